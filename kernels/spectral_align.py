"""spectral_align in Triton: which of :mod:`skd.kernels.align_kernels` a layer takes, cut how, and the launches."""

import contextlib
import math
from typing import NamedTuple

import torch
import triton
from skd.kernels.align_kernels import finish_kernel, general_kernel, planes_kernel, tile_kernel
from torch import Tensor


class Plan(NamedTuple):
    kernel: triton.JITFunction
    programs: int
    constants: dict
    num_warps: int


def plan(layer: dict) -> Plan:
    """The kernel, tile and grid of a layer, from shapes, strides and dtypes alone."""
    student, teacher, gradient = layer["student"], layer["teacher"], layer["gradient"]
    channels, teacher_channels = student.shape[1], teacher.shape[1]
    ratio, left = divmod(teacher_channels, channels)
    modes = {"ROW_TERM": layer["row_weight"] != 0, "WRITE": gradient is not None}
    if left == 0 and ratio in (1, 2, 4, 8, 16):
        chosen = _plan_planes(layer, ratio, modes) or _plan_tile(layer, ratio, modes)
        if chosen:
            return chosen
    batch, _, height, width = student.shape
    columns = min(_power_of_2(width), 128)
    in_block = min(_power_of_2(channels), 32, 1024 // columns)
    rows = min(_power_of_2(batch * height), 1024 // (columns * in_block))
    tile = {"ROWS": rows, "COLUMNS": columns, "CHANNELS": in_block}
    programs = triton.cdiv(batch * height, rows) * triton.cdiv(channels, in_block)
    pool_student = channels > teacher_channels
    # A pooled student keeps two windows per number: fewer numbers per thread leave it registers.
    num_warps = 8 if pool_student else 4
    return Plan(general_kernel, programs, {"POOL_STUDENT": pool_student, **tile, **modes}, num_warps)


def _power_of_2(n: int) -> int:
    return 1 << (n - 1).bit_length()


def _is_planes(x: Tensor) -> bool:
    _, _, height, width = x.shape
    return x.stride()[1:] == (height * width, width, 1)


# Per ratio: elements of d per program and its warps, for 40 to 80 numbers per thread on their way at a time.
_TILES = {1: (4096, 4), 2: (4096, 8), 4: (2048, 8), 8: (1024, 4), 16: (512, 4)}


def _plan_planes(layer: dict, ratio: int, modes: dict) -> Plan | None:
    student, teacher, gradient = layer["student"], layer["teacher"], layer["gradient"]
    maps = [x for x in (student, teacher, gradient) if x is not None]
    batch, channels, height, width = student.shape
    if not all(map(_is_planes, maps)) or ratio * height * width >= 2**31:
        return None
    tile, num_warps = _TILES[ratio]
    columns = _power_of_2(width)
    rows = tile // columns
    if rows == 0:
        return None
    dense = all(x.stride(0) == x.shape[1] * height * width for x in maps)
    planes = batch * channels if dense else channels
    area = height * width
    vector = 16 // min(x.element_size() for x in maps)
    narrow = math.gcd(vector, area)  # the longest vector that no plane's end cuts
    # Half a vector or more comes without a detour through shared memory.
    gather = ratio > 1 and 2 * narrow < vector
    if ratio > 1 and not gather:
        vector = narrow
    if height <= rows:
        # Groups of planes must start at a vector's beginning, and a last, partial one must end at a vector's end.
        step = vector // math.gcd(vector, area)
        in_group = [n for n in range(step, rows // height + 1, step) if step == 1 or planes % n == 0]
        if not in_group:
            return None
        in_group = min(in_group[-1], _power_of_2(planes))
        chunks = 1
    else:
        in_group = 1
        chunks = next((n for n in range(1, height + 1) if height % n == 0 and height // n <= rows), None)
        if chunks is None or area // chunks % vector:
            return None
    rows = min(rows, _power_of_2(in_group * height // chunks))
    constants = {
        "DENSE": dense,
        "RATIO": ratio,
        "PLANES": in_group,
        "CHUNKS": chunks,
        "EVEN": planes % in_group == 0,
        "VECTOR": min(vector, rows * columns),
        "GATHER": gather,
        "ROWS": rows,
        "COLUMNS": columns,
        **modes,
    }
    programs = triton.cdiv(planes, in_group) * chunks * (1 if dense else batch)
    return Plan(planes_kernel, programs, constants, num_warps)


def _plan_tile(layer: dict, ratio: int, modes: dict) -> Plan | None:
    student, teacher, gradient = layer["student"], layer["teacher"], layer["gradient"]
    maps = [x for x in (student, teacher, gradient) if x is not None]
    batch, channels, height, width = student.shape
    columns = _power_of_2(width)
    planes = [x is not None and _is_planes(x) for x in (student, teacher, gradient)]
    tokens = all(x.stride(1) == 1 for x in maps)
    if tokens:
        # As many rows as give each of 128 threads one vector of channels per column.
        in_block = min(_power_of_2(channels), 32 if channels % 64 == 32 else 64)
        vector = 16 // min(x.element_size() for x in maps)
        rows = 128 * vector // ((2 - width % 2) * in_block * ratio)
        tile, num_warps = 16384 // (1 + ratio), 4
    else:
        # Of planes a run of rows is contiguous, of tokens a run of channels: long runs of both.
        tile, num_warps = _TILES[ratio]
        in_block = min(_power_of_2(channels), 32)
        rows = tile // (columns * in_block)
    while columns * in_block > tile:
        in_block //= 2
    if in_block < min(16, channels):
        return None
    rows = max(1, min(rows, tile // (columns * in_block), _power_of_2(height)))
    rows = 1 << (rows.bit_length() - 1)
    while 2 * rows * columns * in_block <= tile and in_block < channels and not tokens:
        in_block *= 2
    groups = triton.cdiv(height, rows)
    spans = (
        sum((n - 1) * abs(stride) for n, stride in zip((in_block * ratio, rows, columns), x.stride()[1:], strict=True))
        for x in (student, teacher, gradient)
        if x is not None
    )
    if max(spans) >= 2**31:
        return None
    constants = {
        **dict(zip(("STUDENT_PLANES", "TEACHER_PLANES", "GRADIENT_PLANES"), planes, strict=True)),
        "TOKENS": tokens,
        "RATIO": ratio,
        "GROUP": triton.cdiv(height, groups),
        "ROWS": rows,
        "COLUMNS": columns,
        "CHANNELS": in_block,
        **modes,
    }
    return Plan(tile_kernel, batch * groups * triton.cdiv(channels, in_block), constants, num_warps)


_FUSION = {"enable_fp_fusion": True}  # a fused product is rounded once: never less exact


def launches(layers: list[dict], out: Tensor) -> list[tuple]:
    """What a call runs, in order: ``(kernel, programs, arguments, constants and options)``."""
    plans = [plan(layer) if layer["student"].numel() else None for layer in layers]
    columns = max((p.programs for p in plans if p), default=0)
    allocate = torch.zeros if None in plans else torch.empty  # a layer with an empty batch launches nothing
    partials = allocate((len(layers), columns), dtype=torch.float64, device=out.device)
    result = []
    for layer, chosen, row in zip(layers, plans, partials, strict=True):
        if chosen is None:
            continue
        student, teacher, gradient = layer["student"], layer["teacher"], layer["gradient"]
        arguments = (
            student, teacher, student if gradient is None else gradient, row, columns,
            layer["row_weight"], layer["loss_scale"], layer["gradient_scale"],
            student.shape[0], student.shape[1], teacher.shape[1], student.shape[2], student.shape[3],
            *student.stride(), *teacher.stride(), *(student if gradient is None else gradient).stride(),
        )  # fmt: skip
        options = {**chosen.constants, "num_warps": chosen.num_warps, **_FUSION}
        result.append((chosen.kernel, chosen.programs, arguments, options))
    length = columns if out.ndim else partials.numel()
    options = {"BLOCK": 4096, "num_warps": 16, **_FUSION}
    result.append((finish_kernel, max(1, out.numel()), (partials, out, length), options))
    return result


def on_device_of(x: Tensor) -> contextlib.AbstractContextManager:
    """Launches inside go to this tensor's device, on its current stream. (The interpreter runs tensors of the CPU.)"""
    return contextlib.nullcontext() if x.device.type == "cpu" else getattr(torch, x.device.type).device(x.device)


def run(layers: list[dict], out: Tensor) -> None:
    """Fills the gradients of `layers` and `out`; the contract of ``skd.ops.spectral_align.IMPLEMENTATIONS``."""
    with on_device_of(out):
        for kernel, programs, arguments, options in launches(layers, out):
            kernel[(programs,)](*arguments, **options)
