"""What ptxas makes of the Triton kernels of fourier_align and spectral_intensity, as test_triton_ahead_of_time.py.

A compilation takes some seconds: most combinations on sm_90, few on the others, in two processes.
"""

import itertools

import pytest
import torch
import triton_ahead_of_time as ahead
from skd.kernels import fourier_align, spectral_intensity

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
ORDERS = list(itertools.product(("nchw", "tokens"), repeat=2))
ALL = ("log_magnitude", 0.6, True)  # match, focal, with bands and spectra
OTHERS = (80, 86, 89, 100, 120)

TILES = [
    *((90, orders, (192, 384), (14, 14), d) for orders in ORDERS for d in ((F32, F32), (BF16, F32))),
    *((90, orders, (192, 768), (7, 7), (BF16, BF16)) for orders in ORDERS[::3]),
    *((90, ORDERS[0], channels, (14, 14), (F16, BF16)) for channels in ((192, 320), (320, 192), (384, 192))),
    *((90, orders, (96, 96), (side, side), (F32, F32)) for side in (4, 8, 16, 28) for orders in ORDERS[::3]),
    (90, ORDERS[3], (192, 384), (14, 14), (F32, F32), *ALL),
    *((a, ORDERS[3], (192, 384), (side, side), (F32, F32)) for a in OTHERS for side in (7, 14)),
]
# What does not fit the registers: the largest planes, and tiles that walk with every option. A bound of the accesses.
SPILLED = {
    (90, ORDERS[3], (192, 384), (7, 7), (F32, F32), *ALL): 16,
    (90, ORDERS[0], (96, 96), (32, 32), (F32, F32)): 160,
    (90, ORDERS[3], (96, 96), (32, 32), (F32, F32), *ALL): 360,
    (90, ORDERS[3], (96, 96), (28, 28), (F32, F32), *ALL): 16,
}
LARGE = [
    (a, ("nchw", "tokens"), channels, (56, 56), (F32, BF16), *ALL)
    for a, channels in ((80, (96, 192)), (90, (192, 96)), (120, (96, 128)))
]
INTENSITY = [
    *((90, order, shape, "channel", F32) for order in ("nchw", "tokens") for shape in ((384, 14, 14), (768, 7, 7))),
    (90, "tokens", (192, 14, 14), "channel", BF16),
    (90, "nchw", (37, 14, 14), "channel", F32),
    *((90, "nchw", (192, side, side), "space", F32) for side in (7, 14, 32, 56)),
    *((a, "tokens", (384, 14, 14), axis, F32) for a in OTHERS for axis in ("channel", "space")),
]


@pytest.fixture(scope="module")
def compiled():
    work = [(ahead.compile_fourier, x) for x in (*TILES, *SPILLED, *LARGE)]
    with ahead.compiled_elsewhere(work + [(ahead.compile_intensity, x) for x in INTENSITY]) as result:
        yield result


def check(codes, spilled=0):
    for kernel, code in codes:
        assert code.local <= (spilled if kernel == "fourier_tile_kernel" else 0), (kernel, code)
        assert code.atomics == 0 and code.registers <= 255, (kernel, code)


@pytest.mark.slow
@pytest.mark.parametrize("case", TILES, ids=ahead.name)
def test_small_planes_take_one_kernel_without_spills(compiled, case):
    codes = compiled(ahead.compile_fourier, case)
    assert codes[0][0] == "fourier_tile_kernel"
    assert {kernel for kernel, _ in codes[1:]} <= {"finish_kernel", "finish_spectra_kernel"}
    check(codes)
    if max(case[3]) <= 14 and len(case) == 5:
        assert codes[0][1].registers <= 168  # three programs of four warps on a multiprocessor


@pytest.mark.slow
@pytest.mark.parametrize("case", SPILLED, ids=ahead.name)
def test_what_is_spilled_is_bounded(compiled, case):
    check(compiled(ahead.compile_fourier, case), SPILLED[case])


@pytest.mark.slow
@pytest.mark.parametrize("case", LARGE, ids=ahead.name)
def test_the_passes_for_large_planes(compiled, case):
    codes = compiled(ahead.compile_fourier, case)
    assert {"pool_kernel", "transform_kernel", "compare_kernel", "unpool_kernel"} <= {kernel for kernel, _ in codes}
    check(codes)


@pytest.mark.slow
@pytest.mark.parametrize("case", INTENSITY, ids=ahead.name)
def test_intensity(compiled, case):
    check(compiled(ahead.compile_intensity, case))


# --- The choice, a pure function of shapes, strides and dtypes ---


def test_each_layer_has_its_path():
    def kernels(size, channels=(16, 16)):
        layer = ahead.make_fourier_layer(("nchw", "nchw"), channels, size, (F32, F32))
        return [launch[0].fn.__name__ for launch in fourier_align.launches([layer], torch.empty(1))]

    for size in ((1, 1), (7, 7), (14, 14), (32, 32), (1, 32), (31, 2)):
        for channels in ((16, 16), (16, 37), (37, 16)):
            assert kernels(size, channels) == ["fourier_tile_kernel", "finish_kernel"]
    assert kernels((33, 4))[0] == kernels((4, 33))[0] == "pool_kernel"


def test_programs_walk_where_spectra_are_wanted():
    layer = ahead.make_fourier_layer(("nchw", "nchw"), (4096, 4096), (14, 14), (F32, F32), everything=True)
    plan = fourier_align.plan(layer)
    assert plan.programs * layer["spectra"].numel() * 4 <= fourier_align.WORKSPACE < 2 * plan.programs * 1792
    layer["spectra"] = None
    assert fourier_align.plan(layer).programs == 4 * 4096 / plan.constants["PLANES"]


def test_maps_that_span_two_gigabytes_of_numbers_use_64_bit_offsets():
    layer = ahead.make_fourier_layer(("nchw", "nchw"), (64, 64), (14, 14), (F32, F32))
    assert "int32" in str(fourier_align.plan(layer).constants["INDEX"])
    layer["student"] = torch.empty_strided((4, 64, 14, 14), (1, 2**31, 14, 1), device="meta")
    assert "int64" in str(fourier_align.plan(layer).constants["INDEX"])


@pytest.mark.parametrize("channels", [192, 384, 768, 1024, 1280, 2048, 96, 640])
def test_the_usual_numbers_of_channels_have_two_factors(channels):
    first, second = spectral_intensity.factors(channels)
    assert first * second == channels and first <= 64 and second <= 32


@pytest.mark.parametrize("channels", [1, 2, 7, 37, 101, 67 * 16, 4096])
def test_others_are_one_product(channels):
    assert spectral_intensity.factors(channels) is None
