"""spectral_align in Triton: one launch per layer reads both maps once from memory and writes the gradient once.

Per pooled element the pass moves ``student + ratio * teacher + gradient`` numbers of 2 or 4 bytes and does about ten
operations, so memory traffic decides. A program owns whole rows of d (the gradient is local to a row): it loads them,
pools the teacher in registers, sums each row, writes the gradient, and leaves one partial sum of the loss. A last
small launch adds the partials of every layer in double precision and in a fixed order. Three kernels share a layer's
arguments, and :func:`plan` picks one from shapes, strides and dtypes alone:

* ``_planes_kernel``: both maps are NCHW. A run of planes is one flat stream, loaded in vectors of 16 bytes whatever
  H and W are; a gather through shared memory turns it into rows of a power of two to be summed.
* ``_tile_kernel``: a [rows, columns, channels] tile. Channels-contiguous maps load 16 bytes along channels, planes what
  divides W along columns, and the compiler transposes between the two.
* ``_general_kernel``: any strides (offsets in 64 bits), any pair of widths, rows of any length. It reads twice.

64-bit arithmetic is in the base pointers only; :func:`plan` sends tiles that span 2^31 elements to the general kernel.
"""

import contextlib
import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _leave_partial(partials, columns, loss, loss_scale):
    """This program's share of the loss, and zeros where a layer with fewer programs leaves columns unused."""
    tl.store(partials + tl.program_id(0), loss.to(tl.float64) * loss_scale)
    for column in range(tl.program_id(0) + tl.num_programs(0), columns, tl.num_programs(0)):
        tl.store(partials + column, 0.0)


@triton.jit(do_not_specialize=["columns", "batch", "_"])
def _tile_kernel(
    student, teacher, gradient, partials, columns, row_weight, loss_scale, gradient_scale, batch, channels, _,
    HEIGHT: tl.constexpr, WIDTH: tl.constexpr,
    s_b, s_c, s_h, s_w, t_b, t_c, t_h, t_w, g_b, g_c, g_h, g_w,
    STUDENT_PLANES: tl.constexpr, TEACHER_PLANES: tl.constexpr, GRADIENT_PLANES: tl.constexpr, TOKENS: tl.constexpr,
    RATIO: tl.constexpr, GROUP: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, CHANNELS: tl.constexpr,
    ROW_TERM: tl.constexpr, WRITE: tl.constexpr,
):  # fmt: skip
    """GROUP rows of one image, times CHANNELS channels. ROWS and COLUMNS are the powers of two that hold them."""
    # What the compiler knows of a plane's strides decides the width of its loads.
    if STUDENT_PLANES:
        s_c, s_h, s_w = HEIGHT * WIDTH, WIDTH, 1
    if TEACHER_PLANES:
        t_c, t_h, t_w = HEIGHT * WIDTH, WIDTH, 1
    if GRADIENT_PLANES:
        g_c, g_h, g_w = HEIGHT * WIDTH, WIDTH, 1

    channel_blocks = (channels + CHANNELS - 1) // CHANNELS
    groups: tl.constexpr = (HEIGHT + GROUP - 1) // GROUP
    first_channel = tl.program_id(0) % channel_blocks * CHANNELS
    first_row = tl.program_id(0) // channel_blocks % groups * GROUP
    b = (tl.program_id(0) // channel_blocks // groups).to(tl.int64)
    c64, h64 = first_channel.to(tl.int64), first_row.to(tl.int64)
    student += b * s_b + c64 * s_c + h64 * s_h
    teacher += b * t_b + c64 * RATIO * t_c + h64 * t_h

    # Threads are dealt to the axis of the longest contiguous runs, then from the last axis to the first. Tokens have
    # columns first, one of each parity: a thread holds a row's columns and adds them up without a word to the others.
    # Planes have columns and then rows last, where they are contiguous.
    CLASSES: tl.constexpr = 2 - WIDTH % 2
    if TOKENS:
        k = tl.arange(0, COLUMNS // CLASSES)[:, None, None, None]
        h = tl.arange(0, ROWS)[None, :, None, None]
        w = k * CLASSES + tl.arange(0, CLASSES)[None, None, :, None]
        c = tl.arange(0, CHANNELS)[None, None, None, :]
        wide = tl.arange(0, CHANNELS * RATIO)[None, None, None, :]
    else:
        c = tl.arange(0, CHANNELS)[:, None, None]
        wide = tl.arange(0, CHANNELS * RATIO)[:, None, None]
        h = tl.arange(0, ROWS)[None, :, None]
        w = tl.arange(0, COLUMNS)[None, None, :]
    inside = (h < tl.minimum(HEIGHT - first_row, GROUP)) & (w < WIDTH)
    mask = inside & (c < channels - first_channel)

    x = tl.load(student + (h * s_h + w * s_w + c * s_c), mask=mask, other=0.0).to(tl.float32)
    if RATIO == 1 or TEACHER_PLANES:
        y = tl.full(mask.shape, 0.0, tl.float32)
        for j in tl.static_range(RATIO):
            y += tl.load(teacher + (h * t_h + w * t_w + (c * RATIO + j) * t_c), mask=mask, other=0.0).to(tl.float32)
    else:
        mask_wide = inside & (wide < (channels - first_channel) * RATIO)
        y = tl.load(teacher + (h * t_h + w * t_w + wide * t_c), mask=mask_wide, other=0.0).to(tl.float32)
        if TOKENS:
            y = tl.sum(tl.reshape(y, [COLUMNS // CLASSES, ROWS, CLASSES, CHANNELS, RATIO]), 4)
        else:
            y = tl.sum(tl.reshape(y, [CHANNELS, RATIO, ROWS, COLUMNS]), 1)
    d = x - y * (1.0 / RATIO)

    g = d
    if ROW_TERM:
        if TOKENS:
            g = d + row_weight * tl.sum(d, 0, keep_dims=True)
        elif CLASSES == 1:
            g = d + row_weight * tl.sum(d, 2, keep_dims=True)
        else:
            is_even = w % 2 == 0
            even = tl.sum(tl.where(is_even, d, 0.0), 2, keep_dims=True)
            odd = tl.sum(tl.where(is_even, 0.0, d), 2, keep_dims=True)
            g = d + row_weight * tl.where(is_even, even, odd)
    if WRITE:
        gradient += b * g_b + c64 * g_c + h64 * g_h
        scaled = (g * gradient_scale).to(gradient.dtype.element_ty)
        tl.store(gradient + (h * g_h + w * g_w + c * g_c), scaled, mask=mask)
    _leave_partial(partials, columns, tl.sum(d * g), loss_scale)


@triton.jit(do_not_specialize=["columns", "batch", "channels", "_"])
def _planes_kernel(
    student, teacher, gradient, partials, columns, row_weight, loss_scale, gradient_scale, batch, channels, _,
    HEIGHT: tl.constexpr, WIDTH: tl.constexpr,
    s_b, s_c, s_h, s_w, t_b, t_c, t_h, t_w, g_b, g_c, g_h, g_w,
    DENSE: tl.constexpr, RATIO: tl.constexpr, PLANES: tl.constexpr, CHUNKS: tl.constexpr, EVEN: tl.constexpr,
    VECTOR: tl.constexpr, GATHER: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    ROW_TERM: tl.constexpr, WRITE: tl.constexpr,
):  # fmt: skip
    """PLANES whole planes of the student, or one of CHUNKS equal parts of a plane: COUNT consecutive numbers."""
    HW: tl.constexpr = HEIGHT * WIDTH
    COUNT: tl.constexpr = PLANES * HW // CHUNKS
    TILE: tl.constexpr = ROWS * COLUMNS
    planes = channels
    if DENSE:
        planes = batch * channels
    part = tl.program_id(0) % CHUNKS
    groups = (planes + PLANES - 1) // PLANES
    group = tl.program_id(0) // CHUNKS % groups
    b = (tl.program_id(0) // CHUNKS // groups).to(tl.int64)
    start = group.to(tl.int64) * (PLANES * HW)
    student += b * s_b + start + part * COUNT
    teacher += b * t_b + start * RATIO + part * COUNT
    count = COUNT
    if not EVEN:
        count = tl.minimum(planes - group * PLANES, PLANES) * HW

    # Vectors as an axis of their own, so that the compiler sees that a plane's end never cuts one.
    v = tl.arange(0, TILE // VECTOR)[:, None]
    lane = tl.arange(0, VECTOR)[None, :]
    p = v * VECTOR + lane
    mask = p < count
    x = tl.load(student + p, mask=mask, other=0.0).to(tl.float32)
    if RATIO == 1:
        y = tl.load(teacher + p, mask=mask, other=0.0).to(tl.float32)
    elif GATHER:  # a teacher's plane starts amid a vector: load the stream as it lies, then pick
        stream = tl.arange(0, TILE * RATIO)
        t = tl.load(teacher + stream, mask=stream < count * RATIO, other=0.0).to(tl.float32)
        flat = tl.arange(0, TILE)
        at = flat // HW * (RATIO * HW) + flat % HW
        total = tl.full([TILE], 0.0, tl.float32)
        for j in tl.static_range(RATIO):
            total += tl.gather(t, tl.where(flat < COUNT, at + j * HW, 0), 0)
        y = tl.reshape(total, [TILE // VECTOR, VECTOR])
    else:
        at = v // (HW // VECTOR) * (RATIO * HW) + v % (HW // VECTOR) * VECTOR
        y = tl.full([TILE // VECTOR, VECTOR], 0.0, tl.float32)
        for j in tl.static_range(RATIO):
            y += tl.load(teacher + (at + j * HW + lane), mask=mask, other=0.0).to(tl.float32)
    d = x - tl.where(mask, y * (1.0 / RATIO), 0.0)

    g = d
    if ROW_TERM:
        # Columns of the same parity are summed, or all of them if W is odd; a thread holds all columns of a sum.
        CLASSES: tl.constexpr = 2 - WIDTH % 2
        k = tl.arange(0, COLUMNS // CLASSES)[:, None, None]
        row = tl.arange(0, ROWS)[None, :, None]
        parity = tl.arange(0, CLASSES)[None, None, :]
        in_row = (k * CLASSES + parity < WIDTH) & (row < COUNT // WIDTH)
        at = tl.where(in_row, row * WIDTH + k * CLASSES + parity, 0)
        by_row = tl.gather(tl.reshape(d, [TILE]), tl.reshape(at, [TILE]), 0)
        by_row = tl.where(in_row, tl.reshape(by_row, [COLUMNS // CLASSES, ROWS, CLASSES]), 0.0)
        sums = tl.reshape(tl.sum(by_row, 0), [ROWS * CLASSES])
        flat = tl.arange(0, TILE)
        at = tl.where(flat < COUNT, flat // WIDTH * CLASSES + flat % WIDTH % CLASSES, 0)
        g = d + row_weight * tl.reshape(tl.gather(sums, at, 0), [TILE // VECTOR, VECTOR])
    if WRITE:
        gradient += b * g_b + start + part * COUNT
        tl.store(gradient + p, (g * gradient_scale).to(gradient.dtype.element_ty), mask=mask)
    _leave_partial(partials, columns, tl.sum(d * g), loss_scale)


@triton.jit
def _difference(student, teacher, s_c, t_c, i, channels, teacher_channels, mask, POOL_STUDENT: tl.constexpr):
    """Pooled student less pooled teacher in channel i, from pointers to channel 0."""
    if POOL_STUDENT:
        wide, stride, many, few = student, s_c, channels, teacher_channels
        narrow = tl.load(teacher + i * t_c, mask=mask, other=0.0).to(tl.float32)
    else:
        wide, stride, many, few = teacher, t_c, teacher_channels, channels
        narrow = tl.load(student + i * s_c, mask=mask, other=0.0).to(tl.float32)
    start, end = i * many // few, ((i + 1) * many + few - 1) // few
    pooled = tl.full(mask.shape, 0.0, tl.float32)
    for j in range((many + few - 1) // few + 1):  # the longest window there is
        pooled += tl.load(wide + (start + j) * stride, mask=mask & (start + j < end), other=0.0).to(tl.float32)
    pooled = pooled / (end - start).to(tl.float32)
    return pooled - narrow if POOL_STUDENT else narrow - pooled


@triton.jit(do_not_specialize=["columns", "batch", "channels", "teacher_channels", "height", "width"])
def _general_kernel(
    student, teacher, gradient, partials, columns, row_weight, loss_scale, gradient_scale,
    batch, channels, teacher_channels, height, width,
    s_b, s_c, s_h, s_w, t_b, t_c, t_h, t_w, g_b, g_c, g_h, g_w,
    POOL_STUDENT: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, CHANNELS: tl.constexpr,
    ROW_TERM: tl.constexpr, WRITE: tl.constexpr,
):  # fmt: skip
    """ROWS rows times CHANNELS channels of the student, walked COLUMNS at a time: once to sum, once to write."""
    channel_blocks = (channels + CHANNELS - 1) // CHANNELS
    r = (tl.program_id(0) // channel_blocks).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None, None]
    c = (tl.program_id(0) % channel_blocks).to(tl.int64) * CHANNELS + tl.arange(0, CHANNELS)[None, None, :]
    inside = (r < batch.to(tl.int64) * height) & (c < channels)
    b, h = r // height, r % height
    student += b * s_b + h * s_h
    teacher += b * t_b + h * t_h
    gradient += b * g_b + h * g_h + c * g_c

    # The window that holds a student channel, or the last one and, where two overlap, the one before.
    last = c
    counted = inside
    if POOL_STUDENT:
        last = ((c + 1) * teacher_channels - 1) // channels
        counted = inside & (last * channels // teacher_channels == c)  # a window's loss counts at its first channel
    before = c * teacher_channels // channels

    squares = tl.full([ROWS, COLUMNS, CHANNELS], 0.0, tl.float32)
    even, odd, even_before, odd_before = squares, squares, squares, squares
    for first in range(0, width, COLUMNS):
        w = (first + tl.arange(0, COLUMNS)[None, :, None]).to(tl.int64)
        mask = inside & (w < width)
        is_even = (w % 2 == 0) | (width % 2 == 1)
        s, t = student + w * s_w, teacher + w * t_w
        d = _difference(s, t, s_c, t_c, last, channels, teacher_channels, mask, POOL_STUDENT)
        squares += d * d
        even += tl.where(is_even, d, 0.0)
        odd += tl.where(is_even, 0.0, d)
        if POOL_STUDENT and ROW_TERM and WRITE:
            d = _difference(s, t, s_c, t_c, before, channels, teacher_channels, mask, POOL_STUDENT)
            even_before += tl.where(is_even, d, 0.0)
            odd_before += tl.where(is_even, 0.0, d)
    even, odd = tl.sum(even, 1, keep_dims=True), tl.sum(odd, 1, keep_dims=True)
    even_before, odd_before = tl.sum(even_before, 1, keep_dims=True), tl.sum(odd_before, 1, keep_dims=True)
    loss = tl.sum(tl.where(counted, squares, 0.0))
    if ROW_TERM:
        loss += row_weight * tl.sum(tl.where(counted, even * even + odd * odd, 0.0))

    if WRITE:
        if POOL_STUDENT:
            n = teacher_channels
            last_length = (((last + 1) * channels + n - 1) // n - last * channels // n).to(tl.float32)
            before_length = (((before + 1) * channels + n - 1) // n - before * channels // n).to(tl.float32)
        for first in range(0, width, COLUMNS):
            w = (first + tl.arange(0, COLUMNS)[None, :, None]).to(tl.int64)
            mask = inside & (w < width)
            is_even = (w % 2 == 0) | (width % 2 == 1)
            s, t = student + w * s_w, teacher + w * t_w
            g = _difference(s, t, s_c, t_c, last, channels, teacher_channels, mask, POOL_STUDENT)
            if ROW_TERM:
                g += row_weight * tl.where(is_even, even, odd)
            if POOL_STUDENT:
                g = g / last_length
                f = _difference(s, t, s_c, t_c, before, channels, teacher_channels, mask, POOL_STUDENT)
                if ROW_TERM:
                    f += row_weight * tl.where(is_even, even_before, odd_before)
                g += tl.where(before != last, f / before_length, 0.0)
            tl.store(gradient + w * g_w, (g * gradient_scale).to(gradient.dtype.element_ty), mask=mask)
    _leave_partial(partials, columns, loss, loss_scale)


@triton.jit(do_not_specialize=["length"])
def _finish_kernel(partials, out, length, BLOCK: tl.constexpr):
    """One program per number of `out`: the sum of `length` partials, always in the same order."""
    partials += tl.program_id(0).to(tl.int64) * length
    i = tl.arange(0, BLOCK)
    total = tl.full([BLOCK], 0.0, tl.float64)
    for start in range(0, length, BLOCK):
        total += tl.load(partials + start + i, mask=i < length - start, other=0.0)
    tl.store(out + tl.program_id(0), tl.sum(total).to(tl.float32))


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
    return Plan(_general_kernel, programs, {"POOL_STUDENT": pool_student, **tile, **modes}, num_warps)


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
    return Plan(_planes_kernel, programs, constants, num_warps)


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
    return Plan(_tile_kernel, batch * groups * triton.cdiv(channels, in_block), constants, num_warps)


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
    result.append((_finish_kernel, max(1, out.numel()), (partials, out, length), options))
    return result


def on_device_of(x: Tensor) -> contextlib.AbstractContextManager:
    """Launches inside go to this tensor's device, on its current stream. (The interpreter runs tensors of the CPU.)"""
    return contextlib.nullcontext() if x.device.type == "cpu" else getattr(torch, x.device.type).device(x.device)


def run(layers: list[dict], out: Tensor) -> None:
    """Fills the gradients of `layers` and `out`; the contract of ``skd.ops.spectral_align.IMPLEMENTATIONS``."""
    with on_device_of(out):
        for kernel, programs, arguments, options in launches(layers, out):
            kernel[(programs,)](*arguments, **options)
