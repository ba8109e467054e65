"""What is measured of the losses on CUDA: the implementations, each on all layers of a case in one call."""

import dataclasses

import torch
from torch import Tensor

from skd.bench import case as cases
from skd.bench import correctness
from skd.bench.case import COPY
from skd.bench.config import MATCHES
from skd.bench.correctness import Errors
from skd.bench.cuda.device import Device
from skd.bench.cuda.workloads import Case, Inputs, Maps, known_shapes, make_inputs, select_cases
from skd.bench.objectives import closed_form, plain_loss, published, skd_loss
from skd.bench.pairs import BASELINE

__all__ = ["ALWAYS", "KINDS", "VARIANTS", "Run", "known_shapes", "make_inputs", "select_cases", "truth"]

COPY_GRAPH = f"{COPY}-graph"

KINDS = tuple(MATCHES)
"""What of :data:`skd.bench.config.What` this is."""


@dataclasses.dataclass(frozen=True)
class Variant(cases.Variant):
    """One implementation.

    Attributes:
        graph: forward and backward are captured in a CUDA graph and replayed.
        first: whether it belongs to the first look at a case, or to the second, which takes longer.
    """

    graph: bool = False
    first: bool = False

    @property
    def is_copy(self) -> bool:
        return self.build is None


_NO_TRANSFORM, _TRANSFORM = MATCHES["align"], MATCHES["magnitude"]

VARIANTS = (
    Variant(BASELINE, plain_loss(published), nchw=True, first=True),
    Variant(COPY, None, first=True),
    Variant(COPY_GRAPH, None, graph=True, first=True),
    Variant("skd-cuda", skd_loss("cuda"), backend="cuda", first=True),
    Variant("skd-cuda-graph", skd_loss("cuda"), backend="cuda", graph=True, first=True),
    Variant("skd-triton", skd_loss("triton"), backend="triton", first=True),
    Variant("skd-triton-graph", skd_loss("triton"), backend="triton", graph=True, first=True),
    Variant("skd-reference", skd_loss("reference"), backend="reference"),
    Variant("published", plain_loss(published)),
    Variant("published-nchw-graph", plain_loss(published), nchw=True, graph=True),
    Variant("closed-form", plain_loss(closed_form), only=_NO_TRANSFORM),
    Variant("closed-form-graph", plain_loss(closed_form), graph=True, only=_NO_TRANSFORM),
    Variant("closed-form-compile", plain_loss(closed_form, True), compiled=True, only=_NO_TRANSFORM),
    Variant("closed-form-compile-graph", plain_loss(closed_form, True), compiled=True, graph=True, only=_NO_TRANSFORM),
    Variant("published-compile", plain_loss(published, compiled=True), compiled=True),
    *(
        Variant(f"skd-{name}-spectra", skd_loss(name, spectra=True), backend=name, only=_TRANSFORM)
        for name in ("cuda", "triton")
    ),
)
"""Every implementation that is measured.

``published-nchw``: the published form on contiguous NCHW maps, the baseline. ``published``, ``closed-form``: the plain
forms of :mod:`skd.reference` in eager PyTorch, layer by layer, on maps of the case's memory orders; ``-compile``: the
same under ``torch.compile``, all layers in one graph. ``skd-...``: :func:`skd.spectral_loss` with that backend.
``-graph``: captured and replayed; ``-spectra``: with ``return_spectra``, for the losses that take a transform.
``copy``: the floor, a fresh copy of half of the bytes to move, read once and written once.
"""

ALWAYS = (BASELINE, COPY, COPY_GRAPH)
"""What every ratio and share refers to; measured together with whatever is asked for."""


Truth = tuple[float, list[Tensor]]


def truth(case: Case, inputs: Inputs, device: Device) -> Truth:
    """Loss and gradients of the first set of maps in float64, by the published form with its Fourier transforms."""
    maps, upstream = inputs.sets[0], case.upstream_gradient().to(device.torch_device)
    return correctness.truth_of_layers(maps.students, maps.teachers, case.match, upstream)


class Run:
    """A variant on the inputs of a case, ready to be called; the k-th call of a sample works on set k of the maps."""

    def __init__(self, variant: Variant, case: Case, inputs: Inputs, device: Device):
        self.variant = variant
        self._sets: list[Maps] = inputs.nchw if variant.nchw else inputs.sets
        self._upstream = case.upstream_gradient().to(device.torch_device)
        self.sets = len(self._sets)
        if variant.build is None:
            amount = case.floor_bytes("both") // 2
            self._sources = [noise(amount, device.torch_device) for _ in self._sets]
        else:
            self._loss = variant.build(case.match)

    def forward(self, index: int) -> tuple[Tensor, list[Tensor]]:
        """The loss, and the student maps it can be differentiated by; for the copy twice the copy."""
        if self.variant.is_copy:
            copied = self._sources[index].clone()
            return copied, [copied]
        maps = self._sets[index]
        # Leaves of this very call: in a graph's capture autograd would wait for the stream an older leaf was made on.
        students = [s.detach().requires_grad_() for s in maps.students] if self.variant.graph else maps.students
        loss = self._loss(students, maps.teachers)
        return loss if isinstance(loss, Tensor) else loss[0], students

    def backward(self, forward: tuple[Tensor, list[Tensor]]) -> list[Tensor]:
        """The gradients of the student maps, asked for where a model's own backward would take them over."""
        loss, students = forward
        if self.variant.is_copy:
            return students
        return list(torch.autograd.grad(loss, students, self._upstream.to(loss.dtype)))

    def both(self, index: int) -> tuple[Tensor, list[Tensor]]:
        """Loss and gradients."""
        forward = self.forward(index)
        gradients = self.backward(forward)
        return forward[0].detach(), gradients

    def errors(self, expected: Truth, results: tuple[Tensor, list[Tensor]]) -> Errors | None:
        """How far what :meth:`both` has returned is from float64; None for the copy."""
        return None if self.variant.is_copy else correctness.compare_layers(expected, *results)

    def with_spectra(self, errors: Errors | None) -> Errors | None:
        """The same with the error of the pooled spectra, the student's and the teacher's in turn, if it has any."""
        if self.variant.is_copy:
            return errors
        maps = self._sets[0]
        result = self._loss(maps.students, maps.teachers)
        if isinstance(result, Tensor):
            return errors
        expected = [
            x for pair in zip(maps.students, maps.teachers, strict=True) for x in correctness.pooled_spectra(*pair)
        ]
        worst = correctness.compare_spectra(expected, [x for pair in result[1] for x in pair]).worst
        return dataclasses.replace(errors, spectra=worst)


def noise(amount: int, device: torch.device) -> Tensor:
    """So many random bytes, which no device copies faster than others as it may do with zeros."""
    numbers = torch.randn(-(-amount // 4), device=device)
    return numbers.view(torch.uint8)[:amount]
