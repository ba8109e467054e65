"""The kernel for planes that fit a tile: maps to spectra, their comparison, and back to the gradient.

A tile is PLANES whole planes of one image. A transform is matrix products with DFT matrices that the program makes from
one table of cosines: rows by ``[planes*H, W] x [W, 2 K]``, then columns, real and imaginary parts by ``[planes*K, H] x
[H, H]`` each; and the same backwards.
"""

import triton
import triton.language as tl
from skd.kernels.fourier_arithmetic import (
    column_matrix,
    compare_bins,
    focal_weight,
    magnitude,
    quarter_table,
    row_matrix,
    transform_columns,
)


@triton.jit
def load_pooled(
    base, first, n, i, inside, positions, stride, channels, width,
    RATIO: tl.constexpr, WIDE: tl.constexpr, LONGEST: tl.constexpr,
    PLANES: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Pooled channels in float32, [PLANES, ROWS, COLUMNS].

    Args:
        base: pointer to channel `first` of an image.
        first: that channel; for a RATIO, where the first pooled channel's window begins.
        n, i: pooled channels, [PLANES, 1, 1], counted from the first that exists and in all.
        inside: mask.
        positions: offsets of positions, [1, ROWS, COLUMNS].
        stride: from one channel to the next.
        channels, width: how many are pooled, and to how many.
        RATIO: of these, or 0 where it is no integer.
        WIDE: whether to load the PLANES * RATIO channels as one run.
        LONGEST: window.
        PLANES, ROWS, COLUMNS: the tile.
    """
    if RATIO == 1:
        x = tl.load(base + (positions + n * stride), mask=inside, other=0.0).to(tl.float32)
    elif WIDE:
        run = tl.arange(0, PLANES * RATIO)[:, None, None].to(positions.dtype)
        mask = tl.broadcast_to(inside[:, None, :, :], [PLANES, RATIO, ROWS, COLUMNS])
        mask = tl.reshape(mask, [PLANES * RATIO, ROWS, COLUMNS])
        x = tl.load(base + (positions + run * stride), mask=mask, other=0.0).to(tl.float32)
        x = tl.sum(tl.reshape(x, [PLANES, RATIO, ROWS, COLUMNS]), 1) * (1.0 / RATIO)
    elif RATIO > 1:
        x = tl.zeros([PLANES, ROWS, COLUMNS], tl.float32)
        for j in tl.static_range(RATIO):
            x += tl.load(base + (positions + (n * RATIO + j) * stride), mask=inside, other=0.0).to(tl.float32)
        x *= 1.0 / RATIO
    else:
        begin, end = i * channels // width, ((i + 1) * channels + width - 1) // width
        x = tl.zeros([PLANES, ROWS, COLUMNS], tl.float32)
        for j in range(LONGEST):
            at = positions + (begin + j - first).to(positions.dtype) * stride
            x += tl.load(base + at, mask=inside & (begin + j < end), other=0.0).to(tl.float32)
        x /= (end - begin).to(tl.float32)
    return x


# --- Transforms ---


@triton.jit
def half_spectrum(
    x, row, column_re, column_im, twiddle_cos, twiddle_sin, scale,
    PLANES: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, BINS: tl.constexpr,
    TWIDDLE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Real and imaginary parts, [PLANES, BINS, ROWS] at [plane, kx, ky], of planes [PLANES, ROWS, COLUMNS].

    With TWIDDLE the bins are turned between rows and columns, by angles of [1, ROWS, BINS]: the two are then factors of
    one long transform.
    """
    z = tl.dot(tl.reshape(x, [PLANES * ROWS, COLUMNS]), row, input_precision=PRECISION)
    re, im = tl.split(tl.reshape(z, [PLANES, ROWS, BINS, 2]))
    if TWIDDLE:
        re, im = re * twiddle_cos + im * twiddle_sin, im * twiddle_cos - re * twiddle_sin
    re = tl.reshape(tl.permute(re, [0, 2, 1]), [PLANES * BINS, ROWS])
    im = tl.reshape(tl.permute(im, [0, 2, 1]), [PLANES * BINS, ROWS])
    re, im = transform_columns(re, im, column_re, column_im, ROWS, PRECISION)
    return tl.reshape(re * scale, [PLANES, BINS, ROWS]), tl.reshape(im * scale, [PLANES, BINS, ROWS])


@triton.jit
def half_spectrum_adjoint(
    re, im, row, column_re, column_im, scale,
    PLANES: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, BINS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The transpose: [PLANES, ROWS, COLUMNS]. Over columns it is the transform of the conjugate, conjugated."""
    re, im = tl.reshape(re, [PLANES * BINS, ROWS]), tl.reshape(-im, [PLANES * BINS, ROWS])
    re, im = transform_columns(re, im, column_re, column_im, ROWS, PRECISION)
    re = tl.permute(tl.reshape(re, [PLANES, BINS, ROWS]), [0, 2, 1])
    im = tl.permute(tl.reshape(-im, [PLANES, BINS, ROWS]), [0, 2, 1])
    if BINS >= 16:
        row_re, row_im = tl.split(tl.reshape(row, [COLUMNS, BINS, 2]))
        re, im = tl.reshape(re, [PLANES * ROWS, BINS]), tl.reshape(im, [PLANES * ROWS, BINS])
        x = tl.dot(re, tl.trans(row_re), input_precision=PRECISION)
        x = tl.dot(im, tl.trans(row_im), x, input_precision=PRECISION)
    else:
        z = tl.reshape(tl.join(re, im), [PLANES * ROWS, 2 * BINS])
        x = tl.dot(z, tl.trans(row), input_precision=PRECISION)
    return tl.reshape(x * scale, [PLANES, ROWS, COLUMNS])


# --- Kernels ---


@triton.jit
def _align_tile(
    tile, nothing, student, teacher, gradient, weights,
    norm, inner_weight, focal, gradient_scale, channels, teacher_channels,
    s_b, s_c, s_h, s_w, t_b, t_c, t_h, t_w, g_b, g_c, g_h, g_w,
    HEIGHT: tl.constexpr, WIDTH: tl.constexpr,
    PLANES: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, BINS: tl.constexpr, TABLE: tl.constexpr,
    S_RATIO: tl.constexpr, S_WIDE: tl.constexpr, T_RATIO: tl.constexpr, T_WIDE: tl.constexpr, LONGEST: tl.constexpr,
    POOL_STUDENT: tl.constexpr, HALO: tl.constexpr, INDEX: tl.constexpr,
    MATCH: tl.constexpr, INNER: tl.constexpr, FOCAL: tl.constexpr, BANDS: tl.constexpr, SPECTRA: tl.constexpr,
    WRITE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Writes the gradient of a tile; gives its loss and its sums of the student's and the teacher's magnitudes."""
    row = row_matrix(quarter_table(WIDTH, TABLE, nothing), WIDTH, WIDTH // 2 + 1, COLUMNS, BINS)
    table = quarter_table(HEIGHT, TABLE, nothing)
    column_re = column_matrix(table, HEIGHT, ROWS, False)
    column_im = column_matrix(table, HEIGHT, ROWS, True)

    n = tl.arange(0, PLANES)[:, None, None]
    h = tl.arange(0, ROWS)[None, :, None]
    w = tl.arange(0, COLUMNS)[None, None, :]
    in_plane = (h < HEIGHT) & (w < WIDTH)
    h, w = h.to(INDEX), w.to(INDEX)

    # The tile's pooled channels, and where those of the maps begin.
    width = tl.minimum(channels, teacher_channels)
    groups = (width + PLANES - HALO - 1) // (PLANES - HALO)
    b = (tile // groups).to(tl.int64)
    start = tile % groups * (PLANES - HALO) - HALO
    i = start + n
    own = (i < width) & (n >= HALO)
    inside = in_plane & (i < width) & (i >= 0)
    i = i.to(INDEX)
    if HALO > 0:
        n += tl.minimum(start, 0)
    n = n.to(INDEX)
    s_first = tl.maximum(start, 0).to(tl.int64)
    t_first = s_first
    if POOL_STUDENT:
        s_first = s_first * channels // width
    else:
        t_first = t_first * teacher_channels // width

    x = load_pooled(student + b * s_b + s_first * s_c, s_first, n, i, inside, h * s_h + w * s_w, s_c, channels, width,
                    S_RATIO, S_WIDE, LONGEST, PLANES, ROWS, COLUMNS)  # fmt: skip
    y = load_pooled(teacher + b * t_b + t_first * t_c, t_first, n, i, inside, h * t_h + w * t_w, t_c, teacher_channels,
                    width, T_RATIO, T_WIDE, LONGEST, PLANES, ROWS, COLUMNS)  # fmt: skip
    if MATCH == "complex":
        x -= y
    s_re, s_im = half_spectrum(x, row, column_re, column_im, 0.0, 0.0, norm,
                               PLANES, ROWS, COLUMNS, BINS, False, PRECISION)  # fmt: skip
    t_re, t_im = s_re, s_im
    if MATCH != "complex" or SPECTRA:
        t_re, t_im = half_spectrum(y, row, column_re, column_im, 0.0, 0.0, norm,
                                   PLANES, ROWS, COLUMNS, BINS, False, PRECISION)  # fmt: skip
    student_sums, teacher_sums = 0.0, 0.0
    if SPECTRA:
        re, im = s_re, s_im
        if MATCH == "complex":
            re, im = re + t_re, im + t_im
        student_sums = tl.sum(tl.where(own, magnitude(re, im), 0.0), 0)
        teacher_sums = tl.sum(tl.where(own, magnitude(t_re, t_im), 0.0), 0)

    squared, g_re, g_im = compare_bins(s_re, s_im, t_re, t_im, MATCH)
    weight = tl.full([PLANES, BINS, ROWS], 1.0, tl.float32)
    if INNER:
        kx = tl.arange(0, BINS)[None, :, None]
        weight *= tl.where((kx > 0) & (2 * kx < WIDTH), inner_weight, 1.0)
    if FOCAL > 0:
        largest = tl.max(tl.max(squared, 2, keep_dims=True), 1, keep_dims=True)
        weight *= focal_weight(squared, largest, focal, FOCAL)
    if BANDS:
        weight *= weights
    loss = tl.sum(tl.where(own, weight * squared, 0.0)).to(tl.float64)

    if WRITE:
        g = half_spectrum_adjoint(g_re * weight, g_im * weight, row, column_re, column_im, norm * gradient_scale,
                                  PLANES, ROWS, COLUMNS, BINS, PRECISION)  # fmt: skip
        gradient += b * g_b + s_first * g_c
        places = h * g_h + w * g_w
        if POOL_STUDENT:
            _store_unpooled(gradient, s_first, i, g, own & in_plane, places, g_c, channels, width,
                            LONGEST, HALO, PLANES, ROWS, COLUMNS)  # fmt: skip
        else:
            tl.store(gradient + (places + n * g_c), g.to(gradient.dtype.element_ty), mask=inside)
    return loss, student_sums, teacher_sums


@triton.jit(do_not_specialize=["columns", "batch", "channels", "teacher_channels"])
def fourier_tile_kernel(
    student, teacher, gradient, bands, partials, columns, sums,
    norm, inner_weight, focal, loss_scale, gradient_scale, batch, channels, teacher_channels,
    s_b, s_c, s_h, s_w, t_b, t_c, t_h, t_w, g_b, g_c, g_h, g_w,
    HEIGHT: tl.constexpr, WIDTH: tl.constexpr,
    PLANES: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, BINS: tl.constexpr, TABLE: tl.constexpr,
    S_RATIO: tl.constexpr, S_WIDE: tl.constexpr, T_RATIO: tl.constexpr, T_WIDE: tl.constexpr, LONGEST: tl.constexpr,
    POOL_STUDENT: tl.constexpr, HALO: tl.constexpr, INDEX: tl.constexpr,
    MATCH: tl.constexpr, INNER: tl.constexpr, FOCAL: tl.constexpr, BANDS: tl.constexpr, SPECTRA: tl.constexpr,
    WRITE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Planes of HEIGHT x WIDTH, PLANES at a time, in tiles of powers of two: [PLANES, ROWS, COLUMNS].

    Where student channels are in two windows (POOL_STUDENT, no integer ratio) tiles overlap by one pooled channel
    (HALO): a tile writes the channels that begin in its windows, the first of which may also end the window before.
    """
    KX: tl.constexpr = WIDTH // 2 + 1
    kx = tl.arange(0, BINS)[:, None]
    ky = tl.arange(0, ROWS)[None, :]
    is_bin = (kx < KX) & (ky < HEIGHT)
    weights = 0.0
    if BANDS:
        weights = tl.load(bands + (ky * KX + kx), mask=is_bin, other=0.0)[None, :, :]
    if SPECTRA:
        width = tl.minimum(channels, teacher_channels)
        tiles = batch * ((width + PLANES - HALO - 1) // (PLANES - HALO))
        loss = tl.program_id(0).to(tl.float64) * 0.0
        student_sums = tl.zeros([BINS, ROWS], tl.float64)
        teacher_sums = tl.zeros([BINS, ROWS], tl.float64)
        for tile in range(tl.program_id(0), tiles, tl.num_programs(0)):
            more, of_student, of_teacher = _align_tile(
                tile, tile // tiles, student, teacher, gradient, weights, norm, inner_weight, focal, gradient_scale,
                channels, teacher_channels, s_b, s_c, s_h, s_w, t_b, t_c, t_h, t_w, g_b, g_c, g_h, g_w,
                HEIGHT, WIDTH, PLANES, ROWS, COLUMNS, BINS, TABLE, S_RATIO, S_WIDE, T_RATIO, T_WIDE, LONGEST,
                POOL_STUDENT, HALO, INDEX, MATCH, INNER, FOCAL, BANDS, SPECTRA, WRITE, PRECISION,
            )  # fmt: skip
            loss += more
            student_sums += of_student
            teacher_sums += of_teacher
        sums += tl.program_id(0).to(tl.int64) * (2 * HEIGHT * KX)
        tl.store(sums + (ky * KX + kx), student_sums.to(tl.float32), mask=is_bin)
        tl.store(sums + (HEIGHT * KX + ky * KX + kx), teacher_sums.to(tl.float32), mask=is_bin)
    else:
        loss, _, _ = _align_tile(
            tl.program_id(0), 0, student, teacher, gradient, weights, norm, inner_weight, focal, gradient_scale,
            channels, teacher_channels, s_b, s_c, s_h, s_w, t_b, t_c, t_h, t_w, g_b, g_c, g_h, g_w,
            HEIGHT, WIDTH, PLANES, ROWS, COLUMNS, BINS, TABLE, S_RATIO, S_WIDE, T_RATIO, T_WIDE, LONGEST,
            POOL_STUDENT, HALO, INDEX, MATCH, INNER, FOCAL, BANDS, SPECTRA, WRITE, PRECISION,
        )  # fmt: skip
    tl.store(partials + tl.program_id(0), loss * loss_scale)
    for column in range(tl.program_id(0) + tl.num_programs(0), columns, tl.num_programs(0)):
        tl.store(partials + column, 0.0)


@triton.jit
def _store_unpooled(
    base, first, i, g, mask, positions, stride, channels, width,
    LONGEST: tl.constexpr, HALO: tl.constexpr,
    PLANES: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Gives each student channel its share of the gradients of the windows it is in; as `load_pooled`."""
    dtype = base.dtype.element_ty
    begin, end = i * channels // width, (i + 1) * channels // width  # what also begins the next window is its own
    length = (((i + 1) * channels + width - 1) // width - begin).to(tl.float32)
    share = g / length
    at = positions + (begin - first).to(positions.dtype) * stride
    if HALO > 0:
        n = tl.arange(0, PLANES)[:, None]
        previous = tl.broadcast_to(tl.maximum(n - 1, 0), [PLANES, ROWS * COLUMNS])
        other = tl.gather(tl.reshape(share, [PLANES, ROWS * COLUMNS]), previous, 0)
        other = tl.reshape(other, [PLANES, ROWS, COLUMNS])
        both = share + tl.where(i * channels % width != 0, other, 0.0)
        tl.store(base + at, both.to(dtype), mask=mask)
    else:
        tl.store(base + at, share.to(dtype), mask=mask)
    for j in range(1, LONGEST):
        at += stride
        tl.store(base + at, share.to(dtype), mask=mask & (begin + j < end))


@triton.jit(do_not_specialize=["length", "numbers"])
def finish_spectra_kernel(sums, out, length, numbers, scale, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """out[group, number] = scale * sum of sums[group, 0 .. length - 1, number], always in the same order."""
    blocks = (numbers + COLUMNS - 1) // COLUMNS
    group = (tl.program_id(0) // blocks).to(tl.int64)
    number = tl.program_id(0) % blocks * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    r = tl.arange(0, ROWS)[:, None]
    sums += group * length * numbers
    total = tl.zeros([ROWS, COLUMNS], tl.float64)
    for start in range(0, length, ROWS):
        mask = (r < length - start) & (number < numbers)
        total += tl.load(sums + (start + r).to(tl.int64) * numbers + number, mask=mask, other=0.0).to(tl.float64)
    total = tl.sum(total, 0, keep_dims=True) * scale
    tl.store(out + group * numbers + number, total.to(tl.float32), mask=number < numbers)
