"""Arithmetic that the Fourier kernels share: DFT matrices, magnitudes, the comparison of a bin of both spectra.

As in ``csrc/common/fourier_compare.h``. Nothing here needs libdevice, so that the interpreter runs it.
"""

import triton
import triton.language as tl


@triton.jit
def cos_quarters(quarters, n):
    """cos(pi/2 * quarters / n) for int32 `quarters`: exact reduction to an eighth of a turn, then Taylor series."""
    turn = (2 * quarters + n) // (2 * n)
    x = (quarters - turn * n).to(tl.float32) / n  # in [-1/2, 1/2]
    y = x * x
    cos = 1.0 + y * (-1.23370055 + y * (0.253669508 + y * (-0.0208634807 + y * (9.19260274e-4 - y * 2.52020424e-5))))
    sin = 1.57079633 + y * (-0.645964098 + y * (0.0796926262 + y * (-0.00468175414 + y * (1.60441185e-4 - y * 3.6e-6))))
    sin = x * sin
    value = tl.where(turn % 2 == 0, cos, sin)
    return tl.where((turn + 1) % 4 < 2, value, -value)


@triton.jit
def quarter_table(N: tl.constexpr, SIZE: tl.constexpr, nothing):
    """cos(2 pi q / (4 N)) for q < SIZE, of which there must be 4 N: what all matrices of a length are looked up in.

    `nothing` is 0. Where the compiler cannot know it, the table and what comes of it are not carried through a loop.
    """
    return cos_quarters(tl.arange(0, SIZE) + nothing, N)


@triton.jit
def _look_up(table, quarters, inside, N: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    at = tl.reshape(tl.where(inside, quarters % (4 * N), 0), [ROWS * COLUMNS])
    return tl.where(inside, tl.reshape(tl.gather(table, at, 0), [ROWS, COLUMNS]), 0.0)


@triton.jit
def row_matrix(table, N: tl.constexpr, BINS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """exp(-2 pi i w k / N), [ROWS, 2*COLUMNS] at [w, (k, re or im)], 0 outside of w < N, k < BINS."""
    w = tl.arange(0, ROWS)[:, None]
    column = tl.arange(0, 2 * COLUMNS)[None, :]
    k = column // 2
    return _look_up(table, 4 * w * k + column % 2 * N, (w < N) & (k < BINS), N, ROWS, 2 * COLUMNS)


@triton.jit
def column_matrix(table, N: tl.constexpr, SIZE: tl.constexpr, IMAGINARY: tl.constexpr):
    """For Re or Im of sum_h z[h] exp(-2 pi i h j / N): what z[(h, re or im)] is multiplied with, [2*SIZE, SIZE].

    From SIZE = 16 on the cosines, or the sines, [SIZE, SIZE]: real and imaginary parts are then products of their own,
    since a thread holds all factors of its results.
    """
    j = tl.arange(0, SIZE)[None, :]
    if SIZE >= 16:
        h = tl.arange(0, SIZE)[:, None]
        return _look_up(table, 4 * h * j + (3 * N if IMAGINARY else 0), (h < N) & (j < N), N, SIZE, SIZE)
    else:
        row = tl.arange(0, 2 * SIZE)[:, None]
        h, part = row // 2, row % 2
        ahead = (1 - part) * N if IMAGINARY else part * (3 * N)
        return _look_up(table, 4 * h * j + ahead, (h < N) & (j < N), N, 2 * SIZE, SIZE)


@triton.jit
def transform_columns(re, im, matrix, other, SIZE: tl.constexpr, PRECISION: tl.constexpr):
    """The sums of `column_matrix` (real `matrix`, imaginary `other`) for z = re + i im, [lines, SIZE]."""
    if SIZE >= 16:
        x = tl.dot(re, matrix, input_precision=PRECISION)
        x = tl.dot(im, other, x, input_precision=PRECISION)
        y = tl.dot(im, matrix, input_precision=PRECISION)
        y = tl.dot(-re, other, y, input_precision=PRECISION)
    else:
        z = tl.reshape(tl.join(re, im), [re.shape[0], 2 * SIZE])
        x = tl.dot(z, matrix, input_precision=PRECISION)
        y = tl.dot(z, other, input_precision=PRECISION)
    return x, y


# --- Magnitudes ---


@triton.jit
def _scaled_size(re, im):
    """|z| * scale and re, im, 1/scale: squares that would overflow or underflow get a power of two."""
    # The fused product is written out, so that equal numbers have equal magnitudes wherever this is inlined.
    x = tl.fma(re, re, im * im)
    scale = tl.where(x < 1e-30, 1.2676506002282294e30, tl.where(x > 1e30, 7.888609052210118e-31, 1.0))  # 2^(+-100)
    back = tl.where(x < 1e-30, 7.888609052210118e-31, tl.where(x > 1e30, 1.2676506002282294e30, 1.0))
    re, im = re * scale, im * scale
    return tl.sqrt_rn(tl.fma(re, re, im * im)), re, im, back


@triton.jit
def polar(re, im):
    """|z| and z/|z|, which is 0 for z = 0."""
    size, re, im, back = _scaled_size(re, im)
    inverse = tl.where(size == 0.0, 0.0, 1.0 / tl.where(size == 0.0, 1.0, size))
    return size * back, re * inverse, im * inverse


@triton.jit
def magnitude(re, im):
    size, _, _, back = _scaled_size(re, im)
    return size * back


@triton.jit
def log_1p(x):
    """log(1 + x) for x >= 0, to a few units in the last place also where x is small."""
    bits = (1.0 + x).to(tl.int32, bitcast=True)
    exponent = (bits - 0x3F3504F3) >> 23  # 1 + x = 2^exponent * m with m in [sqrt(1/2), sqrt(2))
    m = (bits - (exponent << 23)).to(tl.float32, bitcast=True)
    f = tl.where(exponent == 0, x, m - 1.0)
    z = f / (2.0 + f)
    y = z * z
    series = 2.0 + y * (0.666666667 + y * (0.4 + y * (0.285714286 + y * (0.222222222 + y * 0.181818182))))
    return tl.where(x < float("inf"), z * series + exponent.to(tl.float32) * 0.693147181, x)


# --- The comparison of a bin ---


@triton.jit
def compare_bins(s_re, s_im, t_re, t_im, MATCH: tl.constexpr):
    """|difference|^2 and the direction of the gradient. For "complex", (s_re, s_im) is the difference already."""
    if MATCH == "complex":
        squared, g_re, g_im = s_re * s_re + s_im * s_im, s_re, s_im
    else:
        size, unit_re, unit_im = polar(s_re, s_im)
        other = magnitude(t_re, t_im)
        difference = size - other
        along = difference
        if MATCH == "log_magnitude":
            # log1p(a) - log1p(b) without cancellation: the logarithm of the larger over the smaller.
            log = log_1p(tl.abs(difference) / (tl.minimum(size, other) + 1.0))
            difference = tl.where(difference < 0.0, -log, log)
            along = difference / (size + 1.0)
        squared, g_re, g_im = difference * difference, unit_re * along, unit_im * along
    return squared, g_re, g_im


@triton.jit
def focal_weight(squared, largest, focal, FOCAL: tl.constexpr):
    """(squared/largest)^(focal/2), and 0 in a plane without differences. FOCAL: 1, 2, or 3 for any exponent."""
    ratio = squared / tl.where(largest == 0.0, 1.0, largest)
    if FOCAL == 1:
        ratio = tl.sqrt_rn(ratio)
    elif FOCAL == 3:
        power = tl.exp2(tl.log2(tl.where(ratio == 0.0, 1.0, ratio)) * (focal * 0.5))
        ratio = tl.where(ratio == 0.0, 0.0, power)
    return ratio
