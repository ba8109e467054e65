"""A model with its feature taps, as a training task optimises, wraps and averages it."""

from collections.abc import Sequence

from timm.models import group_parameters
from torch import Tensor, nn

from skd.features import FeatureTap


class TappedModel(nn.Module):
    """A model that returns ``(logits, maps)``, with no maps and no hooks where no layers are asked for.

    It passes on what timm's optimizer factory asks a model: which parameters take no weight decay, and how parameters
    group into layers.
    """

    def __init__(self, model: nn.Module, layers: Sequence[int | str]):
        super().__init__()
        self.body = FeatureTap(model, list(layers)) if layers else model
        self.tapped = bool(layers)
        self.training = model.training

    @property
    def model(self) -> nn.Module:
        return self.body.model if self.tapped else self.body

    def forward(self, images: Tensor) -> tuple[Tensor, list[Tensor]]:
        return self.body(images) if self.tapped else (self.body(images), [])

    def close(self) -> None:
        if self.tapped:
            self.body.close()

    @property
    def _prefix(self) -> str:
        return "body.model." if self.tapped else "body."

    def no_weight_decay(self) -> set[str]:
        names = getattr(self.model, "no_weight_decay", set)()
        return {self._prefix + name for name in names}

    def group_matcher(self, coarse: bool = False):
        matcher = getattr(self.model, "group_matcher", None)
        if matcher is None:
            return {}
        layer_of = group_parameters(self.model, matcher(coarse=coarse), reverse=True)
        last = max(layer_of.values(), default=0)
        prefix = self._prefix
        return lambda name: layer_of.get(name.removeprefix(prefix), last)
