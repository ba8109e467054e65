"""Which passes of :mod:`skd.kernels.fourier_passes` planes of any size take, and their workspace."""

import math

import torch
import triton
import triton.language as tl
from skd.kernels.fourier_passes import (
    compare_kernel,
    pool_kernel,
    pool_magnitudes_kernel,
    transform_kernel,
    unpool_kernel,
)
from torch import Tensor

WORKSPACE = 64 << 20
"""Bytes, unless one image takes more."""

SUMS = 1 << 20
"""Bytes that the programs' sums of magnitudes may take."""

_BLOCK = 512  # numbers of a program that works number by number
_LINES = 32  # of a transform's program
OPTIONS = {"num_warps": 4, "enable_fp_fusion": True, "num_stages": 1}


def longest_window(channels: int, width: int) -> int:
    return channels // width if channels % width == 0 else -(-channels // width) + 1


def _transform(source, target, lines, scale, along, count, outputs, n, sign, real, precision, shape) -> tuple:
    """The launch of a transform along "rows" or "columns" of planes of `shape`; real: its (source, target)."""
    height, bins = shape[0], shape[1] // 2 + 1
    if along == "rows":
        inner, steps = 1, [1 if is_real else 2 for is_real in real]
        outer = [shape[1] if is_real else bins * 2 for is_real in real]
    else:
        inner, steps, outer = bins, [bins * 2] * 2, [height * bins * 2] * 2
    tile = {"LINES": _LINES, "TERMS": 16, "BINS": 32 if outputs > 16 else 16}
    constants = {
        "INNER": inner,
        **dict(zip(("S_OUTER", "T_OUTER"), outer, strict=True)),
        **dict(zip(("S_STEP", "T_STEP"), steps, strict=True)),
        "S_INNER": 2 * (inner > 1),
        "T_INNER": 2 * (inner > 1),
        "N": n,
        "COUNT": count,
        "OUTPUTS": outputs,
        "SIGN": sign,
        "REAL_SOURCE": real[0],
        "REAL_TARGET": real[1],
        "INDEX": tl.int64 if n * n >= 2**31 else tl.int32,
        **tile,
        "PRECISION": precision,
    }
    programs = triton.cdiv(lines, tile["LINES"]) * triton.cdiv(outputs, tile["BINS"])
    return transform_kernel, programs, (source, target, lines, scale), {**constants, **OPTIONS}


class Chunks:
    """The passes over a map, or over a student's and a teacher's, some images at a time."""

    def __init__(self, student: Tensor, teacher: Tensor | None, difference: bool, with_spectra: bool, precision: str):
        batch, channels, self.height, self.columns = student.shape
        self.student, self.teacher, self.difference, self.precision = student, teacher, difference, precision
        self.width = min(channels, teacher.shape[1]) if teacher is not None else channels
        self.maps = 2 if teacher is not None and (with_spectra or not difference) else 1
        self.bins = self.height * (self.columns // 2 + 1)
        numbers = self.width * (max(self.height * self.columns, 2 * self.bins) + 2 * self.bins)  # of an image
        self.images = max(1, min(batch, WORKSPACE // (4 * numbers * self.maps)))
        allocate = {"dtype": torch.float32, "device": student.device}
        planes = self.maps * self.images * self.width
        # Passes go from one to the other: planes, rows, columns; and back.
        self.first = torch.empty(planes * max(self.height * self.columns, 2 * self.bins), **allocate)
        self.second = torch.empty(planes * 2 * self.bins, **allocate)

    def __iter__(self):
        """First image and number of images of each chunk."""
        batch = self.student.shape[0]
        for image in range(0, batch, self.images):
            yield image, min(self.images, batch - image)

    def __len__(self) -> int:
        return triton.cdiv(self.student.shape[0], self.images)

    def spectra(self, image: int, images: int, scale: float) -> list[tuple]:
        """The passes from the maps to their spectra, which end in `first`."""
        height, columns, bins = self.height, self.columns, self.columns // 2 + 1
        x, y = self.student, self.student if self.teacher is None else self.teacher
        constants = {
            "S_LONGEST": longest_window(x.shape[1], self.width),
            "T_LONGEST": longest_window(y.shape[1], self.width),
            "DIFFERENCE": self.difference,
            "TEACHER": self.teacher is not None,
            "STORE_TEACHER": self.maps == 2,
            "BLOCK": _BLOCK,
        }
        arguments = (x, y, self.first, image, images, x.shape[1], y.shape[1], self.width, height, columns)
        planes = images * self.width
        programs = triton.cdiv(planes * height * columns, _BLOCK)
        result = [(pool_kernel, programs, (*arguments, *x.stride(), *y.stride()), {**constants, **OPTIONS})]
        shape, planes = (height, columns), planes * self.maps
        rows = (self.first, self.second, planes * height, 1.0, "rows", columns, bins, columns, -1, (True, False))
        down = (self.second, self.first, planes * bins, scale, "columns", height, height, height, -1, (False, False))
        return [*result, _transform(*rows, self.precision, shape), _transform(*down, self.precision, shape)]

    def gradient(self, gradient: Tensor, image: int, images: int, scale: float) -> list[tuple]:
        """The passes from the gradient's spectrum, in `first`, to a map."""
        height, columns, bins = self.height, self.columns, self.columns // 2 + 1
        shape, planes = (height, columns), images * self.width
        up = (self.first, self.second, planes * bins, 1.0, "columns", height, height, height, 1, (False, False))
        rows = (self.second, self.first, planes * height, scale, "rows", bins, columns, columns, 1, (False, True))
        arguments = (self.first, gradient, image, images, gradient.shape[1], self.width, height, columns)
        programs = triton.cdiv(images * gradient.shape[1] * height * columns, _BLOCK)
        return [
            _transform(*up, self.precision, shape),
            _transform(*rows, self.precision, shape),
            (unpool_kernel, programs, (*arguments, *gradient.stride()), {"BLOCK": _BLOCK, **OPTIONS}),
        ]

    def parts(self, in_group: int, groups: int) -> int:
        """Into how many sums the magnitudes of a group of planes go, for all groups of a chunk."""
        return max(1, min(in_group, SUMS // (4 * self.maps * self.bins * groups), 64))

    def magnitudes(self, sums: Tensor, planes: int, in_group: int, parts: int) -> tuple:
        """The pass from spectra to ``sums[group, part, map, bin]``."""
        constants = {"MAPS": self.maps, "DIFFERENCE": self.difference, "BLOCK": _BLOCK}
        programs = planes // in_group * parts * triton.cdiv(self.bins, _BLOCK)
        arguments = (self.first, sums, planes, in_group, self.bins, parts)
        return pool_magnitudes_kernel, programs, arguments, {**constants, **OPTIONS}


class LargeLayer:
    """A layer of fourier_align whose planes fit no tile."""

    def __init__(self, layer: dict, precision: str):
        self.layer = layer
        self.chunks = Chunks(
            layer["student"], layer["teacher"], layer["match"] == "complex", layer["spectra"] is not None, precision
        )
        self.programs = [min(images * self.chunks.width, 1024) for _, images in self.chunks]
        self.parts = self.chunks.parts(self.chunks.images * self.chunks.width, len(self.chunks))

    def sums(self) -> Tensor:
        """Workspace for the magnitudes, ``[rows, 2, H, W//2+1]``."""
        return torch.empty((len(self.chunks) * self.parts, 2, self.chunks.bins), device=self.layer["student"].device)

    def launches(self, partials: Tensor, sums: Tensor | None, focal: int) -> list[tuple]:
        """Everything but the finish; `partials` has a number for each of `programs`, `focal` is FOCAL."""
        layer, chunks = self.layer, self.chunks
        norm = 1.0 / math.sqrt(chunks.height * chunks.columns)
        constants = {
            "MATCH": layer["match"],
            "INNER": layer["inner_weight"] != 1.0,
            "FOCAL": focal,
            "BANDS": layer["bands"] is not None,
            "BLOCK": _BLOCK,
        }
        bands = partials if layer["bands"] is None else layer["bands"].contiguous()
        result, done = [], 0
        for n, (image, images) in enumerate(chunks):
            result += chunks.spectra(image, images, norm)
            planes = images * chunks.width
            if sums is not None:
                rows = sums[n * self.parts : (n + 1) * self.parts]
                result.append(chunks.magnitudes(rows, planes, planes, self.parts))
            arguments = (
                chunks.first, bands, partials[done:], planes, chunks.bins, chunks.columns // 2 + 1, chunks.columns,
                layer["inner_weight"], layer["focal"] or 0.0, layer["loss_scale"],
            )  # fmt: skip
            result.append((compare_kernel, self.programs[n], arguments, {**constants, **OPTIONS}))
            done += self.programs[n]
            if layer["gradient"] is not None:
                result += chunks.gradient(layer["gradient"], image, images, norm * layer["gradient_scale"])
        return result
