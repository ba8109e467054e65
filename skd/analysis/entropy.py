"""Entropy of a layer's channel values, counted in whole numbers so that no order of additions can change it."""

from collections.abc import Sequence

import torch
from torch import Tensor

from skd.ops.channel_histogram import bins_holding

BINS = 100
_NARROWEST = 1e-30  # a range below it counts as one value: 100 / range would overflow


class ChannelEntropy:
    """Accumulates, over images, how the C channel values of a position spread over 100 bins.

    As in the analysis of "Distillation Dynamics: Towards Understanding Feature-Based Distillation in Vision
    Transformers" (AAAI 2026, arXiv 2511.06848): for every position the histogram of its C channel values in 100 bins
    over a range that all layers share, its Shannon entropy in bits, and the mean over positions and images. There the
    range is that of all images together; here each image has its own, from its lowest to its highest number in any of
    the layers, so that images can be seen once, one batch at a time, and in any batches. For one image both agree.

    At most log2(min(C, 100)) bits; 0 where all channels of a position fall into one bin. A layer whose numbers are
    small beside those of another has a low entropy for that reason, and other layers in the analysis change the range.
    """

    def __init__(self, channels: Sequence[int]):
        self._channels = list(channels)
        # For each layer, how many bins of all positions held n values, n = 0 .. C: all that the entropy needs.
        self._bins_holding = [torch.zeros(c + 1, dtype=torch.int64) for c in channels]
        self._positions = [0] * len(self._channels)

    def add(self, maps: Sequence[Tensor], backend: str | None = None) -> None:
        """Count one batch: the maps ``[B, C, H, W]`` of all layers, finite."""
        low = torch.stack([x.amin((1, 2, 3)).to(torch.float64) for x in maps]).amin(0)
        high = torch.stack([x.amax((1, 2, 3)).to(torch.float64) for x in maps]).amax(0)
        span = high - low
        scale = torch.where(span > _NARROWEST, BINS / span, 0.0)
        for layer, x in enumerate(maps):
            self._bins_holding[layer] += bins_holding(x, low, scale, BINS, backend)
            self._positions[layer] += x.shape[0] * x.shape[2] * x.shape[3]

    def bits(self) -> Tensor:
        """Mean entropy of every layer so far: [L] float64."""
        entropies = []
        for channels, holding, positions in zip(self._channels, self._bins_holding, self._positions, strict=True):
            n = torch.arange(1, channels + 1, dtype=torch.float64)
            # -sum (n/C) log2(n/C) over the bins of a position is log2 C - sum n log2 n / C.
            inner = (holding[1:] * n * n.log2()).sum() / (channels * positions)
            entropies.append((torch.tensor(float(channels)).double().log2() - inner).clamp(min=0))
        return torch.stack(entropies)
