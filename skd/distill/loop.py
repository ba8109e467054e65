"""Epochs of one timm task: train on one loader, evaluate on another."""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.task import TrainingTask
from timm.utils import random_seed

from skd.distill.config import OptimConfig
from skd.distill.data import DataSource, Loader
from skd.distill.errors import DistillError

FINITE_CHECK_STEPS = 50
_MAX_EPOCHS_PER_SEED = 10_000
_PARTS = {"train_loss": "loss", "train_ce": "ce_loss", "train_kd": "kd_loss", "train_spectral": "spectral_loss"}


@dataclass(frozen=True)
class EpochResult:
    """One row of metrics.csv, less the arm and seed. Losses are means over the epoch's steps."""

    epoch: int
    lr: float
    train_loss: float
    train_ce: float
    train_kd: float
    train_spectral: float
    test_ce: float
    test_top1: float
    test_correct: int
    seconds: float


def train(
    task: TrainingTask,
    source: DataSource,
    optim: OptimConfig,
    *,
    epochs: int,
    seed: int,
    name: str,
    on_step: Callable[[], None] = lambda: None,
    on_epoch: Callable[[EpochResult], None] = lambda result: None,
) -> list[EpochResult]:
    """Train ``task`` with warm-up and cosine decay, testing after every epoch; no epoch is picked by its test result.

    Args:
        task: on its device already.
        source: the images.
        optim: filled in; ``lr``, ``weight_decay``, ``warmup_epochs`` and ``opt`` are used.
        epochs: how many.
        seed: of order and augmentation, which are the same for every task with this seed.
        name: of the task, for an error.
        on_step: called after every step.
        on_epoch: called with every epoch's result.

    Returns:
        One result per epoch.

    Raises:
        DistillError: the loss is no longer finite, or timm does not know the optimizer.
    """
    train_loader, test_loader = source.make_train_loader(), source.make_test_loader()
    optimizer = make_optimizer(task, optim)
    scheduler, _ = create_scheduler_v2(
        optimizer,
        sched="cosine",
        num_epochs=epochs,
        warmup_epochs=min(optim.warmup_epochs, epochs - 1),
        warmup_lr=optim.lr / 100,
        min_lr=optim.lr / 100,
        step_on_epochs=False,
        updates_per_epoch=len(train_loader),
    )
    results = []
    for epoch in range(epochs):
        began = time.perf_counter()
        # The order of images and their augmentation depend on seed and epoch alone, whatever an arm drew before.
        random_seed(seed * _MAX_EPOCHS_PER_SEED + epoch)
        lr = optimizer.param_groups[0]["lr"]
        losses = _train_epoch(task, train_loader, optimizer, scheduler, epoch, f"{name}, epoch {epoch + 1}", on_step)
        test = evaluate(task, test_loader)
        result = EpochResult(epoch=epoch + 1, lr=lr, **losses, **test, seconds=time.perf_counter() - began)
        results.append(result)
        on_epoch(result)
    return results


def make_optimizer(task: TrainingTask, optim: OptimConfig) -> torch.optim.Optimizer:
    """timm's optimizer for what the task trains.

    Raises:
        DistillError: timm does not know it, or cannot make it.
    """
    try:
        return create_optimizer_v2(
            task.get_trainable_module(), opt=optim.opt, lr=optim.lr, weight_decay=optim.weight_decay
        )
    except (ValueError, TypeError, AssertionError, KeyError, ModuleNotFoundError) as error:
        raise DistillError(f"timm cannot make the optimizer --opt {optim.opt}: {error}") from error


def evaluate(task: TrainingTask, loader: Loader) -> dict:
    """Cross-entropy, top-1 in percent and the number of images recognised, of the task's eval model."""
    task.eval()
    evaluator = task.create_evaluator()
    model = task.get_eval_model()
    with torch.no_grad():
        for images, target in loader:
            evaluator.update(model(images.to(task.device)), target.to(task.device))
    summary = evaluator.compute()
    correct = round(summary["top1"] / 100 * evaluator.num_samples)
    return {"test_ce": summary["loss"], "test_top1": summary["top1"], "test_correct": correct}


def _train_epoch(task, loader: Loader, optimizer, scheduler, epoch: int, name: str, on_step) -> dict[str, float]:
    task.train()
    totals = torch.zeros(len(_PARTS), dtype=torch.float64)
    totals = totals.to(task.device)
    steps = len(loader)
    for step, (images, target) in enumerate(loader):
        images = images.to(task.device, non_blocking=True)
        target = target.to(task.device, non_blocking=True)
        result = task(images, target)
        loss = result["loss"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        scheduler.step_update(epoch * steps + step + 1)
        nothing = loss.new_zeros(())
        parts = {**result, "loss": loss, "ce_loss": result.get("ce_loss", loss)}
        totals += torch.stack([parts.get(key, nothing).detach().double() for key in _PARTS.values()])
        # Reading a number makes the host wait for a device, so it is done now and then only.
        if (step + 1) % FINITE_CHECK_STEPS == 0:
            _check_finite(totals, name)
        on_step()
    _check_finite(totals, name)
    return {key: total / steps for key, total in zip(_PARTS, totals.tolist(), strict=True)}


def _check_finite(totals: torch.Tensor, name: str) -> None:
    bad = [part for part, total in zip(_PARTS.values(), totals.tolist(), strict=True) if not math.isfinite(total)]
    if bad:
        raise DistillError(
            f"the training of {name} stopped because {' and '.join(bad)} became infinite or NaN; "
            "give a smaller --lr, or check the images"
        )
