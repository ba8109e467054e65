"""What is measured of skd.analyze: a whole model beside its own forward, and the parts an analysis consists of.

Roofline. What an analysis must do beyond the forward is to read every layer's map once: 24 maps of 0.3 MB per image for
CaiT-S24, while the forward does 9.3 billion multiplications and additions per image: 7 MB beside a second of work.
The shares of time are told twice: as ``analyze`` beyond ``forward``, which is what a user waits for and contains the
machine's noise twice, and as the time of the spectra alone over that of the forward.
"""

import dataclasses
import functools
import importlib.util
from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn

import skd
from skd import reference
from skd.analysis.entropy import ChannelEntropy
from skd.bench import correctness
from skd.bench.case import READ, Share, Variant
from skd.bench.config import BenchConfig
from skd.bench.correctness import SpectraErrors
from skd.bench.spectral_intensity import ForwardRun
from skd.features import FeatureTap, block_names
from skd.ops.spectral_intensity import intensity_per_image

BASELINE = "forward"
ALWAYS = (BASELINE, READ)
MOST = 5.0
"""Percent of the forward that an analysis may take."""


@dataclasses.dataclass(frozen=True)
class Model:
    """Weights, images and the maps that its layers have for them."""

    model: nn.Module
    images: Tensor
    maps: list[Tensor]


# --- Implementations: model -> what is measured ---


def _forward(inputs: Model) -> Tensor:
    return inputs.model(inputs.images)


def _analyze(inputs: Model, entropy: bool) -> list[Tensor]:
    profile = skd.analyze(inputs.model, [inputs.images], entropy=entropy)
    return [*profile.intensity, profile.entropy] if entropy else profile.intensity


def _intensities(inputs: Model) -> list[Tensor]:
    return [intensity_per_image(x).mean(0, dtype=torch.float64) for x in inputs.maps]


def _entropy(inputs: Model) -> Tensor:
    counted = ChannelEntropy([x.shape[1] for x in inputs.maps])
    counted.add(inputs.maps)
    return counted.bits()


def _both(inputs: Model) -> list[Tensor]:
    return [*_intensities(inputs), _entropy(inputs)]


def _read(inputs: Model) -> list[Tensor]:
    return [x.sum() for x in inputs.maps]


def _always(function):
    """A case's variants differ in nothing else."""
    return lambda kind: function


OVER, OF = Share(BASELINE, beyond=True, most=MOST), Share(BASELINE, beyond=False, most=MOST)

VARIANTS = (
    Variant(BASELINE, _always(_forward)),
    Variant("analyze", _always(functools.partial(_analyze, entropy=True)), share=OVER),
    Variant("analyze-no-entropy", _always(functools.partial(_analyze, entropy=False)), share=OVER),
    Variant("intensities", _always(_intensities), share=OF),
    Variant("intensities-and-entropy", _always(_both), share=OF),
    Variant(READ, _always(_read), share=dataclasses.replace(OF, most=None)),
)
"""Everything that is measured.

``forward``: the model on the images, without gradients. ``analyze``: :func:`skd.analyze` with the same images;
``-no-entropy``: with ``entropy=False``. ``intensities``: the spectra of all layers' maps, which lie ready;
``-and-entropy``: their entropy too. ``read``: their sums.
"""


# --- The case ---


@dataclasses.dataclass(frozen=True)
class ModelCase:
    """One model and batch; see :class:`skd.bench.case.Case`."""

    model: str = "cait_s24_224"
    batch: int = 4
    size: int = 224

    operation: ClassVar = "analyze"
    kind: ClassVar = "channel"
    layout: ClassVar = "as the model has it"
    dtype: ClassVar = "float32"
    phases: ClassVar = ("forward",)
    baseline: ClassVar = BASELINE
    floor: ClassVar = READ
    yardsticks: ClassVar = ()

    @property
    def name(self) -> str:
        return f"{self.model} {self.size}x{self.size} B{self.batch}"

    def columns(self) -> dict[str, object]:
        return {"model": self.model, "axis": self.kind, "height": self.size, "width": self.size, "batch": self.batch}

    def floor_bytes(self, phase: str) -> int:
        """One read of all maps."""
        return self._maps_bytes

    @functools.cached_property
    def _maps_bytes(self) -> int:
        with torch.device("meta"):
            model = _create(self.model)
            with FeatureTap(model, block_names(model)) as tap:
                _, maps = tap(torch.empty(self.batch, 3, self.size, self.size))
        return sum(x.numel() * x.element_size() for x in maps)

    def make_inputs(self, seed: int = 0) -> Model:
        with torch.random.fork_rng([]):
            torch.manual_seed(seed)
            model = _create(self.model)
            images = torch.randn(self.batch, 3, self.size, self.size)
        with torch.no_grad(), FeatureTap(model, block_names(model)) as tap:
            _, maps = tap(images)
        return Model(model, images, [x.detach() for x in maps])

    def truth(self, inputs: Model) -> tuple[list[Tensor], Tensor]:
        """The intensities of every layer in float64, and the entropies."""
        maps = [x.double() for x in inputs.maps]
        intensities = [reference.spectral_intensity(x, "channel", 1 / x.shape[1]).mean(0) for x in maps]
        return intensities, _entropy(dataclasses.replace(inputs, maps=maps))

    def run(self, variant: Variant, inputs: Model) -> ForwardRun:
        return ForwardRun(variant, variant.build(self.kind), inputs)

    def errors(self, expected, variant: Variant, forward, backward: None) -> SpectraErrors | None:
        if variant.name in (BASELINE, READ):
            return None
        intensities, entropy = expected
        errors = correctness.compare_spectra(intensities, forward[: len(intensities)])
        if len(forward) == len(intensities) or errors.verdict(self.dtype):
            return errors
        of_entropy = _entropy_error(entropy, forward[-1])
        return errors if of_entropy < ENTROPY_TOLERANCE else SpectraErrors(of_entropy)

    def quick(self) -> "ModelCase":
        return dataclasses.replace(self, batch=1)


ENTROPY_TOLERANCE = 1e-3
"""Relative error above which an entropy is wrong: a number at the edge of a bin may fall to either side of it."""


def _entropy_error(expected: Tensor, found: Tensor) -> float:
    return ((found - expected).abs() / expected).max().item()


def _create(name: str) -> nn.Module:
    import timm

    return timm.create_model(name, pretrained=False).eval()


def known_shapes() -> Sequence[str]:
    return [ModelCase().name]


def cases(config: BenchConfig, texts: Sequence[str]) -> list[ModelCase]:
    """The one case there is.

    Raises:
        ValueError: timm is not installed, or no text is part of its name.
    """
    if importlib.util.find_spec("timm") is None:
        raise ValueError("what='analyze' needs timm, which is not installed: pip install \"skd[train]\"")
    case = ModelCase()
    if unknown := [text for text in texts if text not in case.name]:
        raise ValueError(f"shape {unknown[0]!r} is no part of {case.name!r}, the one model that is analysed")
    return [case]
