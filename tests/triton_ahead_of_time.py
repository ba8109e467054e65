"""Compiles Triton launches for a GPU that is not there, and reads what the machine code does.

A file of tests that imports this is skipped where it cannot be done.
"""

import contextlib
import importlib.util
import multiprocessing
import os
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

if importlib.util.find_spec("triton") is None:
    pytest.skip("needs Triton", allow_module_level=True)
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("the interpreter compiles nothing", allow_module_level=True)

import triton  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.runtime import driver  # noqa: E402

from skd.ops.spectral_align import row_weight  # noqa: E402
from skd.ops.stored_gradients import stored_dtype  # noqa: E402

CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
if not CUOBJDUMP.exists():
    pytest.skip("needs the cuobjdump of Triton's wheel", allow_module_level=True)

WIDTHS = {"128": 128, "64": 64, "U16": 16, "S16": 16, "U8": 8, "S8": 8}


def name(value) -> str:
    """The id of a test with this parameter."""
    return "-".join(map(name, value)) if isinstance(value, tuple) else str(getattr(value, "__name__", value))


@contextlib.contextmanager
def compiled_elsewhere(work: list[tuple[Callable, tuple]]) -> Iterator[Callable]:
    """Gives ``result(function, arguments)`` of all this work, done in two processes of their own.

    In this one the absent driver would stay behind.
    """
    with ProcessPoolExecutor(2, mp_context=multiprocessing.get_context("spawn")) as pool:
        futures = {item: pool.submit(item[0], *item[1]) for item in work}
        yield lambda function, arguments: futures[function, arguments].result()
        pool.shutdown(cancel_futures=True)


class AbsentGPU:
    """As much of a driver as the JIT asks for before it launches, so that it specialises as it would for a launch."""

    def __init__(self, architecture: int):
        self.architecture = architecture

    def get_current_device(self):
        return self.architecture  # the JIT keeps its compiled kernels by device

    def get_current_stream(self, device):
        return 0

    def get_current_target(self):
        return GPUTarget("cuda", self.architecture, 32)


class MachineCode(NamedTuple):
    warps: int
    registers: int
    loads: dict[int, int]
    """Global loads by width in bits."""
    stores: dict[int, int]
    local: int
    """Accesses to local memory: spilled registers."""
    atomics: int


def compile_launch(architecture: int, kernel, programs: int, arguments: tuple, options: dict) -> MachineCode:
    driver.set_active(AbsentGPU(architecture))
    compiled = kernel.warmup(*arguments, grid=(programs,), **options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        dump = [CUOBJDUMP, "-sass", "-res-usage", file.name]
        text = subprocess.run(dump, capture_output=True, text=True, check=True).stdout
    return MachineCode(
        options["num_warps"],
        int(re.search(r"\bREG:(\d+)", text).group(1)),
        _widths(text, "LDG"),
        _widths(text, "STG"),
        len(re.findall(r"\b(?:LDL|STL)\b", text)),
        len(re.findall(r"\b(?:RED|REDG|ATOM|ATOMG|ATOMS)\b", text)),
    )


def _widths(text: str, instruction: str) -> dict[int, int]:
    counts = {}
    for modifiers in re.findall(rf"\b{instruction}((?:\.\w+)*)", text):
        width = next((WIDTHS[m] for m in modifiers.split(".") if m in WIDTHS), 32)
        counts[width] = counts.get(width, 0) + 1
    return counts


def make_map(order: str, b: int, c: int, h: int, w: int, dtype: torch.dtype) -> torch.Tensor:
    if order == "nchw":
        return torch.empty(b, c, h, w, dtype=dtype)
    return torch.empty(b, h * w + 1, c, dtype=dtype)[:, 1:].unflatten(1, (h, w)).permute(0, 3, 1, 2)


def make_layer(orders, channels, side, dtypes, match="complex") -> dict:
    """A layer as :mod:`skd.ops.spectral_align` hands it to its backends; the numbers in it do not matter."""
    maps = [make_map(o, 4, c, side, side, d) for o, c, d in zip(orders, channels, dtypes, strict=True)]
    return {
        "student": maps[0],
        "teacher": maps[1],
        "gradient": torch.empty_like(maps[0], dtype=stored_dtype(*maps)),
        "row_weight": row_weight(match, side),
        "loss_scale": 0.5,
        "gradient_scale": 0.5,
    }


def compile_layer(architecture: int, orders, channels, side, dtypes) -> tuple[str, MachineCode]:
    """The name of the kernel that serves a layer, and its code."""
    from skd.kernels import spectral_align

    layer = make_layer(orders, channels, side, dtypes)
    launch = spectral_align.launches([layer], torch.empty(1))[0]
    return launch[0].fn.__name__, compile_launch(architecture, *launch)


def compile_finish(architecture: int) -> tuple[str, MachineCode]:
    from skd.kernels import spectral_align

    layer = make_layer(("nchw", "nchw"), (16, 16), 8, (torch.float32, torch.float32))
    launch = spectral_align.launches([layer], torch.empty(()))[-1]
    return launch[0].fn.__name__, compile_launch(architecture, *launch)


def compile_scale(architecture: int, dtype: torch.dtype, in_place: bool, number: int) -> tuple[str, MachineCode]:
    from skd.kernels import scale_gradients

    stored = torch.empty(number, dtype=dtype)
    output = stored if in_place else torch.empty_like(stored)
    (launch,) = scale_gradients.launches([stored], [output], torch.empty(1), [1.0])
    return launch[0].fn.__name__, compile_launch(architecture, *launch)


# --- The Fourier operations ---


def make_fourier_layer(orders, channels, size, dtypes, match="magnitude", focal=None, everything=False) -> dict:
    """As :func:`make_layer`, for fourier_align; `everything`: with bands and pooled spectra."""
    maps = [make_map(o, 4, c, *size, d) for o, c, d in zip(orders, channels, dtypes, strict=True)]
    bins = (size[0], size[1] // 2 + 1)
    return {
        "student": maps[0],
        "teacher": maps[1],
        "gradient": torch.empty_like(maps[0], dtype=stored_dtype(*maps)),
        "spectra": torch.empty(2, *bins) if everything else None,
        "bands": torch.empty(bins) if everything else None,
        "match": match,
        "inner_weight": 1.0,
        "focal": focal,
        "loss_scale": 0.5,
        "gradient_scale": 0.5,
    }


def compile_fourier(
    architecture: int, orders, channels, size, dtypes, match="magnitude", focal=None, everything=False, precision="ieee"
) -> list[tuple[str, MachineCode]]:
    """Name and code of every kernel that a layer of fourier_align launches, each once."""
    from skd.kernels import fourier_align

    fourier_align.PRECISION = precision
    layer = make_fourier_layer(orders, channels, size, dtypes, match, focal, everything)
    return _compile_each(architecture, fourier_align.launches([layer], torch.empty(1)))


def compile_intensity(architecture: int, order, shape, axis, dtype) -> list[tuple[str, MachineCode]]:
    """The same for a map of spectral_intensity."""
    from skd.kernels import spectral_intensity

    x = make_map(order, 4, *shape, dtype)
    bins = (shape[0] // 2 + 1,) if axis == "channel" else (shape[1], shape[2] // 2 + 1)
    return _compile_each(architecture, spectral_intensity.launches(x, axis, 1.0, torch.empty(4, *bins)))


def _compile_each(architecture: int, launches: list[tuple]) -> list[tuple[str, MachineCode]]:
    distinct = {}
    for kernel, programs, arguments, options in launches:
        distinct.setdefault((kernel.fn.__name__, repr(options)), (kernel, programs, arguments, options))
    return [(name, compile_launch(architecture, *launch)) for (name, _), launch in distinct.items()]
