"""The Triton kernels of fourier_align and spectral_intensity without a GPU: the tests of both in Triton's interpreter.

They are the files that test every backend, run in processes of their own, for the interpreter must be chosen before
Triton is imported. triton_large_tiles.py makes the tiles larger and thins out the cases, unless SKD_TEST_ALL_CASES=1.
"""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
COMMAND = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-p", "triton_large_tiles"]
RUNS = {
    "losses": ["tests/test_fourier_align.py"],
    "intensity": ["tests/test_spectral_intensity.py"],
}


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton")
def test_the_kernels_pass_in_the_interpreter():
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")]),
        "TRITON_INTERPRET": "1",
        "SKD_TEST_KERNELS": "triton",
        "OMP_NUM_THREADS": "1",
    }
    runs = [
        subprocess.Popen(
            [*COMMAND, "-o", "addopts=", *files],
            cwd=ROOT,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for files in RUNS.values()
    ]
    passed = 0
    try:
        for process in runs:
            output = process.communicate(timeout=1800)[0]
            assert process.returncode == 0, output[-6000:]
            passed += int(re.search(r"(\d+) passed", output).group(1))
    finally:
        for process in runs:
            process.kill()
    assert passed > 200
