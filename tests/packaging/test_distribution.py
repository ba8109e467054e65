"""Real builds: what the source distribution and the wheel contain, and that they install and import."""

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from email.parser import Parser
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

import pybind11
import pytest
from build_helpers import (
    ROOT,
    SMALL_MODULE,
    clean_environment,
    copy_sources,
    copy_with_small_extension,
    load,
    pip,
    pip_wheel,
    put_small_cuda_extension,
    put_small_extension,
    run_python,
)

SUFFIX = EXTENSION_SUFFIXES[0]
CXX = load("build_support").find_cxx(os.environ)
NVCC = load("build_support").find_nvcc(os.environ)

needs_cxx = pytest.mark.skipif(bool(CXX.obstacle), reason=str(CXX.obstacle))


def pep517(tree: Path, hook: str, folder: Path, **environment: str) -> Path:
    """Call a hook of the build backend in ``tree``, as pip and build do; returns what it made."""
    folder.mkdir(exist_ok=True)
    code = f"from setuptools import build_meta; print(build_meta.{hook}({str(folder)!r}))"
    env = clean_environment(**environment)
    done = subprocess.run([sys.executable, "-c", code], cwd=tree, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder / done.stdout.splitlines()[-1]


def names_in(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as archive:
        return set(archive.namelist())


def record_in(wheel: Path) -> dict:
    with zipfile.ZipFile(wheel) as archive:
        return json.loads(archive.read("skd/_build.json"))


def python_files(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*.py")}


# --- The project itself: sources -> sdist -> wheel -> installation -------------------------------------------------


@pytest.fixture(scope="module")
def tree(tmp_path_factory) -> Path:
    tree = copy_sources(tmp_path_factory.mktemp("project") / "tree")
    (tree / "skd/ops/recipe.yaml").touch()  # data in a subpackage
    # What must not get into anything: products of earlier builds.
    (tree / "skd/_cpu.cpython-27-x86_64-linux-gnu.so").write_text("stale")
    (tree / "skd/_build.json").write_text("stale")
    return tree


@pytest.fixture(scope="module")
def sdist(tree) -> Path:
    return pep517(tree, "build_sdist", tree.parent / "sdist")


@pytest.fixture(scope="module")
def unpacked(sdist) -> Path:
    folder = sdist.parent.parent / "unpacked"
    with tarfile.open(sdist) as archive:
        archive.extractall(folder, filter="data")
    (root,) = folder.iterdir()
    return root


@pytest.fixture(scope="module")
def wheel(unpacked) -> Path:
    """With small extensions of the same names: whoever runs the tests has compiled the real ones."""
    small = Path(shutil.copytree(unpacked, unpacked.parent.parent / "small"))
    put_small_extension(small)
    put_small_cuda_extension(small)
    return pip_wheel(small, unpacked.parent.parent / "wheel", SKD_CUDA_ARCHS="90")[0]


@pytest.fixture(scope="module")
def site(wheel) -> Path:
    site = wheel.parent.parent / "site"
    pip("install", "--no-deps", "--no-index", "--target", site, wheel)
    return site


def test_sdist_holds_what_a_wheel_needs_and_the_tests(tree, sdist):
    with tarfile.open(sdist) as archive:
        names = {name.split("/", 1)[1] for name in archive.getnames() if "/" in name}
    for folder in ("skd", "kernels", "tests", "benchmarks"):
        assert {f"{folder}/{name}" for name in python_files(tree / folder)} <= names
    native = {path.relative_to(tree).as_posix() for path in (tree / "csrc").rglob("*") if path.is_file()}
    assert native <= names
    assert {"setup.py", "build_support.py", "pyproject.toml", "LICENSE", "README.md", "skd/py.typed"} <= names
    assert not {name for name in names if name.endswith((".so", ".pyc", "_build.json"))}


@needs_cxx
def test_sdist_holds_every_header_that_its_sources_include(unpacked):
    """The preprocessor, told only of the sdist, Python, pybind11 and CUDA's stand-in, misses none."""
    sources = sorted(unpacked.glob("csrc/c*/*.c*"))
    assert {".cpp", ".cu"} <= {source.suffix for source in sources}
    include = ["-I", unpacked / "csrc", "-I", sysconfig.get_path("include"), "-I", pybind11.get_include()]
    cuda = ["-I", ROOT / "tests/cuda_on_cpu", "-DSKD_CUDA_ON_CPU"]
    command = [*CXX.command, "-std=c++17", "-DSKD_ISA=baseline", "-MM", "-x", "c++", *include, *cuda, *sources]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    headers = {Path(word) for word in done.stdout.split() if word.endswith(".h")}
    assert len({path for path in headers if path.is_relative_to(unpacked)}) > 20


def test_wheel_holds_the_package_and_nothing_else(tree, wheel):
    names = names_in(wheel)
    version = load("skd/__init__").__version__
    info = {name for name in names if name.startswith(f"skd-{version}.dist-info/")}
    extensions = set() if CXX.obstacle else {f"skd/_cpu{SUFFIX}"}
    if not CXX.obstacle and not NVCC.obstacle:
        extensions.add(f"skd/_cuda{SUFFIX}")
    yaml = {path.relative_to(tree).as_posix() for path in (tree / "skd").rglob("*.yaml")}
    expected = {f"skd/{name}" for name in python_files(tree / "skd")}
    expected |= {f"skd/kernels/{name}" for name in python_files(tree / "kernels")}
    expected |= extensions | yaml | {"skd/_build.json", "skd/py.typed"}
    assert names - info == expected
    assert f"skd-{version}.dist-info/licenses/LICENSE" in info


def test_wheel_metadata(wheel):
    with zipfile.ZipFile(wheel) as archive:
        info = next(name.rsplit("/", 1)[0] for name in archive.namelist() if name.endswith("/METADATA"))
        metadata = Parser().parsestr(archive.read(f"{info}/METADATA").decode())
        entry_points = archive.read(f"{info}/entry_points.txt").decode()
    assert metadata["License-Expression"] == "MIT"
    assert metadata["Requires-Python"] == ">=3.10"
    assert {"train", "dev", "tensorboard"} <= set(metadata.get_all("Provides-Extra"))
    always = {text for text in metadata.get_all("Requires-Dist") if "extra ==" not in text}
    assert always == {"torch>=2.6", "numpy"}
    assert "skd = skd.cli:main" in entry_points


@needs_cxx
def test_wheel_is_tagged_for_this_python_and_platform(wheel):
    version = f"cp{sys.version_info.major}{sys.version_info.minor}"
    assert f"-{version}-{version}" in wheel.name
    assert wheel.name.endswith(f"-{sysconfig.get_platform().replace('-', '_').replace('.', '_')}.whl")


def test_installed_package_imports_without_torch(site, tmp_path):
    code = """
import sys, skd, skd.kernels
from skd import build_info
if build_info.read()["cpu"]["built"]:
    import skd._cpu
assert "torch" not in sys.modules
print(skd.__file__, skd.kernels.__file__, build_info.read()["cpu"]["built"])
"""
    package, kernels, built = run_python(code, tmp_path, site).split()
    assert Path(package) == site / "skd/__init__.py"
    assert Path(kernels) == site / "skd/kernels/__init__.py"
    assert built == str(CXX.obstacle is None)


# --- Builds of every outcome, on a small extension -----------------------------------------------------------------


@pytest.fixture
def small(tmp_path) -> Path:
    return copy_with_small_extension(tmp_path / "small")


@needs_cxx
def test_each_instruction_set_is_compiled_and_the_humblest_shared_code_is_kept(small, tmp_path):
    wheel, printed = pip_wheel(small, tmp_path / "wheel")
    assert "skd: built skd._cpu in" in printed
    assert "skd: installing without skd._cuda: this source tree has no CUDA kernels" in printed
    record = record_in(wheel)
    assert record["cpu"]["compiler"] == CXX.description
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "site")
    kernels = eval(run_python("import skd._cpu; print(skd._cpu.kernels())", tmp_path, tmp_path / "site"))
    # The width is what a function emitted into all objects was compiled for: it must run on any processor.
    assert kernels == dict.fromkeys(record["cpu"]["instruction_sets"], 0)


def test_without_a_compiler_the_package_is_pure_python_and_one_line_says_so(small, tmp_path):
    wheel, printed = pip_wheel(small, tmp_path / "wheel", PATH=str(tmp_path / "empty"))
    said = [line.strip() for line in printed.splitlines() if "skd._cpu" in line]
    assert said == [
        "skd: installing without skd._cpu: no C++ compiler was found: install g++ or clang++, or name one in CXX; "
        "CPU operations will run in plain PyTorch"
    ]
    assert wheel.name.endswith("-py3-none-any.whl")
    assert not {name for name in names_in(wheel) if name.endswith(".so")}
    assert record_in(wheel)["cpu"]["reason"].startswith("no C++ compiler was found")
    site = tmp_path / "site"
    pip("install", "--no-deps", "--no-index", "--target", site, wheel)
    code = "import skd, skd.kernels; from skd import build_info; print(build_info.read()['cpu']['reason'])"
    assert run_python(code, tmp_path, site).startswith("no C++ compiler was found")


@pytest.mark.parametrize(
    ("environment", "sentence"),
    [
        ({"SKD_BUILD_CPU": "1", "CXX": "/no/such/compiler"}, "SKD_BUILD_CPU=1, but CXX='/no/such/compiler' is no comp"),
        ({"SKD_BUILD_CUDA": "1"}, "SKD_BUILD_CUDA=1, but this source tree has no CUDA kernels"),
        ({"SKD_BUILD_CPU": "maybe"}, "SKD_BUILD_CPU='maybe' means nothing; set it to auto, 0"),
        ({"MAX_JOBS": "many"}, "MAX_JOBS='many' is no number of jobs"),
    ],
)
def test_what_was_asked_for_and_is_impossible_fails(small, tmp_path, environment, sentence):
    wheel, printed = pip_wheel(small, tmp_path / "wheel", check=False, **environment)
    assert wheel is None
    assert f"error: {sentence}" in printed
    assert "Traceback" not in printed


@needs_cxx
@pytest.mark.parametrize("switch", ["auto", "1"])
def test_a_compile_error_is_shown(small, tmp_path, switch):
    (small / "csrc/cpu/module.cpp").write_text("no such type;")
    wheel, printed = pip_wheel(small, tmp_path / "wheel", check=False, SKD_BUILD_CPU=switch)
    assert "FAILED: " in printed  # ninja's own words, before the compiler's
    assert "| no such type;" in printed or "^" in printed
    if switch == "1":
        assert wheel is None
        assert "SKD_BUILD_CPU=1, but compilation failed: csrc/cpu/module.cpp:1:" in printed
    else:
        assert wheel.name.endswith("-py3-none-any.whl")
        assert record_in(wheel)["cpu"]["reason"].startswith("compilation failed: csrc/cpu/module.cpp:1:")
        assert record_in(wheel)["cpu"]["compiler"] == CXX.description


@needs_cxx
def test_a_second_build_keeps_nothing_of_the_first(small, tmp_path):
    (small / "skd/gone.py").touch()
    first = pep517(small, "build_wheel", tmp_path / "first")
    assert {"skd/gone.py", f"skd/_cpu{SUFFIX}"} <= names_in(first)
    (small / "skd/gone.py").unlink()
    second = pep517(small, "build_wheel", tmp_path / "second", SKD_BUILD_CPU="0")
    assert second.name.endswith("-py3-none-any.whl")
    assert names_in(first) - names_in(second) >= {"skd/gone.py", f"skd/_cpu{SUFFIX}"}


@needs_cxx
def test_a_changed_header_recompiles(small, tmp_path):
    (small / "csrc/cpu/answer.h").write_text("#define ANSWER 1\n")
    module = SMALL_MODULE.replace("baseline::width()", "ANSWER")
    (small / "csrc/cpu/module.cpp").write_text('#include "cpu/answer.h"\n' + module)
    code = "import skd._cpu; print(skd._cpu.kernels()['baseline'])"
    for answer in ("1", "2"):
        (small / "csrc/cpu/answer.h").write_text(f"#define ANSWER {answer}\n")
        wheel = pep517(small, "build_wheel", tmp_path / "wheel")
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(tmp_path / answer)
        assert run_python(code, tmp_path, tmp_path / answer) == answer


@needs_cxx
@pytest.mark.parametrize("mode", ["default", "strict"])
def test_editable(small, tmp_path, mode):
    """Imports come from the source tree and see changes there, wherever Python is started."""
    settings = ", {'editable_mode': 'strict'}" if mode == "strict" else ""
    folder = tmp_path / "wheel"
    folder.mkdir()
    code = f"from setuptools import build_meta; build_meta.build_editable({str(folder)!r}{settings})"
    subprocess.run([sys.executable, "-c", code], cwd=small, env=clean_environment(), check=True, capture_output=True)
    site = tmp_path / "site"
    with zipfile.ZipFile(next(folder.glob("*.whl"))) as archive:
        archive.extractall(site)
    assert not list(site.glob("skd/*.py"))
    (small / "skd/build_info.py").write_text((small / "skd/build_info.py").read_text() + "\nCHANGED = True\n")
    code = """
import skd, skd._cpu, skd.kernels
from skd import build_info
assert build_info.CHANGED and build_info.read()["cpu"]["built"] and build_info.read()["cpu"]["compiler"]
print(skd.__file__, skd.kernels.__file__, skd._cpu.__file__, sep="\\n")
"""
    # Started in the root, Python finds skd there before it asks any installation; strict mode has no answer to that.
    for cwd in (tmp_path,) if mode == "strict" else (tmp_path, small):
        files = [Path(line).resolve() for line in run_python(code, cwd, site).splitlines()]
        assert files == [small / "skd/__init__.py", small / "kernels/__init__.py", small / f"skd/_cpu{SUFFIX}"]


@needs_cxx
def test_editable_again_without_the_extension_removes_it(small, tmp_path):
    pep517(small, "build_editable", tmp_path / "first")
    assert (small / f"skd/_cpu{SUFFIX}").is_file()
    assert json.loads((small / "skd/_build.json").read_text())["cpu"]["built"]
    pep517(small, "build_editable", tmp_path / "second", SKD_BUILD_CPU="0")
    assert not (small / f"skd/_cpu{SUFFIX}").exists()
    assert json.loads((small / "skd/_build.json").read_text())["cpu"]["reason"] == "SKD_BUILD_CPU=0 at build time"


@needs_cxx
@pytest.mark.skipif(bool(NVCC.obstacle), reason=str(NVCC.obstacle))
def test_cuda_extension_needs_neither_driver_nor_cuda_libraries(small, tmp_path):
    put_small_cuda_extension(small)
    arch = "90" if NVCC.version >= (11, 8) else "80"
    environment = {"SKD_BUILD_CUDA": "1", "SKD_CUDA_ARCHS": arch, "SKD_NVCC": NVCC.command[0], "SKD_BUILD_CPU": "0"}
    wheel = pep517(small, "build_wheel", tmp_path / "wheel", **environment)
    assert {f"skd/_cuda{SUFFIX}"} == {name for name in names_in(wheel) if name.endswith(".so")}
    assert record_in(wheel)["cuda"]["architectures"] == [arch]
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "site")
    major = run_python("import skd._cuda; print(skd._cuda.version() // 1000)", tmp_path, tmp_path / "site")
    assert int(major) == NVCC.version[0]
    if shutil.which("ldd"):
        extension = tmp_path / f"site/skd/_cuda{SUFFIX}"
        linked = subprocess.run(["ldd", extension], capture_output=True, text=True, check=True).stdout
        assert "libc." in linked
        assert "libcuda" not in linked
