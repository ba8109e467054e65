"""The kernels on a GPU: the numbers of every case, and what an upstream gradient makes of them."""

import math
import os

import pytest
import torch
from cases import BF16, F16, F32, F64, Case, matrix
from gpu_helpers import (
    BACKENDS,
    DEVICE,
    LAYERS,
    UPSTREAM,
    check,
    gpu_backend,
    identical,
    needs_gpu,
    on_device,
    pairs,
    step,
)
from test_spectral_align import float64_oracle
from torch.utils.checkpoint import checkpoint

import skd
from skd.ops.spectral_align import MATCHES

pytestmark = [pytest.mark.gpu, needs_gpu]
backend = gpu_backend


# --- Numbers ---


@pytest.mark.parametrize("match", MATCHES)
@pytest.mark.parametrize("case", matrix(), ids=str)
def test_loss_and_gradient_are_those_of_float64(case, match, backend, poisoned):
    student, teacher = (on_device(x) for x in case.make())
    in_double = F64 in (case.student_dtype, case.teacher_dtype)
    if in_double:
        with pytest.raises(RuntimeError, match=f"{backend}.*float64"):
            skd.spectral_loss(student, teacher, match, backend=backend)
        backend = None  # falls back
    loss = skd.spectral_loss(student, teacher, match, backend=backend)
    (gradient,) = torch.autograd.grad(loss, student)
    assert loss.device == student.device and loss.dtype == (F64 if in_double else F32)
    check(case, match, loss, gradient, student, teacher)


@pytest.mark.parametrize("dtype", [F32, BF16, F16])
@pytest.mark.parametrize("orders", [("nchw", "nchw"), ("tokens", "nchw"), ("nchw", "tokens"), ("tokens", "tokens")])
def test_memory_that_starts_anywhere(backend, orders, dtype, poisoned):
    """Maps whose first element lies on no 16-byte boundary."""
    for shift in (1, 2, 4):
        case = Case(3, 32, 64, 7, 8, *orders, dtype, dtype)
        s, t = case.make()
        for student, teacher in ((on_device(s, shift=shift), on_device(t)), (on_device(s), on_device(t, shift=shift))):
            loss = skd.spectral_loss(student, teacher, backend=backend)
            (gradient,) = torch.autograd.grad(loss, student)
            check(case, "complex", loss, gradient, student, teacher)


def test_many_unlike_layers_in_one_call(backend, poisoned):
    """More than fit into one table of descriptors, of all orders, dtypes and sizes, one of them empty."""
    cases = [c for c in matrix() if F64 not in (c.student_dtype, c.teacher_dtype)][::5]
    students, teachers = pairs([*cases, Case(0, 3, 5, 7, 7)])
    losses, *gradients = step(students, teachers, backend, torch.ones(len(students), device=DEVICE))
    assert len(cases) > 64 and losses[-1].item() == 0 and gradients[-1].shape == students[-1].shape
    for case, loss, gradient, s, t in zip(cases, losses, gradients, students, teachers, strict=False):
        check(case, "complex", loss, gradient, s, t)


def test_the_best_backend_is_chosen_by_itself(monkeypatch):
    monkeypatch.delenv("SKD_BACKEND", raising=False)
    best = next(name for name in (*BACKENDS, "reference") if skd.backends()[name] is True)
    students, teachers = pairs(LAYERS)
    upstream = torch.tensor(UPSTREAM, device=DEVICE)
    assert identical(step(students, teachers, None, upstream), step(students, teachers, best, upstream))


def test_maps_elsewhere_are_refused(backend):
    student, teacher = LAYERS[0].make()
    with pytest.raises(ValueError, match="cpu.*move all maps to one device"):
        skd.spectral_loss(on_device(student), teacher, backend=backend)
    if os.environ.get("TRITON_INTERPRET") != "1":
        with pytest.raises(RuntimeError, match="cpu"):
            skd.spectral_loss(student, teacher, backend=backend)


@pytest.mark.parametrize("order", ["nchw", "tokens", "transposed"])
def test_opcheck(backend, order):
    students, teachers = pairs([Case(2, 6, 9, 4, 5, order, order), Case(2, 8, 4, 3, 3, order, "nchw", BF16)])
    arguments = ([students[0], students[1].detach()], teachers, [1.0, 0.5], "complex", [True, False], backend)
    torch.library.opcheck(torch.ops.skd.spectral_align.default, arguments)


# --- Upstream gradients ---


def test_any_upstream_gradient_of_each_layer(backend, poisoned):
    students, teachers = pairs(LAYERS)
    count = len(LAYERS)
    vectors = [
        torch.tensor(UPSTREAM),
        torch.randn(count, generator=torch.Generator().manual_seed(0)),
        torch.zeros(count),
        -torch.ones(count),
        torch.full((1,), 0.3).expand(count),
        torch.randn(2 * count, generator=torch.Generator().manual_seed(1))[::2],
    ]
    for vector in vectors:
        upstream = on_device(vector)
        assert upstream.stride() == vector.stride()
        _, *gradients = step(students, teachers, backend, upstream)
        for gradient, s, t, factor in zip(gradients, students, teachers, vector.tolist(), strict=True):
            expected = factor * float64_oracle(s.cpu(), t.cpu(), "complex")[1]
            roundings = {F32: 1e-6, BF16: 2.0**-7, F16: 2.0**-10}[s.dtype]  # two in 16 bits: stored, then scaled
            smallest = 6e-8 * math.sqrt(s.numel()) if s.dtype == F16 else 0.0
            assert (gradient.cpu().double() - expected).norm() <= roundings * expected.norm() + smallest


def test_backward_again_twice_used_and_checkpointed(backend):
    student, teacher = (on_device(x) for x in LAYERS[0].make())
    one = float64_oracle(student.cpu(), teacher.cpu(), "complex")[1]

    def close(gradient, factor):
        assert (gradient.cpu().double() - factor * one).norm() <= 2e-6 * abs(factor) * one.norm()

    loss = skd.spectral_loss(student, teacher, backend=backend) * 0.3
    (first,) = torch.autograd.grad(loss, student, retain_graph=True)
    (second,) = torch.autograd.grad(loss, student, torch.tensor(-2.0, device=DEVICE), retain_graph=True)
    (third,) = torch.autograd.grad(loss, student)
    close(first, 0.3), close(second, -0.6)
    assert torch.equal(first, third)

    loss = skd.spectral_loss(student, teacher, backend=backend)
    close(torch.autograd.grad(loss * 0.5 + loss * loss.detach(), student)[0], 0.5 + loss.item())
    both = skd.spectral_loss(student, teacher, backend=backend) - 3 * skd.spectral_loss(student, teacher, "mse")
    mse = float64_oracle(student.cpu(), teacher.cpu(), "mse")[1]
    (gradient,) = torch.autograd.grad(both, student)
    torch.testing.assert_close(gradient.cpu().double(), one - 3 * mse, rtol=1e-4, atol=1e-9)

    for reentrant in (False, True):
        loss = checkpoint(
            lambda s: skd.spectral_loss(s * 1, teacher, backend=backend) * 3, student, use_reentrant=reentrant
        )
        student.grad = None
        loss.backward()
        close(student.grad, 3.0)
