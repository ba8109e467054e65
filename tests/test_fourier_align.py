"""fourier_align: every backend against float64 of the definition, and the contract of the operation."""

import functools
import math

import pair_contract as contract
import pytest
import torch
from cases import BF16, F16, F32, F64, ORDERS, Case, matrix, random
from hypothesis import given
from hypothesis import strategies as st
from kernels_here import each_with_kernels, kernels, using
from pair_contract import ONE, WITHOUT_FLOAT64, layers, refuses
from torch.utils.checkpoint import checkpoint

import skd
import skd.ops.fourier_align  # registers the operation
from skd import reference

ROUNDING = {F32: 1e-5, F64: 1e-11, BF16: 2.0**-8, F16: 2.0**-11}
"""Relative L2 error a gradient may have: the bound of the magnitude losses, or one rounding of a 16-bit format."""

OPTIONS = {
    "magnitude": {"match": "magnitude"},
    "log_magnitude": {"match": "log_magnitude"},
    "complex bands": {"match": "complex", "bands": True},
    "complex focal": {"match": "complex", "focal": 1.0},
    "complex spectra": {"match": "complex", "return_spectra": True},
    "mse spectra": {"match": "mse", "return_spectra": True},
    "magnitude bands focal spectra": {"match": "magnitude", "bands": True, "focal": 1.0, "return_spectra": True},
    "log_magnitude focal 0.6 spectra": {"match": "log_magnitude", "focal": 0.6, "return_spectra": True},
    "complex bands focal 2 spectra": {"match": "complex", "bands": True, "focal": 2.0, "return_spectra": True},
}


def bands_of(student):
    """Weights of very different size, some of them 0."""
    height, columns = student.shape[2:]
    values = torch.linspace(0.0, 3.0, height * (columns // 2 + 1), dtype=F64).view(height, -1)
    return torch.where(values > 0.3, values, 0.0)


def options_for(student, teacher, match="complex", bands=False, **rest):
    dtype = F64 if F64 in (student.dtype, teacher.dtype) else F32
    return {"match": match, "bands": bands_of(student).to(dtype) if bands else None, **rest}


def float64_oracle(student, teacher, match="complex", bands=False, focal=None, return_spectra=False):
    """Loss, gradient, and pooled magnitudes, by autograd through the definition."""
    s, t = student.detach().double().requires_grad_(), teacher.double()
    if match == "mse":
        loss = reference.spectral_align_published(s, t, "mse")
    else:
        loss = reference.fourier_align_published(s, t, match, bands_of(student) if bands else None, focal)
    gradient = torch.autograd.grad(loss, s)[0]
    pooled = [skd.spectral_intensity(x, "space", norm="ortho", backend="reference") for x in pair(s.detach(), t)]
    return loss.detach(), gradient, pooled


def pair(s, t):
    width = min(s.shape[1], t.shape[1])
    return reference.pool_channels(s, width), reference.pool_channels(t, width)


def ill_conditioned(student, teacher, match="complex", bands=False, focal=None, return_spectra=False):
    """How far rounding may turn the loss, and the gradient's L2 norm, on maps whose spectra have zeros or cancel.

    A bin is known to `noise` of its plane's largest. The direction of a bin that is no larger than that is unknown.
    """
    exact = F64 in (student.dtype, teacher.dtype)
    s, t = pair(student.detach().double(), teacher.double())
    s_hat, t_hat = reference.half_spectrum(s), reference.half_spectrum(t)
    noise = (1e-15 if exact else 4e-7) * (s_hat.abs() + t_hat.abs()).amax((-2, -1), keepdim=True)
    noise = noise + 1e-45
    if match in ("complex", "mse"):
        difference, turned = (s_hat - t_hat).abs(), torch.zeros_like(s)[..., : s_hat.shape[-1]]
    else:
        damp = 1.0 if match == "magnitude" else 1 / (1 + s_hat.abs())
        log = match == "log_magnitude"
        a, b = (x.abs().log1p() if log else x.abs() for x in (s_hat, t_hat))
        difference = (a - b).abs()
        turned = difference * damp * (2 * noise / s_hat.abs()).clamp(max=2.0)
    weight = torch.ones_like(difference) if not bands else bands_of(student).expand_as(difference)
    if match == "mse":
        weight = weight * 2
    sharp = 2 + 2 * (focal or 0)
    error = weight * sharp * (turned + noise)
    loss = (weight * sharp * (2 * difference * noise + noise**2)).sum().item() / max(1, s.numel() // 2)
    return loss, error.norm().item() * 2 / max(1, s.numel() // 2)


def assert_close_to_float64(student, teacher, options, loss, gradient, spectra, strict):
    expected_loss, expected, expected_spectra = float64_oracle(student, teacher, **options)
    exact = F64 in (student.dtype, teacher.dtype)
    loss_noise, gradient_noise = (0.0, 0.0) if strict else ill_conditioned(student, teacher, **options)
    assert abs(loss.double() - expected_loss) <= (1e-12 if exact else 1e-6) * expected_loss + loss_noise + 1e-43
    assert gradient.dtype == student.dtype and gradient.shape == student.shape
    error, norm = (gradient.double() - expected).norm().item(), expected.norm().item()
    smallest = {F16: 6e-8, BF16: 1e-40}.get(student.dtype, 1e-44) * math.sqrt(max(1, student.numel()))
    assert error <= ROUNDING[student.dtype] * norm + gradient_noise + smallest, (error, norm, gradient_noise)
    if spectra is not None:
        for ours, true in zip(spectra, expected_spectra, strict=True):
            assert ours.dtype == loss.dtype and not ours.requires_grad
            tolerance = 1e-12 if exact else 1e-6
            torch.testing.assert_close(ours.double(), true, rtol=tolerance, atol=tolerance * true.max().item() + 1e-38)


def check(case, options, backend):
    student, teacher = case.make()
    given = options_for(student, teacher, **options)
    result = skd.spectral_loss(student, teacher, backend=backend, **given)
    loss, spectra = (result[0], result[1][0]) if "return_spectra" in options else (result, None)
    (gradient,) = torch.autograd.grad(loss, student)
    assert loss.dtype == (F64 if F64 in (student.dtype, teacher.dtype) else F32)
    # Random numbers have no zeros in their spectra unless the maps are too small to have room for others.
    strict = case.content is random and student.numel() > 4000 and case.student_order != "expanded"
    assert_close_to_float64(student, teacher, options, loss.detach(), gradient, spectra, strict)


@pytest.mark.parametrize("match", ["magnitude", "log_magnitude"])
@pytest.mark.parametrize("kernel, case", each_with_kernels(matrix()))
def test_loss_and_gradient_are_those_of_float64(kernel, case, match, poisoned):
    with using(kernel) as backend:
        if refuses(backend, case):
            student, teacher = case.make()
            with pytest.raises(RuntimeError, match=f"backend '{backend}' cannot run fourier_align: .*float64"):
                skd.spectral_loss(student, teacher, match, backend=backend)
            return
        check(case, {"match": match}, backend)


def every_path() -> list[Case]:
    """A few cases of every size, order and content, for each combination of options."""
    return [
        case
        for i, case in enumerate(matrix())
        if i % 11 == 0 or case.content is not random and case.student_order == "nchw" and case.width in (7, 9)
    ]


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("kernel, case", each_with_kernels(every_path()))
def test_every_combination_of_options(kernel, case, options, poisoned):
    with using(kernel) as backend:
        if refuses(backend, case):
            pytest.skip("this backend refuses float64")
        check(case, options, backend)


@given(
    batch=st.integers(0, 3),
    student_channels=st.integers(1, 40),
    teacher_channels=st.integers(1, 40),
    height=st.integers(1, 17),
    width=st.integers(1, 35),
    student_order=st.sampled_from(sorted(ORDERS)),
    teacher_order=st.sampled_from(sorted(ORDERS)),
    student_dtype=st.sampled_from([F32, F64, BF16, F16]),
    teacher_dtype=st.sampled_from([F32, F64, BF16, F16]),
    options=st.sampled_from(list(OPTIONS.values())),
)
def test_any_shape_order_and_dtype(options, **description):
    case = Case(**description)
    for kernel in kernels():
        with using(kernel) as name:
            if refuses(name, case) or case.batch == 0:
                continue
            student, teacher = case.make()
            result = skd.spectral_loss(student, teacher, backend=name, **options_for(student, teacher, **options))
            loss, spectra = (result[0], result[1][0]) if "return_spectra" in options else (result, None)
            (gradient,) = torch.autograd.grad(loss, student)
            assert_close_to_float64(student, teacher, options, loss.detach(), gradient, spectra, strict=False)


def loss_by(backend):
    return functools.partial(skd.spectral_loss, match="magnitude", backend=backend)


def oracle(student, teacher):
    return float64_oracle(student, teacher, "magnitude")


def magnitude_gradient(student, teacher):
    return float64_oracle(student, teacher, "magnitude")[1]


# --- What the definition says of special maps ---


@pytest.mark.parametrize("match", ["magnitude", "log_magnitude"])
@pytest.mark.parametrize("shape", [(1, 1, 4, 4), (2, 16, 7, 7), (1, 8, 14, 14), (1, 3, 5, 1)])
def test_where_a_magnitude_is_zero_the_gradient_is(backend, match, shape):
    student = torch.zeros(shape, requires_grad=True)
    teacher = torch.randn(shape)
    loss = skd.spectral_loss(student, teacher, match, backend=backend)
    (gradient,) = torch.autograd.grad(loss, student)
    assert loss > 0 and torch.equal(gradient, torch.zeros(shape))


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_equal_maps_have_no_loss_and_no_gradient(backend, options):
    student = torch.randn(2, 16, 7, 14).requires_grad_()
    given = options_for(student, student, **options)
    result = skd.spectral_loss(student, student.detach().clone(), backend=backend, **given)
    loss = result[0] if "return_spectra" in options else result
    (gradient,) = torch.autograd.grad(loss, student)
    assert loss == 0 and torch.equal(gradient, torch.zeros_like(gradient))


@pytest.mark.parametrize("match", ["magnitude", "log_magnitude"])
def test_a_shifted_teacher_has_the_same_magnitudes(backend, match):
    student = torch.randn(2, 16, 8, 8)
    shifted = student.roll((3, 5), (2, 3))
    assert skd.spectral_loss(student, shifted, match, backend=backend) < 1e-11
    assert skd.spectral_loss(student, shifted, backend=backend) > 0.1


def test_bands_of_ones_leave_the_closed_form(backend):
    student, teacher = ONE.make()
    loss = skd.spectral_loss(student, teacher, bands=torch.ones(7, 4), backend=backend)
    torch.testing.assert_close(loss, skd.spectral_loss(student, teacher, backend=backend), rtol=2e-6, atol=0)


def test_a_band_sees_only_its_own_frequency(backend):
    wave = torch.arange(14.0)
    student = torch.cos(2 * math.pi * (3 * wave[:, None] + 2 * wave) / 14).expand(1, 8, 14, 14).contiguous()
    teacher = torch.zeros(1, 8, 14, 14)
    for ky, kx in ((3, 2), (4, 2), (3, 1)):
        bands = torch.zeros(14, 8)
        bands[ky, kx] = 1
        loss = skd.spectral_loss(student, teacher, "magnitude", bands=bands, backend=backend)
        expected = 7.0**2 / (14 * 8) if (ky, kx) == (3, 2) else 0.0  # |S| = sqrt(HW) / 2
        assert abs(loss - expected) < 1e-5


@pytest.mark.parametrize("match", ["complex", "mse", "magnitude", "log_magnitude"])
def test_spectra_do_not_change_the_loss(backend, match):
    students, teachers = layers()
    plain = skd.spectral_loss(students, teachers, match, reduction="none", backend=backend)
    loss, spectra = skd.spectral_loss(students, teachers, match, reduction="none", return_spectra=True, backend=backend)
    torch.testing.assert_close(loss, plain, rtol=2e-6, atol=0)
    assert len(spectra) == 2
    for (s, t), student, teacher in zip(spectra, students, teachers, strict=True):
        for got, x in zip((s, t), pair(student.detach(), teacher), strict=True):
            assert got.shape == (x.shape[2], x.shape[3] // 2 + 1) and not got.requires_grad
            expected = skd.spectral_intensity(x, "space", norm="ortho", backend="reference")
            torch.testing.assert_close(got, expected, rtol=2e-6, atol=1e-7)


@pytest.mark.parametrize("order", ["nchw", "tokens"])
@pytest.mark.parametrize("match", ["complex", "magnitude"])
def test_spectra_of_equal_planes_do_not_drift(backend, match, order):
    """Rounding errors of equal terms do not cancel: a long sum in float32 drifts."""
    student, teacher = (ORDERS[order](16, 1536, 4, 4).zero_() for _ in range(2))
    student[..., 1, 2], teacher[..., 3, 1] = 0.7, 0.3  # an impulse has the same magnitude in every bin
    _, [spectra] = skd.spectral_loss(student, teacher, match, return_spectra=True, backend=backend)
    for got, x in zip(spectra, (student, teacher), strict=True):
        torch.testing.assert_close(got.double(), (x.double().amax() / 4).expand(4, 3), rtol=1e-6, atol=0)


# --- Gradients ---


@pytest.mark.parametrize("upstream", [torch.tensor([0.7, -3.1]), torch.tensor([2.0, 0.0]), torch.ones(1).expand(2)])
def test_any_upstream_gradient_of_each_layer(backend, upstream):
    contract.check_upstream_gradients(loss_by(backend), oracle, upstream, rtol=1e-4, atol=1e-8)


@pytest.mark.parametrize("dtype", [F32, BF16, F16, F64])
@pytest.mark.parametrize("factor", [1.0, -1.0, 0.0, 0.3, 65536.0])
def test_a_loss_used_in_a_larger_one(backend, dtype, factor):
    if dtype == F64 and backend in WITHOUT_FLOAT64:
        pytest.skip("this backend refuses float64")
    contract.check_a_loss_used_in_a_larger_one(loss_by(backend), oracle, dtype, factor, ROUNDING)


def test_large_bands_do_not_overflow_float16(backend):
    student, teacher = Case(2, 16, 16, 7, 7, student_dtype=F16, teacher_dtype=F16).make()
    bands = torch.full((7, 4), 1e9)
    (1e-9 * skd.spectral_loss(student, teacher, "magnitude", bands=bands, backend=backend)).backward()
    expected = magnitude_gradient(student, teacher)
    assert (student.grad.double() - expected).norm() <= ROUNDING[F16] * expected.norm() + 6e-8 * 40


def test_backward_may_run_again_and_inputs_are_never_written(backend):
    contract.check_backward_runs_again_and_inputs_are_never_written(loss_by(backend))


def test_one_map_in_two_layers_and_two_losses(backend):
    student, teacher = ONE.make()
    maps = ([student, student], [teacher, 2 * teacher])
    loss = skd.spectral_loss(*maps, "magnitude", reduction="sum", backend=backend)
    (loss + 0.5 * skd.spectral_loss(student, teacher, "log_magnitude", backend=backend)).backward()
    parts = [
        magnitude_gradient(student, teacher),
        magnitude_gradient(student, 2 * teacher),
        0.5 * float64_oracle(student, teacher, "log_magnitude")[1],
    ]
    torch.testing.assert_close(student.grad.double(), sum(parts), rtol=1e-4, atol=1e-8)


def test_under_checkpointing(backend):
    student, teacher = ONE.make()
    loss = checkpoint(
        lambda s: skd.spectral_loss(s * 2, teacher, "magnitude", backend=backend) * 3, student, use_reentrant=False
    )
    loss.backward()
    expected = 6 * magnitude_gradient(2 * student.detach(), teacher)
    torch.testing.assert_close(student.grad.double(), expected, rtol=1e-4, atol=1e-8)


def test_only_the_students_that_need_a_gradient_get_one(backend):
    contract.check_only_the_students_that_need_a_gradient_get_one(loss_by(backend))


def test_gradcheck(backend):
    if backend in WITHOUT_FLOAT64:
        pytest.skip("gradcheck needs float64")
    for match in ("magnitude", "log_magnitude"):
        contract.check_gradcheck(functools.partial(skd.spectral_loss, match=match, backend=backend))


def test_a_second_derivative_raises(backend):
    contract.check_a_second_derivative_raises(loss_by(backend))


def test_forward_mode_and_transforms_are_refused(backend):
    contract.check_forward_mode_and_transforms_are_refused(loss_by(backend))


def test_a_trainable_teacher_is_refused(backend):
    student, teacher = ONE.make()
    with pytest.raises(ValueError, match="detach"):
        skd.spectral_loss(student, teacher.requires_grad_(), "magnitude", backend=backend)
    with pytest.raises(ValueError, match="detach"):  # also past the checks of the public function
        torch.ops.skd.fourier_align([student], [teacher], [], [1.0], "magnitude", None, False, [True], backend)


def test_calls_past_the_checks_are_refused_not_computed(backend):
    student, teacher = Case(2, 6, 9, 4, 5).make()
    bands = [bands_of(student).float()]
    for s, t, weights, match in [
        (student, teacher[:1], [], "magnitude"),
        (student, teacher[..., :3], [], "magnitude"),
        (student, teacher, [], "magnitudes"),
        (student, teacher, bands * 2, "magnitude"),
        (student, teacher, [bands[0][:, 1:]], "magnitude"),
        (student, teacher, [bands[0].double()], "magnitude"),
    ]:
        with pytest.raises((ValueError, RuntimeError)):
            torch.ops.skd.fourier_align([s.detach()], [t], weights, [1.0], match, None, False, [True], backend)


def test_the_registered_operation_gives_what_eager_calls_give(backend):
    """Bit for bit, though these go around the dispatcher."""
    pairs = [Case(2, 6, 9, 4, 5).make(), Case(2, 8, 4, 3, 3).make()]
    students, teachers = ([pair[side] for pair in pairs] for side in (0, 1))
    ours, spectra = skd.spectral_loss(
        students, teachers, "magnitude", weights=[1.0, 0.5], reduction="none", return_spectra=True, backend=backend
    )
    ours.sum().backward()
    copies = [s.detach().clone().requires_grad_() for s in students]
    theirs, _, pooled = torch.ops.skd.fourier_align(
        copies, teachers, [], [1.0, 0.5], "magnitude", None, True, [True, True], backend
    )
    theirs.sum().backward()
    assert torch.equal(ours, theirs)
    for a, b, of_both, (student, teacher) in zip(students, copies, pooled, spectra, strict=True):
        assert torch.equal(a.grad, b.grad) and torch.equal(of_both, torch.stack([student, teacher]))


def test_training_with_each_backend_follows_one_curve():
    contract.check_training_follows_one_curve("magnitude", falls_to=0.6)


# --- Layers, reductions, sizes ---


def test_reductions_and_weights(backend):
    criterion = functools.partial(skd.SpectralLoss, "magnitude", backend=backend)
    contract.check_reductions_and_weights(criterion, oracle, rtol=2e-6)


def test_bands_for_layers_of_different_sizes(backend):
    students, teachers = layers()
    bands = [bands_of(s).float() for s in students]
    losses = skd.spectral_loss(students, teachers, bands=bands, reduction="none", backend=backend)
    for loss, s, t in zip(losses, students, teachers, strict=True):
        torch.testing.assert_close(loss.double(), float64_oracle(s, t, bands=True)[0], rtol=2e-6, atol=0)


@pytest.mark.parametrize("options", [OPTIONS["magnitude"], OPTIONS["magnitude bands focal spectra"]])
def test_an_empty_batch_gives_zero_and_an_empty_gradient(backend, poisoned, options):
    student = torch.randn(0, 4, 7, 7, requires_grad=True)
    for teacher in (torch.randn(0, 4, 7, 7), torch.randn(0, 9, 7, 7), torch.randn(0, 3, 7, 7)):
        result = skd.spectral_loss(student, teacher, backend=backend, **options_for(student, teacher, **options))
        loss = result[0] if isinstance(result, tuple) else result
        (gradient,) = torch.autograd.grad(loss, student)
        assert loss.item() == 0 and gradient.shape == student.shape
        if isinstance(result, tuple):
            assert all(torch.equal(x, torch.zeros(7, 4)) for x in result[1][0])


def test_seventy_thousand_planes(backend):
    student, teacher = Case(7, 10_000, 10_000, 4, 4).make()
    loss = skd.spectral_loss(student, teacher, "magnitude", backend=backend)
    (gradient,) = torch.autograd.grad(loss, student)
    assert_close_to_float64(student, teacher, {"match": "magnitude"}, loss.detach(), gradient, None, strict=True)


def test_offsets_beyond_32_bits(backend):
    contract.check_offsets_beyond_32_bits(loss_by(backend), oracle)


@pytest.mark.parametrize("size", [(28, 28), (56, 56), (32, 32), (33, 35), (64, 48), (5, 128), (97, 3)])
@pytest.mark.parametrize("orders", [("nchw", "nchw"), ("tokens", "tokens"), ("nchw", "tokens")])
def test_larger_maps(backend, size, orders, poisoned):
    check(Case(1, 8, 16, *size, *orders), OPTIONS["magnitude bands focal spectra"], backend)


@pytest.mark.parametrize("dtype", [BF16, F16])
@pytest.mark.parametrize("channels", [(16, 32), (32, 16), (20, 7)])
def test_under_autocast_nothing_is_cast_down(backend, dtype, channels):
    student, teacher = Case(1, *channels, 14, 14, student_dtype=F32, teacher_dtype=dtype).make()
    with torch.autocast("cpu", dtype):
        loss = skd.spectral_loss(student, teacher, "magnitude", backend=backend)
    loss.backward()
    assert loss.dtype == F32
    assert_close_to_float64(student, teacher, {"match": "magnitude"}, loss.detach(), student.grad, None, strict=True)


def test_the_gradient_lies_in_memory_as_the_student_does(backend):
    contract.check_the_gradient_lies_in_memory_as_the_student_does(loss_by(backend))


# --- torch.library, torch.compile, determinism ---


@pytest.mark.parametrize("order", ["nchw", "tokens", "transposed"])
def test_opcheck(backend, order):
    student, teacher = Case(2, 6, 9, 4, 5, order, order).make()
    other = Case(2, 8, 4, 3, 3, order, "nchw", BF16).make()
    bands = [bands_of(x).float() for x in (student, other[0])]
    for weights in ([], bands):
        torch.library.opcheck(
            torch.ops.skd.fourier_align.default,
            (
                [student, other[0].detach()],
                [teacher, other[1]],
                weights,
                [1.0, 0.5],
                "magnitude",
                1.0,
                True,
                [True, False],
                backend,
            ),
        )


def test_compiles_as_one_graph(backend):
    def step(a, b, s, t):
        losses, spectra = skd.spectral_loss(
            [a * 2, b], [s, t], "magnitude", reduction="none", return_spectra=True, backend=backend
        )
        return losses[0] * 0.3 + losses[1], spectra[1][0]

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    students, teachers = layers()
    eager, eager_spectrum = step(*students, *teachers)
    expected = torch.autograd.grad(eager, students)
    got, spectrum = compiled(*students, *teachers)
    torch.testing.assert_close(got, eager)
    torch.testing.assert_close(spectrum, eager_spectrum)
    for g, e in zip(torch.autograd.grad(got, students), expected, strict=True):
        torch.testing.assert_close(g, e)


def test_one_graph_serves_all_batch_sizes(backend):
    contract.check_one_graph_serves_all_batch_sizes(loss_by(backend), oracle)


@pytest.mark.parametrize("orders", [("nchw", "nchw"), ("tokens", "nchw"), ("nchw", "tokens"), ("sliced", "sliced")])
def test_the_same_bits_from_run_to_run_and_for_any_number_of_threads(backend, orders):
    student, teacher = Case(8, 48, 96, 14, 14, *orders).make()

    def results():
        loss, spectra = loss_by(backend)(student, teacher, return_spectra=True)
        return loss.detach(), torch.autograd.grad(loss, student)[0], *spectra[0]

    contract.check_the_same_bits_for_any_number_of_threads(backend, results)
