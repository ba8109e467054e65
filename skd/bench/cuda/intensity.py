"""What is measured of spectral_intensity on CUDA: single maps, and the implementations. There is no backward."""

import dataclasses
import itertools
from typing import ClassVar

import torch
from torch import Tensor

from skd import reference
from skd.bench import correctness, spectral_intensity
from skd.bench.case import COPY
from skd.bench.config import BenchConfig
from skd.bench.correctness import SpectraErrors
from skd.bench.cuda.device import Device
from skd.bench.cuda.losses import ALWAYS, COPY_GRAPH, Variant, noise
from skd.bench.cuda.workloads import in_order
from skd.bench.maps import MapShape, select_shapes
from skd.bench.pairs import BASELINE

__all__ = ["ALWAYS", "KINDS", "VARIANTS", "MapCase", "Run", "known_shapes", "make_inputs", "select_cases", "truth"]

KINDS = ("intensity",)
"""What of :data:`skd.bench.config.What` this is."""

SIZES = ((192, 14, 14), (384, 14, 14), (768, 7, 7), (96, 56, 56))
"""Channels, height and width of single maps: DeiT-Tiny; CaiT-S24 and DeiT-Small; Swin's last stage and its first."""


# --- Cases -------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class MapCase:
    """One map, its memory order (``nchw``, or ``tokens`` behind a class token), its dtype, and the axis."""

    shape: MapShape
    student_order: str
    dtype: str
    axis: str

    operation: ClassVar = "spectral_intensity"
    baseline: ClassVar = BASELINE
    recipe: ClassVar = False
    undivided: ClassVar = True
    student_bytes: ClassVar = 0  # of gradients

    @property
    def name(self) -> str:
        return f"{self.workload}, {self.layout}, {self.dtype}, {self.axis}"

    @property
    def workload(self) -> str:
        return self.shape.name

    @property
    def layers(self) -> tuple[MapShape]:
        return (self.shape,)

    @property
    def kind(self) -> str:
        return self.axis

    match = kind

    @property
    def layout(self) -> str:
        return self.student_order

    teacher_order = layout

    @property
    def batch(self) -> int:
        return self.shape.batch

    @property
    def size(self) -> tuple[int, int, int, int]:
        """``[B, C, H, W]``."""
        return self.shape.batch, self.shape.channels, self.shape.height, self.shape.width

    @property
    def torch_dtype(self) -> torch.dtype:
        return getattr(torch, self.dtype)

    def floor_bytes(self, phase: str) -> int:
        """The map is read once, and next to nothing is written."""
        return 0 if phase == "backward" else self.torch_dtype.itemsize * torch.Size(self.size).numel()

    def with_batch(self, batch: int) -> "MapCase":
        """The same with another batch."""
        return dataclasses.replace(self, shape=dataclasses.replace(self.shape, batch=batch))


def _known(config: BenchConfig) -> list[MapShape]:
    return [MapShape(*size, batch) for batch in config.batches for size in SIZES]


def known_shapes(config: BenchConfig) -> list[str]:
    """The names of the default shapes."""
    return [shape.name for shape in _known(config)]


def select_cases(config: BenchConfig) -> list[MapCase]:
    """The cases a configuration asks for.

    Raises:
        ValueError: a shape that is neither known nor spelt out.
    """
    shapes = select_shapes(config.shapes, _known(config), MapShape)
    orders = dict.fromkeys(layout.partition("<-")[0] for layout in config.layouts)
    axes = spectral_intensity.AXES
    return [MapCase(*options) for options in itertools.product(shapes, orders, config.dtypes, axes)]


# --- Inputs and the truth ----------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Inputs:
    """Sets of the same numbers, as many as a cold cache takes: in the case's memory order, and as contiguous NCHW."""

    sets: list[Tensor]
    nchw: list[Tensor]


def make_inputs(case: MapCase, device: torch.device, sets: int, seed: int = 0) -> Inputs:
    """Random maps with a mean, so that the bin at frequency 0 is no noise."""
    generator = torch.Generator(device).manual_seed(seed)
    x = (torch.randn(case.size, generator=generator, device=device) + 0.25).to(case.torch_dtype)
    own = [in_order(x, case.student_order, prefix=1) for _ in range(sets)]
    return Inputs(own, own if case.layout == "nchw" else [x.clone() for _ in range(sets)])


def truth(case: MapCase, inputs: Inputs, device: Device) -> Tensor:
    """The result in float64; image by image, for a whole batch in float64 need not fit."""
    scale = 1 / (case.shape.channels if case.axis == "channel" else case.shape.height * case.shape.width)
    images = inputs.sets[0].split(1)
    return sum(reference.spectral_intensity(image.double(), case.axis, scale)[0] for image in images) / len(images)


# --- Implementations ---------------------------------------------------------------------------------------------

_eager, _skd = spectral_intensity.eager, spectral_intensity.with_backend

VARIANTS = (
    Variant(BASELINE, _eager(), nchw=True, first=True),
    Variant(COPY, None, first=True),
    Variant(COPY_GRAPH, None, graph=True, first=True),
    Variant("skd-cuda", _skd("cuda"), backend="cuda", first=True),
    Variant("skd-cuda-graph", _skd("cuda"), backend="cuda", graph=True, first=True),
    Variant("skd-triton", _skd("triton"), backend="triton", first=True),
    Variant("skd-triton-graph", _skd("triton"), backend="triton", graph=True, first=True),
    Variant("skd-reference", _skd("reference"), backend="reference"),
    Variant("published", _eager()),
    Variant("published-compile", _eager(compiled=True), compiled=True),
)
"""Every implementation that is measured, by the names that the losses' have: ``published`` is the analysis in eager
PyTorch, ``rfft(x, dim=1).abs().mean(...)`` or ``rfft2`` over space."""


class Run:
    """A variant on the inputs of a case, ready to be called; the k-th call of a sample works on set k of the maps."""

    def __init__(self, variant: Variant, case: MapCase, inputs: Inputs, device: Device):
        self.variant = variant
        self._sets = inputs.nchw if variant.nchw else inputs.sets
        self.sets = len(self._sets)
        if variant.build is None:
            self._sets = [noise(case.floor_bytes("both") // 2, device.torch_device) for _ in self._sets]
        self._function = torch.clone if variant.build is None else variant.build(case.axis)

    def forward(self, index: int) -> Tensor:
        """The intensities; for the copy the copy."""
        with torch.no_grad():
            return self._function(self._sets[index])

    def backward(self, forward: Tensor) -> list[Tensor]:
        """There is none."""
        return []

    def both(self, index: int) -> tuple[Tensor, list[Tensor]]:
        """The intensities, and no gradients."""
        return self.forward(index), []

    def errors(self, expected: Tensor, results: tuple[Tensor, list[Tensor]]) -> SpectraErrors | None:
        """How far what :meth:`both` has returned is from float64; None for the copy."""
        return None if self.variant.is_copy else correctness.compare_spectra([expected], [results[0]])

    def with_spectra(self, errors: SpectraErrors | None) -> SpectraErrors | None:
        """The same, for there is nothing else."""
        return errors
