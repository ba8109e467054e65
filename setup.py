"""Build the compiled kernels and install ``kernels/`` as ``skd.kernels``; everything else is in pyproject.toml.

The extensions are optional: where one cannot be built the package is installed without it, one line says so, and
``skd/_build.json`` in the installed package keeps the reason, because pip hides the output of a successful build.

Environment: SKD_BUILD_CPU and SKD_BUILD_CUDA (auto, 0, 1), SKD_CUDA_ARCHS, SKD_NVCC, CUDA_HOME, MAX_JOBS, CXX,
CXXFLAGS, LDFLAGS.
"""

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import time
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.errors import SetupError

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT))  # an isolated build does not put the source tree on the path

import build_support as support  # noqa: E402

RECORD = "_build.json"


class Recipe:
    """How one extension is built: its compiler in words, its ninja file, and what the record says of it."""

    def __init__(self, compiler: str, commands: tuple[list[str], list[str]], objects: list, details: dict):
        self.compiler, self.commands, self.objects, self.details = compiler, commands, objects, details


def includes() -> list[str]:
    import pybind11

    paths = ("csrc", pybind11.get_include(), sysconfig.get_path("include"), sysconfig.get_path("platinclude"))
    return list(dict.fromkeys(paths))


def plan_cpu(env, build_dir: str) -> Recipe | str:
    """The recipe of skd._cpu, or the reason it is left out."""
    cxx = support.find_cxx(env)
    sources = support.cpu_sources(ROOT)
    obstacle = None if sources else "this source tree has no C++ kernels"
    skip = support.reason_to_skip(env, "SKD_BUILD_CPU", obstacle or cxx.obstacle or support.common_obstacle(env))
    if skip:
        return skip
    platform = sysconfig.get_platform()
    return Recipe(
        cxx.description,
        support.cxx_commands(cxx.command, includes(), env, platform),
        support.cpu_objects(sources, build_dir, platform),
        {"instruction_sets": support.instruction_sets(platform)},
    )


def plan_cuda(env, build_dir: str) -> Recipe | str:
    """The recipe of skd._cuda, or the reason it is left out."""
    sources = support.cuda_sources(ROOT)
    cxx, nvcc = support.find_cxx(env), support.find_nvcc(env)
    obstacle = None if sources else "this source tree has no CUDA kernels"
    obstacle = obstacle or nvcc.obstacle or cxx.obstacle or support.common_obstacle(env)
    skip = support.reason_to_skip(env, "SKD_BUILD_CUDA", obstacle)
    if skip:
        return skip
    archs = support.cuda_archs(env, nvcc.version)
    # One source takes nearly all the time, so that the jobs are given to its architectures.
    jobs = support.read_jobs(env, support.machine_cores(), support.machine_memory())
    return Recipe(
        f"nvcc {nvcc.version[0]}.{nvcc.version[1]} with {cxx.description}",
        support.nvcc_commands(nvcc.command, cxx.command, includes(), archs, jobs),
        support.cuda_objects(sources, build_dir),
        {"architectures": [f"{number}{suffix}{'+PTX' if ptx else ''}" for number, suffix, ptx in archs]},
    )


PLANS = {"cpu": plan_cpu, "cuda": plan_cuda}


def run_ninja(recipe: Recipe, build_dir: str, target: str, jobs: int) -> str | None:
    """Compile and link; the compiler's output goes to the screen. Returns the reason of a failure."""
    folder = ROOT / build_dir
    folder.mkdir(parents=True, exist_ok=True)
    text = support.ninja_text(*recipe.commands, recipe.objects, target, build_dir)
    (folder / "build.ninja").write_text(text, encoding="utf-8")
    command = [support.find_ninja(os.environ), "-f", f"{build_dir}/build.ninja", "-j", str(jobs)]
    output = []
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        for line in process.stdout:
            print(line, end="", flush=True)
            output.append(line)
    return f"compilation failed: {support.first_error(''.join(output))}" if process.returncode else None


class BuildKernels(build_ext):
    """Builds what can be built, through ninja, and reduces ``ext_modules`` to that.

    The other commands ask ``has_ext_modules()``, so a wheel without an extension is a pure one.
    """

    def run(self):
        try:
            jobs = support.read_jobs(os.environ, support.machine_cores(), support.machine_memory())
            record = {name: self.build_one(name, jobs) for name in PLANS}
        except support.BuildError as error:
            raise SetupError(str(error)) from None
        self.write(self.build_lib, RECORD, (json.dumps(record, indent=2) + "\n").encode())
        if self.inplace:
            self.copy_to_source(RECORD)
        built = [ext for ext in self.extensions if record[ext.name.removeprefix("skd._")]["built"]]
        self.extensions = self.distribution.ext_modules = built

    def build_one(self, name: str, jobs: int) -> dict:
        """Build one extension, or leave it out and say why; returns its part of the record."""
        filename = os.path.basename(self.get_ext_filename(f"skd._{name}"))
        self.remove_old(filename)
        # Not build_temp: an editable install makes that a temporary folder, and every rebuild would start from nothing.
        base = self.get_finalized_command("build").build_base
        build_dir = os.path.relpath(Path(base, f"skd-{name}-{self.plat_name}-{sys.implementation.cache_tag}"), ROOT)
        plan = PLANS[name](os.environ, build_dir)
        if isinstance(plan, str):
            return self.leave_out(name, plan)
        target = f"{build_dir}/{filename}"
        start = time.monotonic()
        failure = run_ninja(plan, build_dir, target, jobs)
        if failure:
            if support.read_switch(os.environ, f"SKD_BUILD_{name.upper()}") == "1":
                raise support.BuildError(f"SKD_BUILD_{name.upper()}=1, but {failure}")
            return self.leave_out(name, failure, plan.compiler)
        seconds = time.monotonic() - start
        self.write(self.build_lib, filename, (ROOT / target).read_bytes())
        if self.inplace:
            self.copy_to_source(filename)
        details = ", ".join(f"{key.replace('_', ' ')} {' '.join(value)}" for key, value in plan.details.items())
        print(f"skd: built skd._{name} in {seconds:.1f} s with {jobs} jobs ({plan.compiler}; {details})", flush=True)
        return {"built": True, "reason": "", "compiler": plan.compiler, **plan.details}

    def leave_out(self, name: str, reason: str, compiler: str = "") -> dict:
        instead = "; CPU operations will run in plain PyTorch" if name == "cpu" else ""
        print(f"skd: installing without skd._{name}: {reason}{instead}", flush=True)
        return {"built": False, "reason": reason, "compiler": compiler}

    def remove_old(self, filename: str) -> None:
        """An extension left by an earlier build must not stand in for one that is not built this time."""
        for folder in (self.build_lib, ROOT) if self.inplace else (self.build_lib,):
            Path(folder, "skd", filename).unlink(missing_ok=True)

    def write(self, folder, filename: str, content: bytes) -> None:
        """Write skd/``filename`` under ``folder`` in one step: another process may have the old one loaded."""
        path = Path(folder, "skd", filename)
        path.parent.mkdir(parents=True, exist_ok=True)
        scratch = path.with_name(f".{path.name}.{os.getpid()}")
        scratch.write_bytes(content)
        scratch.chmod(0o755 if path.suffix == ".so" else 0o644)
        scratch.replace(path)

    def copy_to_source(self, filename: str) -> None:
        self.write(ROOT, filename, Path(self.build_lib, "skd", filename).read_bytes())

    def get_outputs(self) -> list[str]:
        return [*super().get_outputs(), os.path.join(self.build_lib, "skd", RECORD)]


class Wheel(bdist_wheel):
    """A wheel of this build only: pure if nothing was compiled, and without what earlier builds left behind."""

    def run(self):
        shutil.rmtree(Path(self.get_finalized_command("build").build_lib, "skd"), ignore_errors=True)
        super().run()

    @property
    def root_is_pure(self) -> bool:
        return not self.distribution.has_ext_modules()

    @root_is_pure.setter
    def root_is_pure(self, value) -> None:
        """Setuptools sets it before the build, when it cannot be known yet."""


if __name__ == "__main__":
    os.chdir(ROOT)
    setup(
        packages=[*find_packages(include=["skd", "skd.*"]), "skd.kernels"],
        package_dir={"skd.kernels": "kernels"},
        ext_modules=[
            Extension("skd._cpu", support.cpu_sources(ROOT)),
            Extension("skd._cuda", support.cuda_sources(ROOT)),
        ],
        cmdclass={"build_ext": BuildKernels, "bdist_wheel": Wheel},
    )
