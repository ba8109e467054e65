"""Several processes on the CPU, over gloo: the single process's result, shared decisions, a lost process."""

import contextlib
import csv
import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

for name in ("timm", "sklearn", "matplotlib", "rich", "yaml", "safetensors"):
    pytest.importorskip(name, reason="the trainer needs it (extra 'train')")
if not torch.distributed.is_available():
    pytest.skip("this PyTorch has no torch.distributed", allow_module_level=True)

from waiting import wait_for_file  # noqa: E402

from skd.distill.checkpoint import Checkpoints  # noqa: E402

HERE = Path(__file__).parent


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def start(command: list[str], size: int) -> list[subprocess.Popen]:
    """As torchrun starts them, without its own half minute."""
    shared = {**os.environ, "WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    shared |= {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return [
        subprocess.Popen([sys.executable, *command], env={**shared, "RANK": str(r), "LOCAL_RANK": str(r)}, **pipes)
        for r in range(size)
    ]


def finish(processes: list[subprocess.Popen], timeout: float = 240) -> list[tuple[int, str, str]]:
    try:
        ends = [(*process.communicate(timeout=timeout), process) for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait()
    return [(process.returncode, output, errors) for output, errors, process in ends]


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """What the cases of two_processes.py give, by number of processes and rank."""
    results = {}
    for size in (1, 2):
        out = tmp_path_factory.mktemp(f"{size}-processes")
        for code, _, errors in finish(start([str(HERE / "two_processes.py"), str(out)], size)):
            assert code == 0, errors
        results[size] = [torch.load(out / f"rank{rank}.pt", weights_only=True) for rank in range(size)]
    return results


def assert_close(ours: dict, theirs: dict) -> None:
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        torch.testing.assert_close(
            value, theirs[name], rtol=2e-5, atol=2e-6, msg=lambda text, name=name: f"{name}: {text}"
        )


def test_two_processes_with_half_the_batch_give_the_single_process_result(found):
    (one,), two = found[1], found[2]
    for rank in two:
        for part in ("weights", "average"):
            assert_close(rank["sharing_the_work"][part], one["sharing_the_work"][part])
    ours, theirs = two[0]["sharing_the_work"]["results"], one["sharing_the_work"]["results"]
    for row, wanted in zip(ours, theirs, strict=True):
        assert row["test_correct"] == wanted["test_correct"] and row["lr"] == wanted["lr"]
        for name in ("test_ce", "train_loss", "train_ce", "train_kd", "train_spectral"):
            assert row[name] == pytest.approx(wanted[name], rel=1e-4), name
    assert len(ours) == 2


def test_batch_norms_are_those_of_all_processes_for_the_average_too(found):
    """Each process has seen its own images; what is tested and saved is the mean, in all of them."""
    a, b = (rank["batch_norms"] for rank in found[2])
    for part in ("weights", "average"):
        assert all(torch.equal(a[part][name], b[part][name]) for name in a[part])
    assert a["results"] == b["results"]


def test_a_parameter_without_a_gradient_holds_no_process_up(found):
    (one,), two = found[1], found[2]
    for rank in two:
        assert_close(rank["unused_parameters"]["weights"], one["unused_parameters"]["weights"])


def test_all_processes_have_the_same_bits(found):
    a, b = found[2]
    for case in ("sharing_the_work", "broken_on_one"):
        assert all(torch.equal(a[case]["weights"][name], b[case]["weights"][name]) for name in a[case]["weights"])


def test_a_bad_loss_in_one_process_is_skipped_by_all(found):
    for rank in found[2]:
        case = rank["broken_on_one"]
        assert [row["bad_steps"] for row in case["results"]] == [2, 0]
        assert all(value.isfinite().all() for value in case["weights"].values())


def test_too_many_of_them_end_all_processes(found):
    for rank in found[2]:
        assert "in 12 updates in a row" in rank["always_broken_on_one"]["sentence"]


def test_a_signal_to_one_process_stops_all_after_the_same_step(found):
    a, b = (rank["stopped_on_one"] for rank in found[2])
    assert a == b and 2 <= a["steps"] < 50, "they ask each other about once in a second"
    assert 6 * a["saved"][0] + a["saved"][1] == a["steps"]


def metrics(out: Path) -> list[dict]:
    with (out / "metrics.csv").open(newline="") as file:
        return list(csv.DictReader(file))


QUICK = ["--epochs", "2", "--teacher-epochs", "2", "--arms", "spectral", "--tensorboard", "False"]


def distill(out: Path, *options: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "skd", "distill", "--out", str(out), *QUICK, *options]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


def test_nproc_starts_torchrun_and_gives_one_run(tmp_path):
    """The whole command, against a single process with the same images per step."""
    single = distill(tmp_path / "single", "--batch-size", "128")
    assert single.returncode == 0, single.stderr
    double = distill(tmp_path / "double", "--batch-size", "64", "--nproc", "2")
    assert double.returncode == 0, double.stderr
    assert "2 processes with 64 images each, 128 per step" in double.stdout
    assert double.stdout.count("soft logits + spectral loss: epoch 2/2") == 1, "one process speaks"
    ours, theirs = metrics(tmp_path / "double"), metrics(tmp_path / "single")
    assert len(ours) == len(theirs) == 4
    for row, wanted in zip(ours, theirs, strict=True):
        assert row["lr"] == wanted["lr"]
        assert abs(int(row["test_correct"]) - int(wanted["test_correct"])) <= 2
    # The first epoch starts from equal weights; what rounding does to them grows from there.
    assert float(ours[0]["test_ce"]) == pytest.approx(float(theirs[0]["test_ce"]), rel=1e-3)
    summary = json.loads((tmp_path / "double" / "summary.json").read_text())
    assert summary["environment"]["processes"] == 2
    assert {path.name for path in (tmp_path / "double").iterdir()} == {p.name for p in (tmp_path / "single").iterdir()}


def test_a_lost_process_ends_the_others_with_a_checkpoint(tmp_path):
    out = tmp_path / "run"
    command = ["-m", "skd", "distill", "--out", str(out), "--epochs", "300", "--tensorboard", "False"]
    main, other = processes = start(command, 2)
    wait_for_file(out / "metrics.csv", main, 180)
    other.kill()
    (code, _, errors), _ = finish(processes)
    assert code == 2, errors
    assert "no longer answer" in errors and "can go on with --resume" in errors and "Traceback" not in errors
    state, note = Checkpoints(out).load()
    assert note == "" and state["under_way"]["name"] == "teacher"


def test_a_process_lost_in_a_test_costs_no_step(found, tmp_path):
    (code, _, errors), (lost, _, _) = finish(
        start([str(HERE / "two_processes.py"), str(tmp_path), "lost_in_a_test"], 2)
    )
    assert (code, lost) == (0, 9), errors
    case, whole = torch.load(tmp_path / "rank0.pt", weights_only=True), found[1][0]["sharing_the_work"]
    assert 'the other processes of the training of "spectral" no longer answer' in case["sentence"]
    assert case["at"] == [0, 6], "all steps of the first epoch, which has not been tested"
    assert_close(case["weights"], whole["weights"])
    assert [row["test_correct"] for row in case["results"]] == [row["test_correct"] for row in whole["results"]]


def test_a_signal_to_nproc_saves_and_ends_all_processes(tmp_path):
    """Between two readings of the losses; as schedulers end jobs."""
    signum, out = signal.SIGTERM, tmp_path / "run"
    command = ["-m", "skd", "distill", "--nproc", "2", "--out", str(out), "--epochs", "500", "--tensorboard", "False"]
    process = subprocess.Popen(
        [sys.executable, *command, "--log-interval", "100000"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        wait_for_file(out / "metrics.csv", process, 120)
        process.send_signal(signum)
        _, errors = process.communicate(timeout=25)
        assert process.returncode == 128 + signum, errors
        assert f"Stopped by {signum.name}; go on with: skd distill --resume {out}" in errors
        assert errors.count("Stopped by") == 1 and "Traceback" not in errors
        state, note = Checkpoints(out).load()
        assert note == "" and state["under_way"]["name"] == "teacher"
        with pytest.raises(ProcessLookupError):  # nobody trains on
            os.killpg(process.pid, 0)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


def test_what_is_wrong_is_said_once_and_with_status_2(tmp_path):
    found = distill(tmp_path / "run", "--nproc", "2", "--student-layers", "99", "--teacher-layers", "0")
    assert found.returncode == 2 and "Traceback" not in found.stderr, found.stderr
    assert found.stderr.count("no layer 99") == 1, found.stderr
    assert not (tmp_path / "run").exists()


def test_dry_run_with_two_processes_compares_their_weights():
    command = ["-m", "skd", "distill", "--dry-run", "--arms", "spectral"]
    (code, output, errors), (_, silent, _) = finish(start(command, 2))
    assert code == 0, errors
    assert "2; their weights are compared" in output and "the whole run: about" in output and silent == ""
