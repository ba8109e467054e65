"""The kernels of spectral_intensity: transforms, their magnitudes, and sums of these per image.

A program adds up a part of an image, so that an image's numbers do not depend on what else is in its batch; its sums,
``[image, part, bin]``, are added by ``finish_spectra_kernel``.
"""

import triton
import triton.language as tl
from skd.kernels.fourier_arithmetic import column_matrix, cos_quarters, magnitude, quarter_table, row_matrix
from skd.kernels.fourier_kernels import half_spectrum


@triton.jit(do_not_specialize=["channels", "parts"])
def space_kernel(
    x, sums, channels, parts, x_b, x_c, x_h, x_w,
    HEIGHT: tl.constexpr, WIDTH: tl.constexpr,
    PLANES: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, BINS: tl.constexpr, TABLE: tl.constexpr,
    INDEX: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Planes of HEIGHT x WIDTH, PLANES at a time; as ``fourier_tile_kernel``."""
    KX: tl.constexpr = WIDTH // 2 + 1
    n = tl.arange(0, PLANES)[:, None, None]
    h = tl.arange(0, ROWS)[None, :, None]
    w = tl.arange(0, COLUMNS)[None, None, :]
    in_plane = (h < HEIGHT) & (w < WIDTH)
    offsets = n.to(INDEX) * x_c + h.to(INDEX) * x_h + w.to(INDEX) * x_w
    x += (tl.program_id(0) // parts).to(tl.int64) * x_b
    groups = (channels + PLANES - 1) // PLANES
    total = tl.zeros([BINS, ROWS], tl.float64)
    for group in range(tl.program_id(0) % parts, groups, parts):
        # Made anew for each tile (`nothing` is 0): kept, they would take all registers.
        nothing = group // channels
        row = row_matrix(quarter_table(WIDTH, TABLE, nothing), WIDTH, KX, COLUMNS, BINS)
        table = quarter_table(HEIGHT, TABLE, nothing)
        column_re = column_matrix(table, HEIGHT, ROWS, False)
        column_im = column_matrix(table, HEIGHT, ROWS, True)
        left = channels - group * PLANES
        first = (channels - left).to(tl.int64)
        plane = tl.load(x + first * x_c + offsets, mask=in_plane & (n < left), other=0.0).to(tl.float32)
        re, im = half_spectrum(plane, row, column_re, column_im, 0.0, 0.0, 1.0,
                               PLANES, ROWS, COLUMNS, BINS, False, PRECISION)  # fmt: skip
        total += tl.sum(magnitude(re, im), 0)
    kx = tl.arange(0, BINS)[:, None]
    ky = tl.arange(0, ROWS)[None, :]
    sums += tl.program_id(0).to(tl.int64) * (HEIGHT * KX)
    tl.store(sums + (ky * KX + kx), total.to(tl.float32), mask=(kx < KX) & (ky < HEIGHT))


@triton.jit(do_not_specialize=["positions", "width", "parts"])
def channel_factors_kernel(
    x, sums, positions, width, parts, x_b, x_c, x_h, x_w,
    FIRST: tl.constexpr, SECOND: tl.constexpr,
    PLANES: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, BINS: tl.constexpr, TABLE: tl.constexpr,
    FLAT: tl.constexpr, INDEX: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """FIRST * SECOND channels, PLANES positions at a time, each as a plane of SECOND rows and FIRST columns.

    Channel ``c1 * SECOND + c2`` is at [c2, c1], and bin ``k1 + FIRST * k2`` comes out at [k1, k2], for k1 up to
    FIRST/2: every bin of the half spectrum, or the conjugate of one, and some twice.
    """
    C: tl.constexpr = FIRST * SECOND
    n = tl.arange(0, PLANES)[:, None, None]
    c2 = tl.arange(0, ROWS)[None, :, None]
    c1 = tl.arange(0, COLUMNS)[None, None, :]
    k1 = tl.arange(0, BINS)[None, None, :]
    in_plane = (c2 < SECOND) & (c1 < FIRST)
    offsets = c2.to(INDEX) * x_c + c1.to(INDEX) * (SECOND * x_c)
    x += (tl.program_id(0) // parts).to(tl.int64) * x_b
    part = tl.program_id(0) % parts
    groups = (positions + PLANES - 1) // PLANES
    total = tl.zeros([BINS, ROWS], tl.float64)
    for group in range(part * groups // parts, (part + 1) * groups // parts):
        nothing = group // positions
        row = row_matrix(quarter_table(FIRST, TABLE, nothing), FIRST, FIRST // 2 + 1, COLUMNS, BINS)
        table = quarter_table(SECOND, TABLE, nothing)
        column_re = column_matrix(table, SECOND, ROWS, False)
        column_im = column_matrix(table, SECOND, ROWS, True)
        turn = 4 * c2 * k1 + nothing
        twiddle_cos, twiddle_sin = cos_quarters(turn, C), cos_quarters(turn + 3 * C, C)
        p = group * PLANES + n
        mask = in_plane & (p < positions)
        p = p.to(INDEX)
        at = p * x_w if FLAT else p // width * x_h + p % width * x_w
        plane = tl.load(x + (at + offsets), mask=mask, other=0.0).to(tl.float32)
        re, im = half_spectrum(plane, row, column_re, column_im, twiddle_cos, twiddle_sin, 1.0,
                               PLANES, ROWS, COLUMNS, BINS, True, PRECISION)  # fmt: skip
        total += tl.sum(magnitude(re, im), 0)
    k1 = tl.arange(0, BINS)[:, None]
    k2 = tl.arange(0, ROWS)[None, :]
    k = k1 + FIRST * k2
    is_bin = (k1 <= FIRST // 2) & (k2 < SECOND) & ((2 * k <= C) | ((k1 > 0) & (2 * k1 < FIRST)))
    sums += tl.program_id(0).to(tl.int64) * (C // 2 + 1)
    tl.store(sums + tl.where(2 * k <= C, k, C - k), total.to(tl.float32), mask=is_bin)


@triton.jit(do_not_specialize=["positions", "width", "parts"])
def channel_kernel(
    x, sums, positions, width, parts, x_b, x_c, x_h, x_w,
    CHANNELS: tl.constexpr, POSITIONS: tl.constexpr, TERMS: tl.constexpr, BINS: tl.constexpr,
    FLAT: tl.constexpr, INDEX: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Any number of channels: POSITIONS positions and BINS bins at a time, as a tiled matrix product."""
    KX: tl.constexpr = CHANNELS // 2 + 1
    blocks: tl.constexpr = (KX + BINS - 1) // BINS
    k = tl.program_id(0) % blocks * BINS + tl.arange(0, BINS)[None, :]
    row = tl.program_id(0) // blocks
    part = row % parts
    x += (row // parts).to(tl.int64) * x_b
    groups = (positions + POSITIONS - 1) // POSITIONS
    total = tl.zeros([1, BINS], tl.float64)
    for group in range(part * groups // parts, (part + 1) * groups // parts):
        p = (group * POSITIONS + tl.arange(0, POSITIONS)[:, None]).to(tl.int64)
        at = x + (p * x_w if FLAT else p // width * x_h + p % width * x_w)
        re = tl.zeros([POSITIONS, BINS], tl.float32)
        im = tl.zeros([POSITIONS, BINS], tl.float32)
        for start in range(0, CHANNELS, TERMS):
            c = start + tl.arange(0, TERMS)
            mask = (p < positions) & (c[None, :] < CHANNELS)
            a = tl.load(at + c[None, :].to(tl.int64) * x_c, mask=mask, other=0.0).to(tl.float32)
            m = (c[:, None].to(INDEX) * k % CHANNELS).to(tl.int32) * 4
            re = tl.dot(a, cos_quarters(m, CHANNELS), re, input_precision=PRECISION)
            im = tl.dot(a, cos_quarters(m + CHANNELS, CHANNELS), im, input_precision=PRECISION)
        total += tl.sum(magnitude(re, im), 0, keep_dims=True)
    sums += row.to(tl.int64) * KX
    tl.store(sums + k, total.to(tl.float32), mask=k < KX)
