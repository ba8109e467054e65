"""The spectral alignment loss: checks, layers and reduction around the operation."""

from collections.abc import Sequence
from numbers import Real

import torch
from torch import Tensor

from skd.ops import backends
from skd.ops.spectral_align import MATCHES, TEACHER_REQUIRES_GRAD, spectral_align

REDUCTIONS = ("mean", "sum", "none")
_FLOATING = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def spectral_loss(
    student: Tensor | Sequence[Tensor],
    teacher: Tensor | Sequence[Tensor],
    match: str = "complex",
    *,
    weights: float | Sequence[float] | None = None,
    bands: Tensor | None = None,
    focal: float | None = None,
    reduction: str = "mean",
    return_spectra: bool = False,
    backend: str | None = None,
) -> Tensor:
    """The functional form of :class:`SpectralLoss`; arguments, result and errors are described there."""
    _check_options(match, reduction, bands, focal, return_spectra)
    return _align(student, teacher, match, weights, reduction, backend)


def _align(student, teacher, match, weights, reduction, backend) -> Tensor:
    students, teachers = _layers(student, "student"), _layers(teacher, "teacher")
    _check_layers(students, teachers)
    scales = _scales(weights, reduction, len(students))
    return spectral_align(students, teachers, scales, match, backend, reduce=reduction != "none")


class SpectralLoss(torch.nn.Module):
    """SpectralKD's alignment of student and teacher feature maps in the 2-D Fourier domain (arXiv 2412.19055).

    Per layer, ``mse(stack(re, im) of rfft2(student), the same of rfft2(pooled teacher))`` with orthonormal
    transforms, computed exactly and without a transform (see :func:`skd.reference.spectral_align_closed_form`).
    It has no parameters. The wider of two maps is averaged over channels to the narrower, with the windows of
    ``torch.nn.AdaptiveAvgPool1d``.

    Args:
        match: ``"complex"`` (SpectralKD) or ``"mse"``, the mean squared error in space as a baseline.
        weights: one factor per layer, or one for all; None for 1. The weight of the whole loss is best given here
            too: a product ``0.2 * loss`` costs another pass over the gradients, a weight given here costs nothing.
        bands, focal, return_spectra: reserved for matches that need a transform; this version refuses them.
        reduction: ``"mean"`` over layers (SpectralKD), ``"sum"``, or ``"none"`` for one loss per layer, ``[L]``.
        backend: ``"cpu"``, ``"reference"``, ...; None for ``SKD_BACKEND`` and then the best that can serve.

    Raises:
        ValueError: an unknown match, reduction or backend, or an option of a later version.
    """

    def __init__(
        self,
        match: str = "complex",
        *,
        weights: float | Sequence[float] | None = None,
        bands: Tensor | None = None,
        focal: float | None = None,
        reduction: str = "mean",
        return_spectra: bool = False,
        backend: str | None = None,
    ):
        super().__init__()
        _check_options(match, reduction, bands, focal, return_spectra)
        backends.requested(backend)
        self.match = match
        self.weights = list(weights) if isinstance(weights, Sequence) else weights
        _scales(weights, reduction, len(weights) if isinstance(weights, Sequence) else 1)
        self.reduction = reduction
        self.backend = backend

    def forward(self, student: Tensor | Sequence[Tensor], teacher: Tensor | Sequence[Tensor]) -> Tensor:
        """The loss of one pair of maps or of a list of pairs.

        Args:
            student: ``[B, Cs, H, W]`` or a sequence of such maps, one per layer; float32, float64, bfloat16 or
                float16 with any strides.
            teacher: ``[B, Ct, H, W]`` or an equally long sequence; the dtype may differ from the student's. It is
                frozen: a map that requires grad is refused.

        Returns:
            A scalar, or ``[L]`` for ``reduction="none"``, in float32 (float64 if any map is float64). An empty
            batch gives 0. The gradient has the student's dtype; there is no second derivative.

        Raises:
            TypeError: a map that is no tensor or not floating.
            ValueError: shapes, devices or numbers of layers that do not go together, or a trainable teacher.
            RuntimeError: a backend asked for by name that cannot serve these tensors.
        """
        return _align(student, teacher, self.match, self.weights, self.reduction, self.backend)

    def extra_repr(self) -> str:
        options = {"weights": self.weights, "backend": self.backend}
        shown = "".join(f", {name}={value!r}" for name, value in options.items() if value is not None)
        return f"match={self.match!r}, reduction={self.reduction!r}{shown}"


def _check_options(match, reduction, bands, focal, return_spectra) -> None:
    if match not in MATCHES:
        raise ValueError(f"match={match!r} is not known; use one of {', '.join(map(repr, MATCHES))}")
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction={reduction!r} is not known; use one of {', '.join(map(repr, REDUCTIONS))}")
    for name, given in (("bands", bands is not None), ("focal", focal is not None), ("return_spectra", return_spectra)):
        if given:
            raise ValueError(f"{name} needs a Fourier transform, which this version of skd does not have; leave it out")


def _scales(weights: float | Sequence[float] | None, reduction: str, count: int) -> list[float]:
    if weights is None or isinstance(weights, Real):
        weights = [1.0 if weights is None else weights] * count
    if not isinstance(weights, Sequence) or not all(isinstance(weight, Real) for weight in weights):
        raise TypeError(f"weights must be a number or a sequence of numbers, not {weights!r}; they are not learnt")
    if len(weights) != count:
        raise ValueError(f"weights has {len(weights)} numbers for {count} layers; give one per layer, or one for all")
    shares = count if reduction == "mean" else 1
    return [float(weight) / shares for weight in weights]


def _layers(maps: Tensor | Sequence[Tensor], role: str) -> list[Tensor]:
    if isinstance(maps, Tensor):
        return [maps]
    if not isinstance(maps, Sequence) or isinstance(maps, str):
        raise TypeError(f"{role} must be a Tensor or a sequence of Tensors, not {type(maps).__name__}")
    if not maps:
        raise ValueError(f"{role} is an empty sequence; give at least one map [B, C, H, W]")
    return list(maps)


def _check_layers(students: list[Tensor], teachers: list[Tensor]) -> None:
    if len(students) != len(teachers):
        raise ValueError(
            f"{len(students)} student maps but {len(teachers)} teacher maps; give one teacher map for each student map"
        )
    for index, (student, teacher) in enumerate(zip(students, teachers, strict=True)):
        _check_map("student", index, student)
        _check_map("teacher", index, teacher)
        s, t = student.shape, teacher.shape
        if s[0] != t[0] or s[2:] != t[2:]:
            raise ValueError(f"layer {index}: {_shape_mismatch(tuple(s), tuple(t))}")
        if teacher.requires_grad:
            raise ValueError(f"layer {index}: {TEACHER_REQUIRES_GRAD}")
        if not students[0].device == student.device == teacher.device:
            raise ValueError(
                f"layer {index}: the student map is on {student.device}, the teacher map on {teacher.device}, and the "
                f"first student map on {students[0].device}; move all maps to one device"
            )


def _shape_mismatch(s: tuple, t: tuple) -> str:
    if s[0] != t[0]:
        return f"the batch sizes differ, student {s} and teacher {t}; feed both one batch"
    return (
        f"the spatial sizes differ, student {s} and teacher {t}; "
        f"pair layers of equal height and width, or interpolate one map first"
    )


def _check_map(role: str, index: int, x: Tensor) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"{role} map {index} is a {type(x).__name__}; give a Tensor [B, C, H, W]")
    if x.dtype not in _FLOATING:
        raise TypeError(f"{role} map {index} is {x.dtype}; convert it to float32, float64, bfloat16 or float16")
    if x.ndim != 4:
        hint = "; skd.tokens_to_map turns tokens [B, N, C] into a map" if x.ndim == 3 else ""
        raise ValueError(f"{role} map {index} has shape {tuple(x.shape)}; give [B, C, H, W]{hint}")
    if 0 in x.shape[1:]:
        raise ValueError(f"{role} map {index} has shape {tuple(x.shape)}; only the batch may be empty")
