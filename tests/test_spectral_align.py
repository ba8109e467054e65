"""spectral_align: every backend against float64 of the published form, and the contract of the operation."""

import functools
import math

import pair_contract as contract
import pytest
import torch
import torch.nn.functional as F
from cases import BF16, F16, F32, F64, ORDERS, Case, constant_difference, matrix
from hypothesis import given
from hypothesis import strategies as st
from kernels_here import each_with_kernels, kernels, using
from pair_contract import ONE, TWO, WITHOUT_FLOAT64, layers, refuses
from torch.utils.checkpoint import checkpoint

import skd
from skd import reference
from skd.bench import memory
from skd.ops import backends
from skd.ops.spectral_align import MATCHES

ROUNDING = {F32: 1e-6, F64: 1e-13, BF16: 2.0**-8, F16: 2.0**-11}
"""Relative L2 error a gradient may have: the bound, or one rounding of a 16-bit format."""


def float64_oracle(student, teacher, match):
    s = student.detach().double().requires_grad_()
    loss = reference.spectral_align_published(s, teacher.double(), match)
    return loss.detach(), torch.autograd.grad(loss, s)[0]


def varies(x):
    return x.unique().numel() >= max(64, x.numel() // 16)


def assert_close_to_float64(case, match, loss, gradient, student, teacher):
    expected_loss, expected = float64_oracle(student, teacher, match)
    exact = F64 in (student.dtype, teacher.dtype)
    size = max(student.abs().max().item(), teacher.abs().max().item()) if student.numel() else 0.0
    # What rounding the inputs' own arithmetic leaves where student and teacher cancel; float32 ends at 1e-45.
    noise = size * (1e-15 if exact else 3e-7)
    # The square of a difference that is off by e is off by 2 d e + e^2, however small d is against the maps.
    cancelled = expected_loss.sqrt() * noise + noise**2
    assert abs(loss.double() - expected_loss) <= (1e-13 if exact else 1e-6) * expected_loss + cancelled + 1e-43
    assert gradient.dtype == student.dtype and gradient.shape == student.shape
    error, norm = (gradient.double() - expected).norm().item(), expected.norm().item()
    per_number = 4.0 / max(1, student.numel()) * noise * math.sqrt(max(1, student.numel()))
    smallest = {F16: 6e-8, BF16: 1e-40}.get(student.dtype, 1e-44) * math.sqrt(max(1, student.numel()))
    # Of many numbers rounded to nearest, the errors' root mean square is well below the largest; truncation's is not.
    usual = 0.6 if student.dtype in (BF16, F16) and varies(expected) else 1.0
    assert error <= usual * ROUNDING[student.dtype] * norm + per_number + smallest, (error, norm)
    if norm > 10 * (per_number + smallest):
        cosine = (gradient.double() * expected).sum().item() / (gradient.double().norm().item() * norm)
        assert cosine > 1 - (1e-5 if student.dtype in (BF16, F16) else 1e-9)
        if student.dtype in (F32, F64):
            bias = (gradient.double() - expected).mean().item() / expected.abs().mean().item()
            assert abs(bias) < 1e-6 + 0.5 * per_number / norm


@pytest.mark.parametrize("match", MATCHES)
@pytest.mark.parametrize("kernel, case", each_with_kernels(matrix()))
def test_loss_and_gradient_are_those_of_float64(kernel, case, match, poisoned):
    student, teacher = case.make()
    with using(kernel) as backend:
        if refuses(backend, case):
            with pytest.raises(RuntimeError, match=f"backend '{backend}' cannot run spectral_align: .*float64"):
                skd.spectral_loss(student, teacher, match, backend=backend)
            return
        loss = skd.spectral_loss(student, teacher, match, backend=backend)
        (gradient,) = torch.autograd.grad(loss, student)
    assert loss.dtype == (F64 if F64 in (student.dtype, teacher.dtype) else F32)
    assert_close_to_float64(case, match, loss.detach(), gradient, student, teacher)


@pytest.mark.parametrize("match", MATCHES)
def test_gradients_written_past_the_caches(backend, match, poisoned):
    """As large calls do it: the whole matrix, made to believe that it is large."""
    if backend != "cpu":
        pytest.skip("only the compiled kernels choose how to write")
    before = backends.load("cpu").set_stream_above(-1)
    try:
        for case in matrix():
            student, teacher = case.make()
            loss = skd.spectral_loss(student, teacher, match, backend=backend)
            (gradient,) = torch.autograd.grad(loss, student)
            assert_close_to_float64(case, match, loss.detach(), gradient, student, teacher)
    finally:
        backends.load("cpu").set_stream_above(before)


@pytest.mark.parametrize("order", ["nchw", "tokens", "sliced"])
@pytest.mark.parametrize("shape", [(1, 16, 16, 56, 56), (1, 4, 4, 128, 128), (2, 512, 512, 7, 7), (1, 4, 4, 16, 512)])
def test_equal_numbers_add_up_without_drift(backend, shape, order):
    """Rounding errors of equal terms do not cancel: a long sum in float32 drifts, here up to 3e-5."""
    case = Case(*shape, order, order, content=constant_difference)
    student, teacher = case.make()
    student = (student * 1.1).detach().requires_grad_()
    loss = skd.spectral_loss(student, teacher, backend=backend)
    (gradient,) = torch.autograd.grad(loss, student)
    assert_close_to_float64(case, "complex", loss.detach(), gradient, student, teacher)


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
    match=st.sampled_from(MATCHES),
)
def test_any_shape_order_and_dtype(match, **description):
    case = Case(**description)
    for kernel in kernels():
        with using(kernel) as name:
            if refuses(name, case):
                continue
            student, teacher = case.make()
            loss = skd.spectral_loss(student, teacher, match, backend=name)
            (gradient,) = torch.autograd.grad(loss, student)
            assert_close_to_float64(case, match, loss.detach(), gradient, student, teacher)


def loss_by(backend):
    return functools.partial(skd.spectral_loss, backend=backend)


def oracle(student, teacher):
    return float64_oracle(student, teacher, "complex")


# --- Gradients ---


@pytest.mark.parametrize("upstream", [torch.tensor([0.7, -3.1]), torch.tensor([2.0, 0.0]), torch.ones(1).expand(2)])
def test_any_upstream_gradient_of_each_layer(backend, upstream):
    contract.check_upstream_gradients(loss_by(backend), oracle, upstream, rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("dtype", [F32, BF16, F16, F64])
@pytest.mark.parametrize("factor", [1.0, 2.0, -1.0, 0.0, 0.3, 65536.0])
def test_a_loss_used_in_a_larger_one(backend, dtype, factor):
    if dtype == F64 and backend in WITHOUT_FLOAT64:
        pytest.skip("this backend refuses float64")
    contract.check_a_loss_used_in_a_larger_one(loss_by(backend), oracle, dtype, factor, ROUNDING)


def test_a_float16_gradient_does_not_underflow_while_it_is_stored(backend):
    """1/N here is 2^-22, where float16 has two bits left; a loss scale of 65536 brings the gradient back."""
    student, teacher = Case(8, 64, 64, 56, 56, student_dtype=F16, teacher_dtype=F16).make()
    (skd.spectral_loss(student, teacher, backend=backend) * 65536).backward()
    expected = 65536 * float64_oracle(student, teacher, "complex")[1]
    assert (student.grad.double() - expected).norm() <= ROUNDING[F16] * expected.norm()


def test_a_float16_gradient_does_not_overflow_while_it_is_stored(backend):
    student = torch.full((1, 8, 4, 4), 65504.0, dtype=F16).requires_grad_()
    skd.spectral_loss(student, -student.detach(), backend=backend).backward()
    expected = float64_oracle(student, -student.detach(), "complex")[1]
    assert torch.isfinite(student.grad).all()
    torch.testing.assert_close(student.grad.double(), expected, rtol=2**-10, atol=0)


@pytest.mark.parametrize("teacher_dtype, size", [(F32, 1e6), (BF16, 1e6), (F32, 1e-5)])
def test_a_float16_student_of_a_teacher_with_more_range(backend, teacher_dtype, size):
    student = torch.randn(4, 16, 28, 28).mul(1e-5 if size < 1 else 1).to(F16).requires_grad_()
    teacher = (torch.randn(4, 16, 28, 28) * size).to(teacher_dtype)
    (skd.spectral_loss(student, teacher, backend=backend) * 65536 / max(1.0, size)).backward()
    expected = 65536 / max(1.0, size) * float64_oracle(student, teacher, "complex")[1]
    assert (student.grad.double() - expected).norm() <= ROUNDING[F16] * expected.norm() + 6e-8 * 224


def test_a_lazily_negated_map_is_read_as_it_is_meant(backend):
    student, teacher = ONE.make()
    negated = torch.complex(torch.zeros_like(teacher), -teacher).conj().imag
    assert negated.is_neg() and torch.equal(negated, teacher)
    loss, expected = (skd.spectral_loss(student, t, backend=backend) for t in (negated, teacher))
    assert abs(loss - expected) < 1e-6


def test_backward_may_run_again_and_inputs_are_never_written(backend):
    contract.check_backward_runs_again_and_inputs_are_never_written(loss_by(backend))


def test_one_map_in_two_layers_and_two_losses(backend):
    student, teacher = ONE.make()
    loss = skd.spectral_loss([student, student], [teacher, 2 * teacher], reduction="sum", backend=backend)
    (loss + 0.5 * skd.spectral_loss(student, teacher, "mse", backend=backend)).backward()
    parts = [
        float64_oracle(student, teacher, "complex")[1],
        float64_oracle(student, 2 * teacher, "complex")[1],
        0.5 * float64_oracle(student, teacher, "mse")[1],
    ]
    torch.testing.assert_close(student.grad.double(), sum(parts), rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("reentrant", [False, True])
def test_under_checkpointing(backend, reentrant):
    student, teacher = ONE.make()
    loss = checkpoint(
        lambda s: skd.spectral_loss(s * 2, teacher, backend=backend) * 3, student, use_reentrant=reentrant
    )
    loss.backward()
    expected = 6 * float64_oracle(2 * student.detach(), teacher, "complex")[1]
    torch.testing.assert_close(student.grad.double(), expected, rtol=1e-5, atol=1e-9)


def test_only_the_students_that_need_a_gradient_get_one(backend):
    contract.check_only_the_students_that_need_a_gradient_get_one(loss_by(backend))


def test_gradcheck(backend):
    if backend in WITHOUT_FLOAT64:
        pytest.skip("gradcheck needs float64")
    for match in MATCHES:
        contract.check_gradcheck(functools.partial(skd.spectral_loss, match=match, backend=backend))


def test_a_second_derivative_raises(backend):
    contract.check_a_second_derivative_raises(loss_by(backend))


def test_forward_mode_and_transforms_are_refused(backend):
    contract.check_forward_mode_and_transforms_are_refused(loss_by(backend))


def test_calls_past_the_checks_are_refused_not_computed(backend):
    student, teacher = ONE.make()
    call = torch.ops.skd.spectral_align
    for s, t, match, scales in [
        (student, teacher[:1], "complex", [1.0]),
        (student, teacher[..., :3], "complex", [1.0]),
        (student[:, :, :0], teacher[:, :, :0], "complex", [1.0]),
        (student, teacher, "mes", [1.0]),
        (student, teacher, "complex", []),
    ]:
        with pytest.raises((ValueError, RuntimeError)):
            call([s.detach()], [t], scales, match, [True], backend)


def test_a_trainable_teacher_is_refused(backend):
    student, teacher = ONE.make()
    with pytest.raises(ValueError, match="detach"):
        skd.spectral_loss(student, teacher.requires_grad_(), backend=backend)
    with pytest.raises(ValueError, match="detach"):  # also past the checks of the public function
        torch.ops.skd.spectral_align([student], [teacher], [1.0], "complex", [True], backend)


def test_training_with_each_backend_follows_one_curve():
    contract.check_training_follows_one_curve("complex", falls_to=0.5)


# --- Layers, reductions, options ---


def test_reductions_and_weights(backend):
    criterion = functools.partial(skd.SpectralLoss, backend=backend)
    contract.check_reductions_and_weights(criterion, oracle, rtol=1e-6)
    students, teachers = layers()
    one = skd.spectral_loss(students[0], teachers[0], reduction="none", backend=backend)
    assert one.shape == (1,)


def test_an_empty_batch_gives_zero_and_an_empty_gradient(backend, poisoned):
    student = torch.randn(0, 4, 7, 7, requires_grad=True)
    for teacher in (torch.randn(0, 4, 7, 7), torch.randn(0, 9, 7, 7), torch.randn(0, 3, 7, 7)):
        loss = skd.spectral_loss(student, teacher, backend=backend)
        (gradient,) = torch.autograd.grad(loss, student)
        assert loss.item() == 0 and gradient.shape == student.shape


def test_seventy_thousand_planes(backend):
    student, teacher = Case(7, 10_000, 10_000, 4, 4).make()
    loss = skd.spectral_loss(student, teacher, backend=backend)
    (gradient,) = torch.autograd.grad(loss, student)
    assert_close_to_float64(None, "complex", loss.detach(), gradient, student, teacher)


def test_offsets_beyond_32_bits(backend):
    contract.check_offsets_beyond_32_bits(loss_by(backend), oracle)


@pytest.mark.parametrize("grid", [7, 14, 56])
@pytest.mark.parametrize("dtype", [BF16, F16])
@pytest.mark.parametrize("channels", [(16, 32), (32, 16), (20, 7)])
def test_under_autocast_nothing_is_cast_down(backend, dtype, grid, channels):
    for student_dtype in (F32, dtype):
        case = Case(1, *channels, grid, grid, student_dtype=student_dtype, teacher_dtype=dtype)
        student, teacher = case.make()
        with torch.autocast("cpu", dtype):
            loss = skd.spectral_loss(student, teacher, backend=backend)
        loss.backward()
        assert loss.dtype == F32
        assert_close_to_float64(None, "complex", loss.detach(), student.grad, student, teacher)


def test_the_gradient_lies_in_memory_as_the_student_does(backend):
    contract.check_the_gradient_lies_in_memory_as_the_student_does(loss_by(backend))


# --- torch.library, torch.compile ---


@pytest.mark.parametrize("order", ["nchw", "tokens", "transposed"])
def test_opcheck(backend, order):
    student, teacher = Case(2, 6, 9, 4, 5, order, order).make()
    other = Case(2, 8, 4, 3, 3, order, "nchw", BF16).make()
    torch.library.opcheck(
        torch.ops.skd.spectral_align.default,
        ([student, other[0].detach()], [teacher, other[1]], [1.0, 0.5], "complex", [True, False], backend),
    )
    stored = [student.detach(), other[0].detach().to(F16)]
    torch.library.opcheck(
        torch.ops.skd.scale_gradients.default, (stored, torch.tensor([0.5, 2.0]), [480, 384], [1.0, 0.5], backend)
    )


@pytest.mark.parametrize("dtype", [F32, F16])
def test_compiles_as_one_graph(backend, dtype):
    def step(a, b, s, t):
        losses = skd.spectral_loss([a * 2, b], [s, t], reduction="none", backend=backend)
        return losses[0] * 0.3 + losses[1]

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    students, teachers = layers([Case(2, 16, 32, 7, 7, "tokens", student_dtype=dtype), TWO[1]])
    eager = step(*students, *teachers)
    expected = torch.autograd.grad(eager, students)
    got = compiled(*students, *teachers)
    torch.testing.assert_close(got, eager)
    for g, e in zip(torch.autograd.grad(got, students), expected, strict=True):
        torch.testing.assert_close(g, e)


def test_one_graph_serves_all_batch_sizes(backend):
    contract.check_one_graph_serves_all_batch_sizes(loss_by(backend), oracle)


@pytest.mark.slow
def test_compiles_with_inductor():
    student, teacher = ONE.make()
    compiled = torch.compile(lambda s: skd.spectral_loss(s.sin(), teacher) * 0.5, fullgraph=True)
    (gradient,) = torch.autograd.grad(compiled(student), student)
    (expected,) = torch.autograd.grad(skd.spectral_loss(student.sin(), teacher) * 0.5, student)
    torch.testing.assert_close(gradient, expected)


# --- Determinism and memory ---


@pytest.mark.parametrize("orders", [("nchw", "nchw"), ("tokens", "nchw"), ("nchw", "tokens"), ("sliced", "sliced")])
def test_the_same_bits_from_run_to_run_and_for_any_number_of_threads(backend, orders):
    student, teacher = Case(16, 48, 96, 14, 14, *orders).make()

    def results():
        loss = loss_by(backend)(student, teacher)
        return loss.detach(), torch.autograd.grad(loss, student)[0]

    contract.check_the_same_bits_for_any_number_of_threads(backend, results)


def test_large_calls_write_past_the_caches_and_still_every_number(poisoned, two_threads):
    if backends.backends()["cpu"] is not True:
        pytest.skip("no compiled CPU kernels in this installation")
    for orders in (("nchw", "nchw"), ("tokens", "tokens"), ("nchw", "tokens"), ("tokens", "nchw")):
        case = Case(48, 104, 208, 28, 28, *orders)
        student, teacher = case.make()
        loss = skd.spectral_loss(student, teacher, backend="cpu")
        (gradient,) = torch.autograd.grad(loss, student)
        assert_close_to_float64(case, "complex", loss.detach(), gradient, student, teacher)


@pytest.mark.parametrize("dtype", [F32, BF16, F16])
@pytest.mark.parametrize("orders", [("nchw", "nchw"), ("tokens", "nchw"), ("nchw", "tokens"), ("tokens", "tokens")])
def test_extra_memory_is_the_gradient_and_less_than_a_megabyte(orders, dtype, two_threads):
    if backends.backends()["cpu"] is not True:
        pytest.skip("no compiled CPU kernels in this installation")
    student, teacher = Case(16, 96, 192, 28, 28, *orders, dtype, dtype).make()

    def step():  # a factor that is not 1, so that the backward has to scale
        return torch.autograd.grad(skd.spectral_loss(student, teacher, backend="cpu") * 0.3, student)

    step()
    gradient = student.numel() * student.element_size()
    assert gradient <= memory.peak_tensor_bytes(step) < gradient + 2**16
    # What the kernel itself allocates shows in the process. The best of three: other threads of it allocate too.
    resident = [memory.peak_resident_bytes(step) for _ in range(3)]
    if None not in resident:
        assert min(resident) < gradient + 2**20


@pytest.mark.large
def test_more_than_2_to_the_31_elements():
    import os

    if not os.environ.get("SKD_TEST_LARGE"):
        pytest.skip("takes 14 GB of memory; set SKD_TEST_LARGE=1 to run it")
    channels = 2**31 // (8 * 16 * 16) + 16
    student = torch.empty(8, channels, 16, 16, dtype=BF16).uniform_(-1, 1).requires_grad_()
    teacher = torch.zeros(1, channels, 16, 16, dtype=BF16).expand(8, -1, -1, -1)
    loss = skd.spectral_loss(student, teacher, "mse")
    loss.backward()
    assert student.numel() > 2**31 and abs(loss.item() - 1 / 3) < 1e-3
    assert torch.equal(student.grad[-1, -1] != 0, student.detach()[-1, -1] != 0)


# --- The definition itself ---


def test_published_and_closed_form_agree_in_float64():
    for case in matrix():
        if case.student_dtype != F32 or case.teacher_dtype != F32 or case.student_order != "nchw":
            continue
        s, t = (x.detach().double() for x in case.make())
        for match in MATCHES:
            published = reference.spectral_align_published(s, t, match)
            closed = reference.spectral_align_closed_form(s, t, match)
            torch.testing.assert_close(closed, published, rtol=1e-12, atol=1e-28)


@pytest.mark.parametrize("width", [7, 14])
def test_of_a_constant_difference_the_loss_is_seven_eighths_of_the_mse(width, backend):
    student, teacher = torch.full((2, 8, 5, width), 3.0), torch.ones(2, 8, 5, width)
    assert skd.spectral_loss(student, teacher, backend=backend).item() == pytest.approx(0.875 * 4.0)


def test_the_loss_is_bounded_by_the_mse_and_not_symmetric_in_height_and_width(backend):
    student, teacher = Case(2, 8, 16, 6, 14).make()
    loss, mse = (skd.spectral_loss(student, teacher, m, backend=backend).item() for m in ("complex", "mse"))
    half = 14 // 2 + 1
    assert 14 / (4 * half) <= loss / mse <= 14 / (2 * half)
    turned = skd.spectral_loss(student.transpose(2, 3), teacher.transpose(2, 3), backend=backend).item()
    assert abs(turned - loss) > 1e-3 * loss


@pytest.mark.parametrize("width", [1, 2])
def test_rows_of_one_and_two_give_a_plain_sum(width, backend):
    student, teacher = Case(3, 5, 5, 4, width).make()
    numbers = 2 * 3 * 5 * 4 * (width // 2 + 1)
    expected = (student - teacher).double().square().sum() / numbers
    assert skd.spectral_loss(student, teacher, backend=backend).item() == pytest.approx(expected.item(), rel=1e-6)


@pytest.mark.parametrize("channels, width", [(6, 3), (7, 3), (384, 192), (5, 5), (37, 20)])
def test_pooling_is_adaptive_average_pooling_over_channels(channels, width):
    x = torch.randn(2, channels, 3, 4, dtype=F64, requires_grad=True)
    pooled = reference.pool_channels(x, width)
    tokens = x.permute(0, 2, 3, 1).reshape(2, 12, channels)
    expected = F.adaptive_avg_pool1d(tokens, width).reshape(2, 3, 4, width).permute(0, 3, 1, 2)
    torch.testing.assert_close(pooled, expected)
    upstream = torch.randn_like(pooled)
    (adjoint,) = torch.autograd.grad(pooled, x, upstream)
    torch.testing.assert_close(reference.unpool_channels(upstream, channels), adjoint)
