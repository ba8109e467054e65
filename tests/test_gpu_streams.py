"""The kernels on streams and devices of a GPU: order, independence, a host that never waits, the same bits again."""

import pytest
import torch
from cases import BF16, F32, Case
from gpu_helpers import DEVICE, LAYERS, UPSTREAM, gpu_backend, identical, needs_gpu, on_device, pairs, spin, step

import skd
from skd.ops.spectral_align import MATCHES

pytestmark = [pytest.mark.gpu, needs_gpu]
backend = gpu_backend


def test_a_side_stream_sees_what_was_queued_on_it(backend):
    students, teachers = pairs(LAYERS)
    upstream = torch.tensor(UPSTREAM, device=DEVICE)
    expected = step(students, teachers, backend, upstream)
    side = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(side):
        late = [[on_device(x) for x in maps] for maps in (students, teachers)]
        for x in (*late[0], *late[1]):
            x.detach().fill_(float("nan"))
        spin(100)
        for x, value in zip((*late[0], *late[1]), (*students, *teachers), strict=True):
            x.detach().copy_(value.detach())
        results = step(*late, backend, upstream)
    side.synchronize()
    assert identical(results, expected)


def test_a_side_stream_does_not_wait_for_the_default_stream(backend):
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        students, teachers = pairs(LAYERS)
        upstream = torch.tensor(UPSTREAM, device=DEVICE)
        for _ in range(3):  # compiles, loads and allocates what the first calls need
            expected = step(students, teachers, backend, upstream)
    torch.cuda.synchronize()
    spin(1000)
    default_is_done = torch.cuda.Event()
    default_is_done.record()
    with torch.cuda.stream(side):
        results = step(students, teachers, backend, upstream)
    side.synchronize()
    waited = default_is_done.query()
    torch.cuda.synchronize()
    assert not waited and identical(results, expected)


def test_backward_from_another_stream(backend):
    students, teachers = pairs(LAYERS)
    upstream = torch.tensor(UPSTREAM, device=DEVICE)
    expected = step(students, teachers, backend, upstream)
    one, other = torch.cuda.Stream(), torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(one):
        spin(100)
        losses = skd.spectral_loss(students, teachers, reduction="none", backend=backend)
    with torch.cuda.stream(other):
        gradients = torch.autograd.grad(losses, students, upstream)
        results = [g.clone() for g in gradients]
    torch.cuda.synchronize()
    assert identical([losses.detach(), *results], expected)


def test_calls_queued_on_two_streams_at_once(backend):
    """Each call's maps are freed before it has begun; calls of the same shapes run beside each other."""
    upstream = torch.tensor(UPSTREAM, device=DEVICE)
    work = []
    for factor in (1.0, -0.5):
        students, teachers = pairs(LAYERS)
        for x in students:
            x.detach().mul_(factor)
        work.append((torch.cuda.Stream(), students, teachers, step(students, teachers, backend, upstream), []))
    torch.cuda.synchronize()
    for stream, *_ in work:
        with torch.cuda.stream(stream):
            spin(100)
    for _ in range(20):
        for stream, students, teachers, _, results in work:
            with torch.cuda.stream(stream):
                copies = [[on_device(x) for x in maps] for maps in (students, teachers)]
                results.append(step(*copies, backend, upstream))
                del copies
    torch.cuda.synchronize()
    for _, _, _, expected, results in work:
        assert all(identical(result, expected) for result in results)


@pytest.mark.parametrize("match", MATCHES)
def test_the_host_never_waits(backend, match):
    students, teachers = pairs(LAYERS)
    upstream = torch.tensor(UPSTREAM, device=DEVICE)

    def both():
        loss = skd.spectral_loss(students, teachers, match, backend=backend)
        torch.autograd.grad(loss * 0.3, students)
        return step(students, teachers, backend, upstream, match)

    for _ in range(3):
        expected = both()
    torch.cuda.synchronize()
    spin(1000)
    torch.cuda.set_sync_debug_mode("error")  # PyTorch's own waits; the event shows any other
    try:
        results = both()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    done = torch.cuda.Event()
    done.record()
    waited = done.query()
    torch.cuda.synchronize()
    assert not waited and identical(results, expected)


@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("orders", [("nchw", "nchw"), ("tokens", "nchw"), ("sliced", "tokens")])
def test_the_same_bits_a_thousand_times(backend, orders, dtype):
    """Half of them while another stream keeps the GPU busy."""
    students, teachers = pairs([Case(16, 96, 192, 14, 14, *orders, dtype, dtype), Case(16, 48, 48, 7, 7, *orders)])
    upstream = torch.tensor([0.7, 1.0], device=DEVICE)
    expected = step(students, teachers, backend, upstream)
    different = torch.zeros((), dtype=torch.bool, device=DEVICE)
    noise, side = torch.randn(1024, 1024, device=DEVICE), torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    for repeat in range(1000):
        if repeat >= 500:
            with torch.cuda.stream(side):
                torch.mm(noise, noise)
        for result, wanted in zip(step(students, teachers, backend, upstream), expected, strict=True):
            different |= (result != wanted).any()
    torch.cuda.synchronize()
    assert not different


def test_on_the_second_device_while_the_first_is_current(backend):
    if torch.cuda.device_count() < 2:
        pytest.skip("needs a second GPU")
    second = torch.device(DEVICE.type, 1)
    upstream = torch.tensor(UPSTREAM)
    first = step(*pairs(LAYERS), backend, upstream.to(DEVICE))
    results = step(*pairs(LAYERS, second), backend, upstream.to(second))
    assert torch.cuda.current_device() == 0 and {x.device for x in results} == {second}
    for a, b in zip(first, results, strict=True):
        torch.testing.assert_close(b.cpu(), a.cpu())
    with torch.cuda.device(second), torch.cuda.stream(torch.cuda.Stream(second)):
        again = step(*pairs(LAYERS, second), backend, upstream.to(second))
    torch.cuda.synchronize(second)
    assert identical(again, results)
    with pytest.raises(ValueError, match="move all maps to one device"):
        student, teacher = LAYERS[0].make()
        skd.spectral_loss(student.to(DEVICE), teacher.to(second), backend=backend)
