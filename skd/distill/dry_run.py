"""``skd distill --dry-run``: everything that can be known before the long run, in a minute or so."""

import itertools
import math
import os
import resource
import shutil
import statistics
import sys
import time
from pathlib import Path

import torch
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table
from timm.task import ClassificationTask
from torch import nn

from skd.distill import models
from skd.distill.arms import Arm, make_arms
from skd.distill.config import DistillConfig
from skd.distill.costs import PARTS
from skd.distill.engine import Training
from skd.distill.errors import DistillError
from skd.distill.prepare import Setup, prepared
from skd.distill.run_folder import check_out
from skd.distill.testing import evaluate
from skd.distill.updates import autocast
from skd.features import FeatureTap

STEPS = 20
_TEST_BATCHES = 5
_CHECKPOINT_COPIES = 2


def run(config: DistillConfig, console: Console | None = None) -> int:
    """Check what a run needs, take :data:`STEPS` steps of every training, and print what to expect; writes no file.

    Args:
        config: of the run.
        console: where to print; default standard output.

    Returns:
        0.

    Raises:
        DistillError: something does not go together, in one sentence.
    """
    _check_files(config)
    with prepared(config, console) as (setup, console):
        _run(setup, console)
    return 0


def _check_files(config: DistillConfig) -> None:
    """What the run will write must be possible, in the process that writes it; another's disk may be another."""
    if os.environ.get("RANK", "0") != "0":
        return
    if config.run.resume is None:
        check_out(config.run.out)


def _run(setup: Setup, console: Console) -> None:
    teacher = setup.build_teacher()
    chosen_later = not setup.has_layers
    if chosen_later:
        student = setup.student.build()
        setup = setup.with_layers(*models.default_layer_pairs(student, teacher))
    for name, finding in _checks(setup, teacher, chosen_later):
        console.print(f"{name + ':':<16}{finding}", soft_wrap=True, highlight=False, markup=False)
    trials = [_try_teacher(setup, teacher)] if setup.trains_teacher else []
    trials += [_try_student(setup, teacher, arm) for arm in make_arms(setup.config)]
    test_seconds = _test_seconds(setup)
    console.print(_table(trials))
    for line in _short_epoch(trials) + _projection(setup, trials, test_seconds):
        console.print(line, soft_wrap=True, highlight=False, markup=False)


class _Trial:
    """A few steps of one training."""

    def __init__(self, label: str, training: Training, epochs: int, runs: int):
        self.label, self.epochs, self.runs = label, epochs, runs
        seconds = training.try_steps(STEPS)
        self.steps = len(seconds)
        self.step_seconds = statistics.median(seconds[self.steps // 4 :])
        self.costs = training.costs.mean()
        self.updates_in_epoch = training.updates_in_epoch
        self.images = training.images / self.steps
        if training.world.size > 1:
            _check_agreement(training)

    @property
    def images_per_second(self) -> float:
        return self.images / self.step_seconds

    @property
    def epoch_seconds(self) -> float:
        return self.updates_in_epoch * self.step_seconds


def _try_teacher(setup: Setup, teacher: nn.Module) -> _Trial:
    task = ClassificationTask(teacher, setup.make_criterion(), device=setup.device, verbose=False)
    with setup.teacher_images(teacher).before(teacher):
        training = _training(setup, task, setup.config.optim.teacher_epochs, setup.teacher_unused)
        return _Trial("teacher", training, *_lengths(setup, True))


def _try_student(setup: Setup, teacher: nn.Module, arm: Arm) -> _Trial:
    task = setup.make_task(setup.build_student(), teacher, arm).to(setup.device)
    trial = _Trial(
        arm.label, _training(setup, task, setup.config.optim.epochs, bool(setup.unused)), *_lengths(setup, False)
    )
    task.close()
    return trial


def _training(setup: Setup, task, epochs: int, unused: bool) -> Training:
    seed = setup.config.run.seed
    return Training(
        task, setup.source, setup.config, setup.world, epochs=epochs, seed=seed, label="the dry run",
        unused=unused,
    )  # fmt: skip


def _lengths(setup: Setup, teacher: bool) -> tuple[int, int]:
    """Epochs of a training, and how many trainings of its kind there are."""
    optim = setup.config.optim
    return (optim.teacher_epochs, 1) if teacher else (optim.epochs, setup.config.run.seeds)


def _check_agreement(training: Training) -> None:
    """After the same updates every process must have the same weights."""
    weights = sum(float(p.detach().double().abs().sum()) for p in training.task.get_eval_model().parameters())
    found = training.world.gathered(weights)
    if len(set(found)) > 1:
        raise DistillError(
            f"after {STEPS} steps the processes have different weights (sums of absolute values {found}); "
            "do not start this run, and please report it with the output of skd env"
        )


def _checks(setup: Setup, teacher: nn.Module, chosen_later: bool) -> list[tuple[str, str]]:
    source, config = setup.source, setup.config
    student = setup.build_student()
    checks = [
        ("data", f"{source.name}: {source.train_images} training and {source.test_images} test images"),
        ("classes", f"{len(source.classes)}, the same for data, teacher and student"),
        ("student", setup.student.title),
        ("teacher", setup.teacher.title),
        ("pairs", _pairs(setup, student, teacher, chosen_later)),
        ("normalisation", _normalisation(setup, teacher)),
    ]
    if config.task == "images":
        checks.append(("test crop", _crop(setup)))
    unused = ", ".join(setup.unused[:5]) + (", ..." if len(setup.unused) > 5 else "")
    checks.append(("parameters", f"without a gradient: {unused}" if setup.unused else "all get a gradient"))
    checks.append(("learning rate", _rate(setup)))
    checks.append(("disk", _disk(setup, student)))
    if setup.world.size > 1:
        checks.append(("processes", f"{setup.world.size}; their weights are compared after {STEPS} steps"))
    return checks


def _pairs(setup: Setup, student: nn.Module, teacher: nn.Module, chosen_later: bool) -> str:
    chosen = setup.config.models
    if not any(arm.weight > 0 for arm in make_arms(setup.config)):
        return "none; no arm compares maps"
    images = torch.zeros(
        1, setup.source.in_chans, setup.source.image_size, setup.source.image_size, device=setup.device
    )
    with torch.no_grad():
        with FeatureTap(student.eval(), chosen.student_layers) as tap:
            _, student_maps = tap(images)
        with FeatureTap(teacher.eval(), chosen.teacher_layers) as tap:
            _, teacher_maps = tap(setup.teacher_images(teacher)(images))
    both = zip(chosen.student_layers, chosen.teacher_layers, student_maps, teacher_maps, strict=True)
    shown = ", ".join(f"{i}-{j} ({s.shape[1]}<-{t.shape[1]}, {s.shape[2]}x{s.shape[3]})" for i, j, s, t in both)
    return f"chosen by the teacher's spectra when it is ready; here in their place {shown}" if chosen_later else shown


def _normalisation(setup: Setup, teacher: nn.Module) -> str:
    view = setup.teacher_images(teacher)
    resized = f", and resized to {view.size[0]}x{view.size[1]}" if view.size is not None else ""
    if view.renormalises:
        return f"the student's; images are normalised anew for the teacher{resized}"
    return f"student and teacher agree{resized}"


def _crop(setup: Setup) -> str:
    data, cfg = setup.config.data, models.pretrained_cfg(setup.config.models.student)
    share, own = data.crop_pct or cfg.crop_pct, cfg.crop_pct
    text = f"{data.image_size} of {math.floor(data.image_size / share)} pixels (crop_pct {share:.3f})"
    return text if share == own else f"{text}; timm's own for this student is {own:.3f}"


def _rate(setup: Setup) -> str:
    optim = setup.config.optim
    images = setup.config.data.batch_size * setup.world.size * optim.accumulate
    return f"{optim.lr:.3g} at its peak for {images} images per update, schedule by {optim.schedule}"


def _disk(setup: Setup, student: nn.Module) -> str:
    """Adam keeps two numbers per parameter; the average is one more, and the exported weights another."""
    weights = sum(x.numel() * x.element_size() for x in student.state_dict().values())
    copies = 3 + (setup.config.optim.ema is not None)
    needed = weights * (_CHECKPOINT_COPIES * copies + 2) + weights * copies  # a new one while the old ones are kept
    folder = setup.config.run.out or Path("runs")
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise DistillError(
            f"{folder.resolve()} has {_size(free)} free, and checkpoints and weights take {_size(needed)}; "
            "make room or give another --out"
        )
    return f"{_size(needed)} for checkpoints and weights, {_size(free)} free"


def _test_seconds(setup: Setup) -> float:
    """Of one pass of the student over this process's test images, from a few batches."""
    loader = setup.source.make_test_loader(setup.world)
    batches, model = iter(loader), setup.build_student()

    def seconds(count: int) -> float:
        """Of reading and testing the next batches."""
        began = time.perf_counter()
        precision = autocast(setup.config.engine.amp, setup.device)
        evaluate(model, itertools.islice(batches, count), setup.world, precision)
        return time.perf_counter() - began

    # Loader processes bring as many batches at a time as there are of them, the first ones after they have started.
    at_once = max(1, setup.config.data.workers)
    counted = max(_TEST_BATCHES, 2 * at_once)
    begin, then = seconds(at_once), seconds(counted)
    return begin + then if len(loader) <= at_once + counted else then * len(loader) / counted


def _table(trials: list[_Trial]) -> Table:
    table = Table(title="milliseconds per step", title_justify="left", box=SIMPLE)
    table.add_column("")
    for trial in trials:
        table.add_column(trial.label, justify="right")
    for part in PARTS:
        table.add_row(part, *(f"{1000 * trial.costs[part]:.1f}" for trial in trials))
    table.add_row("step", *(f"{1000 * trial.step_seconds:.1f}" for trial in trials), style="bold")
    table.add_row("images/s", *(f"{trial.images_per_second:.3g}" for trial in trials), style="bold")
    return table


def _short_epoch(trials: list[_Trial]) -> list[str]:
    """A sentence if an epoch has fewer updates than steps were wanted; it has as many in every training."""
    found = min(trial.steps for trial in trials)
    if found >= STEPS:
        return []
    updates, steps = ("update", "step was") if found == 1 else ("updates", "steps were")
    return [f"an epoch has only {found} {updates}, so {found} {steps} taken in place of {STEPS}"]


def _projection(setup: Setup, trials: list[_Trial], test_seconds: float) -> list[str]:
    tests = 1 + (setup.config.optim.ema is not None)
    seconds = sum(trial.runs * trial.epochs * (trial.epoch_seconds + tests * test_seconds) for trial in trials)
    if setup.device.type == "cuda":
        memory = f"{_size(torch.cuda.max_memory_allocated(setup.device))} of the device at most"
    else:
        unit = 1 if sys.platform == "darwin" else 1024
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
        memory = f"{_size(peak)} at most"
    epochs = ", ".join(f"{trial.runs * trial.epochs} of {trial.label}" for trial in trials)
    return [
        f"memory: {memory}",
        f"the whole run: about {_duration(seconds)} for its epochs ({epochs}); "
        f"{test_seconds:.1f} seconds per test; nothing was written and nothing is kept",
    ]


def _size(amount: float) -> str:
    return f"{amount / 2**30:.1f} GiB" if amount >= 2**30 else f"{amount / 2**20:.1f} MiB"


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} seconds"
    return f"{seconds / 60:.0f} minutes" if seconds < 7200 else f"{seconds / 3600:.1f} hours"
