"""skd distill --dry-run: what it checks, measures and foretells, and that it leaves nothing behind."""

import csv
import io
import re
import shutil
import sys
import time
from collections import namedtuple
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("timm", reason="the trainer is built on timm (extra 'train')")
for name in ("sklearn", "matplotlib", "rich", "tyro", "yaml", "safetensors"):
    pytest.importorskip(name, reason="the trainer needs it (extra 'train')")

from photos import write_photos  # noqa: E402
from rich.console import Console  # noqa: E402
from small_training import make_training  # noqa: E402

from skd import cli  # noqa: E402
from skd.distill import dry_run, prepare  # noqa: E402
from skd.distill.config import DistillConfig  # noqa: E402
from skd.distill.distributed import World  # noqa: E402
from skd.distill.errors import DistillError  # noqa: E402
from skd.distill.experiment import run as train  # noqa: E402

SUFFIX = {"seconds": 1, "minutes": 60}


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path_factory, monkeypatch):
    monkeypatch.chdir(tmp_path_factory.mktemp("cwd"))


def try_out(config):
    console = Console(file=io.StringIO(), width=200)
    threads = torch.get_num_threads()
    assert dry_run.run(config, console) == 0
    assert torch.get_num_threads() == threads
    return console.file.getvalue()


def findings(text):
    """What is said before the table, by name."""
    pairs = re.findall(r"^([a-z ]+): +(.*)$", text.partition("milliseconds per step")[0], re.MULTILINE)
    assert pairs
    return dict(pairs)


def costs(text):
    """The rows of the table: numbers by name."""
    table = text.partition("milliseconds per step")[2].partition("memory:")[0]
    rows = [re.split(r"\s{2,}", line.strip()) for line in table.splitlines()]
    return {row[0]: [float(cell) for cell in row[1:]] for row in rows if len(row) > 1 and re.match(r"[\d.]", row[1])}


@pytest.fixture(scope="module")
def digits():
    return try_out(DistillConfig().replace(run={"threads": 1}))


def test_digits_are_checked(digits):
    said = findings(digits)
    assert said["data"] == "digits: 1437 training and 360 test images"
    assert said["classes"].startswith("10, ") and said["normalisation"] == "student and teacher agree"
    assert said["pairs"] == "0-0 (16<-48, 4x4), 1-2 (16<-48, 4x4), 2-3 (16<-48, 4x4)"
    assert said["parameters"] == "all get a gradient" and "test crop" not in said and "processes" not in said
    assert said["learning rate"] == "0.005 at its peak for 64 images per update, schedule by step"
    assert re.fullmatch(r"[\d.]+ MiB for checkpoints and weights, [\d.]+ [MG]iB free", said["disk"])


def test_every_part_of_a_step_of_every_training_is_measured(digits):
    rows = costs(digits)
    assert list(rows) == ["data", "teacher", "student", "loss", "optimizer", "other", "step", "images/s"]
    assert all(len(row) == 4 for row in rows.values()), "the teacher and three students"
    teacher = rows["teacher"]
    assert teacher[0] == teacher[1] == 0 < min(teacher[2:]), "no teacher is asked without soft logits"
    for step, rate in zip(rows["step"], rows["images/s"], strict=True):
        assert rate == pytest.approx(64 / (step / 1000), rel=0.02)
    assert all(cost > 0 for part in ("data", "student", "loss", "optimizer") for cost in rows[part])
    assert "an epoch has only" not in digits


def test_the_whole_run_is_foretold():
    """Seconds of the epochs of all trainings, with a test after each, twice where there is an average."""
    setup = SimpleNamespace(
        config=DistillConfig().replace(optim={"ema": 0.9}), device=torch.device("cpu"), world=World()
    )
    trials = [
        SimpleNamespace(label="teacher", runs=1, epochs=10, epoch_seconds=60.0),
        SimpleNamespace(label="spectral", runs=3, epochs=100, epoch_seconds=600.0),
    ]
    memory, whole = dry_run._projection(setup, trials, test_seconds=30.0)
    assert re.fullmatch(r"memory: [\d.]+ [GM]iB at most", memory)
    hours = (10 * (60 + 2 * 30) + 3 * 100 * (600 + 2 * 30)) / 3600
    assert f"about {hours:.1f} hours for its epochs (10 of teacher, 300 of spectral); 30.0 seconds per test" in whole


def test_a_run_takes_as_long_as_was_foretold():
    config = DistillConfig().replace(
        optim={"epochs": 4, "teacher_epochs": 4}, run={"arms": ("spectral",), "threads": 1, "tensorboard": False}
    )
    foretold = re.search(r"the whole run: about (\d+) (seconds|minutes)", try_out(config))
    seconds = int(foretold[1]) * SUFFIX[foretold[2]]
    assert train(config.replace(run={"out": Path("run")}), Console(file=io.StringIO())) == 0
    with Path("run/metrics.csv").open(newline="") as file:
        took = sum(float(row["seconds"]) for row in csv.DictReader(file))
    # Machines that test this are shared: a factor of three tells a mistake in the sum from noise.
    assert seconds / 3 < took < 3 * seconds, (seconds, took)


def test_nothing_is_written(tmp_path, capsys):
    out = tmp_path / "out" / "run"
    assert cli.main(["distill", "--dry-run", "--quick", "--arms", "spectral", "--threads", "1", "--out", str(out)]) == 0
    assert "nothing was written" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())


def test_layers_that_the_spectra_will_choose():
    said = findings(try_out(DistillConfig().replace(models={"layers": "auto"}, run={"arms": ("spectral",)})))
    assert said["pairs"].startswith("chosen by the teacher's spectra when it is ready; here in their place 0-")


def test_layers_that_no_arm_compares_are_not_looked_for():
    layers = {"student_layers": (99,), "teacher_layers": (1,)}
    config = DistillConfig().replace(models=layers, run={"arms": ("labels",), "threads": 1})
    assert findings(try_out(config))["pairs"] == "none; no arm compares maps"


@pytest.mark.parametrize(
    ("run", "sentence"),
    [
        ({"out": Path("used")}, "--out used is not empty; give a new folder"),
        ({"out": Path("used/file")}, "--out used/file is a file; give a new folder"),
        ({"out": Path("used/file/run")}, "cannot be made: .*Not a directory"),
        ({"out": Path("locked/run")}, "cannot be made: .*Permission denied"),
        ({"wandb": "project"}, "--wandb project needs Weights & Biases, which is not installed"),
    ],
)
def test_files_that_the_run_could_not_write_are_refused_before_anything_is_loaded(monkeypatch, run, sentence):
    Path("used").mkdir()
    Path("used/file").write_text("an earlier run")
    Path("locked").mkdir()
    may = dry_run.os.access
    # Root may write everywhere, so the system is not asked.
    monkeypatch.setattr(dry_run.os, "access", lambda path, mode: Path(path) != Path("locked") and may(path, mode))
    monkeypatch.setitem(sys.modules, "wandb", None)
    monkeypatch.setattr(prepare, "prepare", lambda *_: pytest.fail("something was loaded"))
    with pytest.raises(DistillError, match=sentence):
        dry_run.run(DistillConfig().replace(run=run))
    assert sorted(str(path) for path in Path().rglob("*")) == ["locked", "used", "used/file"]


def test_only_the_process_that_writes_looks_at_the_folder(monkeypatch):
    Path("used").write_text("on the disk of another machine")
    config = DistillConfig().replace(run={"out": Path("used")})
    monkeypatch.setenv("RANK", "1")
    dry_run._check_files(config)
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(DistillError, match="is a file"):
        dry_run._check_files(config)


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    return write_photos(tmp_path_factory.mktemp("photos"), train=8, val=2)


def images_config(root, **sections):
    config = DistillConfig().replace(
        data={"data": root, "image_size": 64, "batch_size": 4},
        models={"teacher": "test_vit2", "student": "test_vit", "train_teacher": True},
        optim={"epochs": 3},
        run={"arms": ("spectral",), "threads": 1, "seeds": 2},
    )
    return config.replace(**sections)


def test_images_are_checked(photos):
    text = try_out(
        images_config(
            photos,
            data={"crop_pct": 0.8, "teacher_image_size": 96},
            models={"teacher": "test_efficientnet"},
            loss={"weight": 0.0},
            optim={"accumulate": 2, "schedule": "epoch-late"},
            run={"arms": ("logits",)},
        )
    )
    said = findings(text)
    assert said["data"].endswith("24 training and 6 test images") and said["classes"].startswith("3, ")
    assert said["normalisation"] == ("the student's; images are normalised anew for the teacher, and resized to 96x96")
    assert said["test crop"] == "64 of 80 pixels (crop_pct 0.800); timm's own for this student is 0.950"
    assert re.fullmatch(r"[\d.e-]+ at its peak for 8 images per update, schedule by epoch-late", said["learning rate"])
    assert "(3 of teacher, 6 of soft logits)" in text
    # Six updates of two batches each, in which the rate counts both.
    rows = costs(text)
    assert rows["images/s"][-1] == pytest.approx(8 / (rows["step"][-1] / 1000), rel=0.02)
    # Twenty are asked for, and an epoch has three.
    below = text.partition("milliseconds per step")[2]
    assert "\nan epoch has only 3 updates, so 3 steps were taken in place of 20\n" in below


def test_one_step_is_not_called_steps():
    said = dry_run._short_epoch([SimpleNamespace(steps=1)])
    assert said == ["an epoch has only 1 update, so 1 step was taken in place of 20"]


class SlowLoader:
    """Batches that take as long to read as a step of the digits."""

    seconds = 0.01

    def __init__(self, batches):
        self.batches, self.read = batches, 0

    def __len__(self):
        return self.batches

    def __iter__(self):
        for _ in range(self.batches):
            time.sleep(self.seconds)
            self.read += 1
            yield torch.zeros(2, 1, 4, 4), torch.zeros(2, dtype=torch.int64)


@pytest.mark.parametrize(("batches", "workers", "read"), [(200, 0, 6), (200, 4, 12), (4, 0, 4), (0, 0, 0)])
def test_reading_the_test_images_takes_time(batches, workers, read):
    loader = SlowLoader(batches)
    setup = SimpleNamespace(
        config=DistillConfig().replace(data={"workers": workers}),
        device=torch.device("cpu"),
        world=World(),
        source=SimpleNamespace(make_test_loader=lambda world: loader),
        build_student=lambda: torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(16, 3)),
    )
    seconds = dry_run._test_seconds(setup)
    assert loader.read == read, "a few are enough"
    assert seconds >= batches * loader.seconds
    assert seconds < 3 * batches * loader.seconds + 0.1


def test_processes_that_load_the_test_images_start_and_end(photos):
    text = try_out(images_config(photos, data={"workers": 2, "batch_size": 2}))
    assert re.search(r"; \d+\.\d seconds per test", text)


def test_parameters_without_a_gradient_are_named(photos, monkeypatch):
    from timm.models.vision_transformer import VisionTransformer

    init = VisionTransformer.__init__

    def with_a_spare(self, *args, **kwargs):
        init(self, *args, **kwargs)
        self.spare = torch.nn.Parameter(torch.zeros(3))

    monkeypatch.setattr(VisionTransformer, "__init__", with_a_spare)
    assert findings(try_out(images_config(photos)))["parameters"] == "without a gradient: spare"


def test_a_disk_without_room_is_refused(tmp_path, monkeypatch):
    Usage = namedtuple("Usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: Usage(2**30, 2**30 - 1000, 1000))
    config = DistillConfig().replace(run={"out": tmp_path / "not" / "yet"})
    with pytest.raises(DistillError, match=rf"{tmp_path} has 0.0 MiB free, and .* take [\d.]+ MiB; make room or give"):
        try_out(config)


def test_the_moving_average_takes_room():
    def size(**optim):
        text = findings(try_out(DistillConfig().replace(optim=optim, run={"arms": ("labels",), "threads": 1})))["disk"]
        return float(text.partition(" MiB")[0])

    assert size(ema=0.9) > size()


@pytest.mark.parametrize(
    ("sections", "sentence"),
    [
        ({"models": {"student_layers": (0,), "teacher_layers": (99,)}}, "no layer 99"),
        ({"models": {"train_teacher": False}}, "1000 classes, the data has 3"),
        ({"data": {"batch_size": 100}}, "24 images, fewer than one batch of 100"),
        ({"optim": {"epochs": 1, "warmup_epochs": 3}}, "--warmup-epochs is 3, .* 0 to 0, fewer than --epochs 1$"),
        ({"optim": {"accumulate": 7}}, "6 batches per process, fewer than --accumulate 7"),
        ({"optim": {"lr": 1e30}, "engine": {"max_bad_steps": 2}}, "infinite or NaN"),
    ],
)
def test_what_would_end_the_run_ends_the_trial(photos, sections, sentence):
    with pytest.raises(DistillError, match=sentence):
        try_out(images_config(photos, **sections))


class Drifted(World):
    """Another process has other weights."""

    def gathered(self, value):
        return [value, value * (1 + 1e-12)] if isinstance(value, float) else [value]


def test_processes_that_drift_apart_are_noticed():
    training = make_training()
    dry_run._check_agreement(training)
    training.world = Drifted()
    with pytest.raises(DistillError, match="after 20 steps the processes have different weights"):
        dry_run._check_agreement(training)
