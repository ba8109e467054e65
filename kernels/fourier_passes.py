"""Planes that fit no tile: some passes through a workspace, correct for any lengths, not fast.

Both pooled maps are copied as float32 planes, transformed over rows and then over columns by tiled matrix products, and
compared; the gradient goes the same way back. Matrices are made where they are used, their angles reduced exactly.
"""

import triton
import triton.language as tl
from skd.kernels.fourier_arithmetic import compare_bins, cos_quarters, focal_weight, magnitude


@triton.jit
def _pooled(base, stride, i, channels, width, mask, LONGEST: tl.constexpr):
    begin, end = i * channels // width, ((i + 1) * channels + width - 1) // width
    x = tl.zeros(mask.shape, tl.float32)
    for j in range(LONGEST):
        x += tl.load(base + (begin + j) * stride, mask=mask & (begin + j < end), other=0.0).to(tl.float32)
    return x / (end - begin).to(tl.float32)


@triton.jit(do_not_specialize=["image", "images", "s_channels", "t_channels", "width", "height", "columns"])
def pool_kernel(
    student, teacher, planes, image, images, s_channels, t_channels, width, height, columns,
    s_b, s_c, s_h, s_w, t_b, t_c, t_h, t_w,
    S_LONGEST: tl.constexpr, T_LONGEST: tl.constexpr,
    DIFFERENCE: tl.constexpr, TEACHER: tl.constexpr, STORE_TEACHER: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Pooled maps of some images side by side, [maps, images, width, H, W]; the student's less the teacher's where
    the difference is transformed."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    numbers = images.to(tl.int64) * width * height * columns
    mask = at < numbers
    w, row = at % columns, at // columns
    h, plane = row % height, row // height
    i, b = plane % width, plane // width + image
    x = _pooled(student + (b * s_b + h * s_h + w * s_w), s_c, i, s_channels, width, mask, S_LONGEST)
    if TEACHER:
        y = _pooled(teacher + (b * t_b + h * t_h + w * t_w), t_c, i, t_channels, width, mask, T_LONGEST)
        if DIFFERENCE:
            x -= y
        if STORE_TEACHER:
            tl.store(planes + numbers + at, y, mask=mask)
    tl.store(planes + at, x, mask=mask)


@triton.jit(do_not_specialize=["lines"])
def transform_kernel(
    source, target, lines, scale,
    INNER: tl.constexpr, S_OUTER: tl.constexpr, S_INNER: tl.constexpr, S_STEP: tl.constexpr,
    T_OUTER: tl.constexpr, T_INNER: tl.constexpr, T_STEP: tl.constexpr,
    N: tl.constexpr, COUNT: tl.constexpr, OUTPUTS: tl.constexpr, SIGN: tl.constexpr,
    REAL_SOURCE: tl.constexpr, REAL_TARGET: tl.constexpr, INDEX: tl.constexpr,
    LINES: tl.constexpr, TERMS: tl.constexpr, BINS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """target[line, k < OUTPUTS] = scale * sum over n < COUNT of source[line, n] exp(SIGN 2 pi i n k / N).

    Line l begins at ``l // INNER * OUTER + l % INNER * INNER_STRIDE`` and goes on in STEPs, in numbers, of which a
    complex one is two that follow each other.
    """
    blocks: tl.constexpr = (OUTPUTS + BINS - 1) // BINS
    line = (tl.program_id(0) // blocks).to(tl.int64) * LINES + tl.arange(0, LINES)[:, None]
    k = tl.program_id(0) % blocks * BINS + tl.arange(0, BINS)[None, :]
    inside = line < lines
    source += line // INNER * S_OUTER + line % INNER * S_INNER
    re = tl.zeros([LINES, BINS], tl.float32)
    im = tl.zeros([LINES, BINS], tl.float32)
    for start in range(0, COUNT, TERMS):
        n = start + tl.arange(0, TERMS)
        mask = inside & (n[None, :] < COUNT)
        a = tl.load(source + n[None, :].to(tl.int64) * S_STEP, mask=mask, other=0.0)
        m = (n[:, None].to(INDEX) * k % N).to(tl.int32) * 4
        cos, sin = cos_quarters(m, N), cos_quarters(m + 3 * N, N) * SIGN
        re = tl.dot(a, cos, re, input_precision=PRECISION)
        if not REAL_TARGET:
            im = tl.dot(a, sin, im, input_precision=PRECISION)
        if not REAL_SOURCE:
            a = tl.load(source + 1 + n[None, :].to(tl.int64) * S_STEP, mask=mask, other=0.0)
            re = tl.dot(a, -sin, re, input_precision=PRECISION)
            if not REAL_TARGET:
                im = tl.dot(a, cos, im, input_precision=PRECISION)
    target += line // INNER * T_OUTER + line % INNER * T_INNER + k.to(tl.int64) * T_STEP
    mask = inside & (k < OUTPUTS)
    tl.store(target, re * scale, mask=mask)
    if not REAL_TARGET:
        tl.store(target + 1, im * scale, mask=mask)


@triton.jit
def _load_bin(at, mask):
    return tl.load(at, mask=mask, other=0.0), tl.load(at + 1, mask=mask, other=0.0)


@triton.jit
def _load_pair(at, apart, mask, MATCH: tl.constexpr):
    """A bin of the student's spectrum, or of the difference's, and of the teacher's where that is compared with."""
    s_re, s_im = _load_bin(at, mask)
    t_re, t_im = s_re, s_im
    if MATCH != "complex":
        t_re, t_im = _load_bin(at + apart, mask)
    return s_re, s_im, t_re, t_im


@triton.jit(do_not_specialize=["planes", "bins", "row_bins", "columns"])
def compare_kernel(
    spectra, bands, partials, planes, bins, row_bins, columns, inner_weight, focal, loss_scale,
    MATCH: tl.constexpr, INNER: tl.constexpr, FOCAL: tl.constexpr, BANDS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Puts the gradient with respect to the student's bins in their place; a program walks planes."""
    loss = tl.program_id(0).to(tl.float64) * 0.0
    numbers = bins.to(tl.int64) * 2
    apart = numbers * planes  # from the student's spectrum to the teacher's
    for plane in range(tl.program_id(0), planes, tl.num_programs(0)):
        s_at = spectra + numbers * plane
        largest = 0.0
        if FOCAL > 0:
            most = tl.zeros([BLOCK], tl.float32)
            for start in range(0, bins, BLOCK):
                i = start + tl.arange(0, BLOCK)
                s_re, s_im, t_re, t_im = _load_pair(s_at + i * 2, apart, i < bins, MATCH)
                squared, _, _ = compare_bins(s_re, s_im, t_re, t_im, MATCH)
                most = tl.maximum(most, squared)
            largest = tl.max(most)
        for start in range(0, bins, BLOCK):
            i = start + tl.arange(0, BLOCK)
            s_re, s_im, t_re, t_im = _load_pair(s_at + i * 2, apart, i < bins, MATCH)
            squared, g_re, g_im = compare_bins(s_re, s_im, t_re, t_im, MATCH)
            weight = tl.full([BLOCK], 1.0, tl.float32)
            if INNER:
                kx = i % row_bins
                weight *= tl.where((kx > 0) & (2 * kx < columns), inner_weight, 1.0)
            if FOCAL > 0:
                weight *= focal_weight(squared, largest, focal, FOCAL)
            if BANDS:
                weight *= tl.load(bands + i, mask=i < bins, other=0.0)
            loss += tl.sum(weight * squared).to(tl.float64)
            tl.store(s_at + i * 2, g_re * weight, mask=i < bins)
            tl.store(s_at + i * 2 + 1, g_im * weight, mask=i < bins)
    tl.store(partials + tl.program_id(0), loss * loss_scale)


@triton.jit(do_not_specialize=["planes", "in_group", "bins", "parts"])
def pool_magnitudes_kernel(
    spectra, sums, planes, in_group, bins, parts, MAPS: tl.constexpr, DIFFERENCE: tl.constexpr, BLOCK: tl.constexpr
):
    """sums[group, part, map, bin]: the magnitudes of every parts-th plane of a group of planes that follow each other.

    With DIFFERENCE the first map's spectra are those of the student less the teacher.
    """
    blocks = (bins + BLOCK - 1) // BLOCK
    i = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    row = (tl.program_id(0) // blocks).to(tl.int64)
    group, part = row // parts, row % parts
    apart = planes.to(tl.int64) * bins * 2
    first, second = tl.zeros([BLOCK], tl.float64), tl.zeros([BLOCK], tl.float64)
    for n in range(part, in_group, parts):
        at = spectra + (group * in_group + n) * bins * 2 + i * 2
        re, im = _load_bin(at, i < bins)
        if MAPS == 2:
            t_re, t_im = _load_bin(at + apart, i < bins)
            second += magnitude(t_re, t_im)
            if DIFFERENCE:
                re, im = re + t_re, im + t_im
        first += magnitude(re, im)
    sums += row * MAPS * bins
    tl.store(sums + i, first.to(tl.float32), mask=i < bins)
    if MAPS == 2:
        tl.store(sums + bins + i, second.to(tl.float32), mask=i < bins)


@triton.jit(do_not_specialize=["image", "images", "channels", "width", "height", "columns"])
def unpool_kernel(
    planes, gradient, image, images, channels, width, height, columns, g_b, g_c, g_h, g_w, BLOCK: tl.constexpr
):
    """Gives each student channel its share of the gradients of the windows it is in: the adjoint of `pool_kernel`."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = at < images.to(tl.int64) * channels * height * columns
    w, row = at % columns, at // columns
    h, plane = row % height, row // height
    c, b = plane % channels, plane // channels
    before, last = c * width // channels, ((c + 1) * width - 1) // channels  # windows with the channel
    place = ((b * width + last) * height + h) * columns + w
    length = ((last + 1) * channels + width - 1) // width - last * channels // width
    g = tl.load(planes + place, mask=mask, other=0.0) / length.to(tl.float32)
    place -= (last - before) * height * columns
    length = ((before + 1) * channels + width - 1) // width - before * channels // width
    g += tl.load(planes + place, mask=mask & (before < last), other=0.0) / length.to(tl.float32)
    gradient += (b + image) * g_b + c * g_c + h * g_h + w * g_w
    tl.store(gradient, g.to(gradient.dtype.element_ty), mask=mask)
