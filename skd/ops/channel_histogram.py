"""Histograms of the channel values of every position of a map, counted in whole numbers. For analysis, without grad."""

import torch
from torch import Tensor

from skd.ops import backends
from skd.ops.extensions import map_of


def bins_holding(x: Tensor, low: Tensor, scale: Tensor, bins: int, backend: str | None = None) -> Tensor:
    """How many bins of all positions hold n of their position's C values, for n = 0 .. C.

    Args:
        x: ``[B, C, H, W]``, floating and finite.
        low, scale: ``[B]`` float64 on the map's device: a value v of an image is in bin ``(v - low) * scale``, rounded
            down, or in the nearest there is.
        bins: number of bins.
        backend: ``"reference"`` for plain PyTorch; with any other the kernel, where there is one: for maps on a CPU.

    Returns:
        ``[C+1]`` int64 on the CPU; the sum is ``B * H * W * bins``. The order of additions is of no consequence.
    """
    extension = backends.load("cpu")
    wants_reference = backends.requested(backend) == "reference"
    if x.device.type != "cpu" or isinstance(extension, str) or wants_reference:
        return _plain(x, low, scale, bins)
    x, offset, scale = x.resolve_neg(), (-low * scale).contiguous(), scale.contiguous()
    holding = torch.zeros(x.shape[1] + 1, dtype=torch.int64)
    described, threads = map_of(extension, x), torch.get_num_threads()
    extension.count_channels(described, offset.data_ptr(), scale.data_ptr(), bins, threads, holding.data_ptr())
    return holding


def _plain(x: Tensor, low: Tensor, scale: Tensor, bins: int) -> Tensor:
    x = x if x.dtype == torch.float64 else x.float()
    batch, channels, height, width = x.shape
    positions = torch.arange(batch * height * width, dtype=torch.int32, device=x.device) * bins
    if x.stride(1) == 1:  # walk the map in the order of its memory
        x = x.permute(0, 2, 3, 1)
        positions = positions.view(batch, height, width, 1)
    else:
        positions = positions.view(batch, 1, height, width)
    offset = (-low * scale).to(x.dtype).view(-1, 1, 1, 1)
    place = torch.addcmul(offset, x, scale.to(x.dtype).view(-1, 1, 1, 1)).to(torch.int32)
    place.clamp_(0, bins - 1).add_(positions)
    counts = torch.bincount(place.flatten(), minlength=positions.numel() * bins)
    return torch.bincount(counts, minlength=channels + 1).cpu()
