"""What every loss on pairs of maps has to keep, whatever it computes.

A file of tests hands over its loss, ``skd.spectral_loss`` with some arguments, and where numbers matter its oracle: the
exact loss and gradient of a student and a teacher.
"""

import math

import pytest
import torch
from cases import BF16, F16, F64, Case
from kernels_here import kernels

import skd

WITHOUT_FLOAT64 = ("cuda", "triton")
"""The kernels for GPUs; that they refuse float64 is tested with the matrix."""

ONE = Case(2, 16, 32, 7, 7, "tokens", "nchw")
TWO = [ONE, Case(2, 24, 24, 14, 14)]


def refuses(backend, case):
    return backend in WITHOUT_FLOAT64 and F64 in (case.student_dtype, case.teacher_dtype)


def layers(cases=TWO):
    students, teachers = zip(*(case.make() for case in cases), strict=True)
    return list(students), list(teachers)


# --- Gradients ---


def check_upstream_gradients(loss, oracle, upstream, rtol, atol):
    students, teachers = layers()
    gradients = torch.autograd.grad(loss(students, teachers, reduction="none"), students, upstream)
    for g, s, t, factor in zip(gradients, students, teachers, upstream.tolist(), strict=True):
        torch.testing.assert_close(g.double(), factor * oracle(s, t)[1], rtol=rtol, atol=atol)


def check_a_loss_used_in_a_larger_one(loss, oracle, dtype, factor, rounding):
    student, teacher = Case(2, 16, 32, 7, 7, student_dtype=dtype, teacher_dtype=dtype).make()
    (loss(student, teacher) * factor).backward()
    expected = factor * oracle(student, teacher)[1]
    error = (student.grad.double() - expected).norm()
    # A factor that is a power of two is exact; any other may round a 16-bit gradient a second time.
    roundings = 1 if math.frexp(abs(factor))[0] in (0.0, 0.5) else 2
    assert error <= roundings * rounding[dtype] * expected.norm() + (1e-7 if dtype == F16 else 0)


def check_backward_runs_again_and_inputs_are_never_written(loss):
    students, teachers = layers()
    before = [x.detach().clone() for x in (*students, *teachers)]
    total = loss(students, teachers) * 0.3
    total.backward(retain_graph=True)
    once = [s.grad.clone() for s in students]
    total.backward(retain_graph=True)
    total.backward()
    for s, g in zip(students, once, strict=True):
        torch.testing.assert_close(s.grad, 3 * g)
    for x, copy in zip((*students, *teachers), before, strict=True):
        assert torch.equal(x.detach(), copy)


def check_only_the_students_that_need_a_gradient_get_one(loss):
    students, teachers = layers()
    students[1] = students[1].detach()
    loss(students, teachers).backward()
    assert students[0].grad is not None and students[1].grad is None
    with torch.no_grad():
        assert not loss(students, teachers).requires_grad


def check_gradcheck(loss):
    students, teachers = layers(
        [Case(1, 2, 3, 3, 4, student_dtype=F64), Case(2, 3, 2, 2, 3, "tokens", "tokens", F64, F64)]
    )
    torch.autograd.gradcheck(lambda *s: loss(s, teachers, reduction="none"), students)


def check_a_second_derivative_raises(loss):
    """Also where the upstream gradient is a constant, so that PyTorch by itself would see nothing to differentiate."""
    student, teacher = ONE.make()
    (gradient,) = torch.autograd.grad(loss(student, teacher), student, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        gradient.square().sum().backward()


def check_forward_mode_and_transforms_are_refused(loss):
    student, teacher = ONE.make()
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(student.detach(), torch.ones_like(student))
        with pytest.raises(RuntimeError, match="no forward-mode derivative"):
            loss(dual, teacher)
        loss(student, teacher)
    with pytest.raises(RuntimeError, match=r"torch\.func"):
        torch.func.grad(lambda s: loss(s, teacher))(student.detach())
    with pytest.raises(RuntimeError, match=r"torch\.func"):
        torch.func.vmap(loss)(student.detach()[:, None], teacher[:, None])


def check_training_follows_one_curve(match, falls_to):
    """Trap 20: forty steps of a small network; the curves of all backends coincide."""
    curves = {}
    for name in {"reference", *(kernel.partition(":")[0] for kernel in kernels())}:
        torch.manual_seed(0)
        student = torch.nn.Sequential(
            torch.nn.Conv2d(3, 16, 3, 2, 1), torch.nn.GELU(), torch.nn.Conv2d(16, 24, 3, 1, 1)
        )
        teacher = torch.nn.Conv2d(3, 48, 5, 2, 2).requires_grad_(False)
        optimizer = torch.optim.AdamW(student.parameters(), lr=1e-2)
        curve = []
        for step in range(40):
            images = torch.randn(8, 3, 28, 28, generator=torch.Generator().manual_seed(step))
            loss = skd.spectral_loss(student(images), teacher(images), match, backend=name)
            optimizer.zero_grad()
            (0.2 * loss).backward()
            optimizer.step()
            curve.append(loss.item())
        assert curve[-1] < falls_to * curve[0]
        curves[name] = torch.tensor(curve)
    for curve in curves.values():
        torch.testing.assert_close(curve, curves["reference"], rtol=1e-3, atol=0)


# --- Layers and sizes ---


def check_reductions_and_weights(criterion, oracle, rtol):
    students, teachers = layers()
    each = torch.stack([oracle(s, t)[0] for s, t in zip(students, teachers, strict=True)]).float()
    for weights in (None, [0.25, 3.0], 0.2, (0.25, 3.0)):
        scaled = each * torch.tensor(1.0 if weights is None else weights)
        for reduction, expected in (("none", scaled), ("sum", scaled.sum()), ("mean", scaled.mean())):
            loss = criterion(weights=weights, reduction=reduction)(students, teachers)
            torch.testing.assert_close(loss, expected, rtol=rtol, atol=0)


def check_offsets_beyond_32_bits(loss, oracle):
    """Two images 2^31 elements apart; only the pages that are touched take memory."""
    far = 2**31 + 16
    memory = torch.empty(far + 1024, dtype=BF16)
    teacher = memory.as_strided((2, 8, 4, 4), (far, 16, 4, 1))
    teacher.copy_(torch.randn(2, 8, 4, 4))
    student = torch.randn(2, 8, 4, 4, requires_grad=True)
    expected = oracle(student, teacher.clone())[0]
    assert abs(loss(student, teacher).double() - expected) <= 1e-6 * expected


def check_the_gradient_lies_in_memory_as_the_student_does(loss):
    for order in ("nchw", "nhwc", "tokens"):
        student, teacher = Case(2, 16, 16, 6, 5, order).make()
        (gradient,) = torch.autograd.grad(loss(student, teacher), student)
        assert gradient.stride() == torch.empty_like(student).stride()
        assert (gradient.stride(1) == 1) == (order != "nchw")


# --- torch.compile, determinism ---


def check_one_graph_serves_all_batch_sizes(loss, oracle):
    torch._dynamo.reset()
    graphs = []

    def count(graph, _):
        graphs.append(graph)
        return graph

    compiled = torch.compile(lambda s, t: loss(s, t), fullgraph=True, dynamic=True, backend=count)
    for batch in (2, 3, 5, 8):
        student, teacher = Case(batch, 6, 12, 7, 7).make()
        got = compiled(student, teacher)
        got.backward()
        assert abs(got.item() - oracle(student, teacher)[0]) < 1e-6
    assert len(graphs) == 1


def check_the_same_bits_for_any_number_of_threads(backend, results):
    """Of ``results()``, all its tensors, and from run to run."""
    before, runs = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3, 8, 1, 8):
            torch.set_num_threads(threads)
            runs.append(results())
    finally:
        torch.set_num_threads(before)
    compared = runs if backend != "reference" else [runs[0], runs[4]]  # PyTorch's sums depend on the threads
    for other in compared[1:]:
        for x, y in zip(other, compared[0], strict=True):
            assert torch.equal(x, y)
