"""What the figures of a measurement on the CPU depend on, and what its columns mean."""

import datetime
import os
import platform
import sys

# A thread that spins at the end of a parallel region takes the processor from the next one's threads when there are as
# few cores as threads. The OpenMP library reads this when torch is loaded.
WAIT_POLICY_IN_TIME = "torch" not in sys.modules
if WAIT_POLICY_IN_TIME:
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import torch  # noqa: E402

from skd import env  # noqa: E402
from skd.bench import memory  # noqa: E402
from skd.bench.config import BenchConfig  # noqa: E402


def conditions(config: BenchConfig) -> dict[str, object]:
    """What the figures depend on; goes into every row. Sets the allocator as the configuration has it."""
    allocator = "as it is" if config.allocator == "default" else memory.recycle_freed_memory()
    policy = os.environ.get("OMP_WAIT_POLICY", "not set")
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "cpu": env.cpu_model(),
        "usable_cores": env.usable_cores(),
        "skd_instruction_set": env.instruction_set(),
        "torch_instruction_set": torch.backends.cpu.get_cpu_capability(),
        "last_level_cache_bytes": env.last_level_cache_bytes(),
        **software(),
        "allocator": allocator,
        "cache": config.cache,
        "omp_wait_policy": policy if WAIT_POLICY_IN_TIME else f"{policy} (torch was loaded before it was looked at)",
        "upstream_gradient": config.upstream,
        "seed": config.seed,
        "quick": config.quick,
        "load_average_at_start": load_average(),
    }


def software() -> dict[str, object]:
    """System, versions and commit."""
    commit = env.git_commit()
    return {
        "os": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "skd": env.version(),
        "commit": commit[0] if commit else None,
        "uncommitted_changes": commit[1] if commit else None,
    }


def load_average() -> float | None:
    """Processes that wanted a processor in the last minute, this one included."""
    return round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None


def heading(of: dict[str, object]) -> str:
    """What the conditions are and what the columns mean."""
    cache = of["last_level_cache_bytes"]
    commit = of["commit"]
    changed = " with uncommitted changes" if of["uncommitted_changes"] else ""
    lines = [
        f"skd {of['skd']}" + (f" at {str(commit)[:12]}{changed}" if commit else ""),
        f"{of['cpu']}, {of['usable_cores']} usable cores, "
        + (f"last-level cache {cache / 2**20:g} MiB" if isinstance(cache, int) else "size of the caches unknown"),
        f"skd's kernels: {of['skd_instruction_set']}; torch {of['torch']} uses {of['torch_instruction_set']}",
        f"malloc: {of['allocator']}",
        f"OMP_WAIT_POLICY: {of['omp_wait_policy']}",
        f"caches: {_CACHES[str(of['cache'])]}; upstream gradient {of['upstream_gradient']}",
        "x published, x eager: speed against the baseline, plain PyTorch on NCHW maps (medians); per round: the same",
        "as the median of the rounds' ratios; x copy, x read: time over that of a copy, or a sum, of the least bytes",
        "to move; share: time beyond that of another implementation, or as a part of it; extra MB: peak of tensor",
        "memory beyond the inputs. Forward may include work for the gradient.",
    ]
    load = of["load_average_at_start"]
    if isinstance(load, float) and load > 0.5:
        lines.append(f"NOTE: other programs are running (load average {load}); times will be longer and ratios unsure")
    return "\n".join(lines)


_CACHES = {
    "mixed": "as the implementation that ran before left them (random order)",
    "cold": "flushed before every run",
}
