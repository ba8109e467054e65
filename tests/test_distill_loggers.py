"""The rows of metrics.csv in TensorBoard, for real, and in Weights & Biases, by what its client is told."""

import dataclasses
import sys
import types

import pytest

pytest.importorskip("timm", reason="the trainer is built on timm (extra 'train')")

from skd.distill.config import DistillConfig  # noqa: E402
from skd.distill.errors import DistillError  # noqa: E402
from skd.distill.loggers import MetricLoggers, check_loggers  # noqa: E402


def config(**run):
    return DistillConfig().replace(run={"tensorboard": False, **run})


def row(epoch, arm="spectral", seed=0, **numbers):
    values = {"lr": 0.1, "train_loss": 2.0 / epoch, "test_top1": 10.0 * epoch, "ema_top1": None, "bad_steps": 0}
    return {"arm": arm, "seed": seed, "epoch": epoch, **values, **numbers}


@pytest.fixture
def without(monkeypatch):
    """Makes the import of a package fail."""

    def remove(package):
        for name in [name for name in sys.modules if name.partition(".")[0] == package]:
            monkeypatch.delitem(sys.modules, name)
        monkeypatch.setitem(sys.modules, package, None)

    return remove


# --- TensorBoard ---


def scalars(folder):
    """tag -> [(step, value)], as TensorBoard shows them."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder)).Reload()
    return {tag: [(e.step, round(e.value, 4)) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


@pytest.fixture
def tensorboard():
    return pytest.importorskip("tensorboard", reason="TensorBoard is an extra")


def test_tensorboard_has_a_run_per_arm_and_seed(tmp_path, tensorboard):
    loggers = MetricLoggers(tmp_path, config(tensorboard=None))
    for arm, seed in (("teacher", 0), ("labels", 0), ("labels", 1)):
        for epoch in (1, 2):
            loggers.log(row(epoch, arm, seed, ema_top1=5.0 if arm == "teacher" else None))
    loggers.close()
    folder = tmp_path / "tensorboard"
    assert sorted(path.name for path in folder.iterdir()) == ["labels-seed0", "labels-seed1", "teacher-seed0"]
    expected = {
        "lr": [(1, 0.1), (2, 0.1)],
        "train/loss": [(1, 2.0), (2, 1.0)],
        "test/top1": [(1, 10.0), (2, 20.0)],
        "bad_steps": [(1, 0.0), (2, 0.0)],
    }
    assert scalars(folder / "labels-seed1") == expected
    assert scalars(folder / "teacher-seed0") == {**expected, "ema/top1": [(1, 5.0), (2, 5.0)]}


def test_a_row_is_there_before_the_end(tmp_path, tensorboard):
    loggers = MetricLoggers(tmp_path, config(tensorboard=True))
    loggers.log(row(1))
    assert scalars(tmp_path / "tensorboard" / "spectral-seed0")["train/loss"] == [(1, 2.0)]
    loggers.close()


def test_a_run_that_goes_on_doubles_no_row(tmp_path, tensorboard):
    first = MetricLoggers(tmp_path, config(tensorboard=True))
    for epoch in (1, 2, 3):
        first.log(row(epoch))
    # Killed here, without a close; the checkpoint was of the second epoch.
    second = MetricLoggers(tmp_path, config(tensorboard=True), resume=True)
    second.open("spectral", 0, 3)
    second.log(row(3, train_loss=0.7))
    second.log(row(4, train_loss=0.6))
    second.close()
    first.close()
    shown = scalars(tmp_path / "tensorboard" / "spectral-seed0")
    assert shown["train/loss"] == [(1, 2.0), (2, 1.0), (3, 0.7), (4, 0.6)]


def test_tensorboard_is_only_missed_if_it_was_asked_for(tmp_path, without, monkeypatch):
    without("tensorboard")
    for name in [name for name in sys.modules if name.startswith("torch.utils.tensorboard")]:
        monkeypatch.delitem(sys.modules, name)
    for refuse in (check_loggers, lambda told: MetricLoggers(tmp_path, told)):
        with pytest.raises(DistillError, match="not installed: pip install tensorboard"):
            refuse(config(tensorboard=True))
    check_loggers(config(tensorboard=None))
    loggers = MetricLoggers(tmp_path, config(tensorboard=None))
    loggers.log(row(1))
    loggers.close()
    assert list(tmp_path.iterdir()) == []


def test_tensorboard_can_be_left_out(tmp_path):
    loggers = MetricLoggers(tmp_path, config(tensorboard=False))
    loggers.log(row(1))
    loggers.close()
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_written_is_told_at_the_start(tmp_path, tensorboard):
    (tmp_path / "tensorboard").write_text("a file")
    loggers = MetricLoggers(tmp_path, config(tensorboard=True))
    with pytest.raises(DistillError, match="TensorBoard cannot start .*--tensorboard False"):
        loggers.open("labels", 0, 1)


# --- Weights & Biases ---


class FakeWandb(types.ModuleType):
    """Keeps what it is told; the server's part of a resumption is in ``history``."""

    def __init__(self):
        super().__init__("wandb")
        self.inits, self.history, self.open = [], {}, None
        self.broken = None

    def init(self, **options):
        assert self.open is None, "one run at a time"
        if self.broken:
            raise self.broken
        self.inits.append(options)
        self.open = options["id"]
        return self

    def log(self, numbers, step):
        if self.broken:
            raise self.broken
        steps = self.history.setdefault(self.open, {})
        if step > max(steps, default=0):
            steps[step] = numbers

    def finish(self):
        self.open = None


@pytest.fixture
def wandb(monkeypatch):
    fake = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    return fake


def test_weights_and_biases_gets_a_run_per_arm_and_seed(tmp_path, wandb):
    told = config(wandb="my-project")
    loggers = MetricLoggers(tmp_path / "out", told)
    loggers.open("labels", 0, 1)
    for arm, seed in (("labels", 0), ("spectral", 0), ("spectral", 1)):
        loggers.log(row(1, arm, seed))
        loggers.log(row(2, arm, seed))
    loggers.close()
    assert wandb.open is None
    assert [options["name"] for options in wandb.inits] == ["labels-seed0", "spectral-seed0", "spectral-seed1"]
    assert len({options["id"] for options in wandb.inits}) == 3
    assert len({options["group"] for options in wandb.inits}) == 1
    for options in wandb.inits:
        assert options["project"] == "my-project" and options["dir"] == str(tmp_path / "out")
        assert options["config"]["loss"] == dataclasses.asdict(told.loss)
        assert "mode" not in options  # WANDB_MODE is the user's
    assert wandb.inits[2]["config"]["arm"] == "spectral" and wandb.inits[2]["config"]["seed"] == 1
    expected = {"lr": 0.1, "train/loss": 1.0, "test/top1": 20.0, "bad_steps": 0.0}
    assert wandb.history[wandb.inits[1]["id"]][2] == expected


def test_a_run_that_goes_on_is_the_same_run_there(tmp_path, wandb):
    first = MetricLoggers(tmp_path, config(wandb="p"))
    for epoch in (1, 2, 3):
        first.log(row(epoch))
    wandb.open = None  # killed
    second = MetricLoggers(tmp_path, config(wandb="p"), resume=True)
    second.log(row(3))
    second.log(row(4))
    second.close()
    (history,) = wandb.history.values()
    assert list(history) == [1, 2, 3, 4]
    assert all(options["resume"] == "allow" for options in wandb.inits)
    # Another run in a folder of that name is another run there.
    MetricLoggers(tmp_path, config(wandb="p")).open("spectral", 0, 1)
    assert wandb.inits[-1]["id"] != wandb.inits[0]["id"]


def test_weights_and_biases_that_is_not_installed_is_refused(tmp_path, without):
    without("wandb")
    for refuse in (check_loggers, lambda told: MetricLoggers(tmp_path, told)):
        with pytest.raises(DistillError, match="--wandb p needs Weights & Biases.*pip install wandb"):
            refuse(config(wandb="p"))


def test_what_is_installed_is_not_opened_by_looking_at_it(tmp_path, monkeypatch, wandb):
    monkeypatch.chdir(tmp_path)
    check_loggers(config(tensorboard=None, wandb="p"))
    assert not wandb.inits and not list(tmp_path.iterdir())


def test_weights_and_biases_that_cannot_start_is_told_before_anything_is_trained(tmp_path, wandb):
    wandb.broken = RuntimeError("no API key configured\nUse wandb login")
    loggers = MetricLoggers(tmp_path, config(wandb="p"))
    with pytest.raises(DistillError, match="cannot start .*no API key.*WANDB_MODE=offline") as caught:
        loggers.open("labels", 0, 1)
    assert "\n" not in str(caught.value)


def test_one_that_fails_later_is_given_up_and_the_other_goes_on(tmp_path, wandb, tensorboard):
    loggers = MetricLoggers(tmp_path, config(tensorboard=True, wandb="p"))
    loggers.log(row(1))
    wandb.broken = ConnectionError("the network is gone")
    with pytest.warns(RuntimeWarning, match="Weights & Biases failed and is given up: ConnectionError: the network"):
        loggers.log(row(2))
    loggers.log(row(3))
    loggers.close()
    assert [step for step, _ in scalars(tmp_path / "tensorboard" / "spectral-seed0")["train/loss"]] == [1, 2, 3]
