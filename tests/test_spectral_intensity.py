"""spectral_intensity: every backend against float64, and what the numbers mean."""

import math

import pytest
import torch
from cases import BF16, F16, F32, F64, ORDERS, cast
from hypothesis import given
from hypothesis import strategies as st
from kernels_here import each_with_kernels, kernels, using

import skd
from skd import reference
from skd.ops.spectral_intensity import AXES, intensity_per_image

WITHOUT_FLOAT64 = ("cuda", "triton")

SIZES = [
    (2, 16, 4, 4),
    (3, 96, 7, 7),
    (1, 192, 14, 14),
    (2, 384, 7, 7),
    (1, 768, 3, 3),
    (1, 128, 28, 28),
    (1, 24, 56, 56),
    (2, 1, 5, 5),
    (2, 2, 1, 1),
    (1, 37, 9, 5),
    (2, 75, 2, 13),
    (1, 101, 3, 1),
    (1, 320, 1, 7),
    (1, 3, 33, 40),
    (1, 6, 1, 300),
    (2, 4, 97, 1),
    (1, 640, 2, 2),
    (1, 1280, 2, 3),
    (1, 2048, 1, 2),
    (1, 1000, 1, 1),
]


def expected(x, axis):
    return reference.spectral_intensity(x.double(), axis)


def assert_close(x, axis, got, scale=1.0):
    true = expected(x, axis) * scale
    tolerance = 1e-12 if x.dtype == F64 else 1e-6
    assert got.dtype == (F64 if x.dtype == F64 else F32) and got.shape == true.shape
    # A mean of few magnitudes may have met a small one, known only to the rounding of the whole transform.
    size = x.double().abs().max().item() * math.sqrt(x.shape[1] if axis == "channel" else x.shape[2] * x.shape[3])
    torch.testing.assert_close(got.double(), true, rtol=tolerance, atol=3 * tolerance * size * scale + 1e-44)


@pytest.mark.parametrize("axis", AXES)
@pytest.mark.parametrize("kernel, case", each_with_kernels([(order, *size) for size in SIZES for order in ORDERS]))
def test_intensity_is_that_of_float64(kernel, case, axis, poisoned):
    torch.manual_seed(0)
    order, *size = case
    x = ORDERS[order](*size)
    with using(kernel) as backend:
        assert_close(x, axis, intensity_per_image(x, axis, norm="backward", backend=backend))


@pytest.mark.parametrize("axis", AXES)
@pytest.mark.parametrize("order", ["nchw", "tokens", "sliced"])
@pytest.mark.parametrize("dtype", [F64, BF16, F16])
def test_every_dtype(dtype, order, axis, backend, poisoned):
    if dtype == F64 and backend in WITHOUT_FLOAT64:
        pytest.skip("this backend refuses float64")
    for size in ((2, 48, 7, 7), (1, 192, 14, 14), (2, 37, 5, 3)):
        x = cast(ORDERS[order](*size), dtype)
        assert_close(x, axis, intensity_per_image(x, axis, norm="backward", backend=backend))


@given(
    size=st.tuples(st.integers(1, 3), st.integers(1, 260), st.integers(1, 12), st.integers(1, 20)),
    order=st.sampled_from(sorted(ORDERS)),
    axis=st.sampled_from(AXES),
    dtype=st.sampled_from([F32, F64, BF16, F16]),
)
def test_any_shape_order_and_dtype(size, order, axis, dtype):
    torch.manual_seed(1)
    x = cast(ORDERS[order](*size), dtype)
    for kernel in kernels():
        with using(kernel) as name:
            if dtype == F64 and name in WITHOUT_FLOAT64:
                continue
            assert_close(x, axis, intensity_per_image(x, axis, norm="backward", backend=name))


def test_the_mean_over_the_batch_and_the_three_norms(backend):
    x = torch.randn(5, 48, 7, 9)
    for axis, n in (("channel", 48), ("space", 63)):
        for norm, scale in (("forward", 1 / n), ("ortho", n**-0.5), ("backward", 1.0)):
            got = skd.spectral_intensity(x, axis, norm=norm, backend=backend)
            torch.testing.assert_close(got.double(), expected(x, axis).mean(0) * scale, rtol=2e-6, atol=0)


@pytest.mark.parametrize("order", ["nchw", "tokens", "sliced", "transposed"])
@pytest.mark.parametrize("channels", [64, 96, 128, 192, 256, 320, 384, 512, 640, 768, 1024, 1280, 1536, 2048])
def test_the_mean_of_vectors_that_images_share(channels, order, backend, poisoned):
    """Positions are taken some at a time; what a plane leaves over may go with what those of other images leave."""
    for batch, height, width in ((9, 7, 7), (3, 14, 14), (5, 3, 5), (17, 2, 1), (4, 1, 1), (1, 5, 5)):
        if backend != "cpu" and channels * batch * height * width > 400_000:
            continue  # long, where the kernel is emulated
        x = ORDERS[order](batch, channels, height, width)
        for dtype in (F32, BF16, F16) if backend in WITHOUT_FLOAT64 else (F32, BF16, F16, F64):
            got = skd.spectral_intensity(cast(x, dtype), norm="ortho", backend=backend)
            true = reference.spectral_intensity(cast(x, dtype).double(), "channel", channels**-0.5).mean(0)
            torch.testing.assert_close(got.double(), true, rtol=1e-6, atol=2e-6)


@pytest.mark.parametrize("channels", [80, 192])
@pytest.mark.parametrize("size", [(13, 7, 7), (32, 6, 6), (13, 14, 14), (61, 3, 4), (21, 7, 7)], ids=str)
def test_the_mean_when_threads_begin_anywhere(channels, size, backend):
    """Work may be cut just before a vector that images share; whoever begins there has kept nothing of theirs."""
    batch, height, width = size
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(4)
        for call in range(10):
            x = torch.randn(batch, channels, height, width) + call  # what an earlier call has left would be wrong
            got = skd.spectral_intensity(x, norm="ortho", backend=backend)
            true = reference.spectral_intensity(x.double(), "channel", channels**-0.5).mean(0)
            torch.testing.assert_close(got.double(), true, rtol=1e-6, atol=2e-6)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("order", ["nchw", "tokens"])
@pytest.mark.parametrize("exponent", [-75, -70, 126])
def test_powers_of_two_whose_squares_are_no_normal_numbers(backend, exponent, order):
    """Such a square may be exact all the same, and the sum of a few such magnitudes too large for float32."""
    if backend != "cpu" and exponent > 0:
        pytest.skip("this backend adds up some magnitudes in float32, as PyTorch does; their sum is infinite")
    x = ORDERS[order](1, 128, 2, 4)
    x[:] = 0.0
    x[:, 0] = 2.0**exponent
    got = skd.spectral_intensity(x, norm="backward", backend=backend)
    torch.testing.assert_close(got.double(), torch.full((65,), 2.0**exponent).double(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("others", [0.0, 1.0])
@pytest.mark.parametrize("order", ["nchw", "tokens"])
def test_an_image_of_very_small_numbers_among_others(backend, order, others):
    """Their squares are no float32, and they are all there is of most bins."""
    if backend == "triton" and others != 0.0:
        pytest.skip("its transforms are matrix products: of a constant they leave rounding errors in every bin")
    x = ORDERS[order](40, 192, 7, 7)
    x[:] = others  # frequency 0 and nothing else
    small = torch.randn(192, 7, 7) * 1e-25
    x[23] = small - small.mean(0)
    got = skd.spectral_intensity(x, norm="backward", backend=backend).double()
    true = expected(x, "channel").mean(0)
    torch.testing.assert_close(got[0], true[0], rtol=1e-6, atol=1e-32)  # nothing but rounding errors where others are 0
    torch.testing.assert_close(got[1:], true[1:], rtol=1e-5, atol=0)


@pytest.mark.parametrize("axis", AXES)
def test_squares_that_torch_takes_for_zeros_by_request(backend, axis):
    """A mode of this thread: the others add up what it does, and afterwards it is as it was."""
    x = torch.zeros(2, 192, 14, 14)
    x[:, 0] = 2.0**-70
    before = skd.spectral_intensity(x, axis, norm="backward", backend=backend)
    if not torch.set_flush_denormal(True):
        pytest.skip("this processor does not offer it")
    try:
        assert torch.equal(skd.spectral_intensity(x, axis, norm="backward", backend=backend), before)
        assert (torch.full((1,), 2.0**-100) * 2.0**-30).item() == 0.0
    finally:
        torch.set_flush_denormal(False)
    assert before.view(-1)[0] > 0


@pytest.mark.parametrize("kernel", kernels())
def test_every_number_of_float16(kernel):
    """Of a map of one number the magnitude is its own."""
    x = torch.arange(65536, dtype=torch.int32).to(torch.int16).view(F16).view(-1, 1, 1, 1)
    finite = x.isfinite().view(-1)
    with using(kernel) as backend:
        for axis in AXES:
            got = intensity_per_image(x, axis, norm="backward", backend=backend).view(-1)
            torch.testing.assert_close(got[finite], x.float().abs().view(-1)[finite], rtol=1e-6, atol=0)
            assert not got[~finite].isfinite().any()


@pytest.mark.parametrize("value", [math.inf, math.nan])
@pytest.mark.parametrize("axis", AXES)
def test_what_is_not_finite_is_not_hidden(backend, axis, value):
    x = torch.randn(3, 192, 7, 7)
    x[1, 5, 3, 2] = value
    assert not skd.spectral_intensity(x, axis, backend=backend).isfinite().any()
    others = intensity_per_image(x, axis, backend=backend)[[0, 2]]
    assert torch.equal(others, intensity_per_image(x[[0, 2]], axis, backend=backend))


@pytest.mark.parametrize("shape", [(2, 64, 0, 4), (2, 0, 4, 4), (0, 64, 4, 4)], ids=str)
def test_the_operation_itself_refuses_maps_without_numbers(backend, shape):
    for axis in AXES:
        with pytest.raises(RuntimeError, match=r"with numbers and a known axis, not \("):
            torch.ops.skd.spectral_intensity(torch.empty(shape), axis, 1.0, backend)


@pytest.mark.parametrize("channels", [8, 12, 49, 192])
@pytest.mark.parametrize("axis", AXES)
def test_zeros_constants_and_the_highest_frequency(backend, axis, channels):
    zeros = torch.zeros(2, channels, 6, 6)
    assert torch.equal(
        skd.spectral_intensity(zeros, axis, backend=backend).abs(),
        zeros[0, : channels // 2 + 1, 0, 0] if axis == "channel" else torch.zeros(6, 4),
    )
    constant = skd.spectral_intensity(zeros + 3, axis, backend=backend).flatten()
    assert abs(constant[0] - 3) < 1e-6 and constant[1:].abs().max() < 1e-5
    if channels % 2 == 0:
        signs = 1.0 - 2.0 * (torch.arange(channels) % 2)
        alternating = signs[:, None, None].expand(2, channels, 6, 6) if axis == "channel" else None
        if axis == "space":
            alternating = (signs[:6].outer(signs[:6])).expand(2, channels, 6, 6)
        got = skd.spectral_intensity(alternating, axis, backend=backend)
        peak = got[-1] if axis == "channel" else got[3, 3]
        assert abs(peak - 1) < 1e-6 and abs(got.sum() - peak) < 1e-4


@pytest.mark.parametrize("scale", [1e-20, 1e4, 1e15])
@pytest.mark.parametrize("axis", AXES)
def test_very_small_and_very_large_numbers(backend, axis, scale):
    x = torch.randn(2, 48, 7, 8)
    got = skd.spectral_intensity(x * scale, axis, norm="backward", backend=backend) / scale
    torch.testing.assert_close(got.double(), expected(x, axis).mean(0), rtol=3e-6, atol=0)


@pytest.mark.parametrize("frequency", [0, 1, 5, 24])
def test_a_grating_over_channels_peaks_at_its_frequency(backend, frequency):
    x = torch.cos(2 * math.pi * frequency * torch.arange(48.0) / 48 + 0.3)[:, None, None].expand(2, 48, 3, 5)
    assert skd.spectral_intensity(x, backend=backend).argmax() == frequency


def test_an_image_does_not_depend_on_its_batch(backend):
    x = torch.randn(7, 96, 14, 14)
    for axis in AXES:
        together = intensity_per_image(x, axis, backend=backend)
        for i in (0, 3, 6):
            assert torch.equal(intensity_per_image(x[i : i + 1], axis, backend=backend)[0], together[i])


@pytest.mark.parametrize("order", ["nchw", "tokens"])
@pytest.mark.parametrize("shape", [(1, 4, 96, 128), (1, 96, 56, 56)], ids=str)
def test_equal_magnitudes_add_up_without_drift(backend, shape, order):
    """Rounding errors of equal terms do not cancel: a long sum in float32 drifts."""
    spectrum = torch.randn(1, shape[1], 1, 1, generator=torch.Generator().manual_seed(0))
    x = ORDERS[order](*shape).copy_(spectrum.expand(shape))
    got = skd.spectral_intensity(x, norm="backward", backend=backend)
    torch.testing.assert_close(got.double(), expected(spectrum, "channel")[0], rtol=1e-6, atol=0)


@pytest.mark.parametrize("order", ["nchw", "tokens"])
def test_the_same_bits_for_any_number_of_threads(backend, order):
    if backend == "reference":
        pytest.skip("PyTorch's sums depend on the threads")
    x, before, results = ORDERS[order](8, 96, 14, 14), torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3, 8):
            torch.set_num_threads(threads)
            results.append([skd.spectral_intensity(x, axis, backend=backend) for axis in AXES])
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(other, results[0], strict=True))


def test_offsets_beyond_32_bits(backend):
    far = 2**31 + 16
    x = torch.empty(far + 1024, dtype=BF16).as_strided((2, 8, 4, 4), (far, 16, 4, 1))
    x.copy_(torch.randn(2, 8, 4, 4))
    for axis in AXES:
        assert_close(x.clone(), axis, intensity_per_image(x, axis, norm="backward", backend=backend))


def test_the_map_is_not_written_and_a_derivative_raises(backend):
    x = torch.randn(2, 16, 7, 7, requires_grad=True)
    copy = x.detach().clone()
    result = skd.spectral_intensity(x, backend=backend)
    assert torch.equal(x.detach(), copy) and result.requires_grad
    with pytest.raises(RuntimeError, match="spectral_intensity has no derivative"):
        result.sum().backward()


@pytest.mark.parametrize("axis", AXES)
def test_opcheck(backend, axis):
    for order in ("nchw", "tokens", "transposed"):
        x = ORDERS[order](2, 6, 4, 5)
        torch.library.opcheck(torch.ops.skd.spectral_intensity.default, (x, axis, 0.5, backend))


def test_compiles_as_one_graph(backend):
    compiled = torch.compile(
        lambda x: skd.spectral_intensity(x * 2, backend=backend), fullgraph=True, backend="aot_eager"
    )
    x = torch.randn(2, 16, 7, 7)
    torch.testing.assert_close(compiled(x), skd.spectral_intensity(x * 2, backend=backend))


def test_the_authors_form_in_numpy(backend):
    """`np.fft.fft(x, channel axis) / C`, magnitude, mean over batch and space."""
    numpy = pytest.importorskip("numpy")
    x = torch.randn(4, 64, 7, 7)
    theirs = numpy.abs(numpy.fft.fft(x.double().numpy(), axis=1) / 64).mean((0, 2, 3))
    ours = skd.spectral_intensity(x, backend=backend).double().numpy()
    numpy.testing.assert_allclose(ours, theirs[:33], rtol=2e-6)


@pytest.mark.parametrize(
    "x, options, error, words",
    [
        ([1.0], {}, TypeError, ["list"]),
        (torch.ones(2, 4, 4, 4, dtype=torch.int32), {}, TypeError, ["int32", "float32"]),
        (torch.ones(2, 49, 8), {}, ValueError, ["(2, 49, 8)", "tokens_to_map"]),
        (torch.ones(4, 4), {}, ValueError, ["(4, 4)", "[B, C, H, W]"]),
        (torch.ones(0, 4, 4, 4), {}, ValueError, ["(0, 4, 4, 4)", "no numbers"]),
        (torch.ones(1, 4, 4, 4), {"axis": "time"}, ValueError, ["'time'", "'channel'", "'space'"]),
        (torch.ones(1, 4, 4, 4), {"norm": "max"}, ValueError, ["'max'", "'forward'", "'ortho'"]),
        (torch.ones(1, 4, 4, 4), {"backend": "tpu"}, ValueError, ["'tpu'", "cpu"]),
    ],
)
def test_bad_input(x, options, error, words):
    with pytest.raises(error) as caught:
        skd.spectral_intensity(x, **options)
    for word in words:
        assert word in str(caught.value)
