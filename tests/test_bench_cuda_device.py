"""skd.bench.cuda.device, as far as it goes without a GPU, and with one."""

import collections

import pytest
import torch

from skd.bench.cuda import device as real


def test_kernels_of_a_trace_are_what_ran_on_the_device():
    events = [
        {"cat": "kernel", "name": "second", "ts": 2.0},
        {"cat": "cpu_op", "name": "aten::add", "ts": 0.0},
        {"cat": "cuda_runtime", "name": "cudaLaunchKernel", "ts": 0.5},
        {"cat": "gpu_memcpy", "name": "Memcpy DtoD", "ts": 3.0},
        {"cat": "gpu_memset", "name": "Memset", "ts": 1.0},
        {"cat": "gpu_user_annotation", "name": "step", "ts": 1.0},
        {"name": "process_name", "ts": 0.0},
    ]
    assert real.kernels_of_trace({"traceEvents": events}) == ["Memset", "second", "Memcpy DtoD"]
    assert real.kernels_of_trace({"traceEvents": events[1:3]}) == []
    with pytest.raises(ValueError, match="saw nothing of CUDA"):
        real.kernels_of_trace({"traceEvents": events[1:2]})


@pytest.fixture
def cuda_in_name_only(monkeypatch):
    """A CudaDevice whose tensors are on the CPU and whose calls into torch.cuda are noted."""
    calls = []

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            calls.append("record")

        def query(self):
            return True

        def synchronize(self):
            calls.append("event.synchronize")

        def elapsed_time(self, end):
            return 0.25

    class Graph:
        def replay(self):
            calls.append("replay")

    class Entered:
        def __init__(self, *arguments):
            calls.append("enter")

        def __enter__(self):
            return self

        def __exit__(self, *_):
            calls.append("exit")

        def wait_stream(self, other):
            calls.append("wait")

    properties = collections.namedtuple("P", "name major minor multi_processor_count total_memory L2_cache_size")
    device = object.__new__(real.CudaDevice)
    device.torch_device, device.l2_bytes = torch.device("cpu"), 4096
    device._properties = properties("Some GPU", 9, 0, 132, 2**36, 4096)
    device._lines, device._sink = torch.ones(4096), torch.empty(())
    peaks = iter([100, 175])
    stand_ins = {
        "Event": Event, "CUDAGraph": Graph, "Stream": Entered, "stream": Entered, "graph": Entered,
        "current_stream": Entered, "synchronize": lambda *_: calls.append("synchronize"),
        "_sleep": lambda cycles: calls.append(("sleep", cycles)), "empty_cache": lambda: calls.append("empty_cache"),
        "reset_peak_memory_stats": lambda *_: calls.append("reset"), "memory_allocated": lambda *_: next(peaks),
        "max_memory_allocated": lambda *_: next(peaks),
    }  # fmt: skip
    for name, stand_in in stand_ins.items():
        monkeypatch.setattr(torch.cuda, name, stand_in)
    return device, calls


def test_the_calls_into_cuda_are_in_order(cuda_in_name_only):
    device, calls = cuda_in_name_only
    start = device.mark()
    device.hold(1.5)
    assert device.passed(start) and device.milliseconds(start, device.mark()) == 0.25
    assert calls == ["record", ("sleep", 3_000_000), "record", "event.synchronize"]
    device.flush_cache()
    assert device._sink == 4096
    assert device.peak_extra_bytes(lambda: torch.ones(3)) == 75
    calls.clear()
    steps = []
    replay, results = device.capture(lambda: steps.append(len(steps)) or len(steps))
    assert steps == [0, 1, 2] and results == 3  # warmed up twice on another stream, then captured once
    replay()
    assert calls[-1] == "replay"
    device.poison(64)
    device.release()
    facts = device.conditions()
    assert facts["device"] == "Some GPU" and facts["compute_capability"] == "9.0" and "spin kernel" in facts["queue"]


@pytest.mark.filterwarnings("ignore:CUDA is not available")
@pytest.mark.skipif(torch.cuda.is_available(), reason="the profiler sees this GPU")
def test_launches_are_unknown_where_the_profiler_sees_no_device(cuda_in_name_only):
    assert cuda_in_name_only[0].kernels(lambda: torch.ones(3)) is None


def test_nvidia_smi_may_be_missing_or_broken(tmp_path, monkeypatch):
    tool = tmp_path / "nvidia-smi"
    monkeypatch.setenv("PATH", str(tmp_path))
    assert real.smi("driver_version") is None
    tool.write_text("#!/bin/sh\necho 580.1\necho 580.1\n")
    tool.chmod(0o755)
    assert real.smi("driver_version") == "580.1"
    tool.write_text("#!/bin/sh\nexit 9\n")
    assert real.smi("driver_version") is None


def test_a_failed_device_has_a_sentence():
    failed = real.Failed("skd-cuda")
    assert "the device failed in skd-cuda" in str(failed)
    with pytest.raises(real.Failed):
        raise failed


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_is_held_counted_and_captured():
    device = real.open_device()
    x = torch.ones(2**20, device=device.torch_device)
    device.synchronize()
    start = device.mark()
    device.hold(20.0)
    end = device.mark()
    assert not device.passed(end)
    assert 5 < device.milliseconds(start, end) < 1000  # in clock cycles: longer on a clock that is idle
    assert device.peak_extra_bytes(lambda: x + 1) == 4 * 2**20
    replay, result = device.capture(lambda: x + 1)
    result.fill_(torch.nan)
    replay()
    device.synchronize()
    assert torch.equal(result, x + 1)
    device.flush_cache()
    device.poison(2**24)
    names = device.kernels(lambda: x + 1)
    assert names is None or len(names) == 1, names
