"""The Fourier transforms of csrc/common/fft_*.h against NumPy in float64, through tests/native/fft_check.cpp."""

import ctypes
import os
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parents[1]
CXX = os.environ.get("CXX") or shutil.which("g++") or shutil.which("c++")
# What is to be inlined need not be, and costs the compiler most of its time.
FLAGS = ["-std=c++17", "-O0", "-Dalways_inline=unused", "-fPIC", "-shared", "-fvisibility=hidden", "-Wno-psabi"]

CODELETS = [*range(1, 17), 28, 32, 56]  # every radix, and every length of a codelet that a kernel has
LONG = [320, 384, 512, 640, 768, 1024, 1280, 1536, 2048]
LONG += [257, 343, 11 * 11 * 2, 11 * 13, 11**3, 2 * 11**3, 11 * 11 * 13 * 2, 997, 1009 * 2, 1000, 1155]
TRANSFORMS = ["forward", "backward", "real_forward", "half_adjoint"]
WAYS = ["codelet", "codelet_array", "plan", "plan_array", "plan_by_butterflies"]
NUMBERS = {"float": (np.float32, 4), "double": (np.float64, 1)}  # with how many in a vector

# Errors, in unit roundoffs of the root mean square of the exact result, grow with the logarithm of the length, and with
# the root of a large prime factor (a sum in order). The worst seen is 2.7 times that, at length 26.
BOUND = 5

pytestmark = [pytest.mark.slow, pytest.mark.skipif(CXX is None, reason="needs a C++ compiler")]


@pytest.fixture(scope="module")
def libraries(tmp_path_factory):
    """skd_fft of every type of number."""
    folder = tmp_path_factory.mktemp("fft")

    def build(number: str) -> ctypes.CDLL:
        target = folder / f"{number}.so"
        lengths = "".join(f" LENGTH({n})" for n in CODELETS)
        defines = [f"-DSKD_NUMBER={number}", f"-DSKD_LANES={NUMBERS[number][1]}", f"-DSKD_LENGTHS(LENGTH)={lengths}"]
        source = ROOT / "tests/native/fft_check.cpp"
        done = subprocess.run(
            [CXX, *FLAGS, *defines, f"-I{ROOT / 'csrc'}", source, "-o", target], capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        return ctypes.CDLL(str(target))

    with ThreadPoolExecutor(2) as pool:
        return dict(zip(NUMBERS, pool.map(build, NUMBERS), strict=True))


def planes(x: np.ndarray) -> np.ndarray:
    """Complex [n, lanes] as real [n, 2, lanes]."""
    return np.stack([x.real, x.imag], 1)


def transform(libraries, number: str, name: str, way: str, n: int, x: np.ndarray) -> np.ndarray:
    """One transform of length n of every lane of x, [n or n // 2 + 1, lanes]."""
    dtype, lanes = NUMBERS[number]
    assert x.shape[1] == lanes
    given = np.ascontiguousarray(planes(x) if np.iscomplexobj(x) else x, dtype)
    shape = {"real_forward": (n // 2 + 1, 2, lanes), "half_adjoint": (n, lanes)}.get(name, (n, 2, lanes))
    out = np.full(shape, np.nan, dtype)
    pointers = [array.ctypes.data_as(ctypes.c_void_p) for array in (given, out)]
    assert libraries[number].skd_fft(n, TRANSFORMS.index(name), WAYS.index(way), *pointers) == 1
    return out.astype(np.float64) if name == "half_adjoint" else out[:, 0] + 1j * out[:, 1].astype(np.float64)


def adjoint(g: np.ndarray, n: int) -> np.ndarray:
    """Re sum_k g[k] exp(2 pi i j k / n) over the lower half of the bins."""
    full = np.zeros((n, g.shape[1]), complex)
    full[: n // 2 + 1] = g
    return np.fft.ifft(full, axis=0).real * n


EXACT = {
    "forward": lambda x, n: np.fft.fft(x, axis=0),
    "backward": lambda x, n: np.fft.ifft(x, axis=0) * n,
    "real_forward": lambda x, n: np.fft.rfft(x, axis=0),
    "half_adjoint": adjoint,
}


def data(name: str, n: int, lanes: int, dtype) -> np.ndarray:
    """Random numbers, different in every lane, that the dtype holds exactly."""
    random = np.random.default_rng([TRANSFORMS.index(name), n])
    real = random.standard_normal((n // 2 + 1 if name == "half_adjoint" else n, 2, lanes)).astype(dtype)
    real = real.astype(np.float64)
    return real[:, 0] if name == "real_forward" else real[:, 0] + 1j * real[:, 1]


def check(libraries, number: str, name: str, way: str, n: int) -> None:
    dtype, lanes = NUMBERS[number]
    roundoff = np.finfo(dtype).eps / 2
    largest_prime = max(p for p in range(1, n + 1) if n % p == 0 and all(p % q for q in range(2, p)))
    bound = BOUND * roundoff * (np.log2(n) + 1 + (largest_prime**0.5 if largest_prime > 13 else 0))
    x = data(name, n, lanes, dtype)
    got, exact = transform(libraries, number, name, way, n, x), EXACT[name](x, n)
    error = np.abs(got - exact).max(0) / np.sqrt((np.abs(exact) ** 2).mean(0))
    assert (error <= bound).all(), f"n={n}: {error / roundoff} roundoffs"


@pytest.mark.parametrize("name", TRANSFORMS)
@pytest.mark.parametrize("number", NUMBERS)
def test_lengths_known_at_compile_time(libraries, number, name):
    for n in CODELETS:
        check(libraries, number, name, "codelet", n)
    check(libraries, number, name, "codelet_array", 15)


@pytest.mark.parametrize("name", TRANSFORMS)
@pytest.mark.parametrize("number", NUMBERS)
def test_any_length(libraries, number, name):
    for n in [*range(1, 257), *LONG]:
        check(libraries, number, name, "plan", n)


@pytest.mark.parametrize("name", ["forward", "backward"])
@pytest.mark.parametrize("number", NUMBERS)
def test_any_length_in_place(libraries, number, name):
    for n in [*range(1, 257), *LONG]:
        check(libraries, number, name, "plan_array", n)


@pytest.mark.parametrize("number", NUMBERS)
def test_butterflies_in_any_order(libraries, number):
    for n in [*range(1, 257), *LONG]:
        check(libraries, number, "forward", "plan_by_butterflies", n)


@pytest.mark.parametrize(("way", "lengths"), [("codelet", CODELETS), ("plan", [*range(1, 257), *LONG])])
def test_half_adjoint_is_the_transpose_of_real_forward(libraries, way, lengths):
    """<F x, g> = <x, F^T g>, with numbers in the imaginary parts of bins that are real."""
    for n in lengths:
        x, g = data("real_forward", n, 1, np.float64), data("half_adjoint", n, 1, np.float64)
        bins = transform(libraries, "double", "real_forward", way, n, x)
        real = transform(libraries, "double", "half_adjoint", way, n, g)
        left, right = (bins.conj() * g).real.sum(0), (x * real).sum(0)
        scale = np.linalg.norm(bins, axis=0) * np.linalg.norm(g, axis=0)
        np.testing.assert_array_less(np.abs(left - right), 1e-14 * scale, err_msg=f"n={n}")
