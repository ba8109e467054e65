"""The report of a run as one page that needs nothing but itself."""

import csv
import json
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from skd.analysis.layers_file import LAYERS_FILE
from skd.distill.html_page import bars, bullets, code, note, page, pairs, picture, section, table
from skd.distill.report import recognised, spread
from skd.files import replacing

REPORT_FILE = "report.html"
_SHOWN_IMAGES = 200
_COST_COLOURS = {  # of Wong's palette
    "data": "#56B4E9",
    "teacher": "#009E73",
    "student": "#0072B2",
    "loss": "#D55E00",
    "optimizer": "#CC79A7",
    "other": "#999999",
}
_CURVES = (
    "Accuracy and cross-entropy on the test images after every epoch. Lines are means over the seeds, bands reach from "
    "the lowest to the highest seed; the first epochs may lie below the axis."
)
_DYNAMICS = (
    "All blocks: the mean intensity of each block's spectrum over depth. The diamonds are the teacher's aligned layers "
    "at the student's width: a student that makes the same maps there lies on them.",
    "Aligned layers: how far the spectra of student and teacher are apart, in decades: 0 are equal spectra, 0.3 is a "
    "factor of two at every frequency. The line is the mean over the pairs, the band goes from the closest pair to the "
    "farthest. Phases are left out, which the spectral loss compares too: an arm may come nearer in it and not here.",
    "Below: single pairs over frequency, where green is what the spectral loss pulls the student to. A student that "
    "cannot follow its teacher everywhere makes smaller maps, and its whole curve lies lower.",
)
_DYNAMICS_ALONE = "The mean intensity of each block's spectrum over depth, before and after the training."


def write_report(folder: Path) -> Path:
    """Write report.html from the other files of a run: a page without scripts that loads nothing.

    Args:
        folder: of the run. What is missing of config.yaml, layers.yaml, metrics.csv, summary.json, dynamics.csv,
            curves.png and dynamics.png is left out of the page.

    Returns:
        The path of the page, which is whole or absent.
    """
    summary = json.loads(_read(folder / "summary.json") or "{}")
    metrics, dynamics = _rows(folder / "metrics.csv"), _rows(folder / "dynamics.csv")
    labels = {name: arm["label"] for name, arm in _arms(summary).items()}
    sections = (
        section("What was found", bullets(summary.get("conclusions", ())), _accuracy(summary, metrics)),
        section("How far it came", "" if summary else _so_far(metrics)),
        section("Learning curves", picture(folder / "curves.png", "learning curves of all arms", [_CURVES])),
        section("Distillation dynamics", _dynamics(folder / "dynamics.png", dynamics), _gaps(dynamics, labels)),
        section("Cost of a training step", _costs(summary.get("costs") or {}, labels)),
        section("What was skipped", _skipped(summary, labels)),
        section("The student", _student(summary.get("student_file") or {}, labels)),
        section("Data and models", pairs(_data(summary))),
        section("Versions", pairs(summary.get("environment", {}))),
        section("Aligned layers", code(_read(folder / LAYERS_FILE))),
        section("Configuration", code(_read(folder / "config.yaml"))),
    )
    path = folder / REPORT_FILE
    with replacing(path) as file:
        file.write_text(page(_title(summary), sections), encoding="utf-8")
    return path


def _title(summary: Mapping) -> str:
    name = summary.get("data", {}).get("name")
    return summary.get("title") or (f"Distillation on {name}" if name else "Distillation")


def _arms(summary: Mapping) -> dict[str, dict]:
    """The teacher, if it was tested, and the students, by name."""
    teacher = summary.get("teacher", {})
    return {**({"teacher": teacher} if "label" in teacher else {}), **summary.get("students", {}).get("arms", {})}


def _accuracy(summary: Mapping, metrics: Sequence[dict]) -> str:
    """Teacher and students, each after its last epoch."""
    arms = _arms(summary)
    if not arms:
        return ""
    averages = _last_averages(metrics)
    columns = [
        "model and training",
        "test top-1 (%)",
        "averaged weights (%)",
        "images recognised",
        "parameters",
        "time",
    ]
    rows = []
    for name, arm in arms.items():
        images = recognised(arm["test_correct"], arm["test_images"])
        seconds = _duration(sum(arm["seconds"]))
        average = spread(averages.get(name, ()))
        rows.append([arm["label"], spread(arm["test_top1"]), average, images, f"{arm['parameters']:,}", seconds])
    if not averages:
        for row in (columns, *rows):
            del row[2]
    seeds = max(len(arm["test_top1"]) for arm in arms.values())
    said = [f"Mean ± standard deviation over {seeds} seeds; time of all of them."] if seeds > 1 else []
    if "tested" in summary:
        said.append(f"Tested {summary['tested']}.")
    if "seconds" in summary:
        said.append(f"The whole run took {_duration(summary['seconds'])}.")
    return table(columns, rows) + note(" ".join(said))


def _so_far(metrics: Sequence[dict]) -> str:
    """Of a run without a summary, which has not ended or was ended early."""
    latest = {(row["arm"], row["seed"]): row for row in metrics}
    rows = [[arm, seed, row["epoch"], f"{float(row['test_top1']):.2f}"] for (arm, seed), row in latest.items()]
    if not rows:
        return ""
    said = note("This run has no summary: it has not ended, or it was ended early.")
    return said + table(["training", "seed", "finished epochs", "test top-1 (%)"], rows)


def _dynamics(path: Path, rows: Sequence[dict]) -> str:
    paired = any(row["gap"] for row in rows) or not rows
    return picture(path, "spectra of the students' layers", _DYNAMICS if paired else [_DYNAMICS_ALONE])


def _gaps(rows: Iterable[dict], labels: Mapping[str, str]) -> str:
    """The gap of every pair at the first and at the last epoch, per arm; means over the seeds."""
    found: dict[tuple[str, str], dict[str, dict[int, list[float]]]] = {}
    for row in rows:
        if row["gap"]:
            epochs = found.setdefault((row["name"], row["teacher_name"]), {}).setdefault(row["arm"], {})
            epochs.setdefault(int(row["epoch"]), []).append(float(row["gap"]))
    if not found:
        return ""
    arms = list(dict.fromkeys(arm for pair in found.values() for arm in pair))
    cells = []
    for (student, teacher), pair in found.items():
        ends = [[pair[arm][epoch] for epoch in (min(pair[arm]), max(pair[arm]))] if arm in pair else [] for arm in arms]
        cells.append([f"{student} – {teacher}", *(" → ".join(f"{statistics.fmean(x):.3f}" for x in of) for of in ends)])
    said = note("The gap of each pair in decades, at the first epoch seen → at the last:")
    return said + table(["student's layer – teacher's", *(labels.get(arm, arm) for arm in arms)], cells)


def _costs(costs: Mapping[str, Mapping[str, float]], labels: Mapping[str, str]) -> str:
    costs = {labels.get(arm, arm): parts for arm, parts in costs.items() if sum(parts.values()) > 0}
    if not costs:
        return ""
    used = [part for part in _COST_COLOURS if any(parts.get(part) for parts in costs.values())]
    rows = []
    for label, parts in costs.items():
        whole = sum(parts.values())
        seconds = [parts.get(part, 0) for part in used]
        cells = [f"{1000 * x:.2f} ({100 * x / whole:.1f}%)" if x else "" for x in seconds]
        rows.append([label, *cells, f"{1000 * whole:.2f}"])
    said = note(
        "Milliseconds of a step, measured in some steps of the run; the student's part is forward and backward."
    )
    return said + table(["training", *used, "together"], rows) + bars(costs, _COST_COLOURS)


def _skipped(summary: Mapping, labels: Mapping[str, str]) -> str:
    said = []
    steps = summary.get("bad_steps") or {}
    for arm, count in (steps if isinstance(steps, dict) else {"": steps}).items():
        if count:
            of_arm = f' of "{labels.get(arm, arm)}"' if arm else ""
            said.append(f"Updates{of_arm} skipped because a loss or a gradient was infinite or NaN: {count}.")
    said += summary.get("dynamics_notes", ())
    images = summary.get("bad_images") or {}
    if not images:
        return bullets(said)
    limit = f" (the first {_SHOWN_IMAGES} are below)" if len(images) > _SHOWN_IMAGES else ""
    said.append(
        f"Images that could not be read: {len(images)}{limit}. In training the next one took the place of each; "
        "in tests they were left out, and accuracies are percent of the others."
    )
    return bullets(said) + table(["image", "reason"], list(images.items())[:_SHOWN_IMAGES], numbers=False)


def _student(saved: Mapping, labels: Mapping[str, str]) -> str:
    if not saved:
        return ""
    arm = labels.get(saved["arm"], saved["arm"])
    said = f'{saved["file"]} has the weights of "{arm}", seed {saved["seed"]}'
    said += f" ({saved['test_top1']:.2f}% of the test images)."
    if saved.get("average"):
        said += f" {saved['average']['file']} has their average ({saved['average']['test_top1']:.2f}%)."
    return note(f"{said} In this folder:") + code(f"import timm\n\nmodel = {saved['load_with']}")


def _data(summary: Mapping) -> dict:
    data = dict(summary.get("data", {}))
    if "name" in data:
        data = {"images": data.pop("name"), **data}
    if "classes" in data:
        data["classes"] = len(data["classes"])
    models = {"teacher": summary.get("teacher", {}), "student": summary.get("students", {})}
    return {**data, **{role: about["model"] for role, about in models.items() if "model" in about}}


def _last_averages(metrics: Sequence[dict]) -> dict[str, list[float]]:
    """Top-1 of the averaged weights after the last epoch, per arm; empty where nothing was averaged."""
    latest = {(row["arm"], row["seed"]): row.get("ema_top1") for row in metrics}
    averages: dict[str, list[float]] = {}
    for (arm, _), top1 in latest.items():
        if top1:
            averages.setdefault(arm, []).append(float(top1))
    return averages


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.1f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def _read(path: Path) -> str:
    return path.read_text(encoding="utf-8") if path.is_file() else ""


def _rows(path: Path) -> list[dict]:
    return list(csv.DictReader(_read(path).splitlines()))
