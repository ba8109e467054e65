"""What is measured of spectral_intensity: shapes, maps and implementations.

Roofline. A map must be read once, and next to nothing is written. A real transform over C channels takes about
2.5 log2 C operations per number, 19 to 24 for C = 192 to 768, the magnitudes about 4 more; over H x W about 19 at 14x14
and 14 at 7x7. That is 5 to 7 operations per byte in float32, so one sum over the map is a floor that a single core does
not quite reach.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

import skd
from skd import reference
from skd.bench import correctness
from skd.bench.case import READ, Variant, Yardstick
from skd.bench.config import BenchConfig
from skd.bench.correctness import SpectraErrors
from skd.bench.maps import MapShape, lay_out, select_shapes

SHAPES = (MapShape(192, 14, 14, 32), MapShape(384, 14, 14, 32), MapShape(768, 7, 7, 32))
"""DeiT-Tiny; CaiT-S24 and DeiT-Small; the last stage of Swin."""

AXES = ("channel", "space")

BASELINE, NUMPY = "eager-nchw", "numpy"
ALWAYS = (BASELINE, READ)


# --- Implementations: axis -> map -> spectrum ---


def eager(compiled: bool = False) -> Callable[[str], Callable[[Tensor], Tensor]]:
    """The plain form; ``torch.compile`` of it."""

    def over_channels(x: Tensor) -> Tensor:
        return torch.fft.rfft(x.float(), dim=1).abs().mean((0, 2, 3)) / x.shape[1]

    def over_space(x: Tensor) -> Tensor:
        return torch.fft.rfft2(x.float()).abs().mean((0, 1)) / (x.shape[2] * x.shape[3])

    def build(axis: str) -> Callable[[Tensor], Tensor]:
        function = over_channels if axis == "channel" else over_space
        return torch.compile(function, dynamic=False, fullgraph=True) if compiled else function

    return build


def _numpy(axis: str) -> Callable[[Tensor], Tensor]:
    def intensity(x: Tensor) -> Tensor:
        array = x.float().numpy()
        whole = np.abs(np.fft.fft(array, axis=1) / array.shape[1]).mean((0, 2, 3))
        return torch.from_numpy(whole)[: array.shape[1] // 2 + 1]

    return intensity


def with_backend(backend: str) -> Callable[[str], Callable[[Tensor], Tensor]]:
    """That of skd."""
    return lambda axis: lambda x: skd.spectral_intensity(x, axis, backend=backend)


VARIANTS = (
    Variant(BASELINE, eager(), nchw=True),
    Variant("eager", eager()),
    Variant("eager-compile", eager(compiled=True), compiled=True),
    Variant(NUMPY, _numpy, nchw=True, only=("channel",)),
    Variant("skd-reference", with_backend("reference"), backend="reference"),
    Variant("skd-cpu", with_backend("cpu"), backend="cpu"),
    Variant(READ, None),
)
"""Every implementation that is measured.

``eager-nchw``: ``torch.fft.rfft(x, dim=1).abs().mean(...)`` (``rfft2`` over space) on contiguous NCHW maps, the
baseline; ``eager``: on maps of the case's layout; ``-compile``: under ``torch.compile``. ``numpy``: the authors'
analysis as it stands, with the full spectrum, on NCHW maps; it has one thread always. ``skd-...``:
:func:`skd.spectral_intensity` with that backend. ``read``: the floor, the sum of the map.
"""


# --- Cases ---


@dataclasses.dataclass(frozen=True)
class Maps:
    """The input of one case: the same numbers in the case's layout and as contiguous NCHW."""

    x: Tensor
    nchw: Tensor


@dataclasses.dataclass(frozen=True)
class IntensityCase:
    """One configuration of inputs; see :class:`skd.bench.case.Case`."""

    shape: MapShape
    layout: str
    dtype: str
    axis: str

    operation: ClassVar = "spectral_intensity"
    phases: ClassVar = ("forward",)
    baseline: ClassVar = BASELINE
    floor: ClassVar = READ

    @property
    def kind(self) -> str:
        return self.axis

    @property
    def name(self) -> str:
        return f"{self.shape.name}, {self.layout}, {self.dtype}, {self.axis}"

    @property
    def yardsticks(self) -> tuple[Yardstick, ...]:
        if self.axis == "space":
            return (Yardstick("skd-cpu", BASELINE),)
        # The least that is good enough; the goals are 6 and 30.
        return Yardstick("skd-cpu", BASELINE, 4.0), Yardstick("skd-cpu", NUMPY, 20.0)

    def columns(self) -> dict[str, object]:
        shape = self.shape
        return {
            "axis": self.axis,
            "student_channels": shape.channels,
            "height": shape.height,
            "width": shape.width,
            "batch": shape.batch,
        }

    def floor_bytes(self, phase: str) -> int:
        shape = self.shape
        return shape.batch * shape.channels * shape.height * shape.width * getattr(torch, self.dtype).itemsize

    def make_inputs(self, seed: int = 0) -> Maps:
        shape = self.shape
        size = (shape.batch, shape.channels, shape.height, shape.width)
        # A mean, so that the bin at frequency 0 is no noise.
        x = torch.randn(size, generator=torch.Generator().manual_seed(seed)) + 0.25
        x = x.to(getattr(torch, self.dtype))
        return Maps(lay_out(x, self.layout, prefix=1), x)

    def truth(self, inputs: Maps) -> Tensor:
        shape = self.shape
        scale = 1 / shape.channels if self.axis == "channel" else 1 / (shape.height * shape.width)
        return reference.spectral_intensity(inputs.nchw.double(), self.axis, scale).mean(0)

    def run(self, variant: Variant, inputs: Maps) -> "ForwardRun":
        function = torch.sum if variant.build is None else variant.build(self.axis)
        return ForwardRun(variant, function, inputs.nchw if variant.nchw else inputs.x)

    def errors(self, expected: Tensor, variant: Variant, forward: Tensor, backward: None) -> SpectraErrors | None:
        return None if variant.name == READ else correctness.compare_spectra([expected], [forward])

    def quick(self) -> "IntensityCase":
        return dataclasses.replace(self, shape=dataclasses.replace(self.shape, batch=max(1, self.shape.batch // 8)))


class ForwardRun:
    """A function of one argument, ready to be called and timed; there is no backward."""

    def __init__(self, variant: Variant, function: Callable, argument):
        self.variant, self._function, self._argument = variant, function, argument

    def forward(self):
        with torch.no_grad():
            return self._function(self._argument)

    def backward(self, forward) -> None:
        return None


def known_shapes() -> Sequence[str]:
    return [shape.name for shape in SHAPES]


def cases(config: BenchConfig, texts: Sequence[str]) -> list[IntensityCase]:
    """The cases a configuration asks for, of shapes that are named by some of the texts."""
    layouts = list(dict.fromkeys(layout.partition("<-")[0] for layout in config.layouts))
    return [
        IntensityCase(shape, layout, dtype, axis)
        for shape in select_shapes(texts, SHAPES, MapShape)
        for axis in AXES
        for dtype in config.dtypes
        for layout in layouts
    ]
