"""Whether a measured implementation computes the right thing: loss, gradient and spectra against float64."""

import dataclasses
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from skd import reference
from skd.bench.objectives import OBJECTIVES, published

TOLERANCES = {"float32": (1e-5, 1e-5), "bfloat16": (1e-5, 2**-7), "float16": (1e-5, 2**-10)}
"""dtype -> relative error of the loss, relative L2 error of the gradient, above which a result is wrong.

Maps of 16 bits are compared with float64 of the same numbers: their loss is as exact as with float32, their gradient is
rounded at most twice, each time by half of the spacing of the dtype.
"""

SPECTRA_TOLERANCE = 1e-5
"""Relative error of a spectrum's worst bin above which it is wrong. Spectra are float32 whatever the maps are."""


@dataclasses.dataclass(frozen=True)
class Errors:
    """Deviations from float64, the gradient's over all its elements together.

    Attributes:
        loss: relative error of the loss.
        gradient: relative L2 error of the gradient, ``|g - g64| / |g64|``.
        cosine: cosine of the angle between the two gradients.
        bias: signed mean deviation, ``sum(g - g64) / sum|g64|``.
        spectra: relative error of the worst bin of the pooled spectra; None if there are none.
    """

    loss: float
    gradient: float
    cosine: float
    bias: float
    spectra: float | None = None

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
        return "" if self.spectra is None else SpectraErrors(self.spectra).verdict(dtype)

    def columns(self) -> dict[str, float | None]:
        """The columns of a row that say how far from float64 the result is."""
        found = {
            "loss_relative_error": _finite(self.loss),
            "gradient_relative_l2": _finite(self.gradient),
            "gradient_cosine": _finite(self.cosine),
            "gradient_bias": _finite(self.bias),
        }
        return found if self.spectra is None else found | SpectraErrors(self.spectra).columns()

    @property
    def shown(self) -> float:
        """The gradient's."""
        return self.gradient


@dataclasses.dataclass(frozen=True)
class SpectraErrors:
    """Deviation of spectra from float64.

    Attributes:
        worst: relative error of the worst bin.
    """

    worst: float

    def verdict(self, dtype: str) -> str:
        """Why the result is wrong, in one sentence; empty if it is right."""
        if self.worst <= SPECTRA_TOLERANCE:
            return ""
        return f"a bin deviates from float64 by {self.worst:.1e} (relative), more than {SPECTRA_TOLERANCE:.1e}"

    def columns(self) -> dict[str, float | None]:
        """The column of a row that says how far from float64 the result is."""
        return {"spectra_relative_error": _finite(self.worst)}

    @property
    def shown(self) -> float:
        """The only figure there is."""
        return self.worst


def _finite(value: float) -> float | None:
    """JSON has no NaN."""
    return value if math.isfinite(value) else None


@dataclasses.dataclass(frozen=True)
class Truth:
    """Loss and upstream-scaled gradient in float64, and the magnitudes pooled over batch and channels."""

    loss: float
    gradient: Tensor
    spectra: tuple[Tensor, Tensor] | None = None


def truth_of_layers(
    students: Sequence[Tensor], teachers: Sequence[Tensor], match: str, upstream: Tensor
) -> tuple[float, list[Tensor]]:
    """The same for the mean over layers: the loss, and the gradient of each student; one layer after the other."""
    total, gradients = 0.0, []
    for student, teacher in zip(students, teachers, strict=True):
        student = student.detach().double().requires_grad_()
        objective = OBJECTIVES[match]
        loss = published(student, teacher.double(), objective, objective.bands(student)) / len(students)
        gradients += torch.autograd.grad(loss, student, upstream.double())
        total += loss.item()
    return total, gradients


def pooled_spectra(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """The orthonormal magnitudes of both maps after pooling, averaged over batch and channels, in float64."""
    width = min(student.shape[1], teacher.shape[1])
    scale = (student.shape[2] * student.shape[3]) ** -0.5
    both = [reference.pool_channels(x.detach().double(), width) for x in (student, teacher)]
    return tuple(reference.spectral_intensity(x, "space", scale).mean(0) for x in both)


def compare(expected: Truth, loss: Tensor, gradient: Tensor, spectra: Sequence[Tensor] | None = None) -> Errors:
    """The errors of a result.

    Args:
        expected: the same in float64.
        loss: the scalar loss, any floating dtype.
        gradient: of the student's shape, any floating dtype and strides.
        spectra: the student's and the teacher's pooled magnitudes, if it has them.
    """
    errors = compare_layers((expected.loss, [expected.gradient]), loss, [gradient])
    if spectra is None:
        return errors
    return dataclasses.replace(errors, spectra=compare_spectra(expected.spectra, spectra).worst)


def compare_spectra(expected: Sequence[Tensor], found: Sequence[Tensor]) -> SpectraErrors:
    """The errors of some spectra: the worst bin of all, relative to what it should be."""
    if [x.shape for x in found] != [x.shape for x in expected]:
        return SpectraErrors(math.nan)
    worst = 0.0
    for x, x64 in zip(found, expected, strict=True):
        # A bin that must be exactly 0 and is not has an infinite error; 0 for 0 has none.
        relative = ((x.double() - x64).abs() / x64).masked_fill((x64 == 0) & (x == 0), 0.0)
        if relative.isnan().any():
            return SpectraErrors(math.nan)
        worst = max(worst, relative.max().item())
    return SpectraErrors(worst)


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
