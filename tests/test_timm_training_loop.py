"""The task in timm's own training loop: the order of calls of its train script, with its optimizer, schedule, average,
scaler, clipping, evaluator and checkpoints.

The script itself is in no wheel; its loop is written again here, and asks of the task what it asks of timm's tasks.
"""

import argparse
import contextlib
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch

pytest.importorskip("timm", reason="the trainer is built on timm (extra 'train')")

from small_vits import CLASSES, batch, one_thread, vit  # noqa: E402, F401
from timm.models import load_checkpoint  # noqa: E402
from timm.optim import create_optimizer_v2  # noqa: E402
from timm.scheduler import create_scheduler_v2  # noqa: E402
from timm.task import load_task_ema_checkpoint, resume_task_checkpoint  # noqa: E402
from timm.utils import CheckpointSaver, NativeScaler, dispatch_clip_grad  # noqa: E402
from torch import nn  # noqa: E402
from torch.nn.parallel import DistributedDataParallel  # noqa: E402

from skd.distill.task import SpectralDistillationTask  # noqa: E402

STEPS, ACCUMULATE, EPOCHS = 4, 2, 4
BF16, F16 = torch.bfloat16, torch.float16


@dataclass(frozen=True)
class Mode:
    """How the script is started."""

    name: str
    compiled: bool = False
    distributed: bool = False
    amp: torch.dtype | None = None
    clip_mode: str = "norm"

    def autocast(self):
        return contextlib.nullcontext() if self.amp is None else torch.autocast("cpu", self.amp)


PLAIN = Mode("plain")
MODES = [
    PLAIN,
    Mode("compiled and distributed", compiled=True, distributed=True),
    Mode("distributed, bfloat16, clipped by value", distributed=True, amp=BF16, clip_mode="value"),
    Mode("float16, adaptively clipped", amp=F16, clip_mode="agc"),
]


@dataclass
class Run:
    """What is left of one start of the script."""

    task: SpectralDistillationTask
    optimizer: torch.optim.Optimizer
    saver: CheckpointSaver
    losses: list = field(default_factory=list)
    rates: list = field(default_factory=list)
    metrics: list = field(default_factory=list)

    def states(self):
        """Weights and average, by their keys in a checkpoint."""
        return {**self.task.get_checkpoint_state(), **self.task.get_checkpoint_state(ema=True)}


def start_script(mode: Mode, folder: Path, epochs: int, resume: Path | None = None, student_seed: int = 0) -> Run:
    """timm's train script from the models to the last epoch, in its order."""
    student, teacher = vit(seed=student_seed, dtype=torch.float32), vit(20, 4, seed=1, dtype=torch.float32)
    criterion = nn.CrossEntropyLoss(label_smoothing=0.1)
    task = SpectralDistillationTask(student, teacher, [0, 2], [1, 3], criterion=criterion, kd_reduction="numel")
    optimizer = create_optimizer_v2(task.get_trainable_module(), opt="adamw", lr=1e-2, weight_decay=0.05)
    scaler = NativeScaler(device="cpu") if mode.amp == F16 else None
    resume_epoch = resume_task_checkpoint(task, str(resume), optimizer, scaler) if resume else None
    task.setup_ema(decay=0.8, use_warmup=True)
    if resume:
        load_task_ema_checkpoint(task, str(resume))
    if mode.compiled:
        eval_model = task.compile(backend="eager")
        assert task.get_eval_model() is eval_model
    if mode.distributed:
        task.prepare_distributed(device_ids=None)
        assert isinstance(task.trainable_module, DistributedDataParallel)

    updates_in_epoch, start = STEPS // ACCUMULATE, resume_epoch or 0
    schedule, _ = create_scheduler_v2(
        optimizer,
        sched="cosine",
        num_epochs=EPOCHS,
        warmup_epochs=1,
        warmup_lr=1e-3,
        step_on_epochs=False,
        updates_per_epoch=updates_in_epoch,
    )
    schedule.step_update(start * updates_in_epoch)
    saver = CheckpointSaver(
        task.get_trainable_module(),
        optimizer,
        args=argparse.Namespace(model="vit", clip_mode=mode.clip_mode),
        amp_scaler=scaler,
        checkpoint_dir=str(folder),
        recovery_dir=str(folder),
        max_history=2,
        task=task,
    )
    run = Run(task, optimizer, saver)
    for epoch in range(start, epochs):
        train_one_epoch(run, mode, epoch, schedule, scaler)
        run.metrics.append([validate(task, mode, ema) for ema in (False, True)])
        schedule.step(epoch + 1, run.metrics[-1][0]["top1"])
        saver.save_checkpoint(epoch, metric=run.metrics[-1][0]["top1"])
    return run


def train_one_epoch(run: Run, mode: Mode, epoch: int, schedule, scaler) -> None:
    task, optimizer = run.task, run.optimizer
    task.train()
    assert not any(module.training for module in task.teacher.modules())
    for step in range(STEPS):
        update = (step + 1) % ACCUMULATE == 0
        images, target = batch(torch.float32, seed=100 * epoch + step)
        with contextlib.nullcontext() if update else task.no_sync():
            with mode.autocast():
                result = task(images, target)
                loss = result["loss"] / ACCUMULATE
            assert result["output"].shape == (len(images), CLASSES)
            if scaler:
                scaler(
                    loss,
                    optimizer,
                    clip_grad=0.1,
                    clip_mode=mode.clip_mode,
                    parameters=task.get_clip_parameters(exclude_head=mode.clip_mode == "agc"),
                    need_update=update,
                )
            else:
                loss.backward()
                if update:
                    dispatch_clip_grad(task.get_clip_parameters(), value=0.1, mode=mode.clip_mode)
                    optimizer.step()
        run.losses.append(loss.item())
        if update:
            run.rates.append(optimizer.param_groups[0]["lr"])
            optimizer.zero_grad()
            number = epoch * STEPS // ACCUMULATE + (step + 1) // ACCUMULATE
            task.update_ema(step=number)
            schedule.step_update(num_updates=number, metric=None)


def validate(task, mode: Mode, ema: bool) -> dict:
    model = task.get_eval_model(ema=ema).eval()
    evaluator = task.create_evaluator()
    for seed in range(2):
        images, target = batch(torch.float32, seed=1000 + seed)
        with torch.inference_mode(), mode.autocast():
            output = model(images)
        evaluator.update(output, target)
    return evaluator.compute()


def assert_same(mine, expected):
    assert set(mine) == set(expected) == {"state_dict", "state_dict_ema"}
    for part in expected:
        assert list(mine[part]) == list(expected[part])
        assert all(torch.equal(mine[part][key], value) for key, value in expected[part].items()), part


@pytest.fixture
def process_group(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """Folder and run of the plain mode, from the first to the last epoch."""
    folder = tmp_path_factory.mktemp("plain")
    return folder, start_script(PLAIN, folder, EPOCHS)


@pytest.mark.parametrize("mode", MODES, ids=lambda mode: mode.name)
def test_training_interrupted_and_resumed_takes_the_same_steps(mode, plain, process_group, tmp_path):
    whole = plain[1] if mode == PLAIN else start_script(mode, tmp_path, EPOCHS)
    folder = tmp_path / "interrupted"
    folder.mkdir()
    first = start_script(mode, folder, EPOCHS // 2)
    second = start_script(mode, folder, EPOCHS, resume=folder / "last.pth.tar", student_seed=9)

    assert len(whole.losses) == EPOCHS * STEPS and len(second.losses) == EPOCHS * STEPS // 2
    assert first.losses + second.losses == whole.losses
    assert first.rates + second.rates == whole.rates and len(set(whole.rates)) > EPOCHS
    assert first.metrics + second.metrics == whole.metrics
    assert_same(second.states(), whole.states())
    assert whole.losses[-1] < whole.losses[0]
    state = whole.states()
    assert not torch.equal(state["state_dict"]["head.weight"], state["state_dict_ema"]["head.weight"])


def test_compiled_and_distributed_training_is_the_plain_one(plain, process_group, tmp_path):
    run = start_script(MODES[1], tmp_path, EPOCHS)
    expected = plain[1]
    torch.testing.assert_close(run.losses, expected.losses, rtol=1e-5, atol=0)
    assert run.rates == expected.rates
    assert list(run.states()["state_dict"]) == list(expected.states()["state_dict"])
    run.task.close()
    models = (run.task.get_eval_model(), run.task.teacher)
    assert not any(module._forward_hooks for model in models for module in model.modules()), (
        "close() takes the taps off"
    )


def test_checkpoints_are_plain_students_for_everything_else_in_timm(plain):
    folder, run = plain
    checkpoint = torch.load(folder / "last.pth.tar", weights_only=False)
    assert set(checkpoint) == {
        *("epoch", "arch", "args", "optimizer", "version", "state_dict", "state_dict_ema", "metric", "saver")
    }
    images, _ = batch(torch.float32)
    for use_ema in (False, True):
        fresh = vit(seed=7, dtype=torch.float32)
        load_checkpoint(fresh, str(folder / "last.pth.tar"), use_ema=use_ema)
        assert torch.equal(fresh.eval()(images), run.task.get_eval_model(ema=use_ema).eval()(images))
    kept = {path.name for path in folder.glob("*.tar")}
    assert {"last.pth.tar", "model_best.pth.tar"} < kept and len(kept) == 4
    best = torch.load(folder / "model_best.pth.tar", weights_only=False)
    assert best["metric"] == max(metrics["top1"] for metrics, _ in run.metrics)


def test_clipping_and_optimizer_see_the_students_parameters_alone(plain):
    _, run = plain
    student = run.task.get_eval_model()
    own = {id(p) for p in student.parameters()}
    assert {id(p) for group in run.optimizer.param_groups for p in group["params"]} == own
    assert {id(p) for p in run.task.get_clip_parameters()} == own
    head = {id(p) for p in student.head.parameters()}
    assert {id(p) for p in run.task.get_clip_parameters(exclude_head=True)} == own - head
    decayed = {group["weight_decay"] > 0: {id(p) for p in group["params"]} for group in run.optimizer.param_groups}
    assert id(student.pos_embed) in decayed[False] and id(student.blocks[0].mlp.fc1.weight) in decayed[True]
