"""The spectral alignment loss: checks, layers and reduction around the operations."""

import math
from collections.abc import Sequence
from numbers import Real

import torch
from torch import Tensor

from skd.ops import backends
from skd.ops.fourier_align import MATCHES, fourier_align
from skd.ops.maps import check_map
from skd.ops.paired_maps import TEACHER_REQUIRES_GRAD, losses_dtype
from skd.ops.spectral_align import MATCHES as CLOSED_FORMS
from skd.ops.spectral_align import spectral_align

REDUCTIONS = ("mean", "sum", "none")


def spectral_loss(
    student: Tensor | Sequence[Tensor],
    teacher: Tensor | Sequence[Tensor],
    match: str = "complex",
    *,
    weights: float | Sequence[float] | None = None,
    bands: Tensor | Sequence[Tensor] | None = None,
    focal: float | None = None,
    reduction: str = "mean",
    return_spectra: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, list[tuple[Tensor, Tensor]]]:
    """The functional form of :class:`SpectralLoss`; arguments, result and errors are described there."""
    _check_options(match, reduction, bands, focal)
    return _align(student, teacher, match, weights, bands, focal, reduction, return_spectra, backend)


def _align(student, teacher, match, weights, bands, focal, reduction, return_spectra, backend):
    students, teachers = _layers(student, "student"), _layers(teacher, "teacher")
    _check_layers(students, teachers)
    scales = _scales(weights, reduction, len(students))
    if match in CLOSED_FORMS and bands is None and focal is None and not return_spectra:
        return spectral_align(students, teachers, scales, match, backend, reduce=reduction != "none")
    bands = _bands_of_layers(bands, students, teachers)
    options = (match, focal, return_spectra, backend, reduction != "none")
    loss, pooled = fourier_align(students, teachers, bands, scales, *options)
    return (loss, [(x[0], x[1]) for x in pooled]) if return_spectra else loss


class SpectralLoss(torch.nn.Module):
    """SpectralKD's alignment of student and teacher feature maps in the 2-D Fourier domain (arXiv 2412.19055).

    Per layer and with orthonormal transforms S and T of the student and the pooled teacher, on the half spectrum
    ``[H, W//2+1]``:

    - ``match="complex"``, SpectralKD: ``mse(stack(re, im) of S, the same of T)``, computed exactly and without a
      transform (see :func:`skd.reference.spectral_align_closed_form`);
    - ``"magnitude"``: ``mean((|S| - |T|)^2)``, blind to where in the map something is; its gradient is 0 where S is;
    - ``"log_magnitude"``: ``mean((log1p|S| - log1p|T|)^2)``;
    - ``"mse"``: the mean squared error in space, the plain baseline.

    It has no parameters. The wider of two maps is averaged over channels to the narrower, with the windows of
    ``torch.nn.AdaptiveAvgPool1d``.

    Args:
        match: one of the above.
        weights: one factor per layer, or one for all; None for 1. The weight of the whole loss is best given here
            too: a product ``0.2 * loss`` costs another pass over the gradients, a weight given here costs nothing.
        bands: real weights ``[H, W//2+1]`` of the squared differences of the bins, in the order of
            ``torch.fft.rfft2``, for all layers; or a sequence with such weights for each layer. They are buffers that
            follow the module's device. Not for ``"mse"``, which has no bins.
        focal: exponent alpha > 0 of the weights ``|difference|^alpha``, over their maximum in each plane and without
            gradient (Focal Frequency Loss, arXiv 2012.12821). Not for ``"mse"``.
        reduction: ``"mean"`` over layers (SpectralKD), ``"sum"``, or ``"none"`` for one loss per layer, ``[L]``.
        return_spectra: return ``(loss, spectra)``, where ``spectra[l]`` holds the student's and the teacher's
            magnitudes ``|S|`` and ``|T|`` averaged over batch and (pooled) channels, ``[H, W//2+1]`` each, float32
            and without gradient, from the same pass over the maps. For ``"complex"`` and ``"mse"`` this is what makes
            a transform necessary.
        backend: ``"cpu"``, ``"reference"``, ...; None for ``SKD_BACKEND`` and then the best that can serve.

    Raises:
        TypeError: bands that are no floating tensors, weights that are no numbers.
        ValueError: an unknown match, reduction or backend, or options that do not go together.
    """

    def __init__(
        self,
        match: str = "complex",
        *,
        weights: float | Sequence[float] | None = None,
        bands: Tensor | Sequence[Tensor] | None = None,
        focal: float | None = None,
        reduction: str = "mean",
        return_spectra: bool = False,
        backend: str | None = None,
    ):
        super().__init__()
        _check_options(match, reduction, bands, focal)
        backends.requested(backend)
        self.match = match
        self.weights = list(weights) if isinstance(weights, Sequence) else weights
        _scales(weights, reduction, len(weights) if isinstance(weights, Sequence) else 1)
        self.focal = focal
        self.reduction = reduction
        self.return_spectra = return_spectra
        self.backend = backend
        self._one_for_all = isinstance(bands, Tensor)
        given = [bands] if self._one_for_all else bands or []
        self._bands = [f"bands_{layer}" for layer in range(len(given))]
        for name, weights_of_layer in zip(self._bands, given, strict=True):
            self.register_buffer(name, weights_of_layer.detach().clone(), persistent=False)

    @property
    def bands(self) -> Tensor | list[Tensor] | None:
        """The weights of the bins as given, on the module's device."""
        tensors = [getattr(self, name) for name in self._bands]
        return tensors[0] if self._one_for_all else tensors or None

    def forward(
        self, student: Tensor | Sequence[Tensor], teacher: Tensor | Sequence[Tensor]
    ) -> Tensor | tuple[Tensor, list[tuple[Tensor, Tensor]]]:
        """The loss of one pair of maps or of a list of pairs.

        Args:
            student: ``[B, Cs, H, W]`` or a sequence of such maps, one per layer; float32, float64, bfloat16 or
                float16 with any strides.
            teacher: ``[B, Ct, H, W]`` or an equally long sequence; the dtype may differ from the student's. It is
                frozen: a map that requires grad is refused.

        Returns:
            A scalar, or ``[L]`` for ``reduction="none"``, in float32 (float64 if any map is float64); with
            ``return_spectra`` a pair of that and the spectra. An empty batch gives 0. The gradient has the student's
            dtype; there is no second derivative.

        Raises:
            TypeError: a map that is no tensor or not floating.
            ValueError: shapes, devices or numbers of layers that do not go together, or a trainable teacher.
            RuntimeError: a backend asked for by name that cannot serve these tensors.
        """
        options = (self.match, self.weights, self.bands, self.focal, self.reduction, self.return_spectra, self.backend)
        return _align(student, teacher, *options)

    def extra_repr(self) -> str:
        bands = f"{len(self._bands)} layers" if self._bands else None
        options = {
            "weights": self.weights,
            "bands": "one for all layers" if self._one_for_all else bands,
            "focal": self.focal,
            "return_spectra": self.return_spectra or None,
            "backend": self.backend,
        }
        shown = "".join(f", {name}={value!r}" for name, value in options.items() if value is not None)
        return f"match={self.match!r}, reduction={self.reduction!r}{shown}"


def _check_options(match, reduction, bands, focal) -> None:
    if match not in MATCHES:
        raise ValueError(f"match={match!r} is not known; use one of {', '.join(map(repr, MATCHES))}")
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction={reduction!r} is not known; use one of {', '.join(map(repr, REDUCTIONS))}")
    for name, option in (("bands", bands), ("focal", focal)):
        if match == "mse" and option is not None:
            raise ValueError(
                f"{name} weighs the bins of a spectrum and match='mse' compares in space; use match='complex' with it"
            )
    if focal is not None and (not isinstance(focal, Real) or isinstance(focal, bool)):
        raise TypeError(f"focal is an exponent, a number greater than 0, not {focal!r}")
    if focal is not None and not (0 < focal < math.inf):
        raise ValueError(f"focal={focal!r} is no exponent; use a number greater than 0, or None for no focal weights")
    for weights in [bands] if isinstance(bands, Tensor) else bands or []:
        if not isinstance(weights, Tensor) or not weights.is_floating_point():
            shown = weights.dtype if isinstance(weights, Tensor) else type(weights).__name__
            raise TypeError(f"bands must be floating tensors [H, W//2+1], or a sequence of them, not {shown}")
        if weights.ndim != 2:
            raise ValueError(f"bands are [H, W//2+1], one weight per bin; got shape {tuple(weights.shape)}")
        if weights.requires_grad:
            raise ValueError("bands require grad, but they are constants and would get none; pass bands.detach()")


def _bands_of_layers(bands, students, teachers) -> list[Tensor]:
    if bands is None:
        return []
    if isinstance(bands, Tensor):
        bands = [bands] * len(students)
    if len(bands) != len(students):
        raise ValueError(
            f"bands has {len(bands)} tensors for {len(students)} layers; give one per layer, or one for all"
        )
    for index, (weights, student) in enumerate(zip(bands, students, strict=True)):
        height, columns = student.shape[2:]
        if weights.shape != (height, columns // 2 + 1):
            raise ValueError(
                f"layer {index}: the bands have shape {tuple(weights.shape)}, but maps of {height} x {columns} have "
                f"{height} x {columns // 2 + 1} bins; give bands [H, W//2+1], a sequence of them if layers differ"
            )
        if weights.device != student.device:
            raise ValueError(
                f"layer {index}: the bands are on {weights.device} and the maps on {student.device}; "
                f"move them, or the SpectralLoss that holds them, there"
            )
    dtype = losses_dtype(students, teachers)
    return [weights.to(dtype).contiguous() for weights in bands]


def _scales(weights: float | Sequence[float] | None, reduction: str, count: int) -> list[float]:
    shares = count if reduction == "mean" else 1
    if weights is None:
        return [1.0 / shares] * count
    if isinstance(weights, Real):
        weights = [weights] * count
    if not isinstance(weights, Sequence) or not all(isinstance(weight, Real) for weight in weights):
        raise TypeError(f"weights must be a number or a sequence of numbers, not {weights!r}; they are not learnt")
    if len(weights) != count:
        raise ValueError(f"weights has {len(weights)} numbers for {count} layers; give one per layer, or one for all")
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
    check_map(f"{role} map {index}", x)
    if 0 in x.shape[1:]:
        raise ValueError(f"{role} map {index} has shape {tuple(x.shape)}; only the batch may be empty")
