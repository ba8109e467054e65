"""What this installation consists of and what it can run: the text to put into a bug report.

Nothing here raises. A fact that cannot be found out is reported as a sentence that says why, so that a broken
installation still describes itself. CUDA is asked through the driver's management library and ``nvidia-smi``, which
leaves this process free of a CUDA context.
"""

import functools
import importlib.metadata
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

PACKAGES = (
    "torch",
    "torchvision",
    "triton",
    "timm",
    "numpy",
    "scikit-learn",
    "matplotlib",
    "rich",
    "tyro",
    "safetensors",
)
"""Distributions whose versions are reported."""

_PACKAGE_FOLDER = Path(__file__).resolve().parent


def report() -> dict[str, dict[str, object]]:
    """Everything that is worth knowing when something does not work.

    Returns:
        Section name -> {fact: value}; the sections are ``skd``, ``system``, ``packages``, ``torch``, ``cuda``,
        ``compilers``, ``built``, ``backends`` and ``variables``. Values are strings, numbers, booleans and lists, so
        that the whole can be written as JSON. ``backends`` holds True or the reason a backend is not available.
    """
    sections: dict[str, Callable[[], dict]] = {
        "skd": _skd,
        "system": _system,
        "packages": _packages,
        "torch": _torch,
        "cuda": _cuda,
        "compilers": _compilers,
        "built": _built,
        "backends": _backends,
        "variables": _variables,
    }
    return {name: _facts(section) for name, section in sections.items()}


def format_report(facts: dict[str, dict[str, object]]) -> str:
    """The report as plain text, one fact per line under the name of its section."""
    lines = []
    for section, entries in facts.items():
        lines.append(section)
        width = max((len(key) for key in entries), default=0)
        lines += [f"  {key:<{width}}  {_plain(value)}" for key, value in entries.items()] or ["  (none)"]
    return "\n".join(lines)


def main() -> int:
    """Prints the report; the exit status is 0."""
    print(format_report(report()))
    return 0


# --- Facts that the benchmarks record too ---


@functools.cache
def cpu_model() -> str:
    """The processor's name as the system gives it, or its architecture where it gives none."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            key, _, value = line.partition(":")
            if key.strip() in ("model name", "Model Name", "cpu model", "Processor") and value.strip():
                return value.strip()
    except OSError:
        pass
    name = _output(["sysctl", "-n", "machdep.cpu.brand_string"]) if sys.platform == "darwin" else ""
    return name or platform.processor() or platform.machine() or "unknown"


def usable_cores() -> int:
    """The number of logical processors this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@functools.cache
def last_level_cache_bytes() -> int | None:
    """The size of the largest cache that the first processor sees, in bytes; None if the system does not say."""
    sizes = []
    for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        try:
            amount = re.fullmatch(r"(\d+)([KMG]?)", path.read_text().strip())
        except OSError:
            continue
        if amount:
            sizes.append(int(amount[1]) * {"": 1, "K": 2**10, "M": 2**20, "G": 2**30}[amount[2]])
    return max(sizes, default=None)


def instruction_set() -> str:
    """The instruction set that the compiled CPU kernels chose when they were loaded, or why there is none."""
    from skd.ops import backends

    extension = backends.load("cpu")
    if isinstance(extension, str):
        return f"none: {extension}"
    return str(extension.instruction_set())


def kernel_threads() -> str:
    """Whose threads the compiled CPU kernels run on."""
    from skd.ops import backends

    extension = backends.load("cpu")
    if isinstance(extension, str):
        return f"none: {extension}"
    return "PyTorch's" if extension.shares_threads() else "their own"


def version() -> str:
    """The version of skd."""
    import skd

    return skd.__version__


@functools.cache
def git_commit() -> tuple[str, bool] | None:
    """The commit of the checkout that skd is imported from, and whether its sources differ from it.

    None if skd is installed, or if git cannot be asked. A repository that merely contains the installed package, such
    as a user's own with a virtual environment in it, does not count.
    """
    folder = _PACKAGE_FOLDER.parent
    git = ["git", "-C", str(folder)]
    if _output([*git, "ls-files", "--error-unmatch", "skd/__init__.py"]) != "skd/__init__.py":
        return None
    commit = _output([*git, "rev-parse", "HEAD"])
    if not commit:
        return None
    sources = ("skd", "csrc", "kernels", "setup.py", "build_support.py")
    return commit, bool(_output([*git, "status", "--porcelain", "--", *sources]))


# --- The sections ---


def _skd() -> dict:
    commit = git_commit()
    return {
        "version": version(),
        "folder": str(_PACKAGE_FOLDER),
        "commit": commit[0] + (" with uncommitted changes" if commit[1] else "") if commit else "not in a git checkout",
    }


def _system() -> dict:
    cache = last_level_cache_bytes()
    return {
        "os": platform.platform(),
        "python": f"{platform.python_version()} ({platform.python_implementation()}, {sys.executable})",
        "processor": cpu_model(),
        "usable cores": usable_cores(),
        "last-level cache": f"{cache / 2**20:g} MiB" if cache else "unknown",
        "memory": f"{os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / 2**30:.1f} GiB"
        if hasattr(os, "sysconf")
        else "unknown",
    }


def _packages() -> dict:
    found = {}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def _torch() -> dict:
    import torch

    return {
        "version": torch.__version__,
        "vector instructions": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "interop threads": torch.get_num_interop_threads(),
        "built for CUDA": torch.version.cuda or "no",
    }


def _cuda() -> dict:
    import torch

    if not torch.backends.cuda.is_built():
        return {"available": "no: this PyTorch is built without CUDA"}
    smi = shutil.which("nvidia-smi")
    gpus = _output([smi, "--query-gpu=name,compute_cap,driver_version", "--format=csv,noheader"]) if smi else ""
    count = torch.cuda.device_count()  # asks NVML where it can, which creates no context
    available = f"{count} device{'s' * (count != 1)}" if count else "no: PyTorch sees no CUDA device"
    return {"available": available, "nvidia-smi": gpus.splitlines() or ("no devices" if smi else "not found")}


def _compilers() -> dict:
    found = {}
    cxx = os.environ.get("CXX", "").split()[-1:]  # the last word of "ccache g++"
    for name, candidates in {"c++": [*cxx, "c++", "g++", "clang++"], "nvcc": _nvcc_candidates()}.items():
        path = next((p for p in map(shutil.which, filter(None, candidates)) if p), None)
        found[name] = f"{path}: {_version_line(path)}" if path else "not found"
    return found


def _nvcc_candidates() -> list[str]:
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH")]
    in_homes = [str(Path(home) / "bin" / "nvcc") for home in homes if home]
    return [os.environ.get("SKD_NVCC") or "", *in_homes, "nvcc", "/usr/local/cuda/bin/nvcc"]


def _version_line(compiler: str) -> str:
    lines = _output([compiler, "--version"]).splitlines()
    release = [line for line in lines if "release" in line]  # nvcc's first line is only its name
    return (release or lines or ["gives no version"])[0].strip()


def _built() -> dict:
    from skd import build_info

    facts: dict[str, object] = {}
    for name, entry in build_info.read().items():
        details = {k: v for k, v in entry.items() if k not in ("built", "reason") and v}
        facts[name] = "yes" if entry.get("built") else f"no: {entry.get('reason') or 'the build left no reason'}"
        facts |= {f"{name} {key.replace('_', ' ')}": value for key, value in details.items()}
    facts["instruction set in use"] = _probe(instruction_set)
    facts["threads of cpu"] = _probe(kernel_threads)
    return facts


def _backends() -> dict:
    from skd.ops import backends

    return dict(backends.backends())


def _variables() -> dict:
    prefixes = ("SKD_", "OMP_", "MKL_NUM_THREADS", "KMP_", "GOMP_", "TRITON_", "CUDA_VISIBLE_DEVICES", "CUDA_HOME")
    names = sorted(name for name in os.environ if name.startswith(prefixes))
    return {name: os.environ[name] for name in names}


# --- Helpers ---


def _facts(section: Callable[[], dict]) -> dict[str, object]:
    facts = _probe(section)
    return facts if isinstance(facts, dict) else {"error": facts}


def _probe(question: Callable[[], object]) -> object:
    """The answer, or a sentence in its place: a report on a broken installation must not break itself."""
    try:
        return question()
    except Exception as error:  # whatever a broken installation throws
        return f"could not be found out: {type(error).__name__}: {error}"


def _output(command: list[str]) -> str:
    """What a program prints, stripped; empty if it cannot be run, fails or takes longer than ten seconds."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True, errors="replace")
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.strip()


def _plain(value: object) -> str:
    if value is True:
        return "available"
    if isinstance(value, list | tuple):
        return ", ".join(map(str, value))
    return " ".join(str(value).split())


if __name__ == "__main__":
    sys.exit(main())
