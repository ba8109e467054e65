"""A few fixed images, and what the layers of a model make of them, without disturbing the training of the model."""

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor, nn

from skd.analysis.measure import analyze
from skd.analysis.profile import SpectralProfile
from skd.distill.config import LayerId
from skd.distill.data import DataSource
from skd.distill.distributed import World
from skd.features import FeatureTap, block_names
from skd.reference import pool_channels

MOST_IMAGES, FEWEST_IMAGES = 32, 8
_SHARE = 100
_NORM = "ortho"  # does not depend on the width, so layers of teacher and student compare
_FLOOR = 1e-5  # of the greatest intensity: below it is what float32 rounds away


def probe_images(source: DataSource, world: World, count: int | None = None) -> Tensor:
    """Some test images [count, channels, H, W] on the CPU, spread evenly over all of them; the same in every process.

    The global random generators stay as they are.

    Args:
        source: the images.
        world: the processes.
        count: how many; default a hundredth of the training images, so that looking at them once in an epoch takes far
            less than a hundredth of it, but from 8 to 32.
    """
    if count is None:
        count = min(max(source.train_images // _SHARE, FEWEST_IMAGES), MOST_IMAGES)
    # One of many processes has every so manieth image, and so all classes even where images are sorted by class.
    one_of_many = replace(world, rank=0, size=max(1, source.test_images // count))
    batches, found = [], 0
    with _generators_kept(world.device):
        for images, _ in source.make_test_loader(one_of_many):
            batches.append(images.cpu())
            found += len(images)
            if found >= count:
                break
    return torch.cat(batches)[:count]


@dataclass(frozen=True)
class Layers:
    """Which layers of a model are looked at.

    Attributes:
        names: all blocks or stages of the model, then what else was asked for.
        blocks: how many of them are blocks or stages.
        asked: for every layer asked for its index in ``names``.
    """

    names: list[str]
    blocks: int
    asked: list[int]


def find_layers(model: nn.Module, asked: Sequence[LayerId]) -> Layers:
    """All blocks of a model and the layers ``asked``, which are as in :class:`skd.FeatureTap`, or none.

    Raises:
        ValueError: unknown layers, or neither blocks nor layers.
    """
    names = []
    if asked:
        with FeatureTap(model, list(asked)) as tap:
            names = tap.layer_names
    try:
        blocks = list(dict.fromkeys(block_names(model)))
    except ValueError:  # a model without blocks that could be counted
        if not names:
            raise
        blocks = []
    every = list(dict.fromkeys([*blocks, *names]))
    return Layers(every, len(blocks) or len(every), [every.index(name) for name in names])


def look(model: nn.Module, images: Tensor, names: Sequence[str], data: str = "") -> SpectralProfile:
    """Spectra of layers, scaled with "ortho".

    The model's modes, its weights and the global random generators stay as they are; an autocast does not matter.

    Args:
        model: what :func:`skd.analyze` takes.
        images: [N, channels, H, W]; taken to the model's device and dtype.
        names: of the layers.
        data: what the images are, for pictures.

    Raises:
        ValueError, RuntimeError: as :func:`skd.analyze`, for maps that are not finite above all.
    """
    with undisturbed(model):
        return analyze(model, _at_home(model, images), names, norm=_NORM, entropy=False, data=data)


def spectra_at(
    model: nn.Module, images: Tensor, profile: SpectralProfile, layers: Sequence[int], widths: Sequence[int]
) -> list[Tensor]:
    """Spectra of layers after averaging their channels to fewer, as :class:`skd.SpectralLoss` does it.

    Args:
        model, images, profile: as in :func:`look`, and what it saw.
        layers: indices into the profile.
        widths: n for each of them, at most its channels; where it is equal the spectrum is the profile's.

    Returns:
        [n//2+1] float64 for each.
    """
    spectra = [profile.intensity[layer] for layer in layers]
    wider = [i for i, (layer, width) in enumerate(zip(layers, widths, strict=True)) if profile.channels[layer] > width]
    if wider:
        names = [profile.layers[layers[i]] for i in wider]
        with FeatureTap(model, names) as tap, undisturbed(model):
            pooled = _Pooled(tap, [widths[i] for i in wider])
            found = analyze(pooled, _at_home(model, images), pooled.names, norm=_NORM, entropy=False)
        for i, spectrum in zip(wider, found.intensity, strict=True):
            spectra[i] = spectrum
    return spectra


def spectral_gap(a: Tensor, b: Tensor) -> float:
    """Distance of two spectra S[k] of equal length in decades: the mean over k of ``|log10(a[k] / b[k])|``.

    0 for equal ones, 0.3 where one has twice the intensity of the other at every frequency. Intensities count as at
    least a hundred-thousandth of the greatest of both, so the gap is 5 at most.
    """
    floor = _FLOOR * max(a.max().item(), b.max().item())
    if floor == 0:
        return 0.0
    return (a.clamp(min=floor).log10() - b.clamp(min=floor).log10()).abs().mean().item()


def _at_home(model: nn.Module, images: Tensor) -> Tensor:
    """The images on the model's device and in its dtype."""
    parameter = next((p for p in model.parameters() if p.is_floating_point()), None)
    return images if parameter is None else images.to(parameter)


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """The global random generators are restored afterwards, and what is computed does not depend on autocast."""
    parameter = next(model.parameters(), None)
    device = torch.device("cpu") if parameter is None else parameter.device
    with _generators_kept(device), torch.autocast(device.type, enabled=False):
        yield


@contextmanager
def _generators_kept(device: torch.device) -> Iterator[None]:
    states = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])


class _Pooled(nn.Module):
    """Layers of a model with their channels averaged to fewer, as layers that can be tapped."""

    def __init__(self, tap: FeatureTap, widths: Sequence[int]):
        super().__init__()
        self.tap, self.pools = tap, nn.ModuleList(_Pool(width) for width in widths)
        self.names = [f"pools.{i}" for i in range(len(widths))]

    def forward(self, images: Tensor) -> None:
        _, maps = self.tap(images)
        for pool, x in zip(self.pools, maps, strict=True):
            pool(x)


class _Pool(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.width = width

    def forward(self, x: Tensor) -> Tensor:
        return pool_channels(x if x.dtype == torch.float64 else x.float(), self.width)
