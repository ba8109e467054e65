"""Cases of a loss on a student and a teacher map: its maps, its least cost, and a variant that is ready to run.

Roofline. Let S and T be the bytes of the student and teacher maps and D the numbers after pooling (B*C*H*W with the
narrower C). Loss and gradient cannot be had for less than reading S and T once and writing S once, ``2 S + T`` bytes;
the loss alone needs ``S + T``, and the backward alone writes ``S``. In float32 with equal widths that is 12 bytes per
number. What arithmetic comes with it is counted in :mod:`skd.bench.spectral_align` and :mod:`skd.bench.fourier_align`.
"""

import dataclasses
from typing import ClassVar

import torch
from torch import Tensor

from skd.bench import correctness
from skd.bench.case import COPY, Variant, Yardstick
from skd.bench.correctness import Errors, Truth
from skd.bench.maps import Shape, lay_out, split_layout
from skd.bench.objectives import OBJECTIVES, focal_frequency_loss_float64
from skd.bench.timing import PHASES

BASELINE = "published-nchw"
"""The variant all ratios refer to: the published loss in eager PyTorch on contiguous NCHW maps."""

FOCAL_FREQUENCY_LOSS = "focal-frequency-loss"
"""The variant that computes another number than the loss, for the same purpose."""


@dataclasses.dataclass(frozen=True)
class Maps:
    """The inputs of one case: the same numbers in the case's layout and as contiguous NCHW; students require grad."""

    student: Tensor
    teacher: Tensor
    student_nchw: Tensor
    teacher_nchw: Tensor


@dataclasses.dataclass(frozen=True)
class PairTruth(Truth):
    """The same in float64, and that of :data:`FOCAL_FREQUENCY_LOSS` where there are focal weights."""

    focal_frequency: Truth | None = None


class LossCase:
    """What cases of a loss have in common, on the CPU and on CUDA: all that their match, dtype and bytes say."""

    match: str
    dtype: str
    upstream: float
    student_bytes: int
    teacher_bytes: int

    baseline: ClassVar = BASELINE

    @property
    def operation(self) -> str:
        return "fourier_align" if OBJECTIVES[self.match].has_transform else "spectral_align"

    @property
    def kind(self) -> str:
        return self.match

    @property
    def torch_dtype(self) -> torch.dtype:
        return getattr(torch, self.dtype)

    def floor_bytes(self, phase: str) -> int:
        """The least traffic of ``forward``, ``backward`` or ``both``, in bytes (see the module's text)."""
        read, written = self.student_bytes + self.teacher_bytes, self.student_bytes
        return {"forward": read, "backward": written, "both": read + written}[phase]

    def upstream_gradient(self) -> Tensor:
        """What arrives at the loss in backward.

        float16 gets a gradient scaler's factor, 2**16, without which its gradients are below the least float16 number.
        """
        return torch.tensor(self.upstream * (65536.0 if self.dtype == "float16" else 1.0))


@dataclasses.dataclass(frozen=True)
class PairCase(LossCase):
    """One configuration of inputs of a loss; see :class:`skd.bench.case.Case`."""

    shape: Shape
    layout: str
    dtype: str
    match: str = "complex"
    upstream: float = 1.0

    phases: ClassVar = PHASES
    floor: ClassVar = COPY

    @property
    def name(self) -> str:
        return f"{self.shape.name}, {self.layout}, {self.dtype}, {self.match}"

    @property
    def yardsticks(self) -> tuple[Yardstick, ...]:
        least = None
        if OBJECTIVES[self.match].match in ("magnitude", "log_magnitude"):
            # The least that is good enough; the goal is 15.
            least = 10.0 if self.shape.height <= 16 else 5.0
        ours = Yardstick("skd-cpu", BASELINE, least), Yardstick("skd-reference", BASELINE)
        return (*ours, Yardstick("skd-cpu", FOCAL_FREQUENCY_LOSS)) if OBJECTIVES[self.match].focal else ours

    def columns(self) -> dict[str, object]:
        shape = self.shape
        return {
            "match": self.match,
            "student_channels": shape.student,
            "teacher_channels": shape.teacher,
            "height": shape.height,
            "width": shape.width,
            "batch": shape.batch,
        }

    @property
    def student_bytes(self) -> int:
        shape = self.shape
        return shape.batch * shape.student * shape.height * shape.width * self.torch_dtype.itemsize

    @property
    def teacher_bytes(self) -> int:
        return self.student_bytes // self.shape.student * self.shape.teacher

    def make_inputs(self, seed: int = 0) -> Maps:
        shape = self.shape
        generator = torch.Generator().manual_seed(seed)

        def normal(channels: int, mean: float) -> Tensor:
            size = (shape.batch, channels, shape.height, shape.width)
            return (torch.randn(size, generator=generator) + mean).to(self.torch_dtype)

        # Means that differ make row sums of d count: the Fourier coefficients at kx=0 are not lost in the noise.
        student, teacher = normal(shape.student, 0.0), normal(shape.teacher, 0.25)
        orders = split_layout(self.layout)
        student_map, teacher_map = lay_out(student, orders[0], prefix=1), lay_out(teacher, orders[1])
        return Maps(student_map.requires_grad_(), teacher_map, student.requires_grad_(), teacher)

    def truth(self, inputs: Maps) -> PairTruth:
        student, teacher, upstream = inputs.student_nchw, inputs.teacher_nchw, self.upstream_gradient()
        loss, (gradient,) = correctness.truth_of_layers([student], [teacher], self.match, upstream)
        objective = OBJECTIVES[self.match]
        spectra = correctness.pooled_spectra(student, teacher) if objective.has_transform else None
        focal_frequency = None
        if objective.focal is not None:
            leaf = student.detach().double().requires_grad_()
            other = focal_frequency_loss_float64(leaf, teacher, objective)
            focal_frequency = Truth(other.item(), *torch.autograd.grad(other, leaf, upstream.double()))
        return PairTruth(loss, gradient, spectra, focal_frequency)

    def run(self, variant: Variant, inputs: Maps) -> "PairRun":
        return PairRun(variant, self, inputs)

    def errors(self, expected: PairTruth, variant: Variant, forward: Tensor | tuple, backward: Tensor) -> Errors | None:
        if variant.name == COPY:
            return None
        if variant.name == FOCAL_FREQUENCY_LOSS:
            return correctness.compare(expected.focal_frequency, forward, backward)
        if isinstance(forward, Tensor):
            return correctness.compare(expected, forward, backward)
        loss, [spectra] = forward
        return correctness.compare(expected, loss, backward, spectra)

    def quick(self) -> "PairCase":
        return dataclasses.replace(self, shape=dataclasses.replace(self.shape, batch=max(1, self.shape.batch // 8)))


class PairRun:
    """A variant on the maps of a case, ready to be called and timed."""

    def __init__(self, variant: Variant, case: PairCase, maps: Maps):
        self.variant = variant
        self._upstream = case.upstream_gradient()
        if variant.build is None:
            # Half of the bytes are read and half are written; the copy is a fresh tensor, as a gradient is.
            source = torch.zeros(case.floor_bytes("both") // 2, dtype=torch.uint8)
            self._loss = lambda _student, _teacher: source.clone()
        else:
            self._loss = variant.build(case.match)
        self._student = maps.student_nchw if variant.nchw else maps.student
        self._teacher = maps.teacher_nchw if variant.nchw else maps.teacher

    def forward(self) -> Tensor | tuple:
        """The loss, or the loss and the spectra (for the copy: the copy)."""
        return self._loss(self._student, self._teacher)

    def backward(self, forward: Tensor | tuple) -> Tensor:
        """The gradient with respect to the student map, where a model's own backward would take it over.

        It is asked for with ``torch.autograd.grad``: ``loss.backward()`` into a leaf would copy a gradient whose memory
        order is not the leaf's, which no map inside a model does.
        """
        if self.variant.build is None:
            return forward
        loss = forward if isinstance(forward, Tensor) else forward[0]
        (gradient,) = torch.autograd.grad(loss, self._student, self._upstream.to(loss.dtype))
        return gradient
