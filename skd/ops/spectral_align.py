"""The operation behind :func:`skd.spectral_loss`: per-layer alignment losses and their gradient in one pass.

``torch.ops.skd.spectral_align`` is registered with ``torch.library`` and is what compilers and tracers see. Plain eager
calls go around the dispatcher, whose Python layers cost more than a small map does; both ways run the same code.
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

MATCHES = ("complex", "mse")


def spectral_align(
    students: list[Tensor],
    teachers: list[Tensor],
    scales: list[float],
    match: str,
    backend: str | None,
    reduce: bool,
) -> Tensor:
    """The losses of a list of layers, each times its scale, or their sum.

    Args:
        students: per layer ``[B, Cs, H, W]``.
        teachers: per layer ``[B, Ct, H, W]``, none of which may require grad.
        scales: per layer the factor of its loss.
        match: one of ``MATCHES``.
        backend: a name, or None for the best.
        reduce: whether the losses are added up.

    Returns:
        ``[L]``, or a scalar if reduced, in float32, or in float64 if any map is float64.
    """
    needs_gradient = [torch.is_grad_enabled() and s.requires_grad for s in students]
    arguments = (students, teachers, scales, match, needs_gradient, backend)
    if is_plain_eager((*students, *teachers)):
        if True in needs_gradient:
            return _Eager.apply(arguments, reduce, *students)
        return _forward(*arguments, reduce)[0]
    refuse_transforms((*students, *teachers))
    losses = torch.ops.skd.spectral_align(*arguments)[0]
    return losses.sum() if reduce else losses


# --- The coefficients, computed once for every backend ---


def row_weight(match: str, columns: int) -> float:
    """Weight of the row sums in loss and gradient (see :func:`skd.reference.spectral_align`)."""
    if match == "mse":
        return 0.0
    return (1.0 if columns % 2 else 2.0) / columns


def numbers_in_mean(match: str, student: Tensor, teacher: Tensor) -> int:
    """What a layer's sum is divided by: the numbers compared, twice for the half spectrum's double weight."""
    batch, channels, height, columns = student.shape
    channels = min(channels, teacher.shape[1])
    return batch * channels * height * (columns if match == "mse" else 4 * (columns // 2 + 1))


# --- Forward ---


def _forward(students, teachers, scales, match, needs_gradient, backend, reduce=False):
    gradients = empty_gradients(students, teachers, needs_gradient)
    layers = []
    for student, teacher, gradient, scale, needed in zip(
        students, teachers, gradients, scales, needs_gradient, strict=True
    ):
        number = numbers_in_mean(match, student, teacher)
        layers.append(
            {
                "student": student,
                "teacher": teacher,
                "gradient": gradient if needed else None,
                "row_weight": row_weight(match, student.shape[3]),
                "loss_scale": scale / number if number else 0.0,
                "gradient_scale": stored_scale(number, scale, gradient.dtype),
            }
        )
    device, dtype = students[0].device, losses_dtype(students, teachers)
    name = backends.choose(backend, device, IMPLEMENTATIONS, "spectral_align", dtype == torch.float64)
    losses = torch.empty(() if reduce else (len(layers),), dtype=dtype, device=device)
    IMPLEMENTATIONS[name](layers, losses)
    return losses, gradients


def _run_reference(layers: list[dict], out: Tensor) -> None:
    losses = []
    for layer in layers:
        coefficients = (layer["row_weight"], layer["loss_scale"], layer["gradient_scale"])
        loss, gradient = reference.spectral_align(layer["student"], layer["teacher"], *coefficients)
        losses.append(loss.to(out.dtype))
        if layer["gradient"] is not None:
            layer["gradient"].copy_(gradient)
    stacked = torch.stack(losses)
    out.copy_(stacked if out.ndim else stacked.sum())


def _run_cpu(layers: list[dict], out: Tensor) -> None:
    extension = backends.load("cpu")
    described = [_describe(extension, layer) for layer in layers]
    in_double = out.dtype == torch.float64
    extension.spectral_align(described, torch.get_num_threads(), out.data_ptr(), in_double, out.ndim == 0)


def _run_cuda(layers: list[dict], out: Tensor) -> None:
    extension = backends.load("cuda")
    described = [_describe(extension, layer) for layer in layers]
    plan = extension.AlignPlan(described, out.ndim == 0)
    with extensions.on(out.device) as (device, stream):
        workspace = torch.empty(plan.workspace_doubles, dtype=torch.float64, device=out.device)
        plan.launch(out.data_ptr(), workspace.data_ptr(), device, stream)


def _run_triton(layers: list[dict], out: Tensor) -> None:
    from skd.kernels import spectral_align as kernel

    kernel.run(layers, out)


def _describe(extension, layer: dict):
    gradient = layer["gradient"]
    return extension.AlignLayer(
        map_of(extension, layer["student"]),
        map_of(extension, layer["teacher"]),
        None if gradient is None else map_of(extension, gradient),
        layer["row_weight"],
        layer["loss_scale"],
        layer["gradient_scale"],
    )


# Each fills the gradients of its layers and `out`, [L] losses or, if it has no dimension, their sum.
IMPLEMENTATIONS = {"cuda": _run_cuda, "triton": _run_triton, "cpu": _run_cpu, "reference": _run_reference}


# --- Autograd, in eager mode and registered ---


def _save(ctx, students, teachers, scales, match, needs_gradient, backend, gradients) -> None:
    numbers = [numbers_in_mean(match, s, t) for s, t in zip(students, teachers, strict=True)]
    save_for_backward(ctx, students, scales, numbers, needs_gradient, backend, gradients)


class _Eager(torch.autograd.Function):
    """The students come once more as arguments of their own, where autograd looks for what it differentiates."""

    @staticmethod
    def forward(ctx, arguments, reduce, *_):
        losses, gradients = _forward(*arguments, reduce)
        _save(ctx, *arguments, gradients)
        return losses

    @staticmethod
    def backward(ctx, upstream):
        return None, None, *student_gradients(ctx, upstream)


torch.library.define(
    "skd::spectral_align",
    "(Tensor[] students, Tensor[] teachers, float[] scales, str match, bool[] needs_gradient, str? backend)"
    " -> (Tensor, Tensor[])",
)


@torch.library.impl("skd::spectral_align", "CompositeExplicitAutograd")
def _registered_forward(students, teachers, scales, match, needs_gradient, backend):
    check_pairs(students, teachers, scales, needs_gradient, match, MATCHES)
    return _forward(students, teachers, scales, match, needs_gradient, backend)


@torch.library.register_fake("skd::spectral_align")
def _fake(students, teachers, scales, match, needs_gradient, backend):
    check_pairs(students, teachers, scales, needs_gradient, match, MATCHES)
    losses = students[0].new_empty(len(students), dtype=losses_dtype(students, teachers))
    return losses, empty_gradients(students, teachers, needs_gradient)


def _setup_context(ctx, inputs, output):
    if any(t.requires_grad for t in inputs[1]):
        raise ValueError(TEACHER_REQUIRES_GRAD)
    ctx.mark_non_differentiable(*output[1])
    _save(ctx, *inputs, output[1])


def _registered_backward(ctx, upstream, _):
    return student_gradients(ctx, upstream), [None] * len(ctx.numbers), None, None, None, None


torch.library.register_autograd("skd::spectral_align", _registered_backward, setup_context=_setup_context)
