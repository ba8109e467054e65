"""Gradients that an operation computes while it reads its maps, kept until the upstream gradient is known.

A *stored gradient* is the gradient of the operation's output itself, so that an upstream gradient of 1 leaves nothing
to do. Only float16 has too little range for the factor 1/N of a mean over N numbers. There it is kept at the size of
the difference of the maps, off by an exact power of two that is taken back in the backward, in the wider factor of the
upstream gradient; and in float32 if the teacher's dtype reaches beyond float16, as the difference then may, or
the caller's own weights are in it.

In an eager backward that cannot run again the stored gradients are scaled in place and become the result: whoever kept
one through ``torch.autograd.graph.saved_tensors_hooks`` sees that happen.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from skd.ops import backends, extensions
from skd.ops.extensions import DTYPE_CODES


def gradient_scale(number: int, scale: float) -> float:
    """What a layer's unscaled gradient is multiplied with: 2 * scale / number, and 0 for an empty layer."""
    return 2.0 * scale / number if number else 0.0


def stored_dtype(student: Tensor, teacher: Tensor, unbounded: bool = False) -> torch.dtype:
    """The dtype a student's gradient is stored in; `unbounded` where the maps do not bound it."""
    if student.dtype == torch.float16 and (unbounded or teacher.dtype != torch.float16):
        return torch.float32
    return student.dtype


def stored_scale(number: int, scale: float, dtype: torch.dtype) -> float:
    """The part of :func:`gradient_scale` that a gradient stored in this dtype holds already."""
    full = gradient_scale(number, scale)
    return math.ldexp(full, -float16_exponent(full)) if dtype == torch.float16 else full


def float16_exponent(full_scale: float) -> int:
    """The k for which ``full_scale / 2**k`` is in [1/8, 1/4).

    An element of the unscaled gradient is at most twice the largest difference of two float16 maps, 2 * 131008, so
    that a quarter of it never overflows.
    """
    return math.frexp(full_scale)[1] + 2 if full_scale else 0


torch.library.define(
    "skd::scale_gradients",
    "(Tensor[] stored, Tensor upstream, SymInt[] numbers, float[] scales, str? backend) -> Tensor[]",
)


@torch.library.impl("skd::scale_gradients", "CompositeExplicitAutograd")
def _scale_gradients(stored, upstream, numbers, scales, backend):
    outputs = [torch.empty_like(g) for g in stored]
    _scale_into(stored, outputs, upstream, _powers(stored, numbers, scales), backend)
    return outputs


@torch.library.register_fake("skd::scale_gradients")
def _scale_gradients_fake(stored, upstream, numbers, scales, backend):
    return [torch.empty_like(g) for g in stored]


def _powers(stored, numbers, scales) -> list[float]:
    """What the upstream gradients are multiplied with: the power of two that a float16 gradient is off by, else 1."""
    if torch.float16 not in {g.dtype for g in stored}:
        return [1.0] * len(stored)
    return [
        math.ldexp(1.0, float16_exponent(gradient_scale(number, scale))) if g.dtype == torch.float16 else 1.0
        for g, number, scale in zip(stored, numbers, scales, strict=True)
    ]


def _scale_into(
    stored: Sequence[Tensor], outputs: Sequence[Tensor], upstream: Tensor, powers: list[float], backend: str | None
) -> None:
    """``outputs[l] = stored[l] * (upstream[l] * powers[l])``, or with one upstream gradient for all; in place or not.

    An output has its stored gradient's strides, without gaps or overlaps, so that both are flat memory.
    """
    if upstream.device.type == "cpu" and backend in (None, "cpu", "reference"):
        return _scale_by_numbers(stored, outputs, upstream, powers)
    upstream = upstream.expand(len(stored))
    in_double = torch.float64 in {g.dtype for g in stored}
    name = backends.choose(backend, upstream.device, SCALE_IMPLEMENTATIONS, "scale_gradients", in_double)
    SCALE_IMPLEMENTATIONS[name](stored, outputs, upstream, powers)


def _scale_by_numbers(stored, outputs, upstream, powers) -> None:
    """On the CPU, where reading a tensor waits for nobody."""
    factors = upstream.tolist() if upstream.ndim else [upstream.item()] * len(stored)
    for gradient, out, factor, power in zip(stored, outputs, factors, powers, strict=True):
        factor *= power
        if factor != 1.0:
            # A number keeps its precision in a product with 16-bit numbers, where a 0-dim tensor is rounded first.
            torch.mul(gradient, factor, out=out)
        elif out is not gradient:
            out.copy_(gradient)


def _scale_with_reference(stored, outputs, upstream, powers) -> None:
    for gradient, out, factor, power in zip(stored, outputs, upstream.unbind(), powers, strict=True):
        wide = torch.promote_types(gradient.dtype, torch.float32)
        out.copy_(gradient.to(wide) * (factor.double() * power).to(wide))


def _scale_with_cuda(stored, outputs, upstream, powers) -> None:
    upstream = upstream.float()
    with extensions.on(upstream.device) as (device, stream):
        described = [
            (g.data_ptr(), out.data_ptr(), DTYPE_CODES[g.dtype], g.numel(), power)
            for g, out, power in zip(stored, outputs, powers, strict=True)
        ]
        backends.load("cuda").scale_gradients(described, upstream.data_ptr(), upstream.stride(0), device, stream)


def _scale_with_triton(stored, outputs, upstream, powers) -> None:
    from skd.kernels import scale_gradients as kernel

    kernel.run(list(stored), list(outputs), upstream.float(), powers)


SCALE_IMPLEMENTATIONS = {
    "cuda": _scale_with_cuda,
    "triton": _scale_with_triton,
    "reference": _scale_with_reference,
}


def is_plain_eager(tensors: Sequence[Tensor]) -> bool:
    """Whether nothing traces, fakes, records or transforms these tensors, so that the dispatcher may be passed by."""
    if (
        torch.compiler.is_compiling()
        or _dispatch_modes() > 0
        or _transforms() is not None
        or _forward_mode_level() >= 0
    ):
        return False
    # The dispatcher would carry out a negation that complex.conj().imag has put off.
    return _PLAIN.issuperset(map(type, tensors)) and True not in [x.is_neg() for x in tensors]


_PLAIN = {Tensor, torch.nn.Parameter}
_dispatch_modes = getattr(torch._C, "_len_torch_dispatch_stack", lambda: 1)
_transforms = getattr(torch._C._functorch, "peek_interpreter_stack", lambda: None)


def _forward_mode_level() -> int:
    return getattr(torch.autograd.forward_ad, "_current_level", -1)


def refuse_transforms(tensors: Sequence[Tensor]) -> None:
    """Raises RuntimeError where a derivative would be missing in silence: forward mode, vmap and torch.func.grad.

    Tensors that :func:`is_plain_eager` holds for need not be asked.
    """
    if torch.compiler.is_compiling():
        return
    plain = "use the plain PyTorch of skd.reference there"
    if _transforms() is not None:
        raise RuntimeError(f"skd's losses do not go through torch.func transforms or batched gradients; {plain}")
    if _forward_mode_level() >= 0 and any(
        torch.autograd.forward_ad.unpack_dual(x).tangent is not None for x in tensors
    ):
        raise RuntimeError(f"skd's losses have no forward-mode derivative; {plain}")


def _graph_is_kept() -> bool:
    """Whether backward may run again (retain_graph); True if this PyTorch cannot tell."""
    keeps = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", None)
    return True if keeps is None else keeps()


class _OnceDifferentiable(torch.autograd.Function):
    """Passes gradients on and refuses to be differentiated, whatever the upstream gradient was."""

    @staticmethod
    def forward(ctx, *gradients):
        return tuple(g.view_as(g) for g in gradients)

    @staticmethod
    def backward(ctx, *_):
        raise RuntimeError(
            "skd's losses have no second derivative; for a gradient penalty use the plain PyTorch of skd.reference"
        )


def hand_out(
    stored: Sequence[Tensor],
    upstream: Tensor,
    numbers: Sequence[int],
    scales: Sequence[float],
    dtypes: Sequence[torch.dtype],
    backend: str | None,
) -> Sequence[Tensor]:
    """The gradients of the students, inside a backward.

    Args:
        stored: what the forward kept; empty tensors where no gradient was needed.
        upstream: ``[L]``, the gradient of the losses, or a scalar for all of them.
        numbers, scales: as in :func:`gradient_scale`, per layer.
        dtypes: the students'.
        backend: as asked for in the forward.
    """
    if torch.is_grad_enabled():  # create_graph
        with torch.no_grad():
            gradients = hand_out(stored, upstream, numbers, scales, dtypes, backend)
        return _OnceDifferentiable.apply(*(g.detach().requires_grad_() for g in gradients))
    if type(upstream) is Tensor and is_plain_eager(stored) and not _graph_is_kept():
        # Nothing will read the stored gradients again, so they become the result without a second buffer.
        gradients = stored
        _scale_into(gradients, gradients, upstream, _powers(gradients, numbers, scales), backend)
    else:
        refuse_transforms(())
        gradients = torch.ops.skd.scale_gradients(stored, upstream.expand(len(stored)), numbers, scales, backend)
    return [g if g.dtype == dtype else g.to(dtype) for g, dtype in zip(gradients, dtypes, strict=True)]
