"""spectral_intensity in Triton: the kernel for an axis and size, how it is cut, and the launches.

Over space, planes of at most 32 x 32 are transformed in one pass; larger ones by :mod:`skd.kernels.fourier_passes`.
Over channels, a number of them that has two factors of the right size is transformed in two steps, any other as a
matrix product. A last small launch adds the programs' sums.
"""

import torch
import triton
import triton.language as tl
from skd.kernels.fourier_align import FUSION, LARGEST_SIDE, PRECISION, finish_spectra, plane_tile, spans_32_bits
from skd.kernels.fourier_large import Chunks
from skd.kernels.intensity_kernels import channel_factors_kernel, channel_kernel, space_kernel
from skd.kernels.spectral_align import on_device_of
from torch import Tensor

_PARTS = 16  # of an image, at most: they depend on nothing but its shape
_TILE = 512  # numbers


def _index(x: Tensor) -> tl.dtype:
    return tl.int64 if spans_32_bits(x, x.shape[1]) else tl.int32


def _sums(x: Tensor, parts: int, bins: int) -> Tensor:
    return torch.empty((x.shape[0], parts, bins), dtype=torch.float32, device=x.device)


def _over_space(x: Tensor) -> tuple[Tensor, list[tuple]]:
    batch, channels, height, columns = x.shape
    bins = height * (columns // 2 + 1)
    if max(height, columns) > LARGEST_SIDE:
        return _over_large_space(x)
    tile = plane_tile(height, columns)
    area = tile["ROWS"] * tile["COLUMNS"]
    planes = max(1, _TILE // area)
    parts = min(triton.cdiv(channels, planes), _PARTS)
    sums = _sums(x, parts, bins)
    constants = {"HEIGHT": height, "WIDTH": columns, "PLANES": planes, **tile, "INDEX": _index(x)}
    options = {**constants, "PRECISION": PRECISION, "num_warps": 8 if area > _TILE else 4, **FUSION}
    return sums, [(space_kernel, batch * parts, (x, sums, channels, parts, *x.stride()), options)]


def _over_large_space(x: Tensor) -> tuple[Tensor, list[tuple]]:
    chunks, channels = Chunks(x, None, False, True, PRECISION), x.shape[1]
    parts = min(channels, max(1, 8192 // chunks.bins))
    sums, result = _sums(x, parts, chunks.bins), []
    for image, images in chunks:
        result += chunks.spectra(image, images, 1.0)
        result.append(chunks.magnitudes(sums[image : image + images], images * channels, channels, parts))
    return sums, result


def factors(channels: int) -> tuple[int, int] | None:
    """The two factors whose transforms take the fewest products, padded as they are, or None if it is one step."""
    best, least = None, channels * 2 * (channels // 2 + 1)
    for second in range(2, 33):
        first = channels // second
        if channels % second == 0 and 2 <= first <= 64:
            tile = plane_tile(second, first)
            rows, bins = tile["ROWS"], tile["BINS"]
            products = rows * tile["COLUMNS"] * 2 * bins + bins * (2 * rows) ** 2
            if products < least:
                best, least = (first, second), products
    return best


def _over_channels(x: Tensor) -> tuple[Tensor, list[tuple]]:
    batch, channels, height, columns = x.shape
    positions, bins, pair = height * columns, channels // 2 + 1, factors(channels)
    flat = x.stride(2) == columns * x.stride(3)
    constants = {"FLAT": flat, "INDEX": _index(x), "PRECISION": PRECISION, **FUSION}
    if pair:
        tile = plane_tile(pair[1], pair[0])
        area = tile["ROWS"] * tile["COLUMNS"]
        planes = max(1, _TILE // area)
        constants |= {"FIRST": pair[0], "SECOND": pair[1], "PLANES": planes, **tile}
        constants["num_warps"] = 4 if area <= _TILE else 8
        kernel, blocks, groups = channel_factors_kernel, 1, triton.cdiv(positions, planes)
    else:
        tile = {"CHANNELS": channels, "POSITIONS": 32, "TERMS": 16, "BINS": 32 if bins > 16 else 16}
        if channels**2 >= 2**31:
            constants["INDEX"] = tl.int64
        constants |= {**tile, "num_warps": 4}
        kernel, blocks, groups = channel_kernel, triton.cdiv(bins, tile["BINS"]), triton.cdiv(positions, 32)
    parts = min(groups, _PARTS)
    sums = _sums(x, parts, bins)
    return sums, [(kernel, batch * parts * blocks, (x, sums, positions, columns, parts, *x.stride()), constants)]


def launches(x: Tensor, axis: str, scale: float, out: Tensor) -> list[tuple]:
    """What a call runs, in order: ``(kernel, programs, arguments, constants and options)``."""
    if x.numel() == 0:
        return []
    sums, result = _over_channels(x) if axis == "channel" else _over_space(x)
    number = x.shape[2] * x.shape[3] if axis == "channel" else x.shape[1]
    return [*result, finish_spectra(sums, out, x.shape[0], sums.shape[1], scale / number)]


def run(x: Tensor, axis: str, scale: float, out: Tensor) -> None:
    """Fills `out`; the contract of ``skd.ops.spectral_intensity.IMPLEMENTATIONS``."""
    with on_device_of(out):
        for kernel, programs, arguments, options in launches(x, axis, scale, out):
            kernel[(programs,)](*arguments, **options)
