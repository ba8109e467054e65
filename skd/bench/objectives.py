"""What a loss compares, by the names of :data:`skd.bench.config.MATCHES`, and its plain forms in PyTorch."""

import dataclasses
import functools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from skd import reference


@dataclasses.dataclass(frozen=True)
class Objective:
    """Options of :func:`skd.spectral_loss`.

    Attributes:
        match: its ``match``.
        banded: whether every bin has a weight.
        focal: exponent of the focal weights.
    """

    match: str
    banded: bool = False
    focal: float | None = None

    def bands(self, student: Tensor) -> Tensor | None:
        """The weights of the bins of a map, made once: from 1 at frequency 0 down to about 0.4."""
        return _bands(student.shape[2], student.shape[3], student.device) if self.banded else None

    @property
    def has_transform(self) -> bool:
        return self.banded or self.focal is not None or self.match not in ("complex", "mse")


OBJECTIVES = {
    "complex": Objective("complex"),
    "mse": Objective("mse"),
    "magnitude": Objective("magnitude"),
    "log_magnitude": Objective("log_magnitude"),
    "complex+bands": Objective("complex", banded=True),
    "complex+focal": Objective("complex", focal=1.0),
}


@functools.lru_cache(maxsize=8)
def _bands(height: int, width: int, device: torch.device) -> Tensor:
    down = torch.fft.fftfreq(height).abs()[:, None]
    across = torch.fft.rfftfreq(width)[None, :]
    return (1 / (1 + 2 * (down.square() + across.square()).sqrt())).to(device)


# --- Plain forms: a pair of maps, the objective, the weights of the bins -> the loss ---


def published(student: Tensor, teacher: Tensor, objective: Objective, bands: Tensor | None) -> Tensor:
    """The definition, with its Fourier transforms."""
    if not objective.has_transform:
        return reference.spectral_align_published(student, teacher, objective.match)
    return reference.fourier_align_published(student, teacher, objective.match, bands, objective.focal)


def closed_form(student: Tensor, teacher: Tensor, objective: Objective, bands: Tensor | None) -> Tensor:
    """Without a transform, for the objectives that need none."""
    return reference.spectral_align_closed_form(student, teacher, objective.match)


def focal_frequency_loss(student: Tensor, teacher: Tensor, objective: Objective, bands: Tensor | None) -> Tensor:
    """Focal Frequency Loss (arXiv 2012.12821), written from its equations.

    With d the difference of the full 2-D spectra (orthonormal) and alpha the exponent::

        w = |d|^alpha / max |d|^alpha over a plane, detached        loss = mean of w |d|^2

    It counts every bin of the whole spectrum, where ``match="complex"`` counts those of the half spectrum, real and
    imaginary parts apart: the same work for another number.
    """
    s, t = _pooled(student.float(), teacher.float())
    difference = torch.fft.fft2(s, norm="ortho") - torch.fft.fft2(t, norm="ortho")
    squared = difference.real.square() + difference.imag.square()
    weight = squared.detach().pow(objective.focal / 2)
    weight = (weight / weight.amax((-2, -1), keepdim=True)).nan_to_num(0.0)
    return (weight * squared).mean()


def focal_frequency_loss_float64(student: Tensor, teacher: Tensor, objective: Objective) -> Tensor:
    """The same number in float64 from the half spectrum, whose inner columns stand for two; differentiable."""
    s, t = _pooled(student.double(), teacher.double())
    difference = reference.half_spectrum(s - t)
    weight = reference.focal_weights(difference, objective.focal)
    weight[..., 1 : (s.shape[-1] + 1) // 2] *= 2
    return (weight * (difference.real.square() + difference.imag.square())).sum() / s.numel()


def _pooled(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    width = min(student.shape[1], teacher.shape[1])
    return reference.pool_channels(student, width), reference.pool_channels(teacher, width)


# --- As variants: match -> the loss of a student and a teacher map, or of a list of each ---


def plain_loss(form: Callable, compiled: bool = False) -> Callable[[str], Callable]:
    """One of the forms above, its mean over the layers of a list."""

    def build(match: str) -> Callable:
        objective = OBJECTIVES[match]

        def mean(students: list[Tensor], teachers: list[Tensor], bands: list[Tensor | None]) -> Tensor:
            total = form(students[0], teachers[0], objective, bands[0])
            for layer in range(1, len(students)):
                total = total + form(students[layer], teachers[layer], objective, bands[layer])
            return total / len(students) if len(students) > 1 else total

        inner = torch.compile(mean, dynamic=False, fullgraph=True) if compiled else mean

        def loss(students: Tensor | Sequence[Tensor], teachers: Tensor | Sequence[Tensor]) -> Tensor:
            if isinstance(students, Tensor):
                students, teachers = [students], [teachers]
            return inner(students, teachers, [objective.bands(s) for s in students])

        return loss

    return build


def skd_loss(backend: str, spectra: bool = False) -> Callable[[str], Callable]:
    """:func:`skd.spectral_loss` with this backend; with ``spectra``, the loss and the pooled spectra."""

    def build(match: str) -> Callable:
        import skd

        objective = OBJECTIVES[match]

        def loss(student: Tensor | Sequence[Tensor], teacher: Tensor | Sequence[Tensor]):
            bands = None
            if objective.banded:
                several = not isinstance(student, Tensor)
                bands = [objective.bands(s) for s in student] if several else objective.bands(student)
            options = {"bands": bands, "focal": objective.focal, "return_spectra": spectra, "backend": backend}
            return skd.spectral_loss(student, teacher, objective.match, **options)

        return loss

    return build
