"""From a model and images to its spectral profile, in one forward per batch and constant memory."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from skd.analysis.entropy import ChannelEntropy
from skd.analysis.profile import SpectralProfile
from skd.features import FeatureTap, block_names
from skd.ops.spectral_intensity import NORMS, intensity_per_image


def analyze(
    model: nn.Module,
    batches: Iterable,
    layers: Sequence[int | str] | None = None,
    *,
    norm: str = "forward",
    entropy: bool = True,
    title: str | None = None,
    data: str = "",
    random_weights: bool = False,
    weights: str = "",
    progress: Callable[[int], None] | None = None,
    backend: str | None = None,
) -> SpectralProfile:
    """Spectral intensity of a model's layers over images (SpectralKD's analysis, arXiv 2412.19055).

    The model runs once per batch, in evaluation mode and without gradients; afterwards every module is in the mode it
    was in. Only sums are kept. They are made image by image, in float64, so that the same maps in other batches give
    the same bits; what a model itself computes may still differ in its last bits between batch sizes.

    Args:
        model: any module whose first argument is a batch of images.
        batches: batches of images ``[B, channels, H, W]``: tensors, or tuples, lists or dicts with the images first;
            one tensor is one batch. They are moved to the model's device.
        layers: as in :class:`skd.FeatureTap`; None means all blocks or stages.
        norm: ``"forward"`` (1/C, as the authors), ``"ortho"``, which does not depend on the width, or ``"backward"``.
        entropy: also count the entropy over channels (:class:`skd.analysis.entropy.ChannelEntropy`).
        title: name of the model in pictures; default its class or timm's name for it.
        data: name of the images in pictures.
        random_weights: whether to say in pictures that the weights are random.
        weights: what to say of the weights otherwise, such as their file.
        progress: called after every batch with the number of images seen so far.
        backend: as in :func:`skd.spectral_intensity`.

    Raises:
        ValueError: no images, a model without blocks, unknown layers or norm, or a map with NaN or infinity, whose
            layer is named.
        TypeError: a batch that holds no tensor of images.
    """
    if norm not in NORMS:
        raise ValueError(f"norm={norm!r} is not known; use one of {', '.join(map(repr, NORMS))}, as in torch.fft")
    sums = None
    with FeatureTap(model, block_names(model) if layers is None else layers) as tap, _evaluating(model):
        for images in _images_of(batches, model):
            _, maps = tap(images)
            if sums is None:
                sums = _Sums(tap.layer_names, [x.shape[1] for x in maps], entropy)
            sums.add(maps, norm, backend)
            del maps
            if progress is not None:
                progress(sums.images)
        names = tuple(tap.layer_names)
    if sums is None:
        raise ValueError("there are no images to analyse: the batches are empty; give at least one image")
    return SpectralProfile(
        layers=names,
        intensity=sums.means(),
        channels=tuple(sums.channels),
        entropy=sums.entropy.bits() if sums.entropy else None,
        images=sums.images,
        norm=norm,
        title=title or _title(model),
        data=data,
        random_weights=random_weights,
        weights=weights,
    )


class _Sums:
    """What is kept between batches: [sum of all layers' bins] numbers and the counts of the entropy."""

    def __init__(self, names: Sequence[str], channels: Sequence[int], entropy: bool):
        self.names, self.channels = list(names), list(channels)
        self.bins = [c // 2 + 1 for c in channels]
        self.total = torch.zeros(sum(self.bins), dtype=torch.float64)
        self.entropy = ChannelEntropy(channels) if entropy else None
        self.images = 0

    def add(self, maps: Sequence[Tensor], norm: str, backend: str | None) -> None:
        for name, channels, x in zip(self.names, self.channels, maps, strict=True):
            if x.shape[1] != channels:
                raise ValueError(f"layer {name!r} has {x.shape[1]} channels here and {channels} in an earlier batch")
        per_layer = [intensity_per_image(x, norm=norm, backend=backend) for x in maps]
        rows = torch.cat(per_layer, dim=1).to("cpu", torch.float64)  # of all layers at once: one wait for a GPU
        if not rows.isfinite().all():
            self._name_the_layer(maps, rows)
        # One image after the other, so that the order of additions is that of the images, whatever the batches.
        for row in rows:
            self.total += row
        if self.entropy is not None:
            self.entropy.add(maps, backend)
        self.images += len(rows)

    def means(self) -> list[Tensor]:
        return [part.clone() for part in (self.total / self.images).split(self.bins)]

    def _name_the_layer(self, maps: Sequence[Tensor], rows: Tensor) -> None:
        for name, x, part in zip(self.names, maps, rows.split(self.bins, dim=1), strict=True):
            if not part.isfinite().all():
                bad = ~x.isfinite().flatten(1).all(1)
                if not bad.any():
                    raise ValueError(f"the spectrum of layer {name!r} overflows; its numbers reach {x.abs().max():.3g}")
                image = self.images + int(bad.nonzero()[0])
                raise ValueError(
                    f"the map of layer {name!r} has NaN or infinity for image {image} (counted from 0); "
                    "look at that image and at the weights up to this layer"
                )


def _images_of(batches: Iterable, model: nn.Module) -> Iterator[Tensor]:
    """The images of every batch that has any, on the model's device."""
    anchor = next(model.parameters(), None)
    if anchor is None:
        anchor = next(model.buffers(), None)
    for batch in [batches] if isinstance(batches, Tensor) else batches:
        images = batch
        if isinstance(batch, Mapping):
            images = next(iter(batch.values()), None)
        elif isinstance(batch, Sequence) and not isinstance(batch, str):
            images = batch[0] if len(batch) else None
        if not isinstance(images, Tensor):
            found = type(batch).__name__ + ("" if images is batch else f" whose first entry is {type(images).__name__}")
            raise TypeError(
                f"a batch to analyse is a tensor of images [B, channels, H, W], or a tuple, list or dict with one "
                f"first; got a {found}"
            )
        if images.dim() != 4:
            raise ValueError(
                f"a batch to analyse holds images [B, channels, H, W]; got a tensor of shape {list(images.shape)}"
            )
        if len(images):
            yield images if anchor is None else images.to(anchor.device, non_blocking=True)


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients; a model may have been in training mode in parts only."""
    training = [module for module in model.modules() if module.training]
    try:
        if training:
            model.eval()
        with torch.no_grad():
            yield
    finally:
        for module in training:
            module.training = True


def _title(model: nn.Module) -> str:
    config = getattr(model, "pretrained_cfg", None)
    return (config.get("architecture") if isinstance(config, dict) else None) or type(model).__name__
