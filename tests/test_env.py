"""skd env: says what there is, never raises, and leaves CUDA alone."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import skd
from skd import build_info, env
from skd.ops import backends

ROOT = Path(__file__).resolve().parent.parent
SECTIONS = ["skd", "system", "packages", "torch", "cuda", "compilers", "built", "backends", "variables"]


def test_report_states_what_is_there(monkeypatch):
    monkeypatch.setenv("SKD_BACKEND", "reference")
    monkeypatch.setenv("UNRELATED_SECRET", "hidden")
    facts = env.report()
    assert list(facts) == SECTIONS
    assert not any("error" in section for section in facts.values())
    assert facts["skd"]["version"] == skd.__version__
    assert facts["torch"]["version"] == torch.__version__ and facts["torch"]["threads"] == torch.get_num_threads()
    assert facts["packages"]["numpy"][0].isdigit()
    assert facts["backends"] == backends.backends() and facts["backends"]["reference"] is True
    assert facts["built"]["cpu"].startswith("yes" if build_info.read()["cpu"]["built"] else "no: ")
    assert facts["variables"]["SKD_BACKEND"] == "reference"
    assert "hidden" not in json.dumps(facts)


def test_every_backend_that_is_missing_has_its_reason():
    for name, state in env.report()["backends"].items():
        assert state is True or (isinstance(state, str) and len(state) > 10), name


def test_format_is_one_line_per_fact():
    text = env.format_report({"a": {"x": True, "longer": "two\nlines"}, "b": {}, "c": {"list": ["1", "2"]}})
    assert text.splitlines() == [
        "a",
        "  x       available",
        "  longer  two lines",
        "b",
        "  (none)",
        "c",
        "  list  1, 2",
    ]


def test_main_prints_and_succeeds(capsys):
    assert env.main() == 0
    out = capsys.readouterr().out
    assert [line for line in out.splitlines() if not line.startswith(" ")] == SECTIONS


def test_a_broken_installation_still_describes_itself(monkeypatch):
    def broken(*_, **__):
        raise RuntimeError("smashed")

    monkeypatch.setattr(subprocess, "run", broken)
    monkeypatch.setattr(build_info, "read", broken)
    monkeypatch.setattr(backends, "backends", broken)
    monkeypatch.setattr(backends, "load", broken)
    monkeypatch.setattr(torch, "get_num_threads", broken)
    monkeypatch.setattr(env.importlib.metadata, "version", broken)
    env.git_commit.cache_clear()
    try:
        facts = env.report()
    finally:
        env.git_commit.cache_clear()
    for section in ("built", "backends", "torch", "packages", "compilers"):
        assert facts[section] == {"error": "could not be found out: RuntimeError: smashed"}, section
    assert facts["system"]["processor"]
    assert "smashed" in env.format_report(facts)


def test_a_program_that_hangs_or_is_missing_gives_nothing():
    assert env._output(["no-such-program-anywhere"]) == ""
    assert env._output([sys.executable, "-c", "import sys; print('x'); sys.exit(3)"]) == ""
    assert env._output([sys.executable, "-c", "print(' x ')"]) == "x"


def test_works_without_the_train_extra_and_without_touching_cuda():
    program = """
import sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("tyro", "rich", "timm", "triton", "yaml", "matplotlib", "sklearn", "safetensors"):
            raise ModuleNotFoundError(name, name=name)
sys.meta_path.insert(0, Absent())
from skd import env
assert env.main() == 0
import torch
assert not torch.cuda.is_initialized()
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "could not be found out" not in done.stdout


def test_compilers_are_found_where_the_build_looks(tmp_path, monkeypatch):
    nvcc = tmp_path / "bin" / "nvcc"
    nvcc.parent.mkdir()
    nvcc.write_text(
        "#!/bin/sh\necho 'nvcc: NVIDIA (R) Cuda compiler driver'\necho 'Cuda compilation tools, release 99.7'\n"
    )
    nvcc.chmod(0o755)
    monkeypatch.delenv("SKD_NVCC", raising=False)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    assert env._compilers()["nvcc"] == f"{nvcc}: Cuda compilation tools, release 99.7"
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("CXX", "ccache no-such-compiler")
    assert env._compilers()["c++"] == "not found"


def test_cache_and_cores():
    cache = env.last_level_cache_bytes()
    assert cache is None or cache >= 2**15
    assert env.usable_cores() >= 1 and env.cpu_model()


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    """A repository with a tracked package, which skd is made to believe it comes from."""
    if not env._output(["git", "--version"]):
        pytest.skip("git is not installed")
    package = tmp_path / "skd"
    package.mkdir()
    (package / "__init__.py").write_text("")

    def git(*arguments):
        identity = ["-c", "user.name=t", "-c", "user.email=t@t"]
        subprocess.run(["git", "-C", str(tmp_path), *identity, *arguments], check=True, capture_output=True)

    git("init")
    monkeypatch.setattr(env, "_PACKAGE_FOLDER", package)
    env.git_commit.cache_clear()
    yield git, package
    env.git_commit.cache_clear()


def test_commit_of_the_checkout_and_whether_it_is_changed(checkout):
    git, package = checkout
    git("add", ".")
    git("commit", "-m", "first")
    commit, changed = env.git_commit()
    assert len(commit) >= 40 and not changed
    (package / "new.py").write_text("x = 1\n")
    env.git_commit.cache_clear()
    assert env.git_commit() == (commit, True)


def test_a_repository_that_only_surrounds_the_package_is_not_its_checkout(checkout):
    git, package = checkout
    (package.parent / "other.txt").write_text("someone else's")
    git("add", "other.txt")
    git("commit", "-m", "first")
    assert env.git_commit() is None
