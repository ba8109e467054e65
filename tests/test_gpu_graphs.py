"""The kernels in CUDA graphs, and what a failed launch leaves behind."""

import contextlib
import ctypes

import pytest
import torch
from gpu_helpers import DEVICE, LAYERS, UPSTREAM, gpu_backend, identical, needs_gpu, on_device, pairs, spin, step

import skd

pytestmark = [pytest.mark.gpu, needs_gpu]
backend = gpu_backend


def capture(work):
    """A function that replays `work`, and the results that it rewrites."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            work()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = work()
    return graph.replay, results


def new_numbers(maps, seed):
    generator = torch.Generator(DEVICE).manual_seed(seed)
    with torch.no_grad():
        for x in maps:
            x.normal_(generator=generator)


def test_a_graph_replays_what_eager_computes(backend, poisoned):
    students, teachers = pairs(LAYERS)
    upstream = torch.ones(len(LAYERS), device=DEVICE)

    def work():
        loss = skd.spectral_loss(students, teachers, "mse", backend=backend)
        return [*step(students, teachers, backend, upstream), *torch.autograd.grad(loss * upstream[0], students)]

    replay, results = capture(work)
    for seed, vector in enumerate(([1.0] * len(LAYERS), UPSTREAM, [0.0] * len(LAYERS), UPSTREAM[::-1])):
        new_numbers([*students, *teachers], seed)
        upstream.copy_(torch.tensor(vector))
        replay()
        replayed = [r.clone() for r in results]
        assert identical(replayed, work())
    replay(), replay()
    assert identical(results, replayed)


def test_graphs_replayed_beside_each_other_and_beside_eager_calls(backend):
    work, streams = [], [torch.cuda.Stream(), torch.cuda.Stream(), torch.cuda.current_stream()]
    for seed in range(3):
        students, teachers = pairs(LAYERS)
        new_numbers([*students, *teachers], seed)
        upstream = torch.tensor(UPSTREAM, device=DEVICE) + seed
        work.append(lambda s=students, t=teachers, u=upstream: step(s, t, backend, u))
    captured = [capture(w) for w in work[:2]]
    expected = [w() for w in work]
    torch.cuda.synchronize()
    collected = [[], [], []]
    for stream in streams:
        with torch.cuda.stream(stream):
            spin(50)
    for _ in range(30):
        for (replay, results), stream, list_ in zip(captured, streams, collected, strict=False):
            with torch.cuda.stream(stream):
                replay()
                list_.append([r.clone() for r in results])
        collected[2].append(work[2]())
    torch.cuda.synchronize()
    for results, wanted in zip(collected, expected, strict=True):
        assert len(results) == 30 and all(identical(r, wanted) for r in results)


def test_graphed_callables(backend):
    student, teacher = (on_device(x) for x in LAYERS[0].make())

    def loss(s, t):
        return skd.spectral_loss(s, t, backend=backend)

    graphed = torch.cuda.make_graphed_callables(loss, (on_device(student), on_device(teacher)))
    for seed in range(3):
        new_numbers([student, teacher], seed)
        results = [[f(student, teacher)] for f in (graphed, loss)]
        for result in results:
            result.append(torch.autograd.grad(result[0] * 0.3, student)[0].clone())
        torch.testing.assert_close(results[0], results[1], rtol=1e-6, atol=0)


def test_a_launch_that_fails_raises(backend):
    """A stream whose capture was broken off refuses launches until the capture ends, and nothing is left behind."""
    student, teacher = (on_device(x) for x in LAYERS[1].make())
    side, driver = torch.cuda.Stream(), ctypes.CDLL("libcuda.so.1")
    handle = ctypes.c_void_p(side.cuda_stream)
    other = torch.zeros(8, device=DEVICE)
    torch.cuda.synchronize()
    with torch.cuda.stream(side):
        for _ in range(3):  # so that the memory comes out of PyTorch's cache below
            expected = skd.spectral_loss(student, teacher, backend=backend).detach()
        side.synchronize()
        if driver.cuStreamBeginCapture_v2(handle, 1):  # of this thread alone
            pytest.skip("the driver begins no capture")
        try:
            with contextlib.suppress(RuntimeError):
                side.synchronize()
            try:
                other.add_(1)
                refuses = False
            except RuntimeError:
                refuses = True
            raised = None
            try:
                skd.spectral_loss(student, teacher, backend=backend)
            except RuntimeError as error:
                raised = error
        finally:
            graph = ctypes.c_void_p()
            driver.cuStreamEndCapture(handle, ctypes.byref(graph))
        after = skd.spectral_loss(student, teacher, backend=backend)
    torch.cuda.synchronize()
    assert torch.equal(after, expected)
    if not refuses:
        pytest.skip("a broken capture does not refuse launches here")
    assert raised is not None
    if backend == "cuda" and not isinstance(raised, torch.AcceleratorError):  # unless a tensor of PyTorch's came first
        assert "skd" in str(raised)
