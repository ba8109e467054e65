"""Whole runs of the trainer: the digits, a folder of images, its files, its refusals, Ctrl-C."""

import csv
import dataclasses
import io
import json

import numpy as np
import pytest
import torch

timm = pytest.importorskip("timm", reason="the trainer is built on timm (extra 'train')")
for name in ("sklearn", "matplotlib", "rich", "yaml", "safetensors"):
    pytest.importorskip(name, reason="the trainer needs it (extra 'train')")

import yaml  # noqa: E402
from photos import write_photos  # noqa: E402
from PIL import Image  # noqa: E402
from rich.console import Console  # noqa: E402
from small_training import Watch  # noqa: E402
from timm.task import ClassificationTask  # noqa: E402

from skd.distill import digits  # noqa: E402
from skd.distill.arms import make_arms  # noqa: E402
from skd.distill.config import DistillConfig, fill_defaults  # noqa: E402
from skd.distill.distributed import World  # noqa: E402
from skd.distill.engine import Training  # noqa: E402
from skd.distill.errors import DistillError  # noqa: E402
from skd.distill.experiment import run  # noqa: E402
from skd.distill.run_folder import RunFolder, replacing  # noqa: E402

FILES = {
    *("config.yaml", "metrics.csv", "dynamics.csv", "summary.json", "report.html", "curves.png", "dynamics.png"),
    *("checkpoint.pt", "checkpoint-previous.pt", "student.safetensors", "teacher.safetensors"),
}


def run_quietly(config):
    console = Console(file=io.StringIO(), width=120)
    status = run(config, console)
    return status, console.file.getvalue()


def read_metrics(folder):
    with (folder / "metrics.csv").open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def digits_run(tmp_path_factory):
    """Two seeds, few epochs: enough to learn something."""
    out = tmp_path_factory.mktemp("runs") / "digits"
    threads = torch.get_num_threads()
    config = DistillConfig().replace(
        run={"out": out, "seeds": 2, "seed": 3, "tensorboard": False}, optim={"epochs": 3, "teacher_epochs": 6}
    )
    status, text = run_quietly(config)
    assert status == 0
    assert torch.get_num_threads() == threads
    return out, text


def test_digits_run_writes_every_file(digits_run):
    out, text = digits_run
    assert {path.name for path in out.iterdir()} == FILES
    assert (out / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert Image.open(out / "curves.png").size[0] > 1000
    assert "demonstration" in text and "labels only" in text and "over 2 seeds" in text
    assert str(out) in text.replace("\n", "")


def test_metrics_have_a_row_per_epoch_arm_and_seed(digits_run):
    rows = read_metrics(digits_run[0])
    counted = {}
    for row in rows:
        counted.setdefault((row["arm"], int(row["seed"])), []).append(int(row["epoch"]))
        assert float(row["test_top1"]) == pytest.approx(100 * int(row["test_correct"]) / 360)
        assert float(row["train_loss"]) > 0 and float(row["seconds"]) > 0
    arms = {(arm, seed): [1, 2, 3] for arm in ("labels", "logits", "spectral") for seed in (3, 4)}
    assert counted == {("teacher", 3): [1, 2, 3, 4, 5, 6], **arms}


def test_the_teacher_learns_and_the_losses_are_what_their_arm_says(digits_run):
    rows = read_metrics(digits_run[0])
    teacher = [float(row["test_top1"]) for row in rows if row["arm"] == "teacher"]
    assert teacher[-1] > 60 and teacher[-1] > teacher[0] + 20, "ten classes, so chance is 10%"
    for row in rows:
        ce, kd, spectral = (float(row[f"train_{part}"]) for part in ("ce", "kd", "spectral"))
        alpha, weight = {"labels": (0, 0), "logits": (0.9, 0), "spectral": (0.9, 0.2)}.get(row["arm"], (0, 0))
        assert float(row["train_loss"]) == pytest.approx((1 - alpha) * ce + alpha * kd + weight * spectral, rel=1e-4)
        assert (kd > 0) == (alpha > 0) and (spectral > 0) == (weight > 0)
    for seed in ("3", "4"):
        aligned = [float(row["train_spectral"]) for row in rows if (row["arm"], row["seed"]) == ("spectral", seed)]
        assert aligned[-1] < 0.9 * aligned[0]


def test_summary_agrees_with_the_metrics(digits_run):
    out, _ = digits_run
    summary, rows = json.loads((out / "summary.json").read_text()), read_metrics(out)
    for arm, found in summary["students"]["arms"].items():
        last = [int(row["test_correct"]) for row in rows if row["arm"] == arm and row["epoch"] == "3"]
        assert found["test_correct"] == last
        assert found["test_top1_mean"] == pytest.approx(100 * np.mean(last) / 360)
        assert found["test_top1_deviation"] == pytest.approx(100 * np.std(last, ddof=1) / 360)
        assert found["parameters"] == sum(p.numel() for p in digits.STUDENT.build().parameters())
    assert summary["teacher"]["test_correct"] == [
        int(row["test_correct"]) for row in rows if row["arm"] == "teacher" and row["epoch"] == "6"
    ]
    assert any("demonstration" in sentence for sentence in summary["conclusions"])


def test_config_file_is_what_ran(digits_run):
    config = yaml.safe_load((digits_run[0] / "config.yaml").read_text())
    ran = {"epochs": 3, "teacher_epochs": 6, "lr": 0.005, "weight_decay": 0.05, "warmup_epochs": 0, "opt": "adamw"}
    assert ran.items() <= config["optim"].items()
    assert config["models"]["student_layers"] == [0, 1, 2] and config["run"]["seed"] == 3
    assert set(config) == {field.name for field in dataclasses.fields(DistillConfig)}


def test_student_loads_with_the_line_of_timm_in_the_summary(digits_run, monkeypatch):
    out, _ = digits_run
    entry = json.loads((out / "summary.json").read_text())["student_file"]
    monkeypatch.chdir(out)
    student = eval(entry["load_with"], {"timm": timm}).eval()
    with torch.no_grad():
        loader = digits.load_digits(batch_size=360).make_test_loader(World())
        correct = sum(int((student(images).argmax(1) == target).sum()) for images, target in loader)
    rows = [row for row in read_metrics(out) if (row["arm"], row["seed"], row["epoch"]) == ("spectral", "3", "3")]
    assert entry["arm"] == "spectral" and entry["seed"] == 3
    assert correct == int(rows[0]["test_correct"]) == round(entry["test_top1"] * 3.6)


def test_same_seed_same_numbers_and_a_teacher_from_its_file(digits_run, tmp_path):
    """The teacher's file gives the student of that run again: seed, data order and weights are all that count."""
    out, _ = digits_run
    config = DistillConfig().replace(
        run={"out": tmp_path / "again", "seed": 3, "tensorboard": False},
        optim={"epochs": 3},
        models={"teacher_checkpoint": out / "teacher.safetensors"},
    )
    assert run_quietly(config)[0] == 0

    def numbers(folder):
        rows = [row for row in read_metrics(folder) if row["seed"] == "3" and row["arm"] != "teacher"]
        return [{k: v for k, v in row.items() if k not in ("seconds", "images_per_second")} for row in rows]

    assert numbers(tmp_path / "again") == numbers(out)
    assert (tmp_path / "again" / "student.safetensors").read_bytes() == (out / "student.safetensors").read_bytes()
    summary = json.loads((tmp_path / "again" / "summary.json").read_text())
    assert not summary["teacher"]["trained_here"] and not (tmp_path / "again" / "teacher.safetensors").exists()


class RecordingTask(ClassificationTask):
    """Notes the targets it is given, and may draw random numbers as dropout does."""

    def __init__(self, draws):
        super().__init__(torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 10)), verbose=False)
        self.draws, self.targets = draws, []

    def forward(self, images, target):
        self.targets.append(target)
        torch.rand(self.draws)
        return super().forward(images, target)


def test_arms_see_the_same_batches_whatever_they_draw():
    config = fill_defaults(DistillConfig())
    orders = []
    for seed, draws in ((0, 0), (0, 3), (1, 0)):
        task = RecordingTask(draws)
        source = digits.load_digits(batch_size=500)
        Training(task, source, config, World(), epochs=2, seed=seed, label="a test").run(Watch())
        orders.append(torch.cat(task.targets))
    assert torch.equal(orders[0], orders[1]) and not torch.equal(orders[0], orders[2])
    assert not torch.equal(*orders[0].chunk(2)), "every epoch has an order of its own"


@pytest.fixture(scope="module")
def image_folder(tmp_path_factory):
    return write_photos(tmp_path_factory.mktemp("images"))


def images_config(root, out, **sections):
    config = DistillConfig().replace(
        data={"data": root, "image_size": 32, "batch_size": 16},
        models={"teacher": "test_vit2", "student": "test_vit", "train_teacher": True},
        optim={"epochs": 2, "lr": 1e-3},
        run={"out": out, "threads": 1, "tensorboard": False},
    )
    return config.replace(**sections)


def test_image_folder_run(image_folder, tmp_path, monkeypatch):
    out = tmp_path / "run"
    status, _ = run_quietly(images_config(image_folder, out, optim={"teacher_epochs": 8, "epochs": 2}))
    assert status == 0 and {path.name for path in out.iterdir()} == FILES
    summary = json.loads((out / "summary.json").read_text())
    assert summary["data"]["classes"] == ["blue", "green", "red"] and summary["data"]["test_images"] == 24
    assert summary["teacher"]["test_top1_mean"] > 80, "three colours; chance is 33%"
    assert yaml.safe_load((out / "config.yaml").read_text())["models"]["teacher_layers"] == [0, 3, 4, 5, 6, 7]
    monkeypatch.chdir(out)
    student = eval(summary["student_file"]["load_with"], {"timm": timm})
    assert student.num_classes == 3


def test_image_folder_with_a_convolutional_teacher_by_layer_names(image_folder, tmp_path):
    """The third stage of the ResNet has one number per 16x16 pixels, as the ViT has one token."""
    config = images_config(
        image_folder,
        tmp_path / "run",
        data={"image_size": 64},
        models={
            "teacher": "test_resnet",
            "student": "test_vit",
            "student_layers": (-1,),
            "teacher_layers": ("layer3",),
        },
        optim={"epochs": 1, "teacher_epochs": 1},
        loss={"match": "mse", "kd": "hard"},
    )
    status, text = run_quietly(config)
    assert status == 0 and "hard logits + mse loss on maps" in text


@pytest.mark.parametrize(
    ("sections", "sentence"),
    [
        ({"models": {"teacher": "nonesuch_zz"}}, "timm has no model 'nonesuch_zz'"),
        ({"models": {"student_layers": (0,), "teacher_layers": ("nope",)}}, "no submodule 'nope'"),
        ({"models": {"student_layers": (0, 1), "teacher_layers": (0,)}}, "--student-layers has 2 layers and"),
        ({"models": {"student_layers": (0,), "teacher_layers": (99,)}}, "no layer 99"),
        ({"models": {"teacher": "test_resnet"}}, "do not go together: .*spatial sizes differ"),
        ({"models": {"teacher_checkpoint": "none.pth"}}, "none.pth is no file"),
        ({"models": {"train_teacher": False}}, "1000 classes, the data has 3"),
        ({"data": {"batch_size": 1000}}, "48 images, fewer than one batch of 1000"),
        ({"run": {"device": "warp"}}, "--device warp cannot be used"),
        ({"optim": {"opt": "nonesuch"}}, "--opt nonesuch"),
        # Not the last of the arms is refused.
        ({"models": {"teacher": "test_resnet"}, "run": {"arms": ("spectral", "labels")}}, "spatial sizes differ"),
        ({"run": {"wandb": "project"}}, "--wandb"),
        ({"data": {"teacher_image_size": 50}, "run": {"arms": ("labels",)}}, "height .50. should be divisible by"),
    ],
)
def test_refusals_leave_nothing_behind(image_folder, tmp_path, sections, sentence):
    out = tmp_path / "run"
    config = images_config(image_folder, out)
    if "teacher_checkpoint" in sections.get("models", {}):
        sections = {"models": {"teacher_checkpoint": tmp_path / "none.pth"}}
    with pytest.raises(DistillError, match=sentence):
        run_quietly(config.replace(**sections))
    assert not out.exists()


def test_arms_without_their_term_are_left_out():
    def names(arms=None, **loss):
        return [arm.name for arm in make_arms(DistillConfig().replace(loss=loss, run={"arms": arms}))]

    assert names() == ["labels", "logits", "spectral"]
    assert names(weight=0.0) == ["labels", "logits"]
    assert names(alpha=0.0) == ["labels", "spectral"]
    assert names(arms=("spectral", "labels")) == ["spectral", "labels"]


def test_an_earlier_run_is_never_overwritten(tmp_path, monkeypatch):
    (tmp_path / "kept.txt").write_text("an earlier run")
    with pytest.raises(DistillError, match="is not empty; give a new folder"):
        run_quietly(DistillConfig().replace(run={"out": tmp_path, "tensorboard": False}))
    with pytest.raises(DistillError, match="is a file"):
        RunFolder(tmp_path / "kept.txt", "digits")
    assert [path.name for path in tmp_path.iterdir()] == ["kept.txt"]
    monkeypatch.chdir(tmp_path)
    folders = {RunFolder(None, "digits").path for _ in range(3)}
    assert len(folders) == 3 and all(path.is_dir() and path.parent.name == "runs" for path in folders)


@pytest.mark.parametrize("log_interval", [12, 10_000], ids=["within the epoch", "at its end"])
def test_an_infinite_loss_stops_the_run_in_a_sentence(tmp_path, log_interval):
    config = DistillConfig().replace(
        optim={"lr": 1e30, "warmup_epochs": 0},
        engine={"log_interval": log_interval},
        run={"out": tmp_path / "run", "quick": True, "tensorboard": False},
    )
    with pytest.raises(DistillError, match=r'training of "teacher", epoch 1, stopped because loss .* infinite or NaN'):
        run_quietly(config)
    assert {path.name for path in (tmp_path / "run").iterdir()} == {"config.yaml"}


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
def test_a_file_is_whole_or_absent(tmp_path, error):
    path = tmp_path / "result.txt"

    def write(text, fail):
        with replacing(path) as file:
            file.write_text(text)
            if fail:
                raise error

    with pytest.raises(error):
        write("half", fail=True)
    assert not list(tmp_path.iterdir())
    write("whole", fail=False)
    with pytest.raises(error):
        write("half of a second", fail=True)
    assert [p.name for p in tmp_path.iterdir()] == ["result.txt"] and path.read_text() == "whole"
