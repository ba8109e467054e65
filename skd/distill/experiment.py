"""One run of the comparison: the teacher, the arms, the report."""

import errno
import signal
import sys
from dataclasses import asdict, replace

from rich.console import Console
from timm.task import ClassificationTask, TrainingTask
from timm.utils import random_seed
from torch import nn

from skd.analysis.layers_file import LAYERS_FILE, write_layers
from skd.distill import curves, dynamics_plots, html_report, layer_choice, report, summary
from skd.distill.arms import Arm, make_arms
from skd.distill.checkpoint import Checkpoints
from skd.distill.config import DistillConfig
from skd.distill.distributed import World, is_connection_error
from skd.distill.dynamics import COLUMNS as DYNAMICS
from skd.distill.dynamics import Dynamics
from skd.distill.engine import PARTS, EpochResult, Training
from skd.distill.errors import DistillError, first_line
from skd.distill.interruption import Stopped, StopRequest
from skd.distill.ledger import Entry, Ledger
from skd.distill.loggers import MetricLoggers
from skd.distill.models import load_checkpoint
from skd.distill.prepare import Setup, prepared
from skd.distill.probe import probe_images
from skd.distill.progress import RunProgress
from skd.distill.resume import OpenedRun, open_run
from skd.distill.run_folder import RunFolder
from skd.distill.summary import AVERAGE_FILE, STUDENT_FILE, TEACHER_FILE
from skd.distill.testing import evaluate
from skd.distill.updates import autocast
from skd.files import replacing

TEACHER = "teacher"
METRICS = ("arm", "seed", *EpochResult.__dataclass_fields__)
_PASS_COST = 50_000  # in parameters
_DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM)


def run(config: DistillConfig, console: Console | None = None) -> int:
    """Compare the arms and write config.yaml, metrics.csv, summary.json, the pictures, the report and the weights.

    Args:
        config: what to run.
        console: where progress and report go; default standard output.

    Returns:
        0, or 128 + the signal (130 after Ctrl-C, 143 after SIGTERM); then there is a checkpoint to go on from.

    Raises:
        DistillError: something the user can mend, in one sentence.
    """
    folder = None
    try:
        with prepared(config, console) as (setup, console):
            opened = _open(setup.config, setup.world)
            folder = opened.folder if opened else None
            with StopRequest() as stop:
                Experiment(setup, opened, console, stop).run()
    except Stopped as stopped:
        name = signal.Signals(stopped.signum).name
        if folder is not None:
            print(f"Stopped by {name}; go on with: skd distill --resume {folder.path}", file=sys.stderr)
        return 128 + stopped.signum
    except OSError as error:
        if folder is not None and not folder.path.is_dir():
            raise DistillError(
                f"{folder.path}, the folder of the run, has gone while it was used; start again"
            ) from error
        if error.errno not in _DISK_ERRORS:
            raise
        kept = folder is not None and Checkpoints(folder.path).exist()
        done = f"go on with --resume {folder.path}" if kept else "start again"
        raise DistillError(
            f"a file could not be read or written ({error}); make room or mend the permissions, then {done}"
        ) from error
    except RuntimeError as error:
        # Within a training, its state has been saved and the sentence says which.
        if not is_connection_error(error):
            raise
        raise DistillError(
            f"the other processes no longer answer ({first_line(error)}); the run can go on with --resume"
        ) from error
    finally:
        if folder is not None:
            folder.tidy()
    return 0


def _open(config: DistillConfig, world: World) -> OpenedRun | None:
    """The run's folder, in the main process; what is wrong with it ends all of them, and one says it."""
    opened, problem = None, None
    if world.is_main:
        try:
            opened = open_run(config, world.size)
        except DistillError as error:
            problem = error
    if world.shared(problem is not None):
        raise problem or SystemExit(2)
    return opened


class Experiment:
    """The state of one run in one process.

    Args:
        setup: data, models and processes.
        opened: the folder, and the checkpoint to go on from; None in the processes that do not write.
        console: for progress and report.
        stop: whether to end early.
    """

    def __init__(self, setup: Setup, opened: OpenedRun | None, console: Console, stop: StopRequest):
        self.setup, self.console, self.stop = setup, console, stop
        self.world: World = setup.world
        self.folder: RunFolder | None = opened.folder if opened else None
        self.arms = make_arms(self.config)
        setup.source.bad_images.tell = self._say
        checkpoints = Checkpoints(self.folder.path) if self.folder else None
        minutes = self.config.run.checkpoint_minutes
        self.ledger = Ledger(checkpoints, self.config.to_dict(), self.world.size, minutes)
        # Only the main process reads the checkpoint, which may be on a disk of its own.
        state, note = self.world.shared((opened.state, opened.note) if opened else None)
        if note:
            self._say(note)
        if state is not None:
            self.ledger.load_state_dict(state)
        self.resumed = state is not None

    @property
    def config(self) -> DistillConfig:
        return self.setup.config

    def run(self) -> None:
        random_seed(self.config.run.seed)
        teacher = self.setup.build_teacher()
        self._write_config()
        self._say(summary.opening(self.setup))
        self.loggers = self._make_loggers()
        try:
            teacher_result = self._train_all(teacher)
        finally:
            if self.loggers is not None:
                self.loggers.close()
        if self.world.is_main:
            self._report(teacher_result)
        self.world.wait()

    def _train_all(self, teacher: nn.Module) -> report.ArmResult:
        total, done = self._costs_of_run(teacher)
        speaks = self.world.is_main
        with RunProgress(self.console, total, completed=done, enabled=speaks) as self.progress:
            # What the teacher does alone, it does with images that were made for the student.
            with self.setup.teacher_images(teacher).before(teacher):
                teacher_result = self._teacher(teacher)
                if not self.setup.has_layers:
                    self._choose_layers(teacher)
            self._observe_from(teacher)
            for seed in self._seeds():
                for arm in self.arms:
                    self._student(teacher, arm, seed)
        return teacher_result

    # --- the teacher

    def _teacher(self, teacher: nn.Module) -> report.ArmResult:
        if not self.setup.trains_teacher:
            loader = self.setup.source.make_test_loader(self.world)
            test = evaluate(teacher, loader, self.world, autocast(self.config.engine.amp, self.world.device))
            result = self._arm_result(TEACHER, TEACHER, teacher, [test.correct], [test.images], [0.0])
        else:
            entry = self.ledger.entries.get((TEACHER, self.config.run.seed))
            if entry is None:
                entry = self._train_teacher(teacher)
            else:
                self._reload_teacher(teacher)
            last = entry.results[-1]
            result = self._arm_result(
                TEACHER, TEACHER, teacher, [last.test_correct], [last.test_images], [entry.seconds]
            )
        self._say(f"teacher: {result.mean:.2f}% of the test images")
        return result

    def _train_teacher(self, teacher: nn.Module) -> Entry:
        task = ClassificationTask(teacher, self.setup.make_criterion(), device=self.world.device, verbose=False)
        return self._train(task, teacher, TEACHER, TEACHER, self.config.run.seed, _cost(teacher), save_as=TEACHER_FILE)

    def _reload_teacher(self, teacher: nn.Module) -> None:
        if self.folder is not None:
            load_checkpoint(teacher, self.folder / TEACHER_FILE, option="the file of this run,")
        state = self.world.shared({key: value.cpu() for key, value in teacher.state_dict().items()})
        teacher.load_state_dict(state)

    def _choose_layers(self, teacher: nn.Module) -> None:
        if self.ledger.layers is None and self.folder is not None:
            choice, reasons = layer_choice.choose(self.config, self.setup.source, self.setup.student.build(), teacher)
            self.ledger.layers = [list(choice.student_layers), list(choice.teacher_layers)]
            write_layers(self.folder / LAYERS_FILE, choice, reasons)
            self._say("\n".join(reasons))
        self.ledger.layers = self.world.shared(self.ledger.layers)
        self.setup = self.setup.with_layers(*self.ledger.layers)
        self._write_config()
        self._say(f"{summary.pairs(self.setup)} ({LAYERS_FILE} keeps them)")

    # --- the students

    def _student(self, teacher: nn.Module, arm: Arm, seed: int) -> None:
        if (arm.name, seed) in self.ledger.entries:
            return
        random_seed(seed)
        student = self.setup.build_student()
        cost = _cost(student, teacher if arm.uses_teacher else None)
        task = self.setup.make_task(student, teacher, arm).to(self.world.device)
        label = arm.label if self.config.run.seeds == 1 else f"{arm.label}, seed {seed}"
        kept = STUDENT_FILE if seed == self.config.run.seed and arm is self.arms[-1] else None
        self._train(task, student, arm.name, label, seed, cost, save_as=kept)
        task.close()

    def _train(
        self, task: TrainingTask, model: nn.Module, name: str, label: str, seed: int, cost: float, save_as: str | None
    ) -> Entry:
        training = Training(
            task,
            self.setup.source,
            self.config,
            self.world,
            epochs=self.config.optim.teacher_epochs if name == TEACHER else self.config.optim.epochs,
            seed=seed,
            label=f'"{label}"',
            unused=self.setup.teacher_unused if name == TEACHER else bool(self.setup.unused),
        )
        self.ledger.go_on(training, name, seed)
        if self.loggers is not None:
            self.loggers.open(name, seed, training.epoch + 1)
        self.progress.training(label, training.epochs, training.epoch)
        watch = _Watch(self, training, model, name, seed, cost)
        if training.done_steps == 0:
            watch.observe(0)
        training.run(watch)
        if self.folder is not None and save_as is not None:
            self.folder.write_safetensors(save_as, model.state_dict())
            if task.has_ema() and save_as == STUDENT_FILE:
                average = task.get_checkpoint_state(ema=True)["state_dict_ema"]
                self.folder.write_safetensors(AVERAGE_FILE, average)
        self._say(f"{label}: {training.results[-1].test_top1:.2f}%")
        return self.ledger.finish(name, seed, training)

    # --- what is written and said

    def _make_loggers(self) -> MetricLoggers | None:
        return MetricLoggers(self.folder.path, self.config, resume=self.resumed) if self.folder else None

    def _observe_from(self, teacher: nn.Module) -> None:
        """The teacher's spectra, which the students' are compared with; in the main process alone."""
        if self.folder is None:
            return
        source = self.setup.source
        images = probe_images(source, self.world)
        view = self.setup.teacher_images(teacher)
        self.ledger.watch(Dynamics(images, teacher, teacher_images=view, data=f"test images of {source.name}"))

    def write_metrics(self, name: str, seed: int, training: Training) -> None:
        under_way = [{"arm": name, "seed": seed, **asdict(result)} for result in training.results]
        self.folder.write_csv("metrics.csv", METRICS, [*self.ledger.rows, *under_way])

    def _write_config(self) -> None:
        if self.folder is not None:
            self.folder.write_yaml("config.yaml", self.config.to_dict())

    def _report(self, teacher: report.ArmResult) -> None:
        students = [self._students_of(arm) for arm in self.arms]
        histories = {arm: [self.ledger.entries[arm.name, seed].results for seed in self._seeds()] for arm in self.arms}
        lines = [curves.Curve(arm.label, results) for arm, results in histories.items()]
        title = summary.title(self.setup)
        with replacing(self.folder / "curves.png") as file:
            curves.draw(file, lines, title=title, teacher_top1=teacher.mean)
        seed = self.config.run.seed
        self._draw_dynamics(f"{title}; spectra of seed {seed}" if self.config.run.seeds > 1 else title)
        sentences = report.conclusions(teacher, students, task=self.config.task, quick=self.config.run.quick)
        content = summary.summarise(self.setup, self.ledger, teacher, students, sentences)
        self.folder.write_json("summary.json", content)
        html_report.write_report(self.folder.path)
        self._say("")
        report.print_table(self.console, [teacher, *students], title)
        for sentence in sentences:
            self._say(f"- {sentence}")
        where = self.folder.path
        self._say(f"{self.ledger.seconds:.0f} seconds in all; the files are in {where}, first of all report.html")

    def _draw_dynamics(self, title: str) -> None:
        dynamics: Dynamics | None = self.ledger.dynamics
        if dynamics is not None and dynamics.histories:
            with replacing(self.folder / "dynamics.png") as file:
                dynamics_plots.draw(file, dynamics, {arm.name: arm.label for arm in self.arms}, title=title)

    def _students_of(self, arm: Arm) -> report.ArmResult:
        entries = [self.ledger.entries[arm.name, seed] for seed in self._seeds()]
        lasts = [entry.results[-1] for entry in entries]
        correct, images = [last.test_correct for last in lasts], [last.test_images for last in lasts]
        student, seconds = self.setup.student.build(), [entry.seconds for entry in entries]
        result = self._arm_result(arm.name, arm.label, student, correct, images, seconds)
        averages = tuple(last.ema_top1 for last in lasts)
        return result if None in averages else replace(result, ema_top1=averages)

    def _arm_result(self, name, label, model: nn.Module, correct, images, seconds) -> report.ArmResult:
        return report.ArmResult(
            name=name,
            label=label,
            correct=tuple(correct),
            test_images=tuple(images),
            parameters=_count_parameters(model),
            seconds=tuple(seconds),
        )

    def _seeds(self) -> range:
        first = self.config.run.seed
        return range(first, first + self.config.run.seeds)

    def _steps(self) -> int:
        return len(self.setup.source.make_train_loader(self.world)) // self.config.optim.accumulate

    def _costs_of_run(self, teacher: nn.Module) -> tuple[float, float]:
        """Work of the whole run, so that the time left allows for a slow teacher; and what of it is done already."""
        optim, steps = self.config.optim, self._steps()
        student = self.setup.student.build()
        costs = {}
        if self.setup.trains_teacher:
            costs[TEACHER, self.config.run.seed] = optim.teacher_epochs * steps * _cost(teacher)
        for arm in self.arms:
            cost = optim.epochs * steps * _cost(student, teacher if arm.uses_teacher else None)
            costs.update({(arm.name, seed): cost for seed in self._seeds()})
        done = sum(cost for training, cost in costs.items() if training in self.ledger.entries)
        under_way = self.ledger.under_way
        if under_way is not None:
            key, share = under_way
            done += share * costs.get(key, 0.0)
        return sum(costs.values()), done

    def _say(self, text: str) -> None:
        if self.world.is_main:
            self.console.print(text, soft_wrap=True, highlight=False, markup=False)


class _Watch:
    """What happens around the steps of one training; see :class:`skd.distill.engine.Watcher`."""

    def __init__(self, experiment: Experiment, training: Training, model: nn.Module, name: str, seed: int, cost: float):
        self.experiment, self.training, self.model = experiment, training, model
        self.name, self.seed, self.cost = name, seed, cost
        self.stop, self.ledger, self.progress = experiment.stop, experiment.ledger, experiment.progress

    def stepped(self) -> None:
        self.progress.advance(self.cost)

    def read(self, losses: dict[str, float], images_per_second: float) -> None:
        self.progress.show(images_per_second, losses)

    def epoch_ended(self, result: EpochResult) -> None:
        experiment = self.experiment
        self.ledger.bad_images.update(experiment.setup.source.bad_images.found)
        self.progress.show(result.images_per_second, {name: getattr(result, name) for name in PARTS})
        self.progress.finish_epoch(result.test_top1)
        if experiment.folder is None:
            return
        experiment.write_metrics(self.name, self.seed, self.training)
        experiment.loggers.log({"arm": self.name, "seed": self.seed, **asdict(result)})
        self.observe(result.epoch)

    def observe(self, epoch: int) -> None:
        """The student's spectra after an epoch, 0 before the first; of the first seed, as one is enough to see it."""
        experiment, dynamics = self.experiment, self.ledger.dynamics
        if dynamics is None or self.name == TEACHER or self.seed != experiment.config.run.seed:
            return
        models = experiment.config.models
        dynamics.observe(self.name, self.seed, epoch, self.model, models.student_layers, models.teacher_layers)
        experiment.folder.write_csv("dynamics.csv", DYNAMICS, dynamics.rows)

    def save_if_due(self) -> None:
        self.ledger.save_if_due(self.name, self.seed, self.training)

    def save(self) -> None:
        self.ledger.save(self.name, self.seed, self.training)


def _count_parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def _cost(trained: nn.Module, teacher: nn.Module | None = None) -> float:
    """Work of one step in passes over parameters: forward and backward are three, a teacher's forward is one.

    Every pass also costs time of its own, which is most of it in the small models of the digits.
    """
    return 3 * (_count_parameters(trained) + _PASS_COST) + (
        0 if teacher is None else _count_parameters(teacher) + _PASS_COST
    )
