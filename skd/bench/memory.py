"""The allocator during measurements, and how much memory an implementation takes beyond its inputs."""

import contextlib
import ctypes
import gc
import json
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

try:
    import resource
except ImportError:  # Windows
    resource = None

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # <malloc.h> of glibc


def recycle_freed_memory() -> str:
    """Makes malloc keep freed memory for the next allocation, and returns a sentence for the record.

    glibc gives buffers above 32 MiB back to the system when they are freed, so that each call of an operation with such
    a buffer pays for page faults, often more than for the operation. Allocators for training do not, and PyTorch's on
    the GPU does not. Kept memory favours the implementations with many large buffers, that is, plain PyTorch. The
    setting holds for the rest of the process.
    """
    try:
        libc = ctypes.CDLL(None)
        libc.gnu_get_libc_version  # noqa: B018  (AttributeError on any other C library)
        done = libc.mallopt(_M_MMAP_MAX, 0) and libc.mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)
    except (OSError, AttributeError, TypeError):
        return "as it is (the C library is not glibc, whose malloc alone can be told to keep freed memory)"
    return "freed memory is kept and used again (mallopt M_MMAP_MAX=0)" if done else "as it is (mallopt refused)"


def prefault(amount: int) -> None:
    """Leaves this many bytes of freed memory that the system has handed out already, at most a quarter of what is free.

    After :func:`recycle_freed_memory` every later buffer comes out of it, without a page fault from the first call on.
    """
    if hasattr(os, "sysconf") and "SC_AVPHYS_PAGES" in os.sysconf_names:
        amount = min(amount, os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 4)
    torch.empty(amount, dtype=torch.uint8).fill_(1)


def page_faults() -> int:
    """The pages this process has been given so far (minor faults); 0 where the system does not count them."""
    return 0 if resource is None else resource.getrusage(resource.RUSAGE_SELF).ru_minflt


def peak_tensor_bytes(step: Callable[[], object]) -> int:
    """The peak of what PyTorch's CPU allocator hands out during a step, in bytes, beyond what was there before.

    Every tensor counts, those inside fused and compiled operators included, because the allocator itself reports to
    the profiler. What the step returns is freed after the count, what existed before is not counted. The figure is the
    same in every run. A kernel's own malloc is not seen; :func:`peak_resident_bytes` sees it.
    """
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # read at the first profile; its notes would go through the tables
    profiler = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True)
    with no_garbage_collection(), profiler as profile:
        result = step()
    del result
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profile.export_chrome_trace(str(path))
        events = json.loads(path.read_text())["traceEvents"]
    changes = [
        (event["ts"], event["args"]["Bytes"])
        for event in events
        if event.get("name") == "[memory]" and event["args"].get("Device Type") == 0
    ]
    held = peak = 0
    for _, amount in sorted(changes, key=lambda change: change[0]):
        held += amount
        peak = max(peak, held)
    return peak


def peak_resident_bytes(step: Callable[[], object]) -> int | None:
    """How far a step raises the peak of the process's resident memory, in bytes; None where Linux does not tell.

    Freed memory is returned to the system first, so that whatever the step takes shows, from whichever allocator. The
    figure is an upper bound: memory that the step frees on its way and cannot use again stays in it, pages are counted
    whole, and so are one-time costs (call the step once before).
    """
    try:
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")  # the peak is set to the present size
        before = _status("VmRSS")
        with no_garbage_collection():
            result = step()
        peak = _status("VmHWM")
    except (OSError, AttributeError, TypeError, LookupError):
        return None
    del result
    return max(peak - before, 0)


@contextlib.contextmanager
def no_garbage_collection() -> Iterator[None]:
    """Python's cyclic collector does not run in the block."""
    collecting = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collecting:
            gc.enable()


def _status(name: str) -> int:
    """A field of /proc/self/status, in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name + ":"):
            return int(line.split()[1]) * 1024
    raise LookupError(name)
