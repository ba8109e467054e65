"""What the tests on a GPU share: the backends, maps on the device, and a set of layers that takes every path."""

import os

import pytest
import torch
from cases import BF16, F16, F32, Case
from test_spectral_align import assert_close_to_float64

import skd

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

DEVICE = torch.device("cuda")
BACKENDS = ("cuda", "triton")


def require(name: str) -> str:
    """Skips where a backend cannot run, unless SKD_TEST_REQUIRE (names with commas between) says that it must."""
    there = skd.backends()[name]
    if there is not True:
        required = os.environ.get("SKD_TEST_REQUIRE", "").replace(" ", "").split(",")
        (pytest.fail if name in required else pytest.skip)(f"backend {name}: {there}")
    return name


@pytest.fixture(params=BACKENDS)
def gpu_backend(request):
    """What the tests on a GPU have in the place of the fixture ``backend``."""
    return require(request.param)


def on_device(x, device=None, shift=0):
    """A copy in the memory order of `x`: strides, gaps and overlaps; its memory may start `shift` elements later."""
    n = x.untyped_storage().nbytes() // x.element_size()
    storage = torch.empty(0, dtype=x.dtype, device=x.device).set_(x.detach().untyped_storage(), 0, (n,), (1,))
    copy = storage.new_zeros(n + shift, device=device or DEVICE)
    copy[shift:].copy_(storage)
    copy = copy.as_strided(x.shape, x.stride(), x.storage_offset() + shift)
    return copy.detach().requires_grad_(x.requires_grad)


def pairs(cases, device=None):
    students, teachers = zip(*(case.make() for case in cases), strict=True)
    return [on_device(s, device) for s in students], [on_device(t, device) for t in teachers]


def step(students, teachers, backend, upstream, match="complex"):
    """Forward and backward: the losses of the layers, then the gradients."""
    losses = skd.spectral_loss(students, teachers, match, reduction="none", backend=backend)
    return [losses.detach(), *torch.autograd.grad(losses, students, upstream)]


def identical(results, expected):
    return len(results) == len(expected) and all(torch.equal(a, b) for a, b in zip(results, expected, strict=True))


def check(case, match, loss, gradient, student, teacher):
    """Against float64 of the published form, on the CPU."""
    gradient, student, teacher = (on_device(x, "cpu") for x in (gradient, student, teacher))
    assert_close_to_float64(case, match, loss.detach().cpu(), gradient, student, teacher)


def spin(milliseconds):
    """Keeps the current stream busy for at least this long."""
    torch.cuda._sleep(int(milliseconds * 2e6))  # clock cycles, at no more than 2 GHz


# Every fast path, every dtype, both directions of pooling, and one layer of odd strides.
LAYERS = [
    Case(8, 96, 192, 14, 14, "tokens", "nchw"),
    Case(8, 64, 64, 28, 28),
    Case(8, 192, 96, 7, 7, "tokens", "tokens", BF16, F32),
    Case(8, 48, 48, 9, 10, "sliced", "transposed", F16, F16),
    Case(4, 32, 40, 5, 6, "nchw", "tokens", F16, F32),
]
UPSTREAM = [0.7, -3.1, 0.0, 128.0, 1.0]
