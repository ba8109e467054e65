"""The implementations that run on this machine, each instruction set of the CPU kernels on its own."""

import contextlib
import os
import zlib

import pytest

from skd.ops import backends


def kernels() -> list[str]:
    """Every implementation that runs here, as ``backend`` or ``backend:instruction set``."""
    names = ["reference"]
    if backends.backends()["cpu"] is True:
        names += [f"cpu:{isa}" for isa in backends.load("cpu").supported_instruction_sets]
    # Triton's interpreter, and the CUDA kernels compiled for the CPU, where the environment brings them.
    names += [name for name in ("triton", "cuda") if "cpu" in backends.device_types(name)]
    chosen = os.environ.get("SKD_TEST_KERNELS", "").split(",")
    return [name for name in names if chosen == [""] or name in chosen]


def each_with_kernels(cases: list) -> list:
    """Parameters ``kernel, case``: every case on the kernels that will serve users here, some on the others.

    The lesser instruction sets run the same source with shorter vectors, and the reference is close to the oracle: of
    their cases one in eight and one in sixteen are chosen by their names.
    """
    best = next((name for name in kernels() if name.startswith("cpu:")), None)
    chosen = []
    for kernel in kernels():
        share = 16 if kernel == "reference" else 8 if kernel.startswith("cpu:") and kernel != best else 1
        chosen += [
            pytest.param(kernel, case, id=f"{kernel}-{case}")
            for case in cases
            if zlib.crc32(str(case).encode()) % share == 0
        ]
    return chosen


@contextlib.contextmanager
def using(kernel: str):
    """Makes one of :func:`kernels` the one that runs; gives the backend's name."""
    name, _, isa = kernel.partition(":")
    if not isa:
        yield name
        return
    extension = backends.load("cpu")
    before = extension.instruction_set()
    extension.use_instruction_set(isa)
    try:
        yield name
    finally:
        extension.use_instruction_set(before)
