"""channel_histogram: the kernel and plain PyTorch against numpy, on values whose bin is known."""

import numpy as np
import pytest
import torch
from cases import BF16, F16, F32, F64, ORDERS

from skd.ops import backends
from skd.ops.channel_histogram import bins_holding

BINS = 20
NO_KERNEL = backends.load("cpu") if isinstance(backends.load("cpu"), str) else ""
BACKENDS = ["reference", pytest.param("cpu", marks=pytest.mark.skipif(bool(NO_KERNEL), reason=NO_KERNEL))]


def map_with_known_bins(order, shape, dtype):
    """A map, each value in the middle of its bin, and the bins; images have ranges of their own."""
    generator = torch.Generator().manual_seed(0)
    bins = (torch.randn(shape, generator=generator) * 4 + 9).long()  # some beyond either end
    low, width = (
        torch.tensor([-3.0, 64.0, 0.0])[: shape[0]].double(),
        torch.tensor([0.5, 2.0, 0.25])[: shape[0]].double(),
    )
    values = low.view(-1, 1, 1, 1) + (bins + 0.5) * width.view(-1, 1, 1, 1)
    x = ORDERS[order](*shape).to(dtype)
    return x.copy_(values), bins.clamp(0, BINS - 1), low, 1 / width


def expected(bins):
    channels = bins.shape[1]
    positions = bins.permute(0, 2, 3, 1).reshape(-1, channels).numpy()
    return np.bincount(np.concatenate([np.bincount(p, minlength=BINS) for p in positions]), minlength=channels + 1)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [F32, F64, BF16, F16], ids=str)
@pytest.mark.parametrize("order", [order for order in ORDERS if order != "expanded"])
@pytest.mark.parametrize(
    "shape", [(3, 64, 7, 7), (2, 33, 5, 9), (1, 1, 1, 1), (2, 300, 6, 6), (2, 5, 14, 14), (1, 3, 1, 200)], ids=str
)
def test_counts_are_those_of_numpy(backend, dtype, order, shape):
    x, bins, low, scale = map_with_known_bins(order, shape, dtype)
    found = bins_holding(x, low, scale, BINS, backend)
    assert found.dtype == torch.int64 and found.tolist() == expected(bins).tolist()
    assert found.sum() == shape[0] * shape[2] * shape[3] * BINS


@pytest.mark.parametrize("backend", BACKENDS)
def test_nothing_in_nothing_and_any_number_of_threads(backend):
    x, _, low, scale = map_with_known_bins("tokens", (3, 64, 14, 14), F32)
    assert bins_holding(x[:0], low[:0], scale[:0], BINS, backend).tolist() == [0] * 65
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            found.append(bins_holding(x, low, scale, BINS, backend))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("order", ["nchw", "tokens"])
def test_what_is_not_finite_is_in_some_bin(backend, order):
    x, _, low, scale = map_with_known_bins(order, (2, 64, 3, 3), F32)
    x[0, 3, 1, 1], x[0, 5, 1, 1], x[1, 7, 2, 2] = torch.nan, torch.inf, -torch.inf
    assert bins_holding(x, low, scale, BINS, backend).sum() == 2 * 9 * BINS


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_negation_that_was_put_off_is_carried_out(backend):
    x = torch.randn(2, 16, 5, 5, dtype=torch.complex64).conj().imag
    low, scale = torch.full((2,), -4.0, dtype=F64), torch.full((2,), 12.5, dtype=F64)
    assert x.is_neg()
    assert torch.equal(bins_holding(x, low, scale, BINS, backend), bins_holding(x.clone(), low, scale, BINS, backend))
