"""Whether a measured implementation computes the right thing: loss and gradient against float64."""

import dataclasses
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from skd import reference
from skd.bench.spectral_align import Case, Maps

TOLERANCES = {"float32": (1e-5, 1e-5), "bfloat16": (1e-5, 2**-7), "float16": (1e-5, 2**-10)}
"""dtype -> relative error of the loss, relative L2 error of the gradient, above which a result is wrong.

Maps of 16 bits are compared with float64 of the same numbers: their loss is as exact as with float32, their gradient is
rounded at most twice, each time by half of the spacing of the dtype.
"""


@dataclasses.dataclass(frozen=True)
class Errors:
    """Deviations from float64, the gradient's over all its elements together.

    Attributes:
        loss: relative error of the loss.
        gradient: relative L2 error of the gradient, ``|g - g64| / |g64|``.
        cosine: cosine of the angle between the two gradients.
        bias: signed mean deviation, ``sum(g - g64) / sum|g64|``.
    """

    loss: float
    gradient: float
    cosine: float
    bias: float

    def verdict(self, dtype: str) -> str:
        """Why the result is wrong, in one sentence; empty if it is right."""
        loss, gradient = TOLERANCES[dtype]
        # An angle whose sine is the L2 tolerance; below 1e-12 the cosine is rounding of float64.
        least_cosine = 1 - max(gradient**2, 1e-12)
        # Written so that a NaN is wrong.
        if not self.loss <= loss:
            return f"the loss deviates from float64 by {self.loss:.1e} (relative), more than {loss:.1e}"
        if not self.gradient <= gradient:
            return f"the gradient deviates from float64 by {self.gradient:.1e} (relative L2), more than {gradient:.1e}"
        if not (self.cosine >= least_cosine and abs(self.bias) <= gradient):
            return f"the gradient is turned (cosine {self.cosine:.9f}) or biased ({self.bias:+.1e}) against float64"
        return ""


@dataclasses.dataclass(frozen=True)
class Truth:
    """Loss and upstream-scaled gradient in float64."""

    loss: float
    gradient: Tensor


def truth(case: Case, maps: Maps) -> Truth:
    """The published form, with its Fourier transforms, in float64."""
    upstream = case.upstream_gradient()
    loss, gradients = truth_of_layers([maps.student_nchw], [maps.teacher_nchw], case.match, upstream)
    return Truth(loss, gradients[0])


def truth_of_layers(
    students: Sequence[Tensor], teachers: Sequence[Tensor], match: str, upstream: Tensor
) -> tuple[float, list[Tensor]]:
    """The same for the mean over layers: the loss, and the gradient of each student; one layer after the other."""
    total, gradients = 0.0, []
    for student, teacher in zip(students, teachers, strict=True):
        student = student.detach().double().requires_grad_()
        loss = reference.spectral_align_published(student, teacher.double(), match) / len(students)
        gradients += torch.autograd.grad(loss, student, upstream.double())
        total += loss.item()
    return total, gradients


def compare(expected: Truth, loss: Tensor, gradient: Tensor) -> Errors:
    """The errors of a result.

    Args:
        expected: from :func:`truth`.
        loss: the scalar loss, any floating dtype.
        gradient: of the student's shape, any floating dtype and strides.
    """
    return compare_layers((expected.loss, [expected.gradient]), loss, [gradient])


def compare_layers(expected: tuple[float, Sequence[Tensor]], loss: Tensor, gradients: Sequence[Tensor]) -> Errors:
    """The errors of a result with a gradient per layer, which count as one long gradient.

    Args:
        expected: from :func:`truth_of_layers`.
        loss: the scalar loss, any floating dtype.
        gradients: of the students' shapes, any floating dtype and strides.
    """
    expected_loss, expected_gradients = expected
    if [g.shape for g in gradients] != [g.shape for g in expected_gradients]:
        return Errors(math.nan, math.nan, math.nan, math.nan)
    found = wanted = deviation = product = drift = size = 0.0
    for gradient, gradient64 in zip(gradients, expected_gradients, strict=True):
        g, g64 = gradient.detach().double().flatten(), gradient64.flatten()
        difference = g - g64
        found += torch.dot(g, g).item()
        wanted += torch.dot(g64, g64).item()
        deviation += torch.dot(difference, difference).item()
        product += torch.dot(g, g64).item()
        drift += difference.sum().item()
        size += g64.abs().sum().item()
    return Errors(
        loss=abs(loss.item() - expected_loss) / abs(expected_loss),
        gradient=math.sqrt(deviation / wanted) if wanted else math.nan,
        cosine=product / (math.sqrt(found) * math.sqrt(wanted)) if found and wanted else math.nan,
        bias=drift / size if size else math.nan,
    )
