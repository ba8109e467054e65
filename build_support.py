"""The decisions and the ninja file behind setup.py: no side effects beyond asking compilers for their version.

Every function takes the environment as an argument, so that the tests can decide for machines they do not run on.
"""

import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

CPU_KERNELS = ("channel_intensity", "fourier_align", "space_intensity", "spectral_align")
"""Stems of the sources in csrc/cpu that are compiled once per instruction set; the others are compiled once."""

X86_64 = ("x86_64", "amd64")
INSTRUCTION_SETS = {
    "baseline": [],
    "avx2": ["-mavx2", "-mfma", "-mf16c"],
    "avx512": [
        *("-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma", "-mf16c"),
        "-mprefer-vector-width=512",
    ],
}
"""Compiler flags of each instruction set, the humblest first; only the first exists outside x86-64."""

CXX_FLAGS = [
    *("-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden", "-fvisibility-inlines-hidden"),
    # Fused multiply-adds are wanted; reassociation is not, for the order of a sum is the kernels' to choose.
    *("-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math"),
    *("-Wall", "-Wextra", "-pthread"),
]
NVCC_FLAGS = ["-std=c++17", "-O3", "-cudart", "static", "-Xcompiler", "-fPIC,-fvisibility=hidden"]

OLDEST_NVCC = (11, 8)
"""The first nvcc whose runtime has cudaLaunchKernelEx."""
DEFAULT_ARCHS = (80, 86, 89, 90, 100, 120)
NVCC_OF_ARCH = {70: (9, 0), 72: (9, 2), 75: (10, 0), 80: (11, 0), 86: (11, 1), 87: (11, 4), 89: (11, 8), 90: (11, 8)}
NVCC_OF_ARCH |= {100: (12, 8), 101: (12, 8), 120: (12, 8), 103: (12, 9), 121: (12, 9), 110: (13, 0)}
"""The first nvcc that compiles for a compute capability (ten times its number)."""

GIB = 1 << 30
MEMORY_PER_JOB = 2 * GIB


class BuildError(Exception):
    """What was asked for cannot be built; the message is one sentence for the user."""


# --- Switches ----------------------------------------------------------------------------------------------------


def read_switch(env: Mapping[str, str], name: str) -> str:
    """The value of SKD_BUILD_CPU or SKD_BUILD_CUDA: "auto" (also when unset or empty), "0" or "1"."""
    value = env.get(name, "").strip().lower() or "auto"
    if value not in ("auto", "0", "1"):
        raise BuildError(f"{name}={env[name]!r} means nothing; set it to auto, 0 (leave out) or 1 (fail if impossible)")
    return value


def reason_to_skip(env: Mapping[str, str], switch: str, obstacle: str | None) -> str | None:
    """Why an extension is left out, or None if it is to be built.

    Args:
        env: the environment.
        switch: name of the variable that rules the extension.
        obstacle: what stands in the way of building it, if anything.

    Raises:
        BuildError: the switch is 1 and there is an obstacle, or the switch has no such value.
    """
    value = read_switch(env, switch)
    if value == "0":
        return f"{switch}=0 at build time"
    if value == "1" and obstacle:
        raise BuildError(f"{switch}=1, but {obstacle}")
    return obstacle


def read_jobs(env: Mapping[str, str], cores: int, memory: int) -> int:
    """How many compilers run at once: MAX_JOBS, or one per core and per 2 GiB of ``memory`` (bytes)."""
    value = env.get("MAX_JOBS", "").strip()
    if not value:
        return max(1, min(cores, memory // MEMORY_PER_JOB))
    if not value.isdecimal() or int(value) == 0:
        raise BuildError(f"MAX_JOBS={value!r} is no number of jobs; set it to a whole number from 1 up")
    return int(value)


def machine_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def machine_memory(limits: Iterable[str] = ("memory.max", "memory/memory.limit_in_bytes")) -> int:
    """Bytes of memory this process may use: the machine's, or its container's where that is less."""
    try:
        memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        memory = 4 * GIB
    for limit in limits:
        try:
            memory = min(memory, int(Path("/sys/fs/cgroup", limit).read_text()))
        except (OSError, ValueError):  # no such control group, or "max"
            continue
    return memory


# --- Tools -------------------------------------------------------------------------------------------------------


class Tool(NamedTuple):
    """A compiler, or the reason there is none (then ``command`` is empty)."""

    command: list[str]
    description: str
    obstacle: str | None = None


def _no_tool(obstacle: str) -> Tool:
    return Tool([], "", obstacle)


def _version_text(command: Sequence[str]) -> str | None:
    """What ``command --version`` prints, or None if it does not run."""
    try:
        done = subprocess.run([*command, "--version"], capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 and done.stdout.strip() else None


def find_cxx(env: Mapping[str, str]) -> Tool:
    """The C++ compiler: CXX if set, otherwise the first of c++, g++, clang++ on the PATH that runs."""
    path = env.get("PATH", "")
    chosen = shlex.split(env.get("CXX", ""))
    for command in [chosen] if chosen else [["c++"], ["g++"], ["clang++"]]:
        program = shutil.which(command[0], path=path)
        version = program and _version_text([program, *command[1:]])
        if version:
            return Tool([program, *command[1:]], version.splitlines()[0])
    if chosen:
        return _no_tool(f"CXX={env['CXX']!r} is no compiler that runs here")
    return _no_tool("no C++ compiler was found: install g++ or clang++, or name one in CXX")


def parse_nvcc_version(text: str) -> tuple[int, int] | None:
    """(major, minor) from what ``nvcc --version`` prints, or None."""
    found = re.search(r"\brelease (\d+)\.(\d+)", text)
    return (int(found[1]), int(found[2])) if found else None


class Nvcc(NamedTuple):
    """The CUDA compiler, or the reason there is none (then ``command`` is empty)."""

    command: list[str]
    version: tuple[int, int]
    obstacle: str | None = None


def find_nvcc(env: Mapping[str, str]) -> Nvcc:
    """The CUDA compiler: SKD_NVCC if set, otherwise that of CUDA_HOME, otherwise the one on the PATH."""
    path = env.get("PATH", "")
    program = shutil.which(env["SKD_NVCC"], path=path) if env.get("SKD_NVCC") else None
    if env.get("SKD_NVCC") and not program:
        return Nvcc([], (0, 0), f"SKD_NVCC={env['SKD_NVCC']!r} is no program on this machine")
    if not program and env.get("CUDA_HOME"):
        program = shutil.which("nvcc", path=os.path.join(env["CUDA_HOME"], "bin"))
    program = program or shutil.which("nvcc", path=path)
    if not program:
        return Nvcc(
            [], (0, 0), "nvcc was not found: put it on the PATH, or set SKD_NVCC to it or CUDA_HOME to its root"
        )
    version = parse_nvcc_version(_version_text([program]) or "")
    if version is None:
        return Nvcc([], (0, 0), f"{program} --version does not say which release of nvcc it is")
    if version < OLDEST_NVCC:
        return Nvcc([], version, f"nvcc {_dotted(version)} is too old; {_dotted(OLDEST_NVCC)} or later is needed")
    return Nvcc([program], version)


def find_ninja(env: Mapping[str, str]) -> str | None:
    """The ninja of the Python package of that name, or the one on the PATH."""
    try:
        import ninja

        return shutil.which("ninja", path=ninja.BIN_DIR) or shutil.which("ninja", path=env.get("PATH", ""))
    except (ImportError, AttributeError):
        return shutil.which("ninja", path=env.get("PATH", ""))


def _dotted(version: tuple[int, int]) -> str:
    return f"{version[0]}.{version[1]}"


# --- CUDA architectures ------------------------------------------------------------------------------------------


def parse_archs(text: str) -> list[tuple[int, str, bool]]:
    """Read SKD_CUDA_ARCHS, such as ``80;90a;12.0+PTX``.

    Returns:
        (compute capability times ten, suffix "", "a" or "f", whether PTX is wanted too) of each, in the order given.

    Raises:
        BuildError: an entry is no architecture.
    """
    archs = []
    for entry in re.split(r"[;,\s]+", text.strip(";, \t\n")):
        found = re.fullmatch(r"(?:(\d{2,3})|(\d{1,2})\.(\d))([af]?)(\+PTX)?", entry, re.IGNORECASE)
        if not found:
            raise BuildError(
                f"SKD_CUDA_ARCHS={text!r}: {entry!r} is no architecture; write compute capabilities like 80;90;120+PTX"
            )
        number = int(found[1] or found[2] + found[3])
        archs.append((number, found[4].lower(), bool(found[5])))
    return archs


def cuda_archs(env: Mapping[str, str], nvcc_version: tuple[int, int]) -> list[tuple[int, str, bool]]:
    """The architectures to compile for: SKD_CUDA_ARCHS, or the current ones this nvcc knows plus PTX of the last.

    Raises:
        BuildError: SKD_CUDA_ARCHS is malformed or asks for what this nvcc cannot compile.
    """
    requested = env.get("SKD_CUDA_ARCHS", "").strip()
    if not requested:
        known = [arch for arch in DEFAULT_ARCHS if NVCC_OF_ARCH[arch] <= nvcc_version]
        return [(arch, "", arch == known[-1]) for arch in known]
    archs = parse_archs(requested)
    for number, _, _ in archs:
        needed = NVCC_OF_ARCH.get(number, (0, 0))  # an unlisted number is for nvcc to judge
        if nvcc_version < needed:
            raise BuildError(
                f"SKD_CUDA_ARCHS={requested!r}: architecture {number} needs nvcc {_dotted(needed)} or later, "
                f"this is nvcc {_dotted(nvcc_version)}"
            )
    return archs


def arch_flags(archs: Iterable[tuple[int, str, bool]]) -> list[str]:
    """The -gencode flags of nvcc for these architectures.

    The kernels use nothing that only a later architecture has, so all with plain numbers go through the front end once,
    as the humblest of them, which takes most of the time; its PTX runs on whatever comes after any of them.
    """
    archs = list(archs)
    plain = [(number, ptx) for number, suffix, ptx in archs if not suffix]
    flags = []
    if plain:
        least = min(number for number, _ in plain)
        code = [f"sm_{number}" for number, _ in plain]
        code += [f"compute_{least}"] if any(ptx for _, ptx in plain) else []
        flags += ["-gencode", f"arch=compute_{least},code=[{','.join(code)}]"]
    for number, suffix, ptx in archs:
        name = f"{number}{suffix}"
        if suffix:
            flags += ["-gencode", f"arch=compute_{name},code=sm_{name}"]
        if suffix and ptx:
            flags += ["-gencode", f"arch=compute_{name},code=compute_{name}"]
    return flags


# --- Obstacles ---------------------------------------------------------------------------------------------------


def common_obstacle(env: Mapping[str, str], platform: str = sys.platform) -> str | None:
    """What keeps this machine from compiling any extension, apart from its compilers."""
    if platform == "win32":
        return "the build speaks to g++ and clang++ only, which it does not expect on Windows"
    try:
        import pybind11  # noqa: F401
    except ImportError:
        return "the Python package pybind11 is not installed"
    if not find_ninja(env):
        return "ninja was not found: pip install ninja"
    header = Path(sysconfig.get_path("include"), "Python.h")
    if not header.is_file():
        return f"{header} does not exist: install the development files of this Python (python3-dev)"
    return None


def cpu_sources(root: Path) -> list[str]:
    return _sources(root, "csrc/cpu", "*.cpp")


def cuda_sources(root: Path) -> list[str]:
    kernels = _sources(root, "csrc/cuda", "*.cu")
    return kernels and [*_sources(root, "csrc/cuda", "*.cpp"), *kernels]


def _sources(root: Path, folder: str, pattern: str) -> list[str]:
    return sorted(path.relative_to(root).as_posix() for path in (root / folder).glob(pattern))


# --- Object files and ninja --------------------------------------------------------------------------------------


class Object(NamedTuple):
    source: str
    path: str
    flags: list[str]


def instruction_sets(platform: str) -> list[str]:
    """The instruction sets compiled for a platform such as ``linux-x86_64`` (sysconfig.get_platform())."""
    machine = platform.rsplit("-", 1)[-1].lower()
    return list(INSTRUCTION_SETS) if machine in X86_64 else ["baseline"]


def cpu_objects(sources: Iterable[str], build_dir: str, platform: str) -> list[Object]:
    """The object files of skd._cpu in the order in which they must be linked.

    The order is what keeps the library safe on old processors. An inline function that the compiler does not
    inline is emitted into every object that uses it, and the linker keeps the first. With the humblest
    instruction set first, what is kept runs wherever any of its callers does.
    """
    sources = list(sources)
    sets = instruction_sets(platform)
    defines = ["-DSKD_X86_KERNELS"] if len(sets) > 1 else []
    objects = [
        Object(source, f"{build_dir}/{Path(source).stem}.o", defines)
        for source in sources
        if Path(source).stem not in CPU_KERNELS
    ]
    for name in sets:
        for source in sources:
            stem = Path(source).stem
            if stem in CPU_KERNELS:
                flags = [*INSTRUCTION_SETS[name], f"-DSKD_ISA={name}", *defines]
                objects.append(Object(source, f"{build_dir}/{stem}.{name}.o", flags))
    return objects


def cuda_objects(sources: Iterable[str], build_dir: str) -> list[Object]:
    return [Object(source, f"{build_dir}/{Path(source).name}.o", []) for source in sources]


def cxx_commands(
    cxx: Sequence[str], includes: Sequence[str], env: Mapping[str, str], platform: str
) -> tuple[list[str], list[str]]:
    """Compile and link commands of skd._cpu. CXXFLAGS come before the flags the kernels depend on, LDFLAGS last."""
    compile_ = [*cxx, *shlex.split(env.get("CXXFLAGS", "")), *CXX_FLAGS, *(f"-I{folder}" for folder in includes)]
    shared = ["-bundle", "-undefined", "dynamic_lookup"] if platform.startswith("macosx") else ["-shared", "-s"]
    return compile_, [*cxx, *shared, "-pthread", "-ldl", *shlex.split(env.get("LDFLAGS", ""))]


def nvcc_commands(
    nvcc: Sequence[str],
    cxx: Sequence[str],
    includes: Sequence[str],
    archs: Iterable[tuple[int, str, bool]],
    threads: int = 1,
) -> tuple[list[str], list[str]]:
    """Compile and link commands of skd._cuda; each compilation takes on ``threads`` architectures at once."""
    # A wrapper or a compiler with flags cannot be handed on; nvcc then looks for its host compiler itself.
    host = ["-ccbin", cxx[0]] if len(cxx) == 1 else []
    at_once = ["--threads", str(threads)] if threads > 1 else []
    compile_ = [*nvcc, *host, *NVCC_FLAGS, *at_once, *arch_flags(archs), *(f"-I{folder}" for folder in includes)]
    return compile_, [*nvcc, *host, "-shared", "-cudart", "static", "-Xlinker", "-s"]


def ninja_text(
    compile_: Sequence[str], link: Sequence[str], objects: Sequence[Object], target: str, build_dir: str
) -> str:
    """A build.ninja, to be run in the root of the source tree, that compiles ``objects`` and links ``target``."""
    lines = [
        "ninja_required_version = 1.5",
        f"builddir = {_ninja_path(build_dir)}",
        "rule compile",
        f"  command = {_ninja_command(compile_)} -MMD -MF $out.d $flags -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "  description = compile $out",
        "rule link",
        f"  command = {_ninja_command(link)} -o $out $in",
        "  description = link $out",
    ]
    for item in objects:
        lines.append(f"build {_ninja_path(item.path)}: compile {_ninja_path(item.source)}")
        if item.flags:
            lines.append(f"  flags = {_ninja_command(item.flags)}")
    lines.append(f"build {_ninja_path(target)}: link {' '.join(_ninja_path(item.path) for item in objects)}")
    return "\n".join(lines) + "\n"


def _ninja_path(path: str) -> str:
    return re.sub(r"([$ :])", r"$\1", path)


def _ninja_command(words: Sequence[str]) -> str:
    return shlex.join(words).replace("$", "$$")


def first_error(output: str) -> str:
    """The line of a failed build's output that says most."""
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    telling = [line for line in lines if re.search(r"\b(error|fatal|undefined reference)\b", line)]
    return (telling or lines[-1:] or ["the compiler said nothing"])[0]
