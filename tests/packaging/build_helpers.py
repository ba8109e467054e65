"""Copies of the source tree, and pip and Python on them, without the network."""

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).resolve().parents[2]

NOT_SOURCES = (".git", ".venv*", "build", "dist", "runs", "results", "*.egg-info", "__pycache__", ".*_cache")
NOT_SOURCES += (".hypothesis", ".benchmarks", "*.so", "_build.json")

# An extension that compiles in a moment. ``widest`` is never inlined, so every object brings its own copy of it.
SMALL_KERNEL = """
__attribute__((noinline)) inline int widest() {
#if defined(__AVX512F__)
  return 512;
#elif defined(__AVX2__)
  return 256;
#else
  return 0;
#endif
}
#define TEXT_(x) #x
#define TEXT(x) TEXT_(x)
namespace SKD_ISA {
int width() { return widest(); }
const char* name() { return TEXT(SKD_ISA); }
}
"""
SMALL_MODULE = """
#include <Python.h>
#define DECLARE(isa) namespace isa { int width(); const char* name(); }
DECLARE(baseline)
#ifdef SKD_X86_KERNELS
DECLARE(avx2)
DECLARE(avx512)
#endif
static PyObject* kernels(PyObject*, PyObject*) {
#ifdef SKD_X86_KERNELS
  return Py_BuildValue("{sisisi}", baseline::name(), baseline::width(), avx2::name(), avx2::width(), avx512::name(),
                       avx512::width());
#else
  return Py_BuildValue("{si}", baseline::name(), baseline::width());
#endif
}
static PyMethodDef methods[] = {{"kernels", kernels, METH_NOARGS, nullptr}, {nullptr, nullptr, 0, nullptr}};
static PyModuleDef module = {PyModuleDef_HEAD_INIT, "_cpu", nullptr, -1, methods, nullptr, nullptr, nullptr, nullptr};
PyMODINIT_FUNC PyInit__cpu() { return PyModule_Create(&module); }
"""

SMALL_CUDA_KERNEL = """
#include <cuda_runtime.h>
__global__ void twice(float* x) { x[threadIdx.x] *= 2; }
int launch() { twice<<<1, 1>>>(nullptr); return int(cudaGetLastError()); }
int runtime_version() { int v = 0; cudaRuntimeGetVersion(&v); return v; }
"""
SMALL_CUDA_MODULE = """
#include <Python.h>
int runtime_version();
static PyObject* version(PyObject*, PyObject*) { return PyLong_FromLong(runtime_version()); }
static PyMethodDef methods[] = {{"version", version, METH_NOARGS, nullptr}, {nullptr, nullptr, 0, nullptr}};
static PyModuleDef module = {PyModuleDef_HEAD_INIT, "_cuda", nullptr, -1, methods, nullptr, nullptr, nullptr, nullptr};
PyMODINIT_FUNC PyInit__cuda() { return PyModule_Create(&module); }
"""


def load(name: str) -> ModuleType:
    """Import a file of the source tree's root under its own name, without putting the root on the path."""
    spec = importlib.util.spec_from_file_location(name, ROOT / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def copy_sources(destination: Path) -> Path:
    """A copy of this source tree without build products."""
    return Path(shutil.copytree(ROOT, destination, ignore=shutil.ignore_patterns(*NOT_SOURCES)))


def copy_with_small_extension(destination: Path) -> Path:
    """A copy of this source tree whose C++ is an extension that compiles in a moment; it has no CUDA kernels."""
    tree = copy_sources(destination)
    put_small_extension(tree)
    return tree


def put_small_extension(tree: Path) -> None:
    """Instead of the C++ and CUDA sources."""
    shutil.rmtree(tree / "csrc")
    (tree / "csrc/cpu").mkdir(parents=True)
    (tree / "csrc/cpu/spectral_align.cpp").write_text(SMALL_KERNEL)
    (tree / "csrc/cpu/module.cpp").write_text(SMALL_MODULE)


def put_small_cuda_extension(tree: Path) -> None:
    """Besides those for the CPU."""
    (tree / "csrc/cuda").mkdir()
    (tree / "csrc/cuda/twice.cu").write_text(SMALL_CUDA_KERNEL)
    (tree / "csrc/cuda/module.cpp").write_text(SMALL_CUDA_MODULE)


def clean_environment(**changes: str) -> dict[str, str]:
    """This process's environment without anything that steers the build or the imports, and with ``changes``."""
    steering = ("SKD_", "CXX", "LDFLAGS", "MAX_JOBS", "CUDA_HOME", "PYTHONPATH", "PIP_", "NVCC_")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(steering)}
    return kept | changes


def pip(*arguments: str | Path, check: bool = True, **environment: str) -> str:
    """Run pip without the network; returns all it printed. Fails the test if pip failed (unless ``check`` is off)."""
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--no-cache-dir", *map(str, arguments)]
    env = clean_environment(**environment)
    done = subprocess.run(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert not check or done.returncode == 0, done.stdout
    return done.stdout


def pip_wheel(source: Path, folder: Path, check: bool = True, **environment: str) -> tuple[Path | None, str]:
    """Build a wheel with the packages at hand; returns it (None if that failed) and what was printed."""
    folder.mkdir(exist_ok=True)
    arguments = ("wheel", "-v", "--no-build-isolation", "--no-deps", "--no-index", "-w", folder, source)
    printed = pip(*arguments, check=check, **environment)
    return next(folder.glob("*.whl"), None), printed


def run_python(code: str, cwd: Path, *sites: Path) -> str:
    """What ``code`` prints in a new interpreter started in ``cwd`` that has ``sites`` for its site folders.

    It does not see what is installed beside this interpreter, where an editable skd would answer for the one tested.
    """
    code = f"import site\nfor path in {[str(path) for path in sites]}: site.addsitedir(path)\n{code}"
    command = [sys.executable, "-S", "-c", code]
    done = subprocess.run(command, cwd=cwd, env=clean_environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()
