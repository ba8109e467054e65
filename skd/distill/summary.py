"""What a run says of itself: its opening lines, its title, and summary.json."""

import platform
from collections.abc import Sequence
from importlib import metadata

import timm
import torch

import skd
from skd.distill.ledger import Ledger
from skd.distill.prepare import Setup
from skd.distill.report import ArmResult

STUDENT_FILE, AVERAGE_FILE, TEACHER_FILE = "student.safetensors", "student-ema.safetensors", "teacher.safetensors"


def opening(setup: Setup) -> str:
    """The lines a run begins with."""
    source, size = setup.source, setup.world.size
    lines = [
        f"data: {source.name}, {len(source.classes)} classes, {source.train_images} training images, "
        f"{source.test_images} test images",
        f"teacher: {setup.teacher.title}",
        f"student: {setup.student.title}",
        pairs(setup),
    ]
    if size > 1:
        batch = setup.config.data.batch_size
        lines.append(f"{size} processes with {batch} images each, {size * batch} per step")
    return "\n".join(lines)


def pairs(setup: Setup) -> str:
    chosen = setup.config.models
    if not setup.has_layers:
        return "aligned layers: chosen by the teacher's spectra when it is ready"
    both = zip(chosen.student_layers, chosen.teacher_layers, strict=True)
    return "aligned layers, student-teacher: " + ", ".join(f"{s}-{t}" for s, t in both)


def title(setup: Setup) -> str:
    run, source = setup.config.run, setup.source
    kind = {"digits": "Demonstration on scikit-learn's digits", "gratings": "Demonstration on synthetic gratings"}
    seeds = f"seed {run.seed}" if run.seeds == 1 else f"seeds {run.seed} to {run.seed + run.seeds - 1}"
    name = kind.get(setup.config.task, source.name)
    return f"{name}, {setup.config.optim.epochs} epochs, {seeds}{', quick run' if run.quick else ''}"


def summarise(
    setup: Setup, ledger: Ledger, teacher: ArmResult, students: Sequence[ArmResult], sentences: Sequence[str]
) -> dict:
    """The content of summary.json.

    Args:
        setup: what ran.
        ledger: its results.
        teacher, students: the same as the report's table shows them.
        sentences: what the numbers allow to say.
    """
    source, saved = setup.source, students[-1]
    student_entry = ledger.entries[saved.name, setup.config.run.seed]
    last = student_entry.results[-1]
    average = None
    if last.ema_top1 is not None:
        average = {"file": AVERAGE_FILE, "test_top1": last.ema_top1}
    return {
        "title": title(setup),
        "task": setup.config.task,
        "quick": setup.config.run.quick,
        "conclusions": list(sentences),
        "tested": "after the last epoch of each training; no epoch and no model is picked by its test result",
        "data": {
            "name": source.name,
            "classes": list(source.classes),
            "train_images": source.train_images,
            "test_images": source.test_images,
            "image_size": source.image_size,
        },
        "teacher": {
            "model": setup.teacher.title,
            "trained_here": setup.trains_teacher,
            **teacher.to_dict(),
        },
        "students": {"model": setup.student.title, "arms": {student.name: student.to_dict() for student in students}},
        "student_file": {
            "file": STUDENT_FILE,
            "arm": saved.name,
            "seed": setup.config.run.seed,
            "test_top1": saved.top1[0],
            "best_test_top1": max(result.test_top1 for result in student_entry.results),
            "load_with": setup.student.loading_code(STUDENT_FILE),
            "average": average,
        },
        "costs": {entry.name: entry.costs for entry in ledger.entries.values() if entry.seed == setup.config.run.seed},
        "bad_steps": sum(result.bad_steps for entry in ledger.entries.values() for result in entry.results),
        "bad_images": ledger.bad_images,
        "dynamics_notes": list(ledger.dynamics.notes) if ledger.dynamics else [],
        "environment": {
            "skd": skd.__version__,
            "torch": torch.__version__,
            "timm": timm.__version__,
            "numpy": metadata.version("numpy"),
            "python": platform.python_version(),
            "platform": platform.platform(),
            "device": str(setup.device),
            "threads": torch.get_num_threads(),
            "processes": setup.world.size,
        },
        "seconds": ledger.seconds,
    }
