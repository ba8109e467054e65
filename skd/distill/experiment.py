"""One run of the comparison: the teacher, the arms, the report."""

import platform
import signal
import sys
import time
from dataclasses import asdict
from importlib import metadata

import timm
import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from timm.task import ClassificationTask
from timm.utils import random_seed
from torch import nn

import skd
from skd.analysis.layers_file import LAYERS_FILE, write_layers
from skd.distill import curves, layer_choice, report
from skd.distill.arms import Arm, make_arms
from skd.distill.config import DistillConfig
from skd.distill.loop import EpochResult, evaluate, train
from skd.distill.prepare import Setup, prepare
from skd.distill.run_folder import RunFolder
from skd.files import replacing

STUDENT_FILE = "student.safetensors"
TEACHER_FILE = "teacher.safetensors"
INTERRUPTED = 128 + signal.SIGINT
_PASS_COST = 50_000  # in parameters
METRICS = ("arm", "seed", *EpochResult.__dataclass_fields__)


def run(config: DistillConfig, console: Console | None = None) -> int:
    """Compare the arms and write config.yaml, metrics.csv, summary.json, curves.png and the weights.

    Args:
        config: what to run.
        console: where progress and report go; default standard output.

    Returns:
        0, or 130 after Ctrl-C; then metrics.csv has the finished epochs and no file is half-written.

    Raises:
        DistillError: something the user can mend, in one sentence.
    """
    began = time.perf_counter()
    setup = prepare(config)
    folder = RunFolder(setup.config.run.out, setup.config.task)
    experiment = Experiment(setup, folder, console or Console(), began)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(setup.config.run.threads or threads)
        experiment.run()
    except KeyboardInterrupt:
        rows = len(experiment.rows)
        kept = f"; {folder / 'metrics.csv'} has the {rows} finished epochs" if rows else " before the first epoch ended"
        print(f"Interrupted{kept}.", file=sys.stderr)
        return INTERRUPTED
    finally:
        torch.set_num_threads(threads)
        folder.tidy()
    return 0


class Experiment:
    """The state of one run.

    Args:
        setup: data and models.
        folder: for the files.
        console: for progress and report.
        began: ``time.perf_counter()`` at the start of the run.
    """

    def __init__(self, setup: Setup, folder: RunFolder, console: Console, began: float):
        self.setup = setup
        self.config = setup.config
        self.folder = folder
        self.console = console
        self.began = began
        self.arms = make_arms(self.config.loss)
        self.rows: list[dict] = []
        self.progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TaskProgressColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=console,
            speed_estimate_period=60,
            disable=not console.is_terminal,
        )

    def run(self) -> None:
        random_seed(self.config.run.seed)
        teacher = self.setup.build_teacher()
        self.folder.write_yaml("config.yaml", self.config.to_dict())
        self._say(self._opening())
        results = {arm.name: [] for arm in self.arms}
        seconds = {arm.name: [] for arm in self.arms}
        with self.progress:
            self.bar = self.progress.add_task("teacher", total=self._total_cost(teacher))
            teacher_result = self._teacher(teacher)
            if not self.setup.has_layers:
                self._choose_layers(teacher)
            first = self.config.run.seed
            for seed in range(first, first + self.config.run.seeds):
                for arm in self.arms:
                    arm_began = time.perf_counter()
                    student, epochs = self._student(teacher, arm, seed)
                    seconds[arm.name].append(time.perf_counter() - arm_began)
                    results[arm.name].append(epochs)
                    if seed == first and arm is self.arms[-1]:
                        self.folder.write_safetensors(STUDENT_FILE, student.state_dict())
        students = [
            report.ArmResult(
                name=arm.name,
                label=arm.label,
                correct=tuple(epochs[-1].test_correct for epochs in results[arm.name]),
                test_images=self.setup.source.test_images,
                parameters=_count_parameters(student),
                seconds=tuple(seconds[arm.name]),
            )
            for arm in self.arms
        ]
        self._draw(results, teacher_result)
        self._report(teacher_result, students)

    def _teacher(self, teacher: nn.Module) -> report.ArmResult:
        began = time.perf_counter()
        task = ClassificationTask(teacher, self.setup.make_criterion(), device=self.setup.device, verbose=False)
        if self.setup.trains_teacher:
            epochs = self._train(task, "teacher", "teacher", self.config.run.seed, _cost(teacher))
            self.folder.write_safetensors(TEACHER_FILE, teacher.state_dict())
            correct = epochs[-1].test_correct
        else:
            correct = evaluate(task, self.setup.source.make_test_loader())["test_correct"]
        result = report.ArmResult(
            name="teacher",
            label="teacher",
            correct=(correct,),
            test_images=self.setup.source.test_images,
            parameters=_count_parameters(teacher),
            seconds=(time.perf_counter() - began,),
        )
        self._say(f"teacher: {result.mean:.2f}% of the test images")
        return result

    def _choose_layers(self, teacher: nn.Module) -> None:
        choice, reasons = layer_choice.choose(self.config, self.setup.source, self.setup.student.build(), teacher)
        self.setup = self.setup.with_layers(choice.student_layers, choice.teacher_layers)
        self.config = self.setup.config
        write_layers(self.folder / LAYERS_FILE, choice, reasons)
        self.folder.write_yaml("config.yaml", self.config.to_dict())
        self._say("\n".join([*reasons, f"{self._pairs()} ({self.folder / LAYERS_FILE} keeps them)"]))

    def _pairs(self) -> str:
        chosen = self.config.models
        if not self.setup.has_layers:
            return "aligned layers: chosen by the teacher's spectra when it is ready"
        pairs = zip(chosen.student_layers, chosen.teacher_layers, strict=True)
        return "aligned layers, student-teacher: " + ", ".join(f"{s}-{t}" for s, t in pairs)

    def _student(self, teacher: nn.Module, arm: Arm, seed: int) -> tuple[nn.Module, list[EpochResult]]:
        random_seed(seed)
        student = self.setup.build_student()
        task = self.setup.make_task(student, teacher, arm).to(self.setup.device)
        label = arm.label if self.config.run.seeds == 1 else f"{arm.label}, seed {seed}"
        epochs = self._train(task, arm.name, label, seed, _cost(student, None if arm is self.arms[0] else teacher))
        task.close()
        self._say(f"{label}: {epochs[-1].test_top1:.2f}%")
        return student, epochs

    def _train(self, task, name: str, label: str, seed: int, cost: float) -> list[EpochResult]:
        optim = self.config.optim
        self.progress.update(self.bar, description=label)

        def keep(result: EpochResult) -> None:
            self.rows.append({"arm": name, "seed": seed, **asdict(result)})
            self.folder.write_csv("metrics.csv", METRICS, self.rows)
            self.progress.update(self.bar, description=f"{label} {result.test_top1:.1f}%")

        return train(
            task,
            self.setup.source,
            optim,
            epochs=optim.teacher_epochs if name == "teacher" else optim.epochs,
            seed=seed,
            name=f'"{label}"',
            on_step=lambda: self.progress.advance(self.bar, cost),
            on_epoch=keep,
        )

    def _total_cost(self, teacher: nn.Module) -> float:
        """Work of the whole run, so that the time left allows for a teacher that is slower than the students."""
        optim = self.config.optim
        steps = len(self.setup.source.make_train_loader())
        student = self.setup.student.build()
        per_seed = _cost(student) + (len(self.arms) - 1) * _cost(student, teacher)
        total = self.config.run.seeds * optim.epochs * steps * per_seed
        return total + (optim.teacher_epochs * steps * _cost(teacher) if self.setup.trains_teacher else 0)

    def _draw(self, results: dict[str, list[list[EpochResult]]], teacher: report.ArmResult) -> None:
        lines = [curves.Curve(arm.label, results[arm.name]) for arm in self.arms]
        with replacing(self.folder / "curves.png") as file:
            curves.draw(file, lines, title=self._title(), teacher_top1=teacher.mean)

    def _report(self, teacher: report.ArmResult, students: list[report.ArmResult]) -> None:
        sentences = report.conclusions(teacher, students, task=self.config.task, quick=self.config.run.quick)
        seconds = time.perf_counter() - self.began
        self.folder.write_json("summary.json", self._summary(teacher, students, sentences, seconds))
        self._say("")
        report.print_table(self.console, [teacher, *students], self._title())
        for sentence in sentences:
            self._say(f"- {sentence}")
        self._say(f"{seconds:.0f} seconds in all; the files are in {self.folder.path}")

    def _summary(self, teacher, students, sentences: list[str], seconds: float) -> dict:
        source, spec = self.setup.source, self.setup.student
        saved = students[-1]
        return {
            "task": self.config.task,
            "quick": self.config.run.quick,
            "conclusions": sentences,
            "tested": "after the last epoch of each training; no epoch and no model is picked by its test result",
            "data": {
                "name": source.name,
                "classes": list(source.classes),
                "train_images": source.train_images,
                "test_images": source.test_images,
                "image_size": source.image_size,
            },
            "teacher": {
                "model": self.setup.teacher.title,
                "trained_here": self.setup.trains_teacher,
                **teacher.to_dict(),
            },
            "students": {"model": spec.title, "arms": {student.name: student.to_dict() for student in students}},
            "student_file": {
                "file": STUDENT_FILE,
                "arm": saved.name,
                "seed": self.config.run.seed,
                "test_top1": saved.top1[0],
                "load_with": spec.loading_code(STUDENT_FILE),
            },
            "environment": {
                "skd": skd.__version__,
                "torch": torch.__version__,
                "timm": timm.__version__,
                "numpy": metadata.version("numpy"),
                "python": platform.python_version(),
                "platform": platform.platform(),
                "device": str(self.setup.device),
                "threads": torch.get_num_threads(),
            },
            "seconds": seconds,
        }

    def _opening(self) -> str:
        source = self.setup.source
        return (
            f"data: {source.name}, {len(source.classes)} classes, {source.train_images} training images, "
            f"{source.test_images} test images\n"
            f"teacher: {self.setup.teacher.title}\n"
            f"student: {self.setup.student.title}\n"
            f"{self._pairs()}"
        )

    def _title(self) -> str:
        run = self.config.run
        kind = "Demonstration on scikit-learn's digits" if self.config.task == "digits" else self.setup.source.name
        seeds = f"seed {run.seed}" if run.seeds == 1 else f"seeds {run.seed} to {run.seed + run.seeds - 1}"
        return f"{kind}, {self.config.optim.epochs} epochs, {seeds}{', quick run' if run.quick else ''}"

    def _say(self, text: str) -> None:
        self.console.print(text, soft_wrap=True, highlight=False, markup=False)


def _count_parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def _cost(trained: nn.Module, teacher: nn.Module | None = None) -> float:
    """Work of one step in passes over parameters: forward and backward are three, a teacher's forward is one.

    Every pass also costs time of its own, which is most of it in the small models of the digits.
    """
    return 3 * (_count_parameters(trained) + _PASS_COST) + (
        0 if teacher is None else _count_parameters(teacher) + _PASS_COST
    )
