"""What nvcc made of the CUDA kernels: the machine code in skd._cuda for every architecture, read without a GPU."""

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from skd import build_info

RECORD = build_info.read().get("cuda", {})
MOST_REGISTERS = {
    **{"align_tiles_kernel": 72, "align_direct_kernel": 128, "scale_gradients_kernel": 40},
    **{"fourier_tiles_kernelILi16E": 102, "fourier_tiles_kernelILi32E": 168, "fourier_tiles_kernelILi56E": 255},
    **{"channel_intensity_kernel": 128, "add_block_sums_kernel": 64},
}
"""72: seven blocks of 128 threads share a multiprocessor's registers; 102: five; 128: four; 168: three; 255: two."""


def tool(name: str) -> str | None:
    try:
        from triton.backends import nvidia

        shipped = Path(nvidia.__file__).parent / "bin" / name
        if shipped.exists():
            return str(shipped)
    except (ImportError, AttributeError, TypeError):
        pass
    return shutil.which(name)


def test_nvcc_where_there_is_one_compiles_every_kernel():
    """An automatic build without CUDA is no failure of the install, so it has to be one here."""
    if RECORD.get("built") or os.environ.get("SKD_BUILD_CUDA") == "0":
        return
    assert "compilation failed" not in RECORD.get("reason", "")


needs_extension = pytest.mark.skipif(not RECORD.get("built"), reason=f"no skd._cuda: {RECORD.get('reason', '?')}")
needs_tool = pytest.mark.skipif(tool("cuobjdump") is None, reason="needs cuobjdump, which comes with Triton or CUDA")


def dump(*options: str) -> str:
    from skd import _cuda

    command = [tool("cuobjdump"), *options, _cuda.__file__]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


@pytest.fixture(scope="module")
def usage():
    """(architecture, kernel) -> (registers, bytes of stack)."""
    found, arch, name = {}, "", ""
    for line in dump("-res-usage").splitlines():
        if words := re.search(r"arch = sm_(\d+)", line):
            arch = words[1]
        elif words := re.search(r"Function (\w+):", line):
            name = words[1]
        elif words := re.search(r"REG:(\d+) STACK:(\d+).* LOCAL:(\d+)", line):
            found[arch, name] = int(words[1]), int(words[2]) + int(words[3])
    return found


@pytest.fixture(scope="module")
def machine_code(usage):
    """(architecture, kernel) -> instructions, for the first architecture of each generation.

    Reading takes longest. All architectures come from the same PTX, and that none of them spills is in their usage.
    """
    first = {arch[:-1]: arch for arch, _ in sorted(usage, key=lambda key: -int(key[0]))}
    functions = {}
    for arch in first.values():
        for part in dump("-sass", "-arch", f"sm_{arch}").split("Function : ")[1:]:
            name = re.match(r"\w+", part)[0]
            functions[arch, name] = re.findall(
                r"^\s+/\*[0-9a-f]+\*/\s+(?:@!?\w+\s+)?([A-Z][A-Z0-9_.]*)", part, re.MULTILINE
            )
    assert set(functions) == {key for key in usage if key[0] in first.values()}
    return functions


def of_kernel(machine_code, kernel: str):
    return {key: value for key, value in machine_code.items() if kernel in key[1]}


@needs_extension
@needs_tool
def test_every_architecture_holds_every_kernel(usage):
    archs = {re.match(r"\d+", arch)[0] for arch in RECORD["architectures"]}
    assert {arch for arch, _ in usage} == archs
    for arch in archs:
        names = [name for there, name in usage if there == arch]
        assert sum("align_tiles_kernel" in name for name in names) == 9  # student and teacher dtypes
        assert sum("align_direct_kernel" in name for name in names) == 1
        assert sum("scale_gradients_kernel" in name for name in names) == 1
        assert sum("fourier_tiles_kernel" in name for name in names) == 3  # lengths
        for kernel in ("fourier_general_kernel", "channel_intensity_kernel", "add_block_sums_kernel"):
            assert sum(kernel in name for name in names) == 1
        assert len(names) == 17


@needs_extension
@needs_tool
@pytest.mark.parametrize("kernel", MOST_REGISTERS)
def test_registers_suffice(usage, machine_code, kernel):
    for key, (registers, stack) in of_kernel(usage, kernel).items():
        assert registers <= MOST_REGISTERS[kernel] and stack == 0, key
    for key, instructions in of_kernel(machine_code, kernel).items():
        assert not [name for name in instructions if name.startswith(("LDL", "STL"))], key


@needs_extension
@needs_tool
def test_maps_come_and_gradients_go_in_16_byte_pieces(machine_code):
    for key, instructions in of_kernel(machine_code, "align_tiles_kernel").items():
        # Past the registers and past the first-level cache; once per map, unrolled by four with a rest of one.
        assert instructions.count("LDGSTS.E.BYPASS.128") >= 8, key
        assert [name for name in instructions if name.startswith("STG.E") and name.endswith(".128")], key
    for key, instructions in of_kernel(machine_code, "scale_gradients_kernel").items():
        for access in ("LDG", "STG"):
            wide = [name for name in instructions if name.startswith(access) and ".128" in name]
            assert len(wide) >= 3, (key, access)  # each dtype


@needs_extension
@needs_tool
def test_maps_to_be_transformed_come_and_go_in_16_byte_pieces(machine_code):
    for key, instructions in of_kernel(machine_code, "fourier_tiles_kernel").items():
        assert instructions.count("LDGSTS.E.BYPASS.128") >= 8, key  # both maps, once per size of a number
        assert [name for name in instructions if name.startswith("STG.E") and name.endswith(".128")], key
    for key, instructions in of_kernel(machine_code, "channel_intensity_kernel").items():
        assert instructions.count("LDGSTS.E.BYPASS.128") >= 4, key
    # A bin comes and goes in one access to shared memory.
    for key, instructions in of_kernel(machine_code, "fourier_tiles_kernel").items():
        assert min(instructions.count("LDS.64"), instructions.count("STS.64")) >= 14, key


@needs_extension
@needs_tool
def test_no_float_is_added_atomically(machine_code):
    """The one atomic operation, of the alignment kernels, counts blocks, in integers."""
    for key, instructions in machine_code.items():
        atomic = {name for name in instructions if name.startswith(("ATOM", "RED."))}
        assert all(".INC." in name for name in atomic), (key, atomic)
        counts = "align_tiles_kernel" in key[1] or "align_direct_kernel" in key[1]
        assert len(atomic) == counts, key


@needs_extension
@pytest.mark.skipif(shutil.which("nvidia-smi") is not None, reason="this machine has a driver")
def test_without_a_driver_there_is_a_reason_and_no_exception():
    """So that an automatic choice goes on to the next backend."""
    from skd import _cuda

    assert "driver" in _cuda.obstacle(0)
