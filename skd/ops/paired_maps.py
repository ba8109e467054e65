"""What the operations on pairs of student and teacher maps share: what they refuse, their outputs, their backward."""

from collections.abc import Sequence

import torch
from torch import Tensor

from skd.ops.stored_gradients import hand_out, stored_dtype

TEACHER_REQUIRES_GRAD = (
    "a teacher map requires grad, but the teacher is frozen and would get none; "
    "pass teacher.detach(), or run the teacher under torch.no_grad()"
)


def check_pairs(students, teachers, scales, needs_gradient, match: str, matches: Sequence[str]) -> None:
    """What a call past :mod:`skd.losses` must not get wrong, for the kernels trust it."""
    if match not in matches:
        raise ValueError(f"match={match!r} is not known; use one of {matches}")
    if not students or not len(students) == len(teachers) == len(scales) == len(needs_gradient):
        raise ValueError("the operation takes equally many students, teachers, scales and needs_gradient, at least one")
    for s, t in zip(students, teachers, strict=True):
        torch._check(s.ndim == 4 and t.ndim == 4, lambda: "maps are [B, C, H, W]")
        for axis in (0, 2, 3):
            torch._check(s.shape[axis] == t.shape[axis], lambda: "student and teacher agree in B, H and W")
        for size in (s.shape[1], t.shape[1], s.shape[2], s.shape[3]):
            torch._check(size > 0, lambda: "only the batch may be empty")


def losses_dtype(students: Sequence[Tensor], teachers: Sequence[Tensor]) -> torch.dtype:
    """float64 if any map is float64, float32 otherwise."""
    return torch.float64 if torch.float64 in [x.dtype for x in (*students, *teachers)] else torch.float32


def empty_gradients(students, teachers, needs_gradient, unbounded: bool = False) -> list[Tensor]:
    """Gradients in the student's own memory order, as the backward of the layer before expects them.

    Args:
        students, teachers: the maps.
        needs_gradient: per layer; an empty tensor stands where none is needed.
        unbounded: whether a gradient may be larger than the maps allow, as with weights of the caller's.
    """
    return [
        torch.empty_like(s, dtype=stored_dtype(s, t, unbounded)) if needed else s.new_empty(0)
        for s, t, needed in zip(students, teachers, needs_gradient, strict=True)
    ]


def save_for_backward(ctx, students, scales, numbers, needs_gradient, backend, gradients) -> None:
    """What :func:`student_gradients` needs, in an autograd context.

    Args:
        ctx: the context.
        students: the maps.
        scales, numbers: per layer, as in :func:`skd.ops.stored_gradients.gradient_scale`.
        needs_gradient: per layer.
        backend: as asked for.
        gradients: stored ones, empty where not needed.
    """
    ctx.set_materialize_grads(False)  # no zeros the size of the maps for outputs that nobody differentiates
    ctx.save_for_backward(*gradients)
    ctx.scales, ctx.numbers, ctx.needs_gradient, ctx.backend = scales, numbers, needs_gradient, backend
    ctx.dtypes = [s.dtype for s in students]


def student_gradients(ctx, upstream: Tensor | None) -> list[Tensor | None]:
    """The students' gradients for the upstream gradient of the losses, ``[L]``, or of their sum."""
    if upstream is None:
        return [None] * len(ctx.numbers)
    gradients = hand_out(ctx.saved_tensors, upstream, ctx.numbers, ctx.scales, ctx.dtypes, ctx.backend)
    return [g if needed else None for g, needed in zip(gradients, ctx.needs_gradient, strict=True)]
