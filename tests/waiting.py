"""Waiting for what another process does."""

import subprocess
import time
from pathlib import Path


def wait_for_file(path: Path, process: subprocess.Popen, seconds: float) -> None:
    """Until the process has written it, has ended or has had its time."""
    deadline = time.monotonic() + seconds
    while not path.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
