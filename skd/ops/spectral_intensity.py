"""Spectral intensity: the magnitudes of a map's Fourier transform over channels or space, pooled in one read."""

import torch
from torch import Tensor

from skd import reference
from skd.ops import backends, extensions
from skd.ops.maps import check_map
from skd.ops.stored_gradients import is_plain_eager

AXES = ("channel", "space")
NORMS = ("forward", "ortho", "backward")


def spectral_intensity(
    x: Tensor, axis: str = "channel", *, norm: str = "forward", backend: str | None = None
) -> Tensor:
    """Which frequencies a feature map carries: magnitudes of its Fourier transform, averaged.

    ``axis="channel"`` is SpectralKD's layer-wise analysis (arXiv 2412.19055): the transform runs over the channels and
    its magnitudes are averaged over batch and positions::

        S[k] = mean over b,h,w of | sum_c x[b,c,h,w] exp(-2 pi i k c / C) | * scale        k = 0 .. C//2

    ``axis="space"`` averages ``|rfft2(x)| * scale`` over batch and channels. ``scale`` is 1/n (``norm="forward"``, as
    in the authors' analysis), 1/sqrt(n) (``"ortho"``) or 1 (``"backward"``), n = C or H*W, as in ``torch.fft``.

    Two things to know when comparing. *Width*: with ``"forward"``, channels of white noise with deviation s give about
    ``0.886 s / sqrt(C)`` in every bin but the ends, so a wider model looks weaker; ``"ortho"`` gives 0.886 s for every
    width. *Order*: the channel spectrum depends on the order of the channels, which a network is free to permute; it
    describes this set of weights, and is no property of the function the network computes.

    Args:
        x: ``[B, C, H, W]``, float32, float64, bfloat16 or float16, any strides, read once.
        axis: ``"channel"`` or ``"space"``.
        norm: ``"forward"``, ``"ortho"`` or ``"backward"``.
        backend: ``"cpu"``, ``"reference"``, ...; None for ``SKD_BACKEND`` and then the best that can serve.

    Returns:
        ``[C//2+1]`` or ``[H, W//2+1]`` in float32 (float64 for a float64 map). Deterministic; bins of an all-zero map
        are exactly 0. A map that requires grad gives a result whose backward raises.

    Raises:
        TypeError: ``x`` is no floating tensor.
        ValueError: it is not ``[B, C, H, W]`` with at least one number, or an unknown axis, norm or backend.
        RuntimeError: a backend asked for by name that cannot serve.
    """
    return _intensity(x, axis, norm, backend, per_image=False)


def intensity_per_image(
    x: Tensor, axis: str = "channel", *, norm: str = "forward", backend: str | None = None
) -> Tensor:
    """:func:`spectral_intensity` before the mean over the batch: ``[B, C//2+1]`` or ``[B, H, W//2+1]``.

    An image's numbers do not depend on what else is in its batch.
    """
    return _intensity(x, axis, norm, backend, per_image=True)


def _intensity(x: Tensor, axis: str, norm: str, backend: str | None, per_image: bool) -> Tensor:
    _check(x, axis, norm)
    n = x.shape[1] if axis == "channel" else x.shape[2] * x.shape[3]
    scale = {"forward": 1 / n, "ortho": n**-0.5, "backward": 1.0}[norm]
    if is_plain_eager([x]) and not (x.requires_grad and torch.is_grad_enabled()):
        return _forward(x, axis, scale, backend, per_image)  # around the dispatcher, as in skd.ops.spectral_align
    intensities = torch.ops.skd.spectral_intensity(x, axis, scale, backend)
    return intensities if per_image else _mean_of_images(intensities)


def _mean_of_images(intensities: Tensor) -> Tensor:
    return intensities.mean(0, dtype=torch.float64).to(intensities.dtype)


def _check(x: Tensor, axis: str, norm: str) -> None:
    check_map("the map of spectral_intensity", x)
    if 0 in x.shape:
        raise ValueError(f"the map {tuple(x.shape)} has no numbers; a mean over them does not exist")
    if axis not in AXES:
        raise ValueError(f"axis={axis!r} is not known; use one of {', '.join(map(repr, AXES))}")
    if norm not in NORMS:
        raise ValueError(f"norm={norm!r} is not known; use one of {', '.join(map(repr, NORMS))}, as in torch.fft")


def bins(x: Tensor, axis: str) -> tuple[int, ...]:
    """Shape of an image's intensities."""
    return (x.shape[1] // 2 + 1,) if axis == "channel" else (x.shape[2], x.shape[3] // 2 + 1)


# --- The operation ---


def _run_reference(x: Tensor, axis: str, scale: float, out: Tensor) -> None:
    out.copy_(reference.spectral_intensity(x, axis, scale))


def _run_cpu(x: Tensor, axis: str, scale: float, out: Tensor, per_image: bool = True) -> None:
    dtype, threads = extensions.DTYPE_CODES[x.dtype], torch.get_num_threads()
    data, out_data = x.data_ptr(), out.data_ptr()
    backends.load("cpu").spectral_intensity(
        data, dtype, x.shape, x.stride(), AXES.index(axis), scale, out_data, per_image, threads
    )


def _run_cuda(x: Tensor, axis: str, scale: float, out: Tensor) -> None:
    extension = backends.load("cuda")
    plan = extension.IntensityPlan(extensions.map_of(extension, x), AXES.index(axis), scale, out.data_ptr())
    with extensions.on(out.device) as (device, stream):
        workspace = torch.empty(plan.workspace_doubles, dtype=torch.float64, device=out.device)
        plan.launch(workspace.data_ptr(), device, stream)


def _run_triton(x: Tensor, axis: str, scale: float, out: Tensor) -> None:
    from skd.kernels import spectral_intensity as kernel

    kernel.run(x, axis, scale, out)


# Each fills `out`, [B, *bins] in float32 or, for a float64 map, float64; that for CPUs also averages the images.
IMPLEMENTATIONS = {"cuda": _run_cuda, "triton": _run_triton, "cpu": _run_cpu, "reference": _run_reference}


torch.library.define("skd::spectral_intensity", "(Tensor x, str axis, float scale, str? backend) -> Tensor")


def _empty(x: Tensor, axis: str, per_image: bool = True) -> Tensor:
    shape = (x.shape[0], *bins(x, axis)) if per_image else bins(x, axis)
    if x.dtype in (torch.float32, torch.float64):
        return x.new_empty(shape)  # a third of what torch.empty takes to read its arguments
    return torch.empty(shape, dtype=torch.float32, device=x.device)


def _forward(x, axis, scale, backend, per_image=True):
    in_double = x.dtype == torch.float64
    name = backends.choose(backend, x.device, IMPLEMENTATIONS, "spectral_intensity", in_double)
    if name == "cpu":
        out = _empty(x, axis, per_image)
        _run_cpu(x, axis, scale, out, per_image)
        return out
    out = _empty(x, axis)
    IMPLEMENTATIONS[name](x, axis, scale, out)
    return out if per_image else _mean_of_images(out)


def _registered(x, axis, scale, backend):
    torch._check(
        x.ndim == 4 and 0 not in x.shape and axis in AXES,
        lambda: f"spectral_intensity takes [B, C, H, W] with numbers and a known axis, not {tuple(x.shape)}, {axis!r}",
    )
    return _forward(x, axis, scale, backend)


torch.library.impl("skd::spectral_intensity", "CompositeExplicitAutograd", _registered)


@torch.library.register_fake("skd::spectral_intensity")
def _fake(x, axis, scale, backend):
    return _empty(x, axis)


def _backward(ctx, upstream):
    raise RuntimeError("spectral_intensity has no derivative; for a loss on spectra use skd.SpectralLoss")


torch.library.register_autograd("skd::spectral_intensity", _backward)
