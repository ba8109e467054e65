"""Runs tests in Triton's interpreter: in a process of their own, for it must be chosen before Triton is imported."""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton")


def passed_in_interpreter(*arguments: str, **environment: str) -> int:
    """The number of tests that passed under pytest with these arguments; none may fail."""
    path = os.pathsep.join([str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")])  # for plugins
    chosen = {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-o", "addopts=", *arguments],
        cwd=ROOT,
        env={**os.environ, **chosen, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=1800,
    )
    assert done.returncode == 0, done.stdout[-6000:]
    return int(re.search(r"(\d+) passed", done.stdout)[1])
