"""The operation behind :func:`skd.spectral_loss`: per-layer alignment losses and their gradient in one pass.

Three operators are registered with ``torch.library``:

``skd::spectral_align``
    the losses of a list of layers and, for each student map that needs one, its *stored gradient*: the
    gradient of the scaled loss, computed while the maps are read anyway.
``skd::scale_gradients``
    the backward of the first: stored gradients times the upstream gradient of their layer. Its own backward
    raises, because second derivatives are not implemented.

**Stored gradients.** In float32, float64 and bfloat16 they are the gradient itself, so that an upstream
gradient of 1 leaves nothing to do. float16 has too little range for the factor 1/N of a mean over N numbers:
there they are kept at the size of the difference of the maps, smaller than the gradient's true size by an exact
power of two, and :func:`float16_exponent` is taken back in the float32 factor of the backward.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from skd import reference
from skd.ops import backends

MATCHES = ("complex", "mse")


# --- The coefficients, computed once for every backend ---


def row_weight(match: str, columns: int) -> float:
    """Weight of the row sums in loss and gradient (see :func:`skd.reference.spectral_align`)."""
    if match == "mse":
        return 0.0
    return (1.0 if columns % 2 else 2.0) / columns


def loss_scale(match: str, batch: int, width: int, height: int, columns: int, scale: float) -> float:
    """Factor that turns a layer's sum into ``scale`` times its mean; 0 for an empty layer."""
    numbers = batch * width * height * (columns if match == "mse" else 4 * (columns // 2 + 1))
    return scale / numbers if numbers else 0.0


def float16_exponent(gradient_scale: float) -> int:
    """The k for which ``gradient_scale / 2**k`` is in [1/8, 1/4): float16 gradients are stored that much smaller.

    An element of the unscaled gradient is at most twice the largest difference of two float16 maps, 2 * 131008,
    so a quarter of it never overflows.
    """
    return math.frexp(gradient_scale)[1] + 2 if gradient_scale else 0


def _gradient_scale(match: str, student: Tensor, width: int, scale: float) -> float:
    batch, _, height, columns = student.shape
    return 2.0 * loss_scale(match, batch, width, height, columns, scale)


# --- skd::spectral_align ---

torch.library.define(
    "skd::spectral_align",
    "(Tensor[] students, Tensor[] teachers, float[] scales, str match, bool[] needs_gradient, str? backend)"
    " -> (Tensor, Tensor[])",
)


def _empty_gradients(students: Sequence[Tensor], needs_gradient: Sequence[bool]) -> list[Tensor]:
    """Gradients in the student's own memory order, as the backward of the layer before expects them."""
    return [
        torch.empty_like(s) if needed else s.new_empty(0) for s, needed in zip(students, needs_gradient, strict=True)
    ]


def _losses_dtype(students: Sequence[Tensor], teachers: Sequence[Tensor]) -> torch.dtype:
    return torch.float64 if torch.float64 in {x.dtype for x in (*students, *teachers)} else torch.float32


@torch.library.impl("skd::spectral_align", "CompositeExplicitAutograd")
def _spectral_align(students, teachers, scales, match, needs_gradient, backend):
    gradients = _empty_gradients(students, needs_gradient)
    layers = []
    for student, teacher, gradient, scale, needed in zip(
        students, teachers, gradients, scales, needs_gradient, strict=True
    ):
        width = min(student.shape[1], teacher.shape[1])
        gradient_scale = _gradient_scale(match, student, width, scale)
        layer = {
            "student": student,
            "teacher": teacher,
            "gradient": gradient if needed else None,
            "row_weight": row_weight(match, student.shape[3]),
            "loss_scale": gradient_scale / 2,
            "gradient_scale": gradient_scale,
        }
        if student.dtype == torch.float16:
            layer["gradient_scale"] = math.ldexp(gradient_scale, -float16_exponent(gradient_scale))
        layers.append(layer)
    name = backends.choose(backend, students[0].device, IMPLEMENTATIONS, "spectral_align")
    losses = IMPLEMENTATIONS[name](layers)
    return losses.to(_losses_dtype(students, teachers)), gradients


def _run_reference(layers: list[dict]) -> Tensor:
    losses = []
    for layer in layers:
        coefficients = (layer["row_weight"], layer["loss_scale"], layer["gradient_scale"])
        loss, gradient = reference.spectral_align(layer["student"], layer["teacher"], *coefficients)
        losses.append(loss.double() if loss.device.type == "cpu" else loss)
        if layer["gradient"] is not None:
            layer["gradient"].copy_(gradient)
    return torch.stack(losses)


def _run_cpu(layers: list[dict]) -> Tensor:
    extension = backends.load("cpu")
    described = [
        extension.AlignLayer(
            student=_map(extension, layer["student"]),
            teacher=_map(extension, layer["teacher"]),
            gradient=None if layer["gradient"] is None else _map(extension, layer["gradient"]),
            row_weight=layer["row_weight"],
            loss_scale=layer["loss_scale"],
            gradient_scale=layer["gradient_scale"],
        )
        for layer in layers
    ]
    return torch.tensor(extension.spectral_align(described, torch.get_num_threads()), dtype=torch.float64)


_DTYPE_CODES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}


def _map(extension, x: Tensor):
    return extension.Map(x.data_ptr(), _DTYPE_CODES[x.dtype], x.shape, x.stride())


IMPLEMENTATIONS = {"cpu": _run_cpu, "reference": _run_reference}


@torch.library.register_fake("skd::spectral_align")
def _spectral_align_fake(students, teachers, scales, match, needs_gradient, backend):
    losses = students[0].new_empty(len(students), dtype=_losses_dtype(students, teachers))
    return losses, _empty_gradients(students, needs_gradient)


# --- skd::scale_gradients: the backward ---

torch.library.define(
    "skd::scale_gradients",
    "(Tensor[] stored, Tensor upstream, SymInt[] widths, float[] scales, str match) -> Tensor[]",
)


def _factors(stored, upstream, widths, scales, match) -> Tensor:
    """What each layer's stored gradient is multiplied with: the upstream gradient, float16 exponents undone."""
    if all(g.dtype != torch.float16 for g in stored):
        return upstream
    exponents = [
        float16_exponent(_gradient_scale(match, g, width, scale)) if g.dtype == torch.float16 and g.numel() else 0
        for g, width, scale in zip(stored, widths, scales, strict=True)
    ]
    # ldexp of a float64: exact for every exponent a float can have.
    powers = torch.tensor([math.ldexp(1.0, k) for k in exponents], dtype=torch.float64)
    return upstream.double() * powers.to(upstream.device)


@torch.library.impl("skd::scale_gradients", "CompositeExplicitAutograd")
def _scale_gradients(stored, upstream, widths, scales, match):
    outputs = [torch.empty_like(g) for g in stored]
    _scale_into(stored, outputs, _factors(stored, upstream, widths, scales, match))
    return outputs


def _scale_into(stored: Sequence[Tensor], outputs: Sequence[Tensor], factors: Tensor) -> None:
    if factors.device.type == "cpu":
        # Reading a CPU tensor costs no synchronisation, so an upstream gradient of 1 costs nothing at all. A
        # Python number keeps its precision in a product with 16-bit numbers, where a 0-dim tensor is rounded first.
        for gradient, out, factor in zip(stored, outputs, factors.tolist(), strict=True):
            if factor != 1.0:
                torch.mul(gradient, factor, out=out)
            elif out is not gradient:
                out.copy_(gradient)
        return
    for gradient, out, factor in zip(stored, outputs, factors.unbind(), strict=True):
        wide = torch.promote_types(gradient.dtype, torch.float32)
        out.copy_(gradient.to(wide) * factor.to(wide))


@torch.library.register_fake("skd::scale_gradients")
def _scale_gradients_fake(stored, upstream, widths, scales, match):
    return [torch.empty_like(g) for g in stored]


_NO_DOUBLE_BACKWARD = (
    "skd.spectral_loss has no second derivative; compute it with "
    "skd.reference.spectral_align_closed_form if a gradient penalty needs one"
)


class _OnceDifferentiable(torch.autograd.Function):
    """Passes gradients on and refuses to be differentiated, whatever the upstream gradient was."""

    @staticmethod
    def forward(ctx, *gradients):
        return tuple(g.view_as(g) for g in gradients)

    @staticmethod
    def backward(ctx, *_):
        raise RuntimeError(_NO_DOUBLE_BACKWARD)


def _graph_is_kept() -> bool:
    """Whether backward may run again (retain_graph); True if this PyTorch cannot tell."""
    keeps = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", None)
    return True if keeps is None else keeps()


TEACHER_REQUIRES_GRAD = (
    "a teacher map requires grad, but the teacher is frozen and would get none; "
    "pass teacher.detach(), or run the teacher under torch.no_grad()"
)


def _setup_context(ctx, inputs, output):
    students, teachers, scales, match, needs_gradient, _ = inputs
    if any(t.requires_grad for t in teachers):
        raise ValueError(TEACHER_REQUIRES_GRAD)
    _, gradients = output
    ctx.mark_non_differentiable(*gradients)
    ctx.set_materialize_grads(False)  # no zeros the size of the maps for outputs that nobody differentiates
    ctx.save_for_backward(*gradients)
    ctx.widths = [min(s.shape[1], t.shape[1]) for s, t in zip(students, teachers, strict=True)]
    ctx.scales, ctx.match, ctx.needs_gradient = scales, match, needs_gradient


def _backward(ctx, upstream, _):
    stored = list(ctx.saved_tensors)
    nothing = [None] * len(stored)
    if upstream is None:
        return nothing, nothing, None, None, None, None
    coefficients = (ctx.widths, ctx.scales, ctx.match)
    eager = type(upstream) is Tensor and type(stored[0]) is Tensor and not torch.compiler.is_compiling()
    with torch.no_grad():
        if eager and not _graph_is_kept():
            # Nothing will read the stored gradients again, so they become the result without a second buffer.
            gradients = [g.detach() for g in stored]
            _scale_into(gradients, gradients, _factors(gradients, upstream, *coefficients))
        else:
            gradients = torch.ops.skd.scale_gradients(stored, upstream, *coefficients)
    if torch.is_grad_enabled():  # create_graph
        gradients = _OnceDifferentiable.apply(*(g.requires_grad_() for g in gradients))
    needed = [g if needs else None for g, needs in zip(gradients, ctx.needs_gradient, strict=True)]
    return needed, nothing, None, None, None, None


torch.library.register_autograd("skd::spectral_align", _backward, setup_context=_setup_context)
