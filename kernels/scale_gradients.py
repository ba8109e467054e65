"""scale_gradients in Triton: each stored gradient times its factor, read on the device.

A factor of 1, the usual one, leaves a gradient that is scaled in place untouched: every program reads one number and
ends. Otherwise each number is read once and written once, 16 bytes at a time.
"""

import triton
import triton.language as tl
from skd.kernels.spectral_align import on_device_of
from torch import Tensor

_BLOCK = 4096


@triton.jit(do_not_specialize=["index"], do_not_specialize_on_alignment=["upstream"])
def _scale_kernel(stored, output, upstream, index, power, numel, IN_PLACE: tl.constexpr, BLOCK: tl.constexpr):
    factor = tl.load(upstream + index) * power
    if IN_PLACE:  # noqa: SIM102 (known when compiled; `factor` is not)
        if factor == 1.0:
            return
    start = tl.program_id(0).to(tl.int64) * BLOCK
    i = tl.arange(0, BLOCK)
    stored += start
    output += start
    if start + BLOCK <= numel:  # without a mask, so that no end of a map narrows the loads of all blocks
        x = tl.load(stored + i).to(tl.float32) * factor
        tl.store(output + i, x.to(output.dtype.element_ty))
    else:
        mask = i < numel - start
        x = tl.load(stored + i, mask=mask).to(tl.float32) * factor
        tl.store(output + i, x.to(output.dtype.element_ty), mask=mask)


def launches(stored: list[Tensor], outputs: list[Tensor], upstream: Tensor, powers: list[float]) -> list[tuple]:
    """What a call runs: ``(kernel, programs, arguments, constants and options)`` per gradient that is not empty."""
    result = []
    for layer, (x, out, power) in enumerate(zip(stored, outputs, powers, strict=True)):
        if x.numel():
            arguments = (x, out, upstream, layer * upstream.stride(0), float(power), x.numel())
            constants = {"IN_PLACE": x.data_ptr() == out.data_ptr(), "BLOCK": _BLOCK}
            options = {"num_warps": 4, "enable_fp_fusion": True}
            result.append((_scale_kernel, triton.cdiv(x.numel(), _BLOCK), arguments, {**constants, **options}))
    return result


def run(stored: list[Tensor], outputs: list[Tensor], upstream: Tensor, powers: list[float]) -> None:
    """``outputs[l] = stored[l] * (upstream[l] * powers[l])`` in float32, without reading `upstream` on the host.

    Args:
        stored: dense maps; empty ones are passed over.
        outputs: of the same strides and dtypes, each the very memory of its stored gradient or none of it.
        upstream: ``[L]`` in float32, of any stride.
        powers: per layer a further factor.
    """
    with on_device_of(upstream):
        for kernel, programs, arguments, options in launches(stored, outputs, upstream, powers):
            kernel[(programs,)](*arguments, **options)
