"""The examples run as they are, from any folder, without a network, and their losses fall."""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"
NEEDS = {
    "plain_pytorch": (),
    "hugging_face_trainer": ("transformers", "accelerate"),
    "lightning_module": ("timm", "lightning"),
}
NOBODY = "http://127.0.0.1:9"


@pytest.mark.parametrize("name", NEEDS)
def test_the_loss_falls(name, tmp_path):
    for package in NEEDS[name]:
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed")
    no_network = {variable: NOBODY for variable in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY")}
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / f"{name}.py"), "--steps", "30"],
        cwd=tmp_path,
        env={**os.environ, **no_network, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    first, last = map(float, re.search(r"([\d.]+) at first, ([\d.]+) at last\n$", done.stdout).groups())
    assert last < 0.9 * first
    assert not list(tmp_path.iterdir()), "nothing is left behind"


def test_every_example_is_short_tested_and_in_the_readme():
    readme = (EXAMPLES / "README.md").read_text()
    scripts = {path.stem: path.read_text() for path in EXAMPLES.glob("*.py")}
    assert set(scripts) == set(NEEDS)
    for name, text in scripts.items():
        assert f"[{name}.py]({name}.py)" in readme
        assert len(text.splitlines()) < 100
