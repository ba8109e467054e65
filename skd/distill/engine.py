"""One training from its first step to its last, resumable at any of them."""

import math
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Protocol

import torch
from timm.task import TrainingTask
from timm.utils import distribute_bn
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from skd.distill.config import DistillConfig
from skd.distill.costs import CostMeter
from skd.distill.data import DataSource
from skd.distill.distributed import World, is_connection_error
from skd.distill.errors import DistillError, first_line
from skd.distill.interruption import Stopped, StopRequest
from skd.distill.seeds import seed_everything
from skd.distill.testing import TestResult, evaluate
from skd.distill.updates import Updates

PARTS = {"train_loss": "loss", "train_ce": "ce_loss", "train_kd": "kd_loss", "train_spectral": "spectral_loss"}
"""Columns of metrics.csv and what a task calls them."""

COST_STEPS = 25
"""Every how many steps one is taken apart into its costs."""

STOP_SECONDS = 1.0
"""How often several processes ask each other whether one was told to stop: torchrun kills them after half a minute."""


@dataclass(frozen=True)
class EpochResult:
    """One row of metrics.csv, less the arm and seed. Losses are means over the epoch's steps that were not skipped."""

    epoch: int
    lr: float
    train_loss: float
    train_ce: float
    train_kd: float
    train_spectral: float
    test_ce: float
    test_top1: float
    test_correct: int
    test_images: int
    ema_top1: float | None
    bad_steps: int
    images_per_second: float
    seconds: float


class Watcher(Protocol):
    """What a training tells of itself, and whom it asks to save it."""

    stop: StopRequest

    def stepped(self) -> None:
        """After every step; must not touch the device."""

    def read(self, losses: dict[str, float], images_per_second: float) -> None:
        """Means of the epoch so far, every ``log_interval`` steps."""

    def epoch_ended(self, result: EpochResult) -> None: ...

    def save_if_due(self) -> None: ...

    def save(self) -> None: ...


class Training:
    """A task that is trained on a source of images, with warm-up and decay, and tested after every epoch.

    Every draw of random numbers depends on seed, epoch, step and process alone, so that going on from
    :meth:`state_dict` gives on a CPU the weights and results, bit by bit, of a training that never stopped.

    Args:
        task: a timm task with its model on the device of ``world``.
        source: the images.
        config: filled in; its sections ``optim`` and ``engine`` are used.
        world: the processes that share the work.
        epochs: how many.
        seed: of order, augmentation and dropout.
        label: of the task, for an error.
        unused: whether some parameters of the student get no gradient.
    """

    def __init__(
        self,
        task: TrainingTask,
        source: DataSource,
        config: DistillConfig,
        world: World,
        *,
        epochs: int,
        seed: int,
        label: str,
        unused: bool = False,
    ):
        self.task, self.source, self.config, self.world = task, source, config, world
        self.epochs, self.seed, self.label = epochs, seed, label
        self.train_loader, self.test_loader = source.make_train_loader(world), source.make_test_loader(world)
        engine, optim = config.engine, config.optim
        self.updates_in_epoch = len(self.train_loader) // optim.accumulate
        if self.updates_in_epoch == 0:
            raise DistillError(
                f"an epoch has {len(self.train_loader)} batches per process, fewer than --accumulate "
                f"{optim.accumulate}; give a smaller one, or a smaller --batch-size"
            )
        self._format = torch.channels_last if engine.channels_last else torch.preserve_format
        if engine.channels_last:
            task.to(memory_format=torch.channels_last)
        # timm's order: optimizer, average, compile, processes.
        self.updates = Updates(task, optim, engine, world, epochs=epochs, updates_per_epoch=self.updates_in_epoch)
        if optim.ema is not None:
            task.setup_ema(decay=optim.ema)
        if engine.compile:
            task.compile()
        if world.size > 1:
            devices = [world.device.index] if world.device.type == "cuda" else None
            task.prepare_distributed(device_ids=devices, find_unused_parameters=unused)
        self.costs = CostMeter(task, world.device)
        self.results: list[EpochResult] = []
        self.epoch = self.step = self.images = 0
        self.seconds = 0.0
        # Sums on the device: read only now and then, because reading makes the host wait.
        self._losses = torch.zeros(len(PARTS), dtype=torch.float64, device=world.device)
        self._last_bad = self._losses.clone()
        self._bad = torch.zeros(3, dtype=torch.int64, device=world.device)  # in the epoch, in a row, longest row

    @property
    def total_steps(self) -> int:
        return self.epochs * self.updates_in_epoch

    @property
    def done_steps(self) -> int:
        return self.epoch * self.updates_in_epoch + self.step

    def run(self, watcher: Watcher) -> list[EpochResult]:
        """Train to the end.

        Returns:
            The results of all epochs, those before a resumption included.

        Raises:
            Stopped: on request, after ``watcher.save()``.
            DistillError: too many updates in a row were not finite, or another process was lost.
        """
        try:
            while self.epoch < self.epochs:
                self._train_epoch(watcher)
                self._end_epoch(watcher)
        except RuntimeError as error:
            self._give_up(error, watcher)
        return self.results

    def try_steps(self, steps: int) -> list[float]:
        """Make a few updates, all taken apart into their costs, and forget where the training is.

        Returns:
            Seconds of each, fewer than asked for if the epoch has fewer; the first ones compile and allocate.
        """
        self.task.train()
        batches = self.train_loader.epoch(self.seed, 0)
        seconds = []
        steps = min(steps, self.updates_in_epoch)
        for _ in range(steps):
            began = time.perf_counter()
            with self.costs.step(measured=len(seconds) >= steps // 4):
                self._update(batches)
            if self.world.device.type == "cuda":
                torch.cuda.synchronize(self.world.device)
            seconds.append(time.perf_counter() - began)
        self._check_bad()
        return seconds

    def state_dict(self) -> dict:
        """All that :meth:`load_state_dict` needs; the same in every process, so any one can be asked."""
        return {
            "epoch": self.epoch,
            "step": self.step,
            "images": self.images,
            "seconds": self.seconds,
            "losses": self._losses.cpu(),
            "bad": self._bad.cpu(),
            "results": [asdict(result) for result in self.results],
            "best": max((result.test_top1 for result in self.results), default=None),
            "costs": self.costs.state_dict(),
            "updates": self.updates.state_dict(),
            "model": self.task.get_checkpoint_state(),
            "ema": self.task.get_checkpoint_state(ema=True) if self.task.has_ema() else None,
        }

    def load_state_dict(self, state: dict) -> None:
        """Go on from there."""
        self.epoch, self.step, self.images = state["epoch"], state["step"], state["images"]
        self.seconds = state["seconds"]
        # Of the first process, and so for the rest of the epoch the means of several are a little off.
        self._losses.copy_(state["losses"])
        self._bad.copy_(state["bad"])
        self._bad[1:] = 0  # who goes on has mended what was wrong
        self.results = [EpochResult(**result) for result in state["results"]]
        self.costs.load_state_dict(state["costs"])
        self.updates.load_state_dict(state["updates"])
        self.task.load_checkpoint_state(state["model"]["state_dict"])
        if state["ema"] is not None:
            self.task.load_checkpoint_state(state["ema"]["state_dict_ema"], ema=True)

    def _train_epoch(self, watcher: Watcher) -> None:
        self.task.train()
        self._images_before, self._began = self.images, time.perf_counter()
        self._asked = self._ask_at = self.step
        self._asked_when = self._began
        first = self.step * self.config.optim.accumulate
        middle = min(COST_STEPS, self.updates_in_epoch) // 2
        batches = self.train_loader.epoch(self.seed, self.epoch, start=first)
        try:
            while self.step < self.updates_in_epoch:
                with self.costs.step(measured=self.step % COST_STEPS == middle):
                    self._update(batches)
                watcher.stepped()
                if self.step % self.config.engine.log_interval == 0:
                    self._read(watcher)
                self._stop_if_asked(watcher)
                watcher.save_if_due()
        finally:
            close = getattr(batches, "close", None)
            if close is not None:
                close()
        if self.step % self.config.engine.log_interval:
            self._read(watcher)

    def _update(self, batches: Iterator[tuple[Tensor, Tensor]]) -> None:
        """One update of the weights from ``accumulate`` batches."""
        updates, accumulate = self.updates, self.config.optim.accumulate
        updates.begin(self.epoch, self.step)
        seed_everything("step", self.seed, self.epoch, self.step, self.world.rank)
        losses = torch.zeros_like(self._losses)
        images_seen = 0
        for micro in range(accumulate):
            with self.costs.part("data"):
                images, target = next(batches)
                images = images.to(self.world.device, non_blocking=True, memory_format=self._format)
                target = target.to(self.world.device, non_blocking=True)
            images_seen += len(images)
            if micro + 1 < accumulate:
                with self.task.no_sync():
                    losses += self._backward(images, target)
            else:
                losses += self._backward(images, target)
        with self.costs.part("optimizer"):
            bad = updates.apply(~losses.isfinite().all())
        losses /= accumulate
        self._losses += torch.where(bad, torch.zeros_like(losses), losses)
        self._last_bad = torch.where(bad, losses, self._last_bad)
        in_row = (self._bad[1] + 1) * bad
        self._bad = torch.stack([self._bad[0] + bad, in_row, torch.maximum(self._bad[2], in_row)])
        self.images += images_seen * self.world.size
        self.step += 1

    def _backward(self, images: Tensor, target: Tensor) -> Tensor:
        with self.updates.autocast():
            result = self.task(images, target)
        loss = result["loss"]
        with self.costs.part("student"):
            self.updates.backward(loss)
        nothing = loss.new_zeros(())
        parts = {**result, "ce_loss": result.get("ce_loss", loss)}
        return torch.stack([parts.get(key, nothing).detach().double() for key in PARTS.values()])

    def _read(self, watcher: Watcher) -> None:
        """Wait for the device, and for the other processes: what is wrong, all see at once."""
        self._check_bad()
        self._share_bad_images()
        means = self._means()
        elapsed = max(time.perf_counter() - self._began, 1e-9)
        watcher.read(means, (self.images - self._images_before) / elapsed)

    def _stop_if_asked(self, watcher: Watcher) -> None:
        """At the next step; several processes stop at the same one, and ask each other about once in a second."""
        if self.world.size == 1:
            if watcher.stop.signum:
                self._stop(watcher, watcher.stop.signum)
        elif self.step > self._ask_at:
            now = time.perf_counter()
            step_seconds = (now - self._asked_when) / (self.step - self._asked)
            signum, step_seconds = self.world.largest_of([float(watcher.stop.signum), step_seconds])
            if signum:
                self._stop(watcher, int(signum))
            steps = int(STOP_SECONDS / max(step_seconds, 1e-9))
            self._asked, self._asked_when = self.step, now
            self._ask_at = self.step - 1 + min(max(steps, 1), self.config.engine.log_interval)

    def _means(self) -> dict[str, float]:
        """Over the images of all processes."""
        good = max(self.step - int(self._bad[0]), 1) * self.world.size
        totals = self.world.total(self._losses.clone()).tolist()
        return {name: total / good for name, total in zip(PARTS, totals, strict=True)}

    def _check_bad(self) -> None:
        allowed, longest = self.config.engine.max_bad_steps, int(self._bad[2])
        if longest < allowed:
            return
        names = [
            part for part, loss in zip(PARTS.values(), self._last_bad.tolist(), strict=True) if not math.isfinite(loss)
        ]
        what = " and ".join(names) or "the gradient"
        raise DistillError(
            f"the training of {self.label}, epoch {self.epoch + 1}, stopped because {what} became infinite or NaN in "
            f"{longest} updates in a row, which were skipped; start again with a smaller --lr, or mend the images and "
            "--resume"
        )

    def _share_bad_images(self) -> None:
        """Every process knows its own; all of them count, and together they may be too many."""
        bad_images = self.source.bad_images
        for found in self.world.gathered(dict(bad_images.found)):
            bad_images.add(found)

    def _stop(self, watcher: Watcher, signum: int) -> None:
        self._keep_time()
        watcher.save()
        raise Stopped(signum)

    def _give_up(self, error: RuntimeError, watcher: Watcher) -> None:
        """What another process did to this one is no defect; any other error is raised again."""
        reason = first_line(error)
        if is_connection_error(error):
            # It shows as an error of whatever collective the others are in.
            what = f"the other processes of the training of {self.label} no longer answer"
        elif reason.startswith("DataLoader worker"):
            what = f"a loader process of the training of {self.label} was ended, perhaps for lack of memory"
        else:
            raise error
        # Weights are whole: every collective of an update comes before the optimizer.
        self._keep_time()
        watcher.save()
        raise DistillError(f"{what} ({reason}); the run can go on with --resume") from error

    def _keep_time(self) -> None:
        now = time.perf_counter()
        self.seconds, self._began = self.seconds + now - self._began, now

    def _end_epoch(self, watcher: Watcher) -> None:
        training_seconds = self.seconds + time.perf_counter() - self._began
        lr = self._rate_of_epoch()
        test, average = self._test(watcher), self._test_average(watcher)
        self._share_bad_images()
        self._keep_time()
        result = EpochResult(
            epoch=self.epoch + 1,
            lr=lr,
            **self._means(),
            test_ce=test.ce,
            test_top1=test.top1,
            test_correct=test.correct,
            test_images=test.images,
            ema_top1=None if average is None else average.top1,
            bad_steps=int(self._bad[0]),
            images_per_second=self.images / max(training_seconds, 1e-9),
            seconds=self.seconds,
        )
        self.results.append(result)
        self.epoch, self.step, self.images, self.seconds = self.epoch + 1, 0, 0, 0.0
        self._began = time.perf_counter()
        self._losses.zero_()
        self._bad[0] = 0
        watcher.epoch_ended(result)
        watcher.save()
        if self.world.size == 1 and watcher.stop.signum:
            raise Stopped(watcher.stop.signum)

    def _rate_of_epoch(self) -> float:
        self.updates.begin(self.epoch, 0)
        return self.updates.lr

    def _test(self, watcher: Watcher, *, average: bool = False) -> TestResult:
        model = self.task.get_eval_model(ema=average)
        if isinstance(model, DistributedDataParallel):
            model = model.module  # processes may have different numbers of test batches
        if self.world.size > 1:
            self._average_batch_norms(model)
        return evaluate(model, self._test_batches(watcher), self.world, self.updates.autocast())

    def _test_batches(self, watcher: Watcher) -> Iterator[tuple[Tensor, Tensor]]:
        """A test may take minutes, and who asked the run to stop may not wait for so long."""
        saved = False
        for batch in self.test_loader:
            if watcher.stop.signum and self.world.size == 1:
                self._stop(watcher, watcher.stop.signum)
            if watcher.stop.signum and not saved:
                # The others may not know of it, and stop with this one after the test.
                self._keep_time()
                watcher.save()
                saved = True
            yield batch

    def _average_batch_norms(self, model: nn.Module) -> None:
        """All or none: a checkpoint is written if a process is lost meanwhile."""
        before = {name: buffer.clone() for name, buffer in model.named_buffers()}
        try:
            distribute_bn(model, self.world.size, reduce=True)
        except RuntimeError:
            for name, buffer in model.named_buffers():
                buffer.copy_(before[name])
            raise

    def _test_average(self, watcher: Watcher) -> TestResult | None:
        return self._test(watcher, average=True) if self.task.has_ema() else None
