"""The rows of a measurement, and their files: CSV and JSON."""

import csv
import dataclasses
import io
import json
import os
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Generic, TypeVar

from skd import env
from skd.bench.case import Case, Errors, Variant
from skd.bench.timing import Times, median_ratio

OK, WRONG, UNAVAILABLE = "ok", "wrong", "unavailable"


@dataclasses.dataclass
class Checked:
    """What is known of one variant on any device, before its times."""

    variant: Variant
    status: str
    reason: str = ""
    errors: Errors | None = None
    extra_bytes: int | None = None

    def error_columns(self) -> dict[str, float | None]:
        """The columns of a row that say how far from float64 the result is."""
        return {} if self.errors is None else self.errors.columns()


@dataclasses.dataclass
class Result(Checked):
    """What is known of one variant in one case with one number of threads."""

    extra_resident_bytes: int | None = None
    times: Times | None = None


AnyTimes = TypeVar("AnyTimes")


class TimedTogether(Generic[AnyTimes]):
    """Results whose times were taken in turns."""

    results: list

    def timed(self, name: str) -> AnyTimes | None:
        """The times of a variant; None if it has none, which a wrong one never has."""
        return next((r.times for r in self.results if r.variant.name == name and r.status == OK), None)


@dataclasses.dataclass
class Group(TimedTogether[Times]):
    """All variants of one case with one number of threads."""

    case: Case
    threads: int
    results: list[Result]

    @property
    def headline(self) -> str:
        """The phase that ratios and shares are told of."""
        return self.case.phases[-1]

    def ratio(self, name: str, phase: str, to: str | None = None) -> float | None:
        """How many times as fast as another variant (the baseline), from the medians; None if either has no times."""
        other, times = self.timed(self.case.baseline if to is None else to), self.timed(name)
        if other is None or times is None or name == self.case.floor:
            return None
        return other.summary(phase).median / times.summary(phase).median

    def times_floor(self, name: str) -> float | None:
        """The headline's time over the floor's, from the medians; None if either has no times."""
        floor, times = self.timed(self.case.floor), self.timed(name)
        if floor is None or times is None:
            return None
        return times.summary(self.headline).median / floor.summary(self.headline).median

    def share(self, variant: Variant, per_round: bool = False) -> float | None:
        """The headline's :class:`skd.bench.case.Share` in percent, from medians, or as the median over the rounds."""
        if variant.share is None:
            return None
        other, times = self.timed(variant.share.of), self.timed(variant.name)
        if other is None or times is None:
            return None
        if per_round:
            return variant.share.percent(median_ratio(times.samples[self.headline], other.samples[self.headline]))
        return variant.share.percent(times.summary(self.headline).median / other.summary(self.headline).median)


ROW_FIELDS = (
    "operation", "match", "axis", "model", "student_channels", "teacher_channels", "height", "width", "batch", "layout",
    "dtype", "threads", "variant", "variant_layout", "phase", "status", "reason", "rounds", "median_ms", "p20_ms",
    "p80_ms", "page_faults", "floor_bytes", "fits_last_level_cache", "gb_per_s", "baseline", "ratio_to_baseline",
    "ratio_to_baseline_per_round", "floor", "times_floor", "share", "share_percent", "share_percent_per_round",
    "extra_bytes", "extra_resident_bytes", "loss_relative_error", "gradient_relative_l2", "gradient_cosine",
    "gradient_bias", "spectra_relative_error",
)  # fmt: skip
"""The columns of a measurement; those of the conditions follow. Times are milliseconds, GB are 1e9 bytes.

``page_faults`` is the median over rounds of the pages that forward + backward asked the system for: time that a loop of
training with a caching allocator does not spend. The channels of an operation with one map are ``student_channels``.
``share`` says what ``share_percent`` is a percentage of."""


def rows(group: Group) -> list[dict[str, object]]:
    """One row per variant and phase. Only a right result has times, rates and ratios; None stands for what is not."""
    case = group.case
    found = []
    for result in group.results:
        name, share = result.variant.name, result.variant.share
        for phase in (group.headline,) if name == case.floor else case.phases:
            row: dict[str, object] = dict.fromkeys(ROW_FIELDS)
            row |= case.columns()
            row |= {
                "operation": case.operation,
                "layout": case.layout,
                "dtype": case.dtype,
                "threads": group.threads,
                "variant": name,
                "variant_layout": "nchw" if result.variant.nchw else case.layout,
                "phase": phase,
                "status": result.status,
                "reason": result.reason,
                "floor_bytes": case.floor_bytes(phase),
                "fits_last_level_cache": fits_cache(case),
                "baseline": case.baseline,
                "floor": case.floor,
                "share": None if share is None else share.sentence,
                "extra_bytes": result.extra_bytes,
                "extra_resident_bytes": result.extra_resident_bytes,
            }
            row |= result.error_columns()
            times = group.timed(name)
            if times is not None:
                summary, baseline = times.summary(phase), group.timed(case.baseline)
                row["rounds"] = len(times.samples[phase])
                row["median_ms"], row["p20_ms"], row["p80_ms"] = summary.median, summary.p20, summary.p80
                row["page_faults"] = statistics.median_low(times.page_faults)
                row["gb_per_s"] = case.floor_bytes(phase) / summary.median / 1e6
                row["ratio_to_baseline"] = group.ratio(name, phase)
                if baseline is not None and name != case.floor:
                    row["ratio_to_baseline_per_round"] = median_ratio(baseline.samples[phase], times.samples[phase])
                if phase == group.headline:
                    row["times_floor"] = group.times_floor(name)
                    row["share_percent"] = group.share(result.variant)
                    row["share_percent_per_round"] = group.share(result.variant, per_round=True)
            found.append(row)
    return found


def fits_cache(case: Case) -> bool | None:
    """Whether all bytes to move fit the last-level cache; None if its size is unknown."""
    cache = env.last_level_cache_bytes()
    return None if cache is None else case.floor_bytes(case.phases[-1]) <= cache


# --- Files -------------------------------------------------------------------------------------------------------


def write(folder: Path, groups: Sequence[Group], conditions: dict[str, object]) -> list[Path]:
    """Writes ``rows.csv`` (every row with the conditions) and ``rows.json`` (conditions, rows, samples per round).

    Both files appear complete or not at all.

    Returns:
        Their paths.
    """
    flat = [row for group in groups for row in rows(group)]
    text = csv_text([*ROW_FIELDS, *conditions], [row | conditions for row in flat])
    samples = [
        {
            "case": g.case.name,
            "threads": g.threads,
            "variant": r.variant.name,
            "milliseconds": {phase: r.times.samples[phase] for phase in g.case.phases},
        }
        for g in groups
        for r in g.results
        if r.status == OK and r.times is not None
    ]
    document = json.dumps({"conditions": conditions, "rows": flat, "samples": samples}, indent=1, allow_nan=False)
    return write_files(folder, {"rows.csv": text, "rows.json": document + "\n"})


def csv_text(fields: Sequence[str], lines: Sequence[dict[str, object]]) -> str:
    """Lines as CSV with a heading; a field that a line does not have stays empty."""
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=fields, lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    return text.getvalue()


def write_files(folder: Path, contents: dict[str, str]) -> list[Path]:
    """Writes files, each of which appears complete or not at all; returns their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for name, content in contents.items():
        unfinished, path = folder / f".{name}.unfinished", folder / name
        try:
            unfinished.write_text(content, encoding="utf-8")
            os.replace(unfinished, path)
        finally:
            unfinished.unlink(missing_ok=True)
        written.append(path)
    return written
