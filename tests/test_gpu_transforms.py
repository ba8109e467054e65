"""The operations with a Fourier transform on a GPU: numbers, memory, graphs and streams."""

import pytest
import torch
from cases import BF16, F16, F32, F64, ORDERS, Case, cast, matrix
from gpu_helpers import DEVICE, LAYERS, identical, needs_gpu, on_device, pairs, require
from test_fourier_align import OPTIONS, assert_close_to_float64, bands_of, every_path
from test_spectral_intensity import SIZES
from test_spectral_intensity import assert_close as assert_intensity_close

import skd
from skd.ops import fourier_align, spectral_intensity
from skd.ops.spectral_intensity import AXES, intensity_per_image

pytestmark = [pytest.mark.gpu, needs_gpu]


@pytest.fixture(params=["cuda", "triton"])
def backend(request):
    operations = (fourier_align, spectral_intensity)
    if not all(request.param in operation.IMPLEMENTATIONS for operation in operations):
        pytest.skip(f"no {request.param} kernels of these operations")
    return require(request.param)


def check(case, options, backend):
    student, teacher = case.make()
    on_gpu = [on_device(x) for x in (student, teacher)]
    bands = bands_of(student).float().to(DEVICE) if options.get("bands") else None
    result = skd.spectral_loss(*on_gpu, backend=backend, **{**options, "bands": bands})
    loss, spectra = (result[0], result[1][0]) if "return_spectra" in options else (result, None)
    (gradient,) = torch.autograd.grad(loss, on_gpu[0])
    assert loss.device == on_gpu[0].device and gradient.stride() == on_gpu[0].stride() or 0 in student.stride()
    spectra = None if spectra is None else [x.cpu() for x in spectra]
    assert_close_to_float64(student, teacher, options, loss.detach().cpu(), gradient.cpu(), spectra, strict=False)


def in_double(case):
    return F64 in (case.student_dtype, case.teacher_dtype)


@pytest.mark.parametrize("match", ["magnitude", "log_magnitude"])
@pytest.mark.parametrize("case", [case for case in matrix() if not in_double(case)], ids=str)
def test_loss_and_gradient_are_those_of_float64(case, match, backend, poisoned):
    check(case, {"match": match}, backend)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_every_combination_of_options(options, backend, poisoned):
    for case in every_path():
        if not in_double(case):
            check(case, options, backend)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_equal_maps_have_no_loss_and_no_gradient(options, backend):
    """Both go through the same instructions."""
    for size in (4, 5, 7, 8, 14, 16, 28, 30, 32, 56):
        student = torch.randn(2, 16, size, size, device=DEVICE).requires_grad_()
        bands = bands_of(student).float().to(DEVICE) if options.get("bands") else None
        result = skd.spectral_loss(student, student.detach().clone(), backend=backend, **{**options, "bands": bands})
        loss = result[0] if "return_spectra" in options else result
        (gradient,) = torch.autograd.grad(loss, student)
        assert loss == 0 and torch.equal(gradient, torch.zeros_like(gradient)), size


@pytest.mark.parametrize("dtype", [F32, BF16, F16])
@pytest.mark.parametrize("size", [7, 14, 16, 28, 32, 56])
def test_the_same_bits_again_with_and_without_other_layers(size, dtype, backend):
    students, teachers = pairs([Case(8, 64, 128, size, size, "tokens", "nchw", dtype, dtype), *LAYERS])

    def results(students, teachers):
        losses, spectra = skd.spectral_loss(
            students, teachers, "magnitude", reduction="none", return_spectra=True, backend=backend
        )
        return [losses[0], *torch.autograd.grad(losses[0], students[0]), *spectra[0]]

    expected = results(students, teachers)
    assert identical(results(students, teachers), expected)
    assert identical(results(students[:1], teachers[:1])[:2], expected[:2])


def test_a_graph_replays_what_eager_computes_on_any_stream(backend):
    students, teachers = pairs(LAYERS)
    x = on_device(ORDERS["tokens"](4, 192, 14, 14))

    def work():
        loss, spectra = skd.spectral_loss(students, teachers, "magnitude", return_spectra=True, backend=backend)
        pooled = [s for both in spectra for s in both]
        intensities = [skd.spectral_intensity(x, axis, backend=backend) for axis in AXES]
        return [loss, *pooled, *intensities, *torch.autograd.grad(loss, students)]

    expected = work()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        assert identical(work(), expected)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = work()
    with torch.no_grad():
        for map_ in (*students, *teachers, x):
            map_.mul_(0.5)
    graph.replay()
    assert identical(results, work())


def test_nothing_waits_for_the_device(backend):
    students, teachers = pairs(LAYERS)
    x = on_device(ORDERS["tokens"](4, 192, 14, 14))
    bands = [torch.rand(s.shape[2], s.shape[3] // 2 + 1, device=DEVICE) for s in students]
    torch.cuda.set_sync_debug_mode("error")
    try:
        loss, _ = skd.spectral_loss(
            students, teachers, "magnitude", bands=bands, focal=1.0, return_spectra=True, backend=backend
        )
        loss.backward()
        for axis in AXES:
            skd.spectral_intensity(x, axis, backend=backend)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("spectra", [False, True])
@pytest.mark.parametrize("size", [7, 14, 28, 56])
def test_extra_memory_is_the_gradient_and_about_a_megabyte(size, spectra, backend):
    students, teachers = pairs([Case(16, c, 2 * c, size, size, "tokens", "nchw") for c in (96, 64)])

    def extra():
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_stats()["requested_bytes.all.current"]
        result = skd.spectral_loss(students, teachers, "magnitude", return_spectra=spectra, backend=backend)
        peak = torch.cuda.memory_stats()["requested_bytes.all.peak"] - before
        del result
        return peak

    extra()
    gradients = sum(s.numel() * s.element_size() for s in students)
    assert gradients <= extra() < gradients + 1.2 * 2**20


@pytest.mark.parametrize("axis", AXES)
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("dtype", [F32, BF16, F16])
def test_intensity_is_that_of_float64(dtype, order, axis, backend, poisoned):
    for size in (*SIZES, (1, 4096, 3, 5), (1, 6000, 2, 2), (3, 192, 28, 28)):
        torch.manual_seed(0)
        x = cast(ORDERS[order](*size), dtype)
        got = intensity_per_image(on_device(x), axis, norm="backward", backend=backend)
        assert_intensity_close(x, axis, got.cpu())


@pytest.mark.parametrize("axis", AXES)
def test_an_image_does_not_depend_on_its_batch(axis, backend):
    x = torch.randn(33, 96, 14, 14, device=DEVICE)
    together = intensity_per_image(x, axis, backend=backend)
    for i in (0, 17, 32):
        assert torch.equal(intensity_per_image(x[i : i + 1], axis, backend=backend)[0], together[i])
