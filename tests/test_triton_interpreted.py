"""The Triton kernels without a GPU: every case of the matrix, and the contract of ``run``, in Triton's interpreter.

The interpreter must be chosen before Triton is imported, so the tests are in triton_interpreted.py and run in processes
of their own. They take about a minute and a half on two cores.
"""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
COMMAND = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-o", "addopts="]


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton")
def test_the_kernels_pass_in_the_interpreter():
    shares = ["test_loss and complex", "test_loss and mse", "not test_loss"]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    runs = [
        subprocess.Popen(
            [*COMMAND, "tests/triton_interpreted.py", "-k", share],
            cwd=ROOT,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for share in shares
    ]
    passed = 0
    try:
        for process in runs:
            output = process.communicate(timeout=900)[0]
            assert process.returncode == 0, output[-6000:]
            passed += int(re.search(r"(\d+) passed", output).group(1))
    finally:
        for process in runs:
            process.kill()
    assert passed > 750  # the matrix for both matches, and the contract
