"""The kernels of spectral_align in Triton: each layer's pass reads both maps once and writes the gradient once.

Per pooled element the pass moves ``student + ratio * teacher + gradient`` numbers of 2 or 4 bytes and does about ten
operations, so memory traffic decides. A program owns whole rows of d (the gradient is local to a row): it loads them,
pools the teacher in registers, sums each row, writes the gradient, and leaves one partial sum of the loss. A last
small launch adds the partials of every layer in double precision and in a fixed order. Three kernels share a layer's
arguments, and ``plan`` in :mod:`skd.kernels.spectral_align` picks one from shapes, strides and dtypes alone:

* ``planes_kernel``: both maps are NCHW. A run of planes is one flat stream, loaded in vectors of 16 bytes whatever
  H and W are; a gather through shared memory turns it into rows of a power of two to be summed.
* ``tile_kernel``: a [rows, columns, channels] tile. Channels-contiguous maps load 16 bytes along channels, planes what
  divides W along columns, and the compiler transposes between the two.
* ``general_kernel``: any strides (offsets in 64 bits), any pair of widths, rows of any length. It reads twice.

64-bit arithmetic is in the base pointers only; tiles that span 2^31 elements go to the general kernel.
"""

import triton
import triton.language as tl


@triton.jit
def _leave_partial(partials, columns, loss, loss_scale):
    """This program's share of the loss, and zeros where a layer with fewer programs leaves columns unused."""
    tl.store(partials + tl.program_id(0), loss.to(tl.float64) * loss_scale)
    for column in range(tl.program_id(0) + tl.num_programs(0), columns, tl.num_programs(0)):
        tl.store(partials + column, 0.0)


@triton.jit(do_not_specialize=["columns", "batch", "_"])
def tile_kernel(
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
def planes_kernel(
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
def general_kernel(
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
def finish_kernel(partials, out, length, BLOCK: tl.constexpr):
    """One program per number of `out`: the sum of `length` partials, always in the same order."""
    partials += tl.program_id(0).to(tl.int64) * length
    i = tl.arange(0, BLOCK)
    total = tl.full([BLOCK], 0.0, tl.float64)
    for start in range(0, length, BLOCK):
        total += tl.load(partials + start + i, mask=i < length - start, other=0.0)
    tl.store(out + tl.program_id(0), tl.sum(total).to(tl.float32))
