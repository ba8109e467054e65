"""fourier_align in Triton: which kernels a layer takes, cut how, and the launches.

Planes of at most 32 x 32 take one launch per layer (:mod:`skd.kernels.fourier_kernels`), larger ones some passes
through a workspace (:mod:`skd.kernels.fourier_passes`). A last small launch adds the partial losses of every layer in
double precision and in a fixed order; another one per layer the magnitudes, where they are wanted.
"""

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from skd.kernels.align_kernels import finish_kernel
from skd.kernels.fourier_kernels import finish_spectra_kernel, fourier_tile_kernel
from skd.kernels.fourier_large import LargeLayer, longest_window
from skd.kernels.spectral_align import on_device_of
from torch import Tensor

PRECISION = "ieee"
"""``input_precision`` of every matrix product."""

LARGEST_SIDE = 32
WORKSPACE = 1 << 20
"""Bytes that the programs' sums of magnitudes may take."""

FUSION = {"enable_fp_fusion": True, "num_stages": 1}  # a fused product is rounded once: never less exact
_TILE = 512  # numbers of a map in a tile


class Plan(NamedTuple):
    kernel: triton.JITFunction
    programs: int
    constants: dict
    num_warps: int


def power_of_2(n: int) -> int:
    return 1 << (n - 1).bit_length()


def plane_tile(height: int, width: int) -> dict:
    """Powers of two that hold a plane and its half spectrum, none too small for a matrix product."""
    return {
        "ROWS": max(8, power_of_2(height)),
        "COLUMNS": max(16, power_of_2(width)),
        "BINS": max(8, power_of_2(width // 2 + 1)),
        "TABLE": 4 * power_of_2(max(height, width)),
    }


def pooling(channels: int, width: int, contiguous: bool) -> tuple[int, bool]:
    """RATIO and WIDE of ``load_pooled``."""
    ratio, left = divmod(channels, width)
    if left or ratio > 16:
        return 0, False
    return ratio, ratio > 1 and contiguous and ratio == power_of_2(ratio)


def spans_32_bits(x: Tensor, channels: int) -> bool:
    """Whether offsets within `channels` channels of an image may need 64 bits."""
    sizes = (channels, *x.shape[2:])
    return sum((n - 1) * abs(stride) for n, stride in zip(sizes, x.stride()[1:], strict=True)) >= 2**31


def plan(layer: dict) -> Plan | None:
    """The tiles and grid of a layer with small planes, from shapes, strides and dtypes alone; else None."""
    student, teacher, gradient = layer["student"], layer["teacher"], layer["gradient"]
    batch, channels, height, columns = student.shape
    if max(height, columns) > LARGEST_SIDE:
        return None
    width = min(channels, teacher.shape[1])
    tile = plane_tile(height, columns)
    s_ratio, s_wide = pooling(channels, width, student.stride(1) == 1)
    t_ratio, t_wide = pooling(teacher.shape[1], width, teacher.stride(1) == 1)
    halo = int(channels % width != 0)
    load = max(s_ratio if s_wide else 1, t_ratio if t_wide else 1)
    area = tile["ROWS"] * tile["COLUMNS"]
    planes = max(1 + halo, _TILE // area // (2 if load > 2 else 1))
    planes = min(planes, power_of_2(width + halo))
    longest = longest_window(max(channels, teacher.shape[1]), width)
    wide_index = max(channels, teacher.shape[1]) * width >= 2**31 or any(
        spans_32_bits(x, min(x.shape[1], planes * longest)) for x in (student, teacher, gradient) if x is not None
    )
    constants = {
        "HEIGHT": height,
        "WIDTH": columns,
        "PLANES": planes,
        **tile,
        "S_RATIO": s_ratio,
        "S_WIDE": s_wide,
        "T_RATIO": t_ratio,
        "T_WIDE": t_wide,
        "LONGEST": longest,
        "POOL_STUDENT": channels > width,
        "HALO": halo,
        "INDEX": tl.int64 if wide_index else tl.int32,
        "MATCH": layer["match"],
        "INNER": layer["inner_weight"] != 1.0,
        "FOCAL": focal_code(layer["focal"]),
        "BANDS": layer["bands"] is not None,
        "SPECTRA": layer["spectra"] is not None,
        "WRITE": gradient is not None,
        "PRECISION": PRECISION,
    }
    programs = batch * triton.cdiv(width, planes - halo)
    if layer["spectra"] is not None:  # programs walk
        programs = min(programs, max(1, WORKSPACE // (layer["spectra"].numel() * 4)))
    return Plan(fourier_tile_kernel, programs, constants, 8 if area > _TILE else 4)


def focal_code(focal: float | None) -> int:
    """FOCAL of ``focal_weight``, 0 for none."""
    return 0 if focal is None else {1.0: 1, 2.0: 2}.get(focal, 3)


def finish_spectra(sums: Tensor, out: Tensor, groups: int, length: int, scale: float) -> tuple:
    """The launch for ``out[group] = scale * sum of the `length` rows of sums[group]``."""
    numbers = out.numel() // groups
    options = {"ROWS": 32, "COLUMNS": 32, "num_warps": 4, **FUSION}
    arguments = (sums, out, length, numbers, scale)
    return finish_spectra_kernel, groups * triton.cdiv(numbers, 32), arguments, options


def _tile_launch(layer: dict, chosen: Plan, partials: Tensor, columns: int, sums: Tensor | None) -> tuple:
    student, teacher = layer["student"], layer["teacher"]
    gradient = student if layer["gradient"] is None else layer["gradient"]
    arguments = (
        student, teacher, gradient, partials if layer["bands"] is None else layer["bands"].contiguous(),
        partials, columns, partials if sums is None else sums,
        1.0 / math.sqrt(student.shape[2] * student.shape[3]), layer["inner_weight"], layer["focal"] or 0.0,
        layer["loss_scale"], layer["gradient_scale"], student.shape[0], student.shape[1], teacher.shape[1],
        *student.stride(), *teacher.stride(), *gradient.stride(),
    )  # fmt: skip
    return chosen.kernel, chosen.programs, arguments, {**chosen.constants, "num_warps": chosen.num_warps, **FUSION}


def launches(layers: list[dict], out: Tensor) -> list[tuple]:
    """What a call runs, in order: ``(kernel, programs, arguments, constants and options)``."""
    plans = [plan(layer) or LargeLayer(layer, PRECISION) if layer["student"].numel() else None for layer in layers]
    numbers = [0 if p is None else p.programs if isinstance(p, Plan) else sum(p.programs) for p in plans]
    columns = max(numbers)
    # A tile kernel fills its row, whose length is the longest layer's.
    allocate = torch.empty if all(isinstance(p, Plan) for p in plans) else torch.zeros
    partials = allocate((len(layers), columns), dtype=torch.float64, device=out.device)
    result, last = [], []
    for layer, chosen, row in zip(layers, plans, partials, strict=True):
        spectra, sums = layer["spectra"], None
        if chosen is None:
            if spectra is not None:
                spectra.zero_()
            continue
        if spectra is not None:
            if isinstance(chosen, Plan):
                sums = torch.empty((chosen.programs, spectra.numel()), dtype=torch.float32, device=out.device)
            else:
                sums = chosen.sums()
            planes = layer["student"].shape[0] * min(layer["student"].shape[1], layer["teacher"].shape[1])
            last.append(finish_spectra(sums, spectra, 1, sums.shape[0], 1.0 / planes))
        if isinstance(chosen, Plan):
            result.append(_tile_launch(layer, chosen, row, columns, sums))
        else:
            result += chosen.launches(row, sums, focal_code(layer["focal"]))
    options = {"BLOCK": 4096, "num_warps": 16, "enable_fp_fusion": True}
    result.append((finish_kernel, max(1, out.numel()), (partials, out, columns), options))
    return result + last


def run(layers: list[dict], out: Tensor) -> None:
    """Fills the gradients and spectra of `layers`, and `out`; as ``skd.ops.fourier_align.IMPLEMENTATIONS``."""
    with on_device_of(out):
        for kernel, programs, arguments, options in launches(layers, out):
            kernel[(programs,)](*arguments, **options)
