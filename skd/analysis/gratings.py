"""Images and maps whose spectra are known: what an analysis must find in them is no matter of opinion."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

ORIENTATIONS = 8
"""Equal steps over 180 degrees."""


@dataclass(frozen=True)
class Grating:
    """A cosine with ``ky`` cycles down and ``kx`` across the image: one frequency of its Fourier transform.

    ``kx`` is not negative, and ``ky`` is positive where it is 0, so that (ky % H, kx) is the bin of ``rfft2`` in which
    all of it lies, at a magnitude of half its amplitude (``norm="forward"``).
    """

    ky: int
    kx: int
    phase: float

    def image(self, size: int, channels: int = 3) -> Tensor:
        """[channels, size, size] float32 in [-1, 1], all channels alike."""
        n = torch.arange(size, dtype=torch.float64) / size
        angle = 2 * math.pi * (self.ky * n[:, None] + self.kx * n[None, :]) + self.phase
        return angle.cos().float().expand(channels, size, size).contiguous()


def gratings(size: int) -> list[Grating]:
    """All different gratings of 8 orientations and of 1, 2, 4, ... cycles, below the finest that ``size`` can hold.

    Frequencies are rounded to whole cycles, so that every grating is periodic in the image and has a single peak. A
    grating depends on ``size`` and its place in the list alone.
    """
    if size < 3:
        raise ValueError(f"an image of {size} x {size} pixels holds no grating; give 3 or more")
    found: dict[tuple[int, int], Grating] = {}
    cycles = 1
    while 2 * cycles < size:
        for step in range(ORIENTATIONS):
            theta = math.pi * step / ORIENTATIONS
            ky, kx = round(cycles * math.sin(theta)), round(cycles * math.cos(theta))
            if kx < 0:  # the same cosine, seen from the other side
                ky, kx = -ky, -kx
            if kx == 0:
                ky = abs(ky)
            phase = 2 * math.pi * ((len(found) * 0.6180339887498949) % 1)  # spread evenly, without a generator
            found.setdefault((ky, kx), Grating(ky, kx, phase))
        cycles *= 2
    return list(found.values())


def grating_batches(size: int, channels: int, batches: int, batch_size: int) -> Iterator[Tensor]:
    """``batches`` batches ``[batch_size, channels, size, size]``; behind the last grating the first follows again."""
    every = gratings(size)
    for first in range(0, batches * batch_size, batch_size):
        chosen = (every[index % len(every)] for index in range(first, first + batch_size))
        yield torch.stack([grating.image(size, channels) for grating in chosen])


def channel_grating(channels: int, cycles: int, height: int = 7, width: int = 7) -> Tensor:
    """A map ``[1, channels, height, width]`` with x[c] = cos(2 pi cycles c / channels) at every position.

    Its channel intensity is 1/2 in the bin ``cycles`` (1 in bin 0 and, for even C, in bin C/2) and 0 elsewhere.
    """
    c = torch.arange(channels, dtype=torch.float64)
    return (2 * math.pi * cycles * c / channels).cos().float().view(1, -1, 1, 1).expand(1, channels, height, width)
