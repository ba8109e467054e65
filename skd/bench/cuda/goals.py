"""What the measurements are held against: per line reached, not reached, or not measured.

For forward and backward together with a cold cache:

- from 64 MB to move: 90% of the bandwidth of a copy (CUDA C++), 85% (Triton), and 80% for either on 7x7 maps;
- below 16 MB: the time of the bytes at the bandwidth of the run's best copy plus 4 microseconds, one launch forward;
- against the published loss in eager PyTorch: 8 times in float32, 14 times in bfloat16;
- against ``torch.compile`` of the closed form: 1.3 times;
- memory beyond the inputs: the students' gradients and 1 MB;
- for float32 maps: 1e-6 relative error of loss and gradient.

The losses that take a transform (fourier_align) are held against other figures: 1.3 times as long as spectral_align
on the same maps where they are at most 16 high, the same memory, 1e-6 for the loss and 1e-5 for the gradient.
spectral_intensity on float32 maps from 64 MB: 80% of the bandwidth of a copy, and 1e-6 for the worst bin.

Times of the plain call count, not of its CUDA graph. Between 16 and 64 MB no bandwidth is asked for.
"""

import dataclasses
from collections.abc import Callable, Iterable, Sequence

from skd.bench.pairs import BASELINE
from skd.bench.report import OK

REACHED, MISSED, UNKNOWN = "reached", "NOT REACHED", "not measured"

SKD = ("skd-cuda", "skd-triton")

COPY_SHARE = {"skd-cuda": 90.0, "skd-triton": 85.0}
COPY_SHARE_7X7 = 80.0
COPY_SHARE_INTENSITY = 80.0
RATIO = {"float32": 8.0, "bfloat16": 14.0}
RATIO_TO_COMPILED = 1.3
LARGE, SMALL = 64_000_000, 16_000_000
SMALL_EXTRA_MS = 0.004
EXTRA_BYTES = 1_000_000
ACCURACY = 1e-6
TRANSFORMED_ACCURACY = 1e-5
TIMES_SPECTRAL_ALIGN = 1.3
MOST_HEIGHT = 16


@dataclasses.dataclass(frozen=True)
class Verdict:
    """One goal on one case: ``reached``, ``NOT REACHED`` or ``not measured``, and the sentence that says it."""

    status: str
    goal: str
    text: str


def verdicts(rows: Iterable[dict]) -> list[Verdict]:
    """Every goal on every case that was measured with one of skd's GPU backends.

    Args:
        rows: of :func:`skd.bench.cuda.report.rows`, from one device; a case that was measured twice is judged twice.
    """
    groups: dict[tuple, dict[tuple, dict]] = {}
    for row in rows:
        mine = groups.setdefault((row.get("date"), row["group"]), {})
        mine[row["variant"], row["cache"], row["phase"]] = row
    best_copy = max((_rate(group) for group in groups.values()), default=0.0)
    aligned = {
        _place(row): row["median_ms"]
        for group in groups.values()
        for (name, cache, phase), row in group.items()
        if (cache, phase) == ("cold", "both")
        and name in SKD
        and row["operation"] == "spectral_align"
        and row["match"] != "mse"
    }
    found = []
    for group in groups.values():
        for name in SKD:
            row = group.get((name, "cold", "both"))
            if row is not None:
                found += _of_case(row, group, best_copy, aligned.get(_place(row)))
    return found


def _rate(group: dict[tuple, dict]) -> float:
    """GB/s of a group's copy."""
    copies = [group.get((name, "cold", "both")) for name in ("copy", "copy-graph")]
    return max((row["gb_per_s"] or 0.0 for row in copies if row is not None), default=0.0)


def _is_transformed(row: dict) -> bool:
    return row["operation"] == "fourier_align"


def _place(row: dict) -> tuple:
    """What two rows must share to compare the losses of the same maps."""
    return row["variant"], row["workload"], row["layout"], row["dtype"]


def _of_case(row: dict, group: dict[tuple, dict], best_copy: float, aligned_ms: float | None) -> list[Verdict]:
    subject = f"{row['variant']}, {row['workload']}, {row['layout']}, {row['dtype']}"
    subject += f", {row['match']}" if row["operation"] != "spectral_align" else ""
    if row["status"] != OK or row["median_ms"] is None:
        why = f"{row['status']}: {row['reason']}" if row["reason"] else "it has no times"
        return [Verdict(UNKNOWN, "all", f"{subject}: {why}")]

    def verdict(goal: str, reached: bool | None, text: str) -> Verdict:
        return Verdict(UNKNOWN if reached is None else REACHED if reached else MISSED, goal, f"{subject}: {text}")

    if row["operation"] == "spectral_intensity":
        return _of_intensity(row, verdict)
    found = _speed_of_transformed(row, aligned_ms, verdict) if _is_transformed(row) else []
    if not _is_transformed(row):
        found += _speed(row, group, best_copy, verdict)
    if row["extra_bytes"] is not None:
        beyond = row["extra_bytes"] - row["student_bytes"]
        text = f"{beyond / 1e6:.2f} MB of memory beyond inputs and gradients (goal 1 MB)"
        found.append(verdict("memory", beyond <= EXTRA_BYTES, text))
    if row["dtype"] == "float32":
        loss, gradient = row["loss_relative_error"], row["gradient_relative_l2"]
        most = TRANSFORMED_ACCURACY if _is_transformed(row) else ACCURACY
        if loss is not None and gradient is not None:
            text = (
                f"errors against float64: loss {loss:.1e} (goal {ACCURACY:.0e}), gradient {gradient:.1e} ({most:.0e})"
            )
            found.append(verdict("accuracy", loss <= ACCURACY and gradient <= most, text))
    return found


def _of_intensity(row: dict, verdict: Callable[..., Verdict]) -> list[Verdict]:
    if row["dtype"] != "float32":
        return []
    found, share, error = [], row["percent_of_copy"], row["spectra_relative_error"]
    if row["floor_bytes"] >= LARGE:
        measured = "no copy to compare with" if share is None else f"{share:.1f}% of the copy bandwidth"
        reached = None if share is None else share >= COPY_SHARE_INTENSITY
        found.append(verdict("intensity", reached, f"{measured} (goal {COPY_SHARE_INTENSITY:.0f}%)"))
    if error is not None:
        text = f"error of the worst bin against float64: {error:.1e} (goal {ACCURACY:.0e})"
        found.append(verdict("accuracy", error <= ACCURACY, text))
    return found


def _speed_of_transformed(row: dict, aligned_ms: float | None, verdict: Callable[..., Verdict]) -> list[Verdict]:
    heights = [int(layer.split()[1].split("x")[0]) for layer in row["layers"].split("; ")]
    if max(heights) > MOST_HEIGHT:
        return []
    if aligned_ms is None:
        text = f"spectral_align was not measured on the same maps (goal {TIMES_SPECTRAL_ALIGN} times its time)"
        return [verdict("transform", None, text)]
    ratio = row["median_ms"] / aligned_ms
    text = f"{ratio:.2f} times as long as spectral_align (goal {TIMES_SPECTRAL_ALIGN})"
    return [verdict("transform", ratio <= TIMES_SPECTRAL_ALIGN, text)]


def _speed(row: dict, group: dict[tuple, dict], best_copy: float, verdict: Callable[..., Verdict]) -> list[Verdict]:
    """The goals of spectral_align."""
    name, found = row["variant"], []
    milliseconds, moved, share = row["median_ms"], row["floor_bytes"], row["percent_of_copy"]
    if moved >= LARGE:
        wanted = COPY_SHARE_7X7 if _all_7x7(row) else COPY_SHARE[name]
        measured = "no copy to compare with" if share is None else f"{share:.1f}% of the copy bandwidth"
        found.append(
            verdict("bandwidth", None if share is None else share >= wanted, f"{measured} (goal {wanted:.0f}%)")
        )
    elif moved < SMALL and best_copy > 0:
        bound = moved / best_copy / 1e6 + SMALL_EXTRA_MS
        launches = (group.get((name, "cold", "forward")) or {}).get("launches")
        text = f"{milliseconds * 1e3:.1f} us, {launches if launches is not None else 'unknown'} launch(es) forward "
        text += f"(goal {bound * 1e3:.1f} us, which is the floor + 4 us, and 1 launch)"
        reached = None if launches is None else milliseconds <= bound and launches == 1
        found.append(verdict("small", False if milliseconds > bound else reached, text))
    if (wanted := RATIO.get(row["dtype"])) is not None:
        ratio = row["ratio_to_published_nchw"]
        text = f"no time of {BASELINE} to compare with" if ratio is None else f"{ratio:.1f} times the published form"
        found.append(verdict("published", None if ratio is None else ratio >= wanted, f"{text} (goal {wanted:.0f})"))
    compiled = group.get(("closed-form-compile", "cold", "both"))
    if compiled is not None and compiled["median_ms"] is not None and compiled["status"] == OK:
        ratio = compiled["median_ms"] / milliseconds
        text = f"{ratio:.2f} times torch.compile of the closed form (goal {RATIO_TO_COMPILED})"
        found.append(verdict("compiled", ratio >= RATIO_TO_COMPILED, text))
    return found


def _all_7x7(row: dict) -> bool:
    return all(" 7x7 " in f" {layer} " for layer in row["layers"].split("; "))


def sentences(found: Sequence[Verdict]) -> list[str]:
    """A count per goal, then each line of what was not reached or not measured, then what was reached."""
    if not found:
        return ["no goal was measured: there are no rows of " + " or ".join(SKD)]
    lines = []
    for goal in dict.fromkeys(v.goal for v in found):
        mine = [v for v in found if v.goal == goal]
        counts = [f"{sum(v.status == s for v in mine)} {s}" for s in (REACHED, MISSED, UNKNOWN)]
        lines.append(f"{goal}: " + ", ".join(count for count in counts if not count.startswith("0 ")))
    for status in (MISSED, UNKNOWN, REACHED):
        lines += [f"{v.status}: {v.text}" for v in found if v.status == status]
    return lines
