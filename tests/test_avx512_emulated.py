"""The AVX-512 kernels on processors without AVX-512: their few intrinsics emulated, their 64-byte vectors split by the
compiler. What runs natively elsewhere is the same source. (spectral_intensity over channels has 8 lanes everywhere.)
"""

import os
import platform
import shutil
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
CXX = os.environ.get("CXX") or shutil.which("g++") or shutil.which("c++")
FLAGS = ["-std=c++17", "-fPIC", "-fvisibility=hidden", "-Wno-psabi", f"-I{ROOT / 'csrc'}"]
FLAGS += ["-O0", "-Dalways_inline=unused"]  # the compiler takes longer than all tests


def flag_of_this_processor(name: str) -> bool:
    try:
        return name in Path("/proc/cpuinfo").read_text().split()
    except OSError:
        return False


@pytest.mark.slow
@pytest.mark.skipif(platform.machine() != "x86_64", reason="AVX-512 is of x86-64")
@pytest.mark.skipif(CXX is None, reason="needs a C++ compiler")
@pytest.mark.skipif(not flag_of_this_processor("f16c"), reason="the emulation itself needs F16C")
def test_the_kernels_pass_with_vectors_of_sixteen_lanes(tmp_path):
    import pybind11

    from build_support import CPU_KERNELS

    includes = [f"-I{pybind11.get_include()}", f"-I{sysconfig.get_path('include')}"]
    wide = ["-DSKD_AVX512=1", "-mavx2", "-mfma", "-mf16c", "-include", str(ROOT / "tests/native/avx512_emulation.h")]

    def compile_(source: Path) -> Path:
        extra = ["-DSKD_ISA=baseline", *wide] if source.stem in CPU_KERNELS else []
        target = tmp_path / f"{source.stem}.o"
        subprocess.run([CXX, *FLAGS, *includes, *extra, "-c", source, "-o", target], check=True)
        return target

    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(compile_, sorted(ROOT.glob("csrc/cpu/*.cpp"))))
    library = tmp_path / f"_cpu{sysconfig.get_config_var('EXT_SUFFIX')}"
    subprocess.run([CXX, "-shared", "-pthread", *objects, "-o", library], check=True)

    names = ("loss_and_gradient", "large_calls", "any_upstream", "opcheck", "every_combination", "larger_maps")
    names += ("intensity", "every_dtype", "very_small", "zeros")
    selected = f"({' or '.join(f'test_{name}' for name in names)}) and not reference"
    files = [f"tests/test_{operation}.py" for operation in ("spectral_align", "fourier_align", "spectral_intensity")]
    options = ["-q", "-x", "-p", "no:cacheprovider", "-o", "addopts="]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *options, *files, "-k", selected],
        cwd=ROOT,
        env={**os.environ, "SKD_TEST_EXTENSION": str(library)},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    assert int(done.stdout.rsplit(" passed", 1)[0].split()[-1]) > 1400
