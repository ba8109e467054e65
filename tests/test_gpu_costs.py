"""What a call on a GPU costs besides time: memory and launches."""

import json
import os
from dataclasses import replace

import pytest
import torch
from cases import BF16, F16, F32, Case
from gpu_helpers import DEVICE, gpu_backend, needs_gpu, pairs

import skd

pytestmark = [pytest.mark.gpu, needs_gpu]
backend = gpu_backend


@pytest.mark.parametrize("dtype", [F32, BF16, F16])
@pytest.mark.parametrize("orders", [("nchw", "nchw"), ("tokens", "nchw"), ("nchw", "tokens"), ("tokens", "tokens")])
def test_extra_memory_is_the_gradient_and_less_than_a_megabyte(backend, orders, dtype):
    students, teachers = pairs([Case(16, c, 2 * c, 28, 28, *orders, dtype, dtype) for c in (96, 64)])

    def extra(work):  # by what was asked for: memory_allocated() counts up to 1 MB of a block that was not split
        for _ in range(2):
            work()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_stats()["requested_bytes.all.current"]
        result = work()
        peak = torch.cuda.memory_stats()["requested_bytes.all.peak"] - before
        del result
        return peak

    gradients = sum(s.numel() * s.element_size() for s in students)

    def train():  # a factor that is not 1, so that the backward has to scale
        return torch.autograd.grad(skd.spectral_loss(students, teachers, backend=backend) * 0.3, students)

    def evaluate():
        with torch.no_grad():
            return skd.spectral_loss(students, teachers, backend=backend)

    assert gradients <= extra(train) < gradients + 2**20
    assert extra(evaluate) < 2**20


@pytest.fixture
def launches(tmp_path):
    """Counts the kernels that a function launches; gives its result and their names."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")

    def profiled(work):
        kinds = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
        with torch.profiler.profile(activities=kinds) as profile:
            result = work()
            torch.cuda.synchronize()
        path = tmp_path / "trace.json"
        profile.export_chrome_trace(str(path))
        events = json.loads(path.read_text())["traceEvents"]
        return result, [event["name"] for event in events if event.get("cat") == "kernel"]

    x = torch.zeros(8, device=DEVICE)
    profiled(lambda: x.add_(1))
    if len(profiled(lambda: x.add_(1))[1]) != 1:
        pytest.skip("the profiler does not see this GPU's kernels")
    return profiled


@pytest.mark.parametrize("dtype", [F32, BF16, F16])
@pytest.mark.parametrize("count", [1, 16])
def test_launches(backend, count, dtype, launches):
    kinds = [Case(4, 96, 192, 14, 14, "tokens", "nchw"), Case(4, 64, 64, 7, 7), Case(4, 24, 48, 9, 5, "nchw", "tokens")]
    cases = [replace(kinds[i % 3], student_dtype=dtype, teacher_dtype=dtype) for i in range(count)]
    students, teachers = pairs(cases)
    limits = (1, 1) if backend == "cuda" else (count + 1, count + 1)
    for reduction, shape, value in (("mean", (), 1.0), ("none", (count,), 0.3)):
        upstream = torch.full(shape, value, device=DEVICE)

        def forward(reduction=reduction):
            return skd.spectral_loss(students, teachers, reduction=reduction, backend=backend)

        torch.autograd.grad(forward(), students, upstream)
        loss, names = launches(forward)
        assert 1 <= len(names) <= limits[0], names
        _, names = launches(lambda loss=loss, upstream=upstream: torch.autograd.grad(loss, students, upstream))
        assert len(names) <= limits[1], names
