"""The operation behind :func:`skd.spectral_loss` wherever a Fourier transform is needed.

That is for magnitudes, for weights of single bins, and for pooled spectra. Losses, the students' gradients and the
spectra come from one pass over both maps. What needs no transform is :mod:`skd.ops.spectral_align`'s.

``torch.ops.skd.fourier_align`` is registered with ``torch.library``; plain eager calls go around the dispatcher, as in
:mod:`skd.ops.spectral_align`.
"""

import torch
from torch import Tensor

from skd import reference
from skd.ops import backends, extensions
from skd.ops.extensions import map_of
from skd.ops.paired_maps import (
    TEACHER_REQUIRES_GRAD,
    check_pairs,
    empty_gradients,
    losses_dtype,
    save_for_backward,
    student_gradients,
)
from skd.ops.stored_gradients import is_plain_eager, refuse_transforms, stored_scale

MATCHES = ("complex", "mse", "magnitude", "log_magnitude")


def fourier_align(
    students: list[Tensor],
    teachers: list[Tensor],
    bands: list[Tensor],
    scales: list[float],
    match: str,
    focal: float | None,
    spectra: bool,
    backend: str | None,
    reduce: bool,
) -> tuple[Tensor, list[Tensor]]:
    """The losses of a list of layers, each times its scale, or their sum; and the pooled magnitudes of both maps.

    Args:
        students: per layer ``[B, Cs, H, W]``.
        teachers: per layer ``[B, Ct, H, W]``, none of which may require grad.
        bands: per layer ``[H, W//2+1]`` in the losses' dtype, on the maps' device; or an empty list for none.
        scales: per layer the factor of its loss.
        match: one of ``MATCHES``.
        focal: exponent of the focal weights, or None.
        spectra: whether the magnitudes are wanted.
        backend: a name, or None for the best.
        reduce: whether the losses are added up.

    Returns:
        ``[L]``, or a scalar if reduced, in float32, or in float64 if any map is float64; and per layer
        ``[2, H, W//2+1]`` of the same dtype, the student's magnitudes and the teacher's, or an empty list.
    """
    needs_gradient = [torch.is_grad_enabled() and s.requires_grad for s in students]
    arguments = (students, teachers, bands, scales, match, focal, spectra, needs_gradient, backend)
    if is_plain_eager((*students, *teachers, *bands)):
        if True in needs_gradient:
            losses, *pooled = _Eager.apply(arguments, reduce, *students)
        else:
            losses, _, pooled = _forward(*arguments, reduce)
        return losses, pooled
    refuse_transforms((*students, *teachers))
    losses, _, pooled = torch.ops.skd.fourier_align(*arguments)
    return losses.sum() if reduce else losses, pooled


# --- The coefficients, computed once for every backend ---


def numbers_in_mean(match: str, student: Tensor, teacher: Tensor) -> int:
    """What a layer's sum is divided by: its bins, real and imaginary parts, or the numbers in space."""
    batch, channels, height, columns = student.shape
    numbers = batch * min(channels, teacher.shape[1]) * height
    if match == "mse":
        return numbers * columns
    return numbers * (columns // 2 + 1) * (2 if match == "complex" else 1)


def _describe(students, teachers, bands, scales, match, focal, gradients, needs_gradient, spectra) -> list[dict]:
    """The layers as every backend gets them; see :func:`skd.reference.fourier_align`."""
    layers = []
    for i, (student, teacher, gradient) in enumerate(zip(students, teachers, gradients, strict=True)):
        number = numbers_in_mean(match, student, teacher)
        layers.append(
            {
                "student": student,
                "teacher": teacher,
                "gradient": gradient if needs_gradient[i] else None,
                "spectra": spectra[i] if spectra else None,
                "bands": bands[i] if bands else None,
                # Parseval: the mean squared error in space is that of the whole spectrum.
                "match": "complex" if match == "mse" else match,
                "inner_weight": 2.0 if match == "mse" else 1.0,
                "focal": focal,
                "loss_scale": scales[i] / number if number else 0.0,
                "gradient_scale": stored_scale(number, scales[i], gradient.dtype),
            }
        )
    return layers


# --- Forward ---


def _empty_outputs(students, teachers, bands, spectra, needs_gradient, reduce=False):
    dtype = losses_dtype(students, teachers)
    shape = () if reduce and len(students) == 1 else len(students)  # a single loss is the sum already
    losses = torch.empty(shape, dtype=dtype, device=students[0].device)
    gradients = empty_gradients(students, teachers, needs_gradient, unbounded=bool(bands))
    shapes = [(2, s.shape[2], s.shape[3] // 2 + 1) for s in students] if spectra else []
    return losses, gradients, [torch.empty(shape, dtype=dtype, device=losses.device) for shape in shapes]


def _run_reference(layers: list[dict], out: Tensor) -> None:
    for layer, place in zip(layers, out.view(-1), strict=True):
        names = ("student", "teacher", "match", "bands", "focal", "inner_weight", "loss_scale", "gradient_scale")
        loss, gradient, spectra = reference.fourier_align(*(layer[name] for name in names))
        place.copy_(loss)
        for name, values in (("gradient", gradient), ("spectra", spectra)):
            if layer[name] is not None:
                layer[name].copy_(values)


_COMPARE_CODES = {"complex": 0, "magnitude": 1, "log_magnitude": 2}


def describe(extension, layer: dict):
    """A layer as the extension's ``FourierLayer``."""

    def address(x: Tensor | None) -> int:
        return 0 if x is None else x.data_ptr()

    gradient = layer["gradient"]
    return extension.FourierLayer(
        map_of(extension, layer["student"]),
        map_of(extension, layer["teacher"]),
        None if gradient is None else map_of(extension, gradient),
        address(layer["bands"]),
        address(layer["spectra"]),
        _COMPARE_CODES[layer["match"]],
        layer["focal"] or 0.0,
        layer["inner_weight"],
        layer["loss_scale"],
        layer["gradient_scale"],
    )


def _run_cpu(layers: list[dict], out: Tensor) -> None:
    extension = backends.load("cpu")
    described = [describe(extension, layer) for layer in layers]
    extension.fourier_align(described, torch.get_num_threads(), out.data_ptr(), out.dtype == torch.float64)


def _run_cuda(layers: list[dict], out: Tensor) -> None:
    extension = backends.load("cuda")
    plan = extension.FourierPlan([describe(extension, layer) for layer in layers])
    with extensions.on(out.device) as (device, stream):
        workspace = torch.empty(plan.workspace_doubles, dtype=torch.float64, device=out.device)
        plan.launch(out.data_ptr(), workspace.data_ptr(), device, stream)


def _run_triton(layers: list[dict], out: Tensor) -> None:
    from skd.kernels import fourier_align as kernel

    kernel.run(layers, out)


# Each fills the gradients and spectra of its layers, and `out`, L numbers.
IMPLEMENTATIONS = {"cuda": _run_cuda, "triton": _run_triton, "cpu": _run_cpu, "reference": _run_reference}


def _forward(students, teachers, bands, scales, match, focal, spectra, needs_gradient, backend, reduce=False):
    losses, gradients, pooled = _empty_outputs(students, teachers, bands, spectra, needs_gradient, reduce)
    layers = _describe(students, teachers, bands, scales, match, focal, gradients, needs_gradient, pooled)
    name = backends.choose(backend, losses.device, IMPLEMENTATIONS, "fourier_align", losses.dtype == torch.float64)
    IMPLEMENTATIONS[name](layers, losses)
    return losses.sum() if reduce and losses.ndim else losses, gradients, pooled


# --- Autograd, in eager mode and registered ---


def _save(ctx, students, teachers, scales, match, needs_gradient, backend, gradients, constants) -> None:
    ctx.mark_non_differentiable(*constants)
    numbers = [numbers_in_mean(match, s, t) for s, t in zip(students, teachers, strict=True)]
    save_for_backward(ctx, students, scales, numbers, needs_gradient, backend, gradients)


class _Eager(torch.autograd.Function):
    """The students come once more as arguments of their own, where autograd looks for what it differentiates."""

    @staticmethod
    def forward(ctx, arguments, reduce, *_):
        students, teachers, _, scales, match, _, _, needs_gradient, backend = arguments
        losses, gradients, pooled = _forward(*arguments, reduce)
        _save(ctx, students, teachers, scales, match, needs_gradient, backend, gradients, pooled)
        return losses, *pooled

    @staticmethod
    def backward(ctx, upstream, *_):
        return None, None, *student_gradients(ctx, upstream)


torch.library.define(
    "skd::fourier_align",
    "(Tensor[] students, Tensor[] teachers, Tensor[] bands, float[] scales, str match, float? focal, bool spectra,"
    " bool[] needs_gradient, str? backend) -> (Tensor, Tensor[], Tensor[])",
)


def _check(students, teachers, bands, scales, match, needs_gradient) -> None:
    check_pairs(students, teachers, scales, needs_gradient, match, MATCHES)
    if bands and len(bands) != len(students):
        raise ValueError("fourier_align takes bands for every layer or for none")
    for student, weights in zip(students, bands, strict=False):
        shape = (student.shape[2], student.shape[3] // 2 + 1)
        torch._check(weights.shape == shape, lambda: "bands are [H, W//2+1]")
        torch._check(weights.dtype == losses_dtype(students, teachers), lambda: "bands have the losses' dtype")


@torch.library.impl("skd::fourier_align", "CompositeExplicitAutograd")
def _registered_forward(students, teachers, bands, scales, match, focal, spectra, needs_gradient, backend):
    _check(students, teachers, bands, scales, match, needs_gradient)
    return _forward(students, teachers, bands, scales, match, focal, spectra, needs_gradient, backend)


@torch.library.register_fake("skd::fourier_align")
def _fake(students, teachers, bands, scales, match, focal, spectra, needs_gradient, backend):
    _check(students, teachers, bands, scales, match, needs_gradient)
    return _empty_outputs(students, teachers, bands, spectra, needs_gradient)


def _setup_context(ctx, inputs, output):
    students, teachers, bands, scales, match, _, _, needs_gradient, backend = inputs
    if any(t.requires_grad for t in (*teachers, *bands)):
        raise ValueError(TEACHER_REQUIRES_GRAD)
    _, gradients, pooled = output
    _save(ctx, students, teachers, scales, match, needs_gradient, backend, gradients, (*gradients, *pooled))
    ctx.bands = len(bands)


def _registered_backward(ctx, upstream, *_):
    layers = len(ctx.numbers)
    return student_gradients(ctx, upstream), [None] * layers, [None] * ctx.bands, *[None] * 6


torch.library.register_autograd("skd::fourier_align", _registered_backward, setup_context=_setup_context)
