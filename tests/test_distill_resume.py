"""Whole runs that end early: killed, stopped, out of disk; and what going on with them gives."""

import csv
import dataclasses
import errno
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

for name in ("timm", "sklearn", "matplotlib", "rich", "yaml", "safetensors"):
    pytest.importorskip(name, reason="the trainer needs it (extra 'train')")

from rich.console import Console  # noqa: E402
from waiting import wait_for_file  # noqa: E402

from skd.distill import checkpoint, experiment  # noqa: E402
from skd.distill.checkpoint import Checkpoints  # noqa: E402
from skd.distill.config import DistillConfig  # noqa: E402
from skd.distill.engine import Training  # noqa: E402
from skd.distill.errors import DistillError  # noqa: E402
from skd.distill.experiment import run  # noqa: E402
from skd.distill.recipe import config_of_run  # noqa: E402
from skd.distill.resume import describe_differences, open_run  # noqa: E402

OPTIONS = {
    "data": {"batch_size": 256},
    "optim": {"epochs": 2, "teacher_epochs": 1, "ema": 0.9},
    "run": {"arms": ["logits", "spectral"], "checkpoint_minutes": 0.0005, "tensorboard": False},
}
WEIGHTS = ("student.safetensors", "student-ema.safetensors", "teacher.safetensors")
TIMES = {"seconds", "images_per_second"}


def config(out: Path, **sections) -> DistillConfig:
    made = DistillConfig().replace(**OPTIONS).replace(run={"out": out, "arms": ("logits", "spectral")})
    return made.replace(**sections)


def run_quietly(settings: DistillConfig) -> tuple[int, str]:
    console = Console(file=io.StringIO(), width=200)
    return run(settings, console), console.file.getvalue()


def rows(file: Path, without=()) -> list[dict]:
    with file.open(newline="") as stream:
        return [{k: v for k, v in row.items() if k not in without} for row in csv.DictReader(stream)]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run that nothing happened to."""
    out = tmp_path_factory.mktemp("whole") / "run"
    assert run_quietly(config(out))[0] == 0
    return out


def assert_same(out: Path, whole: Path) -> None:
    for name in WEIGHTS:
        assert (out / name).read_bytes() == (whole / name).read_bytes(), name
    assert rows(out / "metrics.csv", TIMES) == rows(whole / "metrics.csv", TIMES)
    assert rows(out / "dynamics.csv") == rows(whole / "dynamics.csv")
    ours, theirs = (json.loads((folder / "summary.json").read_text()) for folder in (out, whole))
    assert ours["conclusions"] == theirs["conclusions"]
    assert {path.name for path in out.iterdir()} == {path.name for path in whole.iterdir()}


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="the lives of the run are forks")
def test_killed_at_twenty_moments_it_ends_with_the_same_bits(whole, tmp_path):
    out = tmp_path / "run"
    script = Path(__file__).with_name("killed_runs.py")
    command = [sys.executable, str(script), str(out), "20", "7", json.dumps(OPTIONS)]
    finished = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert finished.returncode == 0, finished.stderr
    lives = finished.stdout.splitlines()
    assert len(lives) == 21 and sum("killed" in life for life in lives) >= 15, lives
    epochs = [int(re.search(r"(\d+) epochs", life).group(1)) for life in lives]
    assert epochs == sorted(epochs), "no finished epoch is ever lost"
    assert_same(out, whole)


@pytest.fixture
def no_pictures(monkeypatch):
    """Drawing takes longer than these trainings."""
    for module in (experiment.curves, experiment.dynamics_plots):
        monkeypatch.setattr(module, "draw", lambda file, *_, **__: file.write_bytes(b""))


class _Stop(Exception):
    pass


@pytest.fixture
def stop_at(monkeypatch):
    """Ends the process's run at the n-th update, as a crash would: without a word to anyone."""

    def arrange(update: int):
        count = 0
        original = Training._update

        def step(self, batches):
            nonlocal count
            count += 1
            if count == update:
                raise _Stop
            return original(self, batches)

        monkeypatch.setattr(Training, "_update", step)
        return lambda: monkeypatch.setattr(Training, "_update", original)

    return arrange


@pytest.mark.parametrize("damage", ["cut", "flipped", "missing"])
def test_a_damaged_checkpoint_is_noticed_and_the_previous_one_used(whole, tmp_path, stop_at, damage, no_pictures):
    out = tmp_path / "run"
    undo = stop_at(15)  # of 6 updates per epoch, 1 epoch of the teacher, 2 of the first student
    with pytest.raises(_Stop):
        run_quietly(config(out))
    undo()
    latest = out / checkpoint.NAME
    content = latest.read_bytes()
    if damage == "cut":
        latest.write_bytes(content[: len(content) // 2])
    elif damage == "flipped":
        middle = len(content) // 2
        latest.write_bytes(content[:middle] + bytes([content[middle] ^ 4]) + content[middle + 1 :])
    else:
        latest.unlink()
    status, text = run_quietly(config(out, run={"resume": "auto"}))
    assert status == 0
    if damage != "missing":
        assert re.search(r"checkpoint.pt is damaged \(.*\): going on from checkpoint-previous.pt", text)
    assert_same(out, whole)


def test_two_damaged_checkpoints_are_a_clear_end(tmp_path, stop_at):
    out = tmp_path / "run"
    undo = stop_at(4)
    with pytest.raises(_Stop):
        run_quietly(config(out))
    undo()
    for name in (checkpoint.NAME, checkpoint.PREVIOUS):
        (out / name).write_bytes(b"no archive")
    with pytest.raises(
        DistillError, match=r"checkpoint.pt is damaged .* and checkpoint-previous.pt is damaged .* anew"
    ):
        run_quietly(config(out, run={"resume": "auto"}))


def test_another_configuration_is_refused_with_the_difference(whole, tmp_path):
    out = tmp_path / "run"
    shutil.copytree(whole, out)
    other = config(out, run={"resume": str(out), "checkpoint_minutes": 5.0}, optim={"lr": 0.001}, loss={"tau": 2.0})
    with pytest.raises(
        DistillError, match=r"another configuration: loss.tau was 1.0 and is 2.0; optim.lr was 0.005 and"
    ):
        run_quietly(other)
    assert_same(out, whole)


def test_what_does_not_change_the_results_may_change():
    before = DistillConfig().to_dict()
    now = (
        DistillConfig()
        .replace(run={"checkpoint_minutes": 1.0, "resume": "auto"}, data={"workers": 4, "data": "moved"})
        .to_dict()
    )
    assert describe_differences(before, now) == []
    now = DistillConfig().replace(data={"mixup": 0.5}).to_dict()
    assert describe_differences(before, now) == ["data.mixup was 0.0 and is 0.5"]


def test_other_processes_may_go_on_with_as_many_images_per_step(whole):
    half = config_of_run(whole).replace(data={"batch_size": 128})
    assert open_run(half, processes=2).state["processes"] == 1
    with pytest.raises(DistillError, match="a step took 256 images in 1 processes and takes 128 in 1"):
        open_run(half, processes=1)


def test_a_finished_run_that_goes_on_reports_again(whole, tmp_path, no_pictures):
    out = tmp_path / "run"
    shutil.copytree(whole, out)
    (out / "report.html").unlink()
    status, text = run_quietly(config(out, run={"resume": str(out)}))
    assert status == 0 and "spectral loss" in text
    assert_same(out, whole)


@pytest.mark.parametrize(
    ("resume", "made", "sentence"),
    [
        ("auto", "nothing", None),
        ("auto", "config.yaml", None),
        ("auto", "other.txt", "is not empty"),
        ("here", "config.yaml", "has no checkpoint.pt to go on from"),
        ("here", "nothing", "is no folder; give the folder of a run"),
    ],
)
def test_resume_without_a_checkpoint(tmp_path, monkeypatch, resume, made, sentence):
    out = tmp_path / "run"
    if made != "nothing":
        out.mkdir()
        (out / made).write_text("x: 1\n")
    settings = config(out, run={"resume": str(out) if resume == "here" else "auto"})
    monkeypatch.setattr(experiment.Experiment, "run", lambda self: None)
    if sentence is None:
        assert run_quietly(settings)[0] == 0
    else:
        with pytest.raises(DistillError, match=sentence):
            run_quietly(settings)


def test_resume_auto_needs_a_folder():
    with pytest.raises(DistillError, match="--resume auto needs --out DIR"):
        run_quietly(config(None, run={"resume": "auto"}))


def test_a_full_disk_ends_the_run_and_loses_nothing(whole, tmp_path, monkeypatch, no_pictures):
    """The disk is full at the ninth checkpoint; when there is room again the run goes on."""
    out, saves, original = tmp_path / "run", 0, torch.save

    def save(state, file):
        nonlocal saves
        saves += 1
        if saves == 9:
            file.write(b"half of it")
            raise OSError(errno.ENOSPC, "No space left on device")
        original(state, file)

    monkeypatch.setattr(torch, "save", save)
    with pytest.raises(
        DistillError, match=r"checkpoint.pt could not be written \(.*No space left.*\).* are whole: make room"
    ):
        run_quietly(config(out))
    assert {checkpoint.NAME, checkpoint.PREVIOUS} <= {path.name for path in out.iterdir()}
    assert not list(out.glob(".part-*"))
    assert run_quietly(config(out, run={"resume": "auto"}))[0] == 0
    assert_same(out, whole)


def test_a_full_disk_under_another_file_is_a_sentence_too(tmp_path, monkeypatch):
    def fail(self, *_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(experiment.RunFolder, "write_csv", fail)
    with pytest.raises(DistillError, match="a file could not be read or written .*No space left.*--resume"):
        run_quietly(config(tmp_path / "run"))


def test_a_file_that_cannot_be_read_before_there_is_a_folder(tmp_path, monkeypatch):
    def fail(*_, **__):
        raise PermissionError(errno.EACCES, "Permission denied", "images/val")

    monkeypatch.setattr("skd.distill.prepare.prepare", fail)
    with pytest.raises(
        DistillError, match="could not be read or written .*images/val.*; make room .* then start again"
    ):
        run_quietly(config(tmp_path / "run"))


def test_a_folder_that_goes_while_it_is_used_is_a_sentence_too(tmp_path, monkeypatch):
    write = experiment.RunFolder.write_csv

    def after_its_end(self, *content):
        shutil.rmtree(self.path)
        write(self, *content)

    monkeypatch.setattr(experiment.RunFolder, "write_csv", after_its_end)
    with pytest.raises(DistillError, match="run, the folder of the run, has gone while it was used; start again"):
        run_quietly(config(tmp_path / "run"))


def test_processes_lost_outside_a_training_are_a_sentence_too(tmp_path, monkeypatch):
    """Their connection, as gloo tells it; any other error is a defect and keeps its traceback."""
    for text, kind, sentence in (
        (
            "[gloo/transport/tcp/pair.cc:561] Connection closed by peer",
            DistillError,
            "no longer answer .*closed by peer",
        ),
        ("shape mismatch", RuntimeError, "shape mismatch"),
    ):

        def lose(*_, text=text):
            raise RuntimeError(text)

        monkeypatch.setattr(experiment.Experiment, "_observe_from", lose)
        with pytest.raises(kind, match=sentence):
            run_quietly(config(tmp_path / kind.__name__))


@pytest.mark.skipif(os.name == "nt" or os.geteuid() == 0, reason="root may write everywhere")
def test_no_permission_to_write(tmp_path):
    locked = tmp_path / "locked"
    locked.mkdir(mode=0o500)
    for out in (locked, locked / "run"):
        with pytest.raises(DistillError, match="permission|cannot be made"):
            run_quietly(config(out))


@pytest.mark.parametrize(("signum", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_saves_and_ends_cleanly(tmp_path, signum, status):
    """In a process of its own, as schedulers end jobs."""
    out = tmp_path / "run"
    command = [sys.executable, "-m", "skd", "distill", "--out", str(out), "--epochs", "500", "--tensorboard", "False"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        wait_for_file(out / "metrics.csv", process, 120)
        process.send_signal(signum)
        output, errors = process.communicate(timeout=60)
    finally:
        process.kill()
        process.wait()
    assert process.returncode == status, errors
    assert "Traceback" not in errors + output
    assert f"Stopped by {signum.name}; go on with: skd distill --resume {out}" in errors
    finished = rows(out / "metrics.csv")
    assert finished and all(None not in row.values() for row in finished)
    state, note = Checkpoints(out).load()
    assert note == "" and len(state["under_way"]["training"]["results"]) == len(finished)
    assert not list(out.glob(".part-*"))


def test_checkpoints_keep_two_and_are_read_safely(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    for number in range(3):
        checkpoints.save({"number": number, "weights": torch.full((3,), float(number))})
    assert checkpoints.load()[0]["number"] == 2
    assert torch.load(checkpoints.previous, weights_only=True)["number"] == 1
    checkpoints.latest.unlink()
    assert checkpoints.load()[0]["number"] == 1
    torch.save({"format": 1, "code": dataclasses.dataclass}, checkpoints.latest)
    state, note = checkpoints.load()
    assert state["number"] == 1 and "checkpoint.pt is damaged" in note
