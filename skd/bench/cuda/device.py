"""The device under measurement: its clock, caches, memory, kernels and graphs. Only this file touches ``torch.cuda``.

The tests put another object with the same methods in its place (:class:`Device` names them).
"""

import importlib.metadata
import json
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import torch


class Device(Protocol):
    """What a measurement needs of a device that works through a queue behind the host's back."""

    torch_device: torch.device
    l2_bytes: int

    def synchronize(self) -> None:
        """Returns when the queue is empty. Raises RuntimeError if the device has failed."""

    def seconds(self) -> float:
        """The host's clock."""

    def mark(self) -> Any:
        """Puts a time stamp into the queue."""

    def passed(self, mark: Any) -> bool:
        """Whether the device has reached a time stamp."""

    def milliseconds(self, start: Any, end: Any) -> float:
        """The device's time between two time stamps; waits for the second."""

    def hold(self, milliseconds: float) -> None:
        """Keeps the device busy about that long without touching memory, so that the host can fill the queue."""

    def flush_cache(self) -> None:
        """Leaves nothing in the L2 cache but clean lines that nobody asks for."""

    def poison(self, amount: int) -> None:
        """Fills memory that the next allocations are likely to get with NaN, lest an unwritten result be an old one."""

    def peak_extra_bytes(self, step: Callable[[], object]) -> int:
        """The peak of memory that a step takes beyond what was there before, its results included."""

    def kernels(self, step: Callable[[], object]) -> list[str] | None:
        """The names of what a step starts on the device (kernels, copies, fills); None if they cannot be listed."""

    def capture(self, step: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
        """A step as a CUDA graph: a function that replays it, and what the step returned, rewritten by each replay."""

    def release(self) -> None:
        """Gives cached memory back."""

    def conditions(self) -> dict[str, object]:
        """Name, driver, versions: what the figures depend on."""

    def state(self) -> str | None:
        """Clocks, power and temperature at this moment; None if nobody tells."""


def open_device() -> "CudaDevice":
    """The current CUDA device.

    Raises:
        ValueError: there is none; the sentence says why.
    """
    if not torch.backends.cuda.is_built():
        raise ValueError(
            "device='cuda': this PyTorch is built without CUDA; use device 'cpu', or a CUDA build of PyTorch"
        )
    if getattr(torch.version, "hip", None):
        raise ValueError("device='cuda': this PyTorch is built for AMD GPUs, which skd bench has never measured")
    if not torch.cuda.is_available():
        raise ValueError("device='cuda': PyTorch sees no CUDA device (no GPU, or no driver for it); use device 'cpu'")
    return CudaDevice()


# The spin kernel counts clock cycles; no GPU is clocked higher, and on a slower one it only holds longer.
_CYCLES_PER_MILLISECOND = 2_000_000


class CudaDevice:
    """See :class:`Device`. Everything happens on the current stream of the current device."""

    def __init__(self):
        index = torch.cuda.current_device()
        self.torch_device = torch.device("cuda", index)
        self._properties = torch.cuda.get_device_properties(index)
        self.l2_bytes = int(getattr(self._properties, "L2_cache_size", 0)) or 50 * 2**20
        # float32, so that they are four times what the cache holds.
        self._lines = torch.zeros(self.l2_bytes, dtype=torch.float32, device=self.torch_device)
        self._sink = torch.empty((), dtype=torch.float32, device=self.torch_device)

    def synchronize(self) -> None:
        torch.cuda.synchronize(self.torch_device)

    def seconds(self) -> float:
        return time.perf_counter()

    def mark(self) -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def passed(self, mark: torch.cuda.Event) -> bool:
        return mark.query()

    def milliseconds(self, start: torch.cuda.Event, end: torch.cuda.Event) -> float:
        end.synchronize()
        return start.elapsed_time(end)

    def hold(self, milliseconds: float) -> None:
        if hasattr(torch.cuda, "_sleep"):
            torch.cuda._sleep(int(milliseconds * _CYCLES_PER_MILLISECOND))

    def flush_cache(self) -> None:
        # By reading: lines that were written would have to go to memory during the measurement, at its expense.
        torch.sum(self._lines, 0, out=self._sink)

    def poison(self, amount: int) -> None:
        torch.cuda.empty_cache()
        # All bits set is a NaN in every floating dtype. Blocks below 1 MiB come from a pool of their own.
        blocks = [torch.empty(2**19, dtype=torch.uint8, device=self.torch_device).fill_(255) for _ in range(32)]
        blocks.append(torch.empty(amount, dtype=torch.uint8, device=self.torch_device).fill_(255))
        self.synchronize()

    def peak_extra_bytes(self, step: Callable[[], object]) -> int:
        torch.cuda.reset_peak_memory_stats(self.torch_device)
        before = torch.cuda.memory_allocated(self.torch_device)
        result = step()
        peak = torch.cuda.max_memory_allocated(self.torch_device)
        del result
        return peak - before

    def kernels(self, step: Callable[[], object]) -> list[str] | None:
        # Read at the first profile. Notes would go through the tables; and the profiler's library, taken down after a
        # profile, has crashed when it met CUDA graphs later (torch.profiler itself sets these two for them).
        for name, value in (("KINETO_LOG_LEVEL", "99"), ("TEARDOWN_CUPTI", "0"), ("DISABLE_CUPTI_LAZY_REINIT", "1")):
            os.environ.setdefault(name, value)
        activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
        try:
            self.synchronize()
            with torch.profiler.profile(activities=activities) as profile:
                result = step()
                self.synchronize()
            del result
            with tempfile.TemporaryDirectory() as folder:
                path = Path(folder) / "trace.json"
                profile.export_chrome_trace(str(path))
                return kernels_of_trace(json.loads(path.read_text()))
        except (RuntimeError, OSError, ValueError):
            return None

    def capture(self, step: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
        side = torch.cuda.Stream(self.torch_device)
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(2):  # libraries and compilers set themselves up at a first call, which a graph cannot hold
                step()
        torch.cuda.current_stream().wait_stream(side)
        self.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            results = step()
        return graph.replay, results

    def release(self) -> None:
        torch.cuda.empty_cache()

    def conditions(self) -> dict[str, object]:
        properties = self._properties
        return {
            "device": properties.name,
            "compute_capability": f"{properties.major}.{properties.minor}",
            "multiprocessors": properties.multi_processor_count,
            "device_memory_bytes": properties.total_memory,
            "l2_bytes": self.l2_bytes,
            "driver": smi("driver_version"),
            "cuda": torch.version.cuda,
            "triton": _version_of("triton"),
            "queue": "filled while a spin kernel runs"
            if hasattr(torch.cuda, "_sleep")
            else "not held: this PyTorch has no spin kernel, so times of short calls contain the host's",
        }

    def state(self) -> str | None:
        return smi("clocks.sm,clocks.mem,power.draw,temperature.gpu")


def kernels_of_trace(trace: dict) -> list[str]:
    """The names of what ran on the device, from a trace of the profiler, in the order of their start.

    Raises:
        ValueError: there is nothing from the host's side of CUDA or from the device: then the profiler did not see the
            device at all, and an empty list would be a lie.
    """
    events = [event for event in trace["traceEvents"] if event.get("cat")]
    on_device = [event for event in events if event["cat"] in ("kernel", "gpu_memcpy", "gpu_memset")]
    if not on_device and not any(event["cat"] in ("cuda_runtime", "cuda_driver") for event in events):
        raise ValueError("the profiler saw nothing of CUDA")
    return [event["name"] for event in sorted(on_device, key=lambda event: event["ts"])]


def smi(query: str) -> str | None:
    """What nvidia-smi says of the first device; None if it is missing or does not answer."""
    command = shutil.which("nvidia-smi")
    if command is None:
        return None
    try:
        asked = [command, f"--query-gpu={query}", "--format=csv,noheader"]
        done = subprocess.run(asked, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    lines = done.stdout.strip().splitlines()
    return lines[0].strip() if done.returncode == 0 and lines else None


def _version_of(module: str) -> str | None:
    try:
        return importlib.metadata.version(module)
    except importlib.metadata.PackageNotFoundError:
        return None


class Failed(Exception):
    """The device does not answer any more, so that nothing further can be measured in this process."""

    def __init__(self, after: str):
        super().__init__(f"the device failed in {after}, and CUDA refuses every further call of this process")
