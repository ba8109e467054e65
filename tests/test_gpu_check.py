"""benchmarks/gpu_check.sh without a GPU: its order, limits and verdicts, with python and the tools of CUDA replaced."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = ROOT / "benchmarks" / "gpu_check.sh"

pytestmark = [
    pytest.mark.skipif(not SCRIPT.is_file(), reason="this is not a source tree: it has no benchmarks/"),
    pytest.mark.skipif(sys.platform != "linux" or not shutil.which("timeout"), reason="needs bash and coreutils"),
]

# Notes what it is called for, and does as the variables FAKE_... say: fail, hang, or what is special to a part.
PYTHON = r"""#!/usr/bin/env bash
note() { echo "$1" >>"$CALLS"; }
act() {
    case "$1" in
    fail) exit 3 ;;
    hang) trap '' TERM; touch "$CALLS.hanging"; sleep 60 & wait $!; sleep 60 ;;
    esac
}
out() { while [ $# -gt 0 ]; do if [ "$1" = --out ]; then echo "$2"; return; fi; shift; done; }
case "$*" in
*is_available*)
    if [ "$FAKE_GPU" = fail ]; then echo "AssertionError: PyTorch sees no CUDA device" >&2; exit 1; fi
    printf '90\nNVIDIA H100 80GB HBM3\n' ;;
*"import hypothesis"*) [ "$FAKE_HYPOTHESIS" != missing ] ;;
*skd.backends*)
    note "backends${PYTHONPATH:+ site}"
    echo "backend cuda: ${FAKE_CUDA:-True}"; echo "backend triton: ${FAKE_TRITON:-True}" ;;
*"pip --version"*) [ "$FAKE_PIP" != missing ] ;;
*"pip install"*)
    note "pip install $SKD_CUDA_ARCHS"
    if [ "$FAKE_PIP" = broken ]; then echo "externally managed"; exit 1; fi
    if [ "$FAKE_BUILD" = fail ]; then echo "error: compilation failed: spectral_align.cu(3)"; exit 1; fi
    act "$FAKE_BUILD" ;;
*"setup.py build_ext"*) note "build_ext"; act "$FAKE_BUILD" ;;
*"-m pytest -o addopts= "*)  # neither pytest-xdist nor its processes
    note "pytest $SKD_TEST_REQUIRE ${*: -1}"
    act "$FAKE_TESTS"
    case "$FAKE_TESTS" in
    none) echo "===== 12 skipped in 1.00s =====" ;;
    wrong) echo "===== 1 failed, 11 passed in 1.00s ====="; exit 1 ;;
    *) echo "===== 112 passed, 2 skipped in 1.00s =====" ;;
    esac ;;
*skd.bench*)
    folder=$(out "$@")
    case "$*" in *--add*) which=full ;; *) which=first ;; esac
    note "bench $which $SKD_COMMIT"
    behaviour=FAKE_BENCH_$which
    if [ "${!behaviour}" = fail ]; then exit 1; fi
    echo "rows of $which" >>"$folder/rows.csv"; echo "{}" >"$folder/rows.json"
    printf '## Goals\n\n- bandwidth: 1 reached\n\n## Times\n' >"$folder/table.md"
    act "${!behaviour}" ;;
*sanitizer_cases*)
    note "cases ${*: -2}"
    act "$FAKE_CASES"
    echo "sanitizer_cases: cuda 4 of 4 cases, 0 wrong" ;;
*"skd env"*) note "env"; echo "the environment" ;;
*) true ;;
esac
"""

SANITIZER = r"""#!/usr/bin/env bash
tool=$2
echo "sanitizer $tool" >>"$CALLS"
case "$FAKE_SANITIZER" in
"$tool") echo "ERROR SUMMARY: 3 errors"; exit 86 ;;
unsupported) echo "Error: Device not supported"; exit 1 ;;
silent) exit 0 ;;
hang) sleep 60 ;;
esac
while [ "$1" != "$SKD_PYTHON" ]; do shift; done
"$@"
"""


class Check:
    """One run of the script in a tree of its own."""

    def __init__(self, tmp_path):
        self.tree, self.bin, self.out = tmp_path / "tree", tmp_path / "bin", tmp_path / "out"
        for folder in (self.tree / "benchmarks", self.tree / "tests", self.tree / "skd", self.bin, self.out):
            folder.mkdir(parents=True)
        shutil.copy(SCRIPT, self.tree / "benchmarks" / "gpu_check.sh")
        (self.tree / "tests" / "test_gpu_matrix.py").write_text("pytestmark = pytest.mark.gpu\n")
        (self.tree / "tests" / "test_other.py").write_text("\n")
        self.install("python", PYTHON)
        self.install("nvidia-smi", "#!/bin/sh\necho 'Driver Version: 580.1'\n")
        self.calls_file = tmp_path / "calls"
        self.environment = {
            **{k: v for k, v in os.environ.items() if not k.startswith(("SKD_", "FAKE_", "CUDA_", "PYTHON"))},
            "PATH": f"{self.bin}:/usr/bin:/bin",
            "SKD_PYTHON": str(self.bin / "python"),
            "SKD_COMMIT": "abc123",
            "CALLS": str(self.calls_file),
            "OUT": str(self.out),
            "TMPDIR": str(tmp_path),
        }

    def install(self, name, text):
        (self.bin / name).write_text(text)
        (self.bin / name).chmod(0o755)

    def start(self, **variables):
        command = ["bash", str(self.tree / "benchmarks" / "gpu_check.sh")]
        environment = {**self.environment, **variables}
        streams = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        # A shell that began with SIGINT ignored, as one in the background does, cannot trap it.
        heard = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)  # noqa: E731
        return subprocess.Popen(command, env=environment, cwd=self.bin, preexec_fn=heard, **streams)

    def run(self, **variables):
        """Exit status and lines of output."""
        process = self.start(**variables)
        text, _ = process.communicate(timeout=120)
        assert not list(self.out.parent.glob("tmp.*")), "the scratch folder was left behind"
        return process.returncode, text.rstrip().splitlines()

    @property
    def calls(self):
        return self.calls_file.read_text().splitlines() if self.calls_file.exists() else []

    @property
    def results(self):
        """The one folder of results."""
        (folder,) = self.out.iterdir()
        return folder

    def text(self, name):
        return (self.results / name).read_text()


@pytest.fixture
def check(tmp_path):
    made = Check(tmp_path)
    made.install("compute-sanitizer", SANITIZER)
    return made


def test_everything_passes_in_the_order_of_worth(check):
    status, lines = check.run()
    assert status == 0 and lines[-1] == "gpu_check: pass", lines
    assert check.calls == [
        "env",
        "pip install 90",
        "backends",
        "pytest cuda,triton tests/test_gpu_matrix.py",
        "bench first abc123",
        "cases cuda triton",
        "sanitizer memcheck",
        "cases cuda triton",
        "sanitizer racecheck",
        "cases cuda triton",
        "bench full abc123",
    ]
    names = {path.name for path in check.results.iterdir()}
    assert names == {
        "check.txt", "environment.txt", "tests.txt", "sanitizer.txt", "rows.csv", "rows.json", "table.md",
    }  # fmt: skip
    assert check.results.name.startswith("nvidia-h100-80gb-hbm3-20")
    assert set(check.results.name) <= set("abcdefghijklmnopqrstuvwxyz0123456789.-_")
    environment = check.text("environment.txt")
    for fact in ("commit: abc123", "580.1", "architectures to build for: 90", "the environment", "sources: "):
        assert fact in environment
    assert check.text("rows.csv") == "rows of first\nrows of full\n"
    assert "112 passed" in check.text("tests.txt") and "=== racecheck" in check.text("sanitizer.txt")
    written = check.text("check.txt").splitlines()
    assert written[-1] == "gpu_check: pass"
    ended = [line for line in written if "exit status" in line]
    assert len(ended) == 9 and all("exit status 0" in line for line in ended)
    assert "- bandwidth: 1 reached" in lines


def test_results_go_into_the_tree_and_never_over_earlier_ones(check):
    for _ in range(2):
        assert check.run(OUT="")[0] == 0
    folders = sorted(path.name for path in (check.tree / "results").iterdir())
    assert len(folders) == 2 and folders[1] == f"{folders[0]}-2"
    assert not list(check.out.iterdir())


def test_without_a_gpu_nothing_begins(check):
    status, lines = check.run(FAKE_GPU="fail")
    assert status == 1 and lines[-1].startswith("gpu_check: FAILED: no GPU that ")
    assert "PyTorch sees no CUDA device" in lines[-1] and check.calls == [] and not list(check.out.iterdir())


def test_figures_are_not_taken_where_tests_fail(check):
    status, lines = check.run(FAKE_TESTS="wrong")
    assert status == 1 and lines[-1] == "gpu_check: FAILED: tests: tests ended with exit status 1"
    assert any("benchmarks were not run" in line for line in lines)
    assert not any(call.startswith("bench") for call in check.calls)
    assert "sanitizer memcheck" in check.calls  # it may say why
    assert not (check.results / "rows.csv").exists() and "1 failed" in check.text("tests.txt")
    assert check.text("check.txt").splitlines()[-1] == lines[-1]


def test_tests_that_all_skip_prove_nothing(check):
    status, lines = check.run(FAKE_TESTS="none")
    assert status == 1 and lines[-1] == "gpu_check: FAILED: tests: none was run"
    assert not any(call.startswith("bench") for call in check.calls)


def test_there_must_be_tests(check):
    (check.tree / "tests" / "test_gpu_matrix.py").unlink()
    assert check.run()[1][-1] == "gpu_check: FAILED: tests: no file in tests/ has tests marked gpu"


def test_a_build_that_fails_ends_it(check):
    status, lines = check.run(FAKE_BUILD="fail")
    assert status == 1 and lines[-1] == "gpu_check: FAILED: build: build ended with exit status 1"
    assert check.calls == ["env", "pip install 90"]
    assert "compilation failed: spectral_align.cu(3)" in check.text("check.txt")


@pytest.mark.parametrize("pip", ["missing", "broken"])
def test_it_builds_in_the_tree_where_pip_cannot(check, pip):
    status, lines = check.run(FAKE_PIP=pip)
    assert status == 0 and lines[-1] == "gpu_check: pass"
    assert "build_ext" in check.calls and "backends site" in check.calls  # with kernels/ as skd.kernels


def test_it_builds_in_the_tree_if_asked_to(check):
    assert check.run(SKD_CHECK_BUILD="inplace")[0] == 0
    assert "build_ext" in check.calls and not any(call.startswith("pip") for call in check.calls)


def test_missing_cuda_kernels_fail_though_the_build_went_through(check):
    status, lines = check.run(FAKE_CUDA="the extension skd._cuda is not in this installation")
    assert status == 1 and lines[-1].startswith(
        "gpu_check: FAILED: build: skd has no CUDA kernels here (backend cuda: the"
    )


def test_missing_triton_fails_and_the_rest_is_done_without_it(check):
    status, lines = check.run(FAKE_TRITON="Triton cannot be imported")
    assert status == 1 and lines[-1] == (
        "gpu_check: FAILED: Triton cannot serve (backend triton: Triton cannot be imported)"
    )
    assert "pytest cuda tests/test_gpu_matrix.py" in check.calls and "bench full abc123" in check.calls


def test_hypothesis_may_be_missing(check):
    status, lines = check.run(FAKE_HYPOTHESIS="missing")
    assert status == 0 and any("an empty one stands in" in line for line in lines)


def test_the_stand_in_for_hypothesis_skips_what_needs_it(tmp_path):
    text = SCRIPT.read_text()
    folder = tmp_path / "hypothesis"
    folder.mkdir()
    for name in ("__init__.py", "strategies.py"):
        body = text.split(f"hypothesis/{name}\" <<'END'\n", 1)[1].split("\nEND\n", 1)[0]
        (folder / name).write_text(body + "\n")
    (tmp_path / "test_it.py").write_text(
        "from hypothesis import example, given, settings, strategies as st\n"
        "settings.register_profile('same', max_examples=60, derandomize=True, deadline=None)\n"
        "settings.load_profile('same')\n"
        "whole = st.integers(1, 8).flatmap(lambda n: st.lists(st.floats(), min_size=n)).filter(bool)\n"
        "@settings(max_examples=3)\n@given(whole, x=st.data())\n@example(1, 2)\n"
        "def test_generated(a, x):\n    assert 0\n"
        "def test_plain():\n    pass\n"
    )
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "-p",
        "no:hypothesispytest",
        "test_it.py",
    ]
    environment = {
        **os.environ,
        "PYTHONPATH": str(tmp_path),
        "PYTEST_ADDOPTS": "",
        "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",
    }
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and "1 passed, 1 skipped" in done.stdout, done.stdout + done.stderr


def test_a_missing_sanitizer_is_said_and_fails_nothing(check):
    (check.bin / "compute-sanitizer").unlink()
    tools = check.bin.parent / "tools"  # only what the script needs, in case this machine has a compute-sanitizer
    tools.mkdir()
    names = "bash dirname mktemp sed tail head tr cut date mkdir rm ln grep git find sort xargs sha256sum uname wc cat"
    for name in (*names.split(), "timeout", "sleep", "touch", "env"):
        if where := shutil.which(name):
            (tools / name).symlink_to(where)
    if Path("/usr/local/cuda/bin/compute-sanitizer").exists():
        pytest.skip("this machine has a compute-sanitizer where the script looks for it")
    status, lines = check.run(PATH=f"{check.bin}:{tools}")
    assert status == 0 and lines[-1] == "gpu_check: pass", lines
    assert "not checked: memory accesses and races: compute-sanitizer is not found" in lines


def test_a_sanitizer_that_does_not_know_the_device_is_said(check):
    status, lines = check.run(FAKE_SANITIZER="unsupported")
    assert status == 0 and lines[-1] == "gpu_check: pass"
    assert "not checked: racecheck: compute-sanitizer does not support this device or system" in lines


@pytest.mark.parametrize("tool", ["memcheck", "racecheck"])
def test_what_a_sanitizer_finds_fails(check, tool):
    status, lines = check.run(FAKE_SANITIZER=tool)
    assert status == 1 and lines[-1] == f"gpu_check: FAILED: {tool} found errors (sanitizer.txt)"
    assert "3 errors" in check.text("sanitizer.txt") and "bench full abc123" in check.calls


def test_a_sanitizer_that_ran_nothing_fails(check):
    status, lines = check.run(FAKE_SANITIZER="silent")
    assert status == 1 and lines[-1] == "gpu_check: FAILED: memcheck ran no case; racecheck ran no case"


def test_wrong_results_of_the_small_cases_fail(check):
    status, lines = check.run(FAKE_CASES="fail")
    assert status == 1 and lines[-1] == "gpu_check: FAILED: sanitizer's cases alone ended with exit status 3"


def test_a_benchmark_that_fails_is_named_and_its_rows_are_kept(check):
    status, lines = check.run(FAKE_BENCH_full="fail")
    assert status == 1 and lines[-1] == "gpu_check: FAILED: full benchmark ended with exit status 1"
    assert check.text("rows.csv") == "rows of first\n"


def test_tests_that_hang_are_cut(check):
    began = time.monotonic()
    status, lines = check.run(FAKE_TESTS="hang", SKD_CHECK_SECONDS="30")
    assert status == 1 and lines[-1] == "gpu_check: FAILED: tests: tests was cut after its time"
    assert time.monotonic() - began < 30
    assert "sanitizer racecheck" in check.calls and "bench first abc123" not in check.calls


def test_a_full_benchmark_is_cut_by_the_end_of_the_time(check):
    status, lines = check.run(FAKE_BENCH_full="hang", SKD_CHECK_SECONDS="16")
    assert status == 0 and lines[-1] == "gpu_check: pass", lines
    assert any(line.startswith("not checked: the rest of the full benchmark") for line in lines)
    assert check.text("rows.csv") == "rows of first\nrows of full\n"


@pytest.mark.parametrize(("name", "expected"), [("SIGTERM", 143), ("SIGINT", 130)])
def test_a_signal_leaves_what_there_is_and_a_last_line(check, name, expected):
    process = check.start(FAKE_BENCH_first="hang")
    hanging = Path(f"{check.calls_file}.hanging")
    deadline = time.monotonic() + 60
    while not hanging.exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(getattr(signal, name))
    text, _ = process.communicate(timeout=30)
    assert process.returncode == expected
    last = text.rstrip().splitlines()[-1]
    assert last == f"gpu_check: FAILED: stopped by {name} during first benchmark"
    assert check.text("rows.csv") == "rows of first\n"
    assert check.text("check.txt").splitlines()[-1] == last
    assert "bench full abc123" not in check.calls
