"""The kernels on a GPU: tens of thousands of planes, and maps of more than 2^31 numbers."""

import pytest
import torch
from cases import BF16, Case
from gpu_helpers import DEVICE, check, gpu_backend, needs_gpu, on_device

import skd

pytestmark = [pytest.mark.gpu, needs_gpu]
backend = gpu_backend


@pytest.mark.parametrize("order", ["nchw", "tokens"])
@pytest.mark.parametrize("shape", [(7, 10_000, 10_000), (70_000, 1, 1), (1, 70_000, 35_000)])
def test_seventy_thousand_planes(backend, shape, order, poisoned):
    case = Case(*shape, 4, 4, order, order)
    student, teacher = (on_device(x) for x in case.make())
    loss = skd.spectral_loss(student, teacher, backend=backend)
    (gradient,) = torch.autograd.grad(loss, student)
    check(case, "complex", loss, gradient, student, teacher)


def zeros(order, b, c, h, w):
    if order == "nchw":
        return torch.zeros(b, c, h, w, dtype=BF16, device=DEVICE)
    rows = torch.zeros(b, h * w + 1, c, dtype=BF16, device=DEVICE)
    return rows[:, 1:].unflatten(1, (h, w)).permute(0, 3, 1, 2)


def need_memory(*sizes):
    """Skips unless so many bfloat16 numbers fit, with a margin."""
    torch.cuda.empty_cache()
    needed, free = 2 * sum(sizes) + 2**30, torch.cuda.mem_get_info()[0]
    if free < needed:
        pytest.skip(f"takes {needed / 1e9:.0f} GB of GPU memory, {free / 1e9:.0f} GB are free")


FAR = 8192, 1040, 16  # more than 2^31 elements in maps of 16x16


@pytest.mark.large
@pytest.mark.parametrize("student_order", ["nchw", "tokens"])
@pytest.mark.parametrize("teacher_order", ["nchw", "tokens"])
@pytest.mark.parametrize("share", [1, 2])
def test_more_than_2_to_the_31_elements(backend, share, student_order, teacher_order, poisoned):
    """All but four images are zero, so that a small call has the same sums."""
    batch, channels, side = FAR
    planes = channels // share
    map_size = batch * channels * (side * side + 1)
    need_memory(map_size, map_size // share, map_size // share)
    images = [0, batch // 3, batch // 2, batch - 1]
    student, teacher = (
        zeros(order, batch, c, side, side) for order, c in ((student_order, planes), (teacher_order, channels))
    )
    few = []
    for x in (student, teacher):
        few.append(torch.randn(len(images), *x.shape[1:], device=DEVICE).to(BF16))
        for image, values in zip(images, few[-1], strict=True):
            x[image].copy_(values)
    loss = skd.spectral_loss(student.requires_grad_(), teacher, backend=backend)
    (gradient,) = torch.autograd.grad(loss, student)
    factor = batch // len(images)  # a power of two, exact in bfloat16
    check(None, "complex", loss * factor, torch.stack([gradient[i] for i in images]) * factor, *few)
    for image in images:
        gradient[image].zero_()
    assert teacher.numel() > 2**31 and not any(chunk.any() for chunk in gradient.split(batch // 16))


@pytest.mark.large
def test_an_image_of_more_than_2_to_the_31_elements(backend, poisoned):
    few, side, factor = 8 * FAR[1] - 120, FAR[2], FAR[0] // 8
    need_memory(*[few * factor * side * side] * 3)
    student, teacher = (zeros("nchw", 1, few * factor, side, side) for _ in range(2))
    s, t = (torch.randn(1, few, side, side, device=DEVICE).to(BF16) for _ in range(2))
    student[:, -few:].copy_(s), teacher[:, -few:].copy_(t)
    loss = skd.spectral_loss(student.requires_grad_(), teacher, backend=backend)
    (gradient,) = torch.autograd.grad(loss, student)
    check(None, "complex", loss * factor, gradient[:, -few:] * factor, s, t)
    assert not any(chunk.any() for chunk in gradient[:, :-few].split(few * factor // 16, 1))
