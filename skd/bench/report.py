"""The rows of a measurement: as tables on the screen, and as CSV and JSON."""

import csv
import dataclasses
import io
import json
import math
import os
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Generic, TypeVar

from skd import env
from skd.bench.correctness import Errors
from skd.bench.spectral_align import BASELINE, COPY, Case, Variant
from skd.bench.timing import PHASES, Times, median_ratio

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
        if self.errors is None:
            return {}
        return {
            "loss_relative_error": _finite(self.errors.loss),
            "gradient_relative_l2": _finite(self.errors.gradient),
            "gradient_cosine": _finite(self.errors.cosine),
            "gradient_bias": _finite(self.errors.bias),
        }


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

    def ratio(self, name: str, phase: str) -> float | None:
        """How many times as fast as the baseline, from the medians; None if either has no times."""
        baseline, times = self.timed(BASELINE), self.timed(name)
        if baseline is None or times is None or name == COPY:
            return None
        return baseline.summary(phase).median / times.summary(phase).median

    def times_copy(self, name: str) -> float | None:
        """Forward + backward over the copy of the same bytes, from the medians; None if either has no times."""
        copy, times = self.timed(COPY), self.timed(name)
        if copy is None or times is None:
            return None
        return times.summary("both").median / copy.summary("both").median


ROW_FIELDS = (
    "operation", "match", "student_channels", "teacher_channels", "height", "width", "batch", "layout", "dtype",
    "threads", "variant", "variant_layout", "phase", "status", "reason", "rounds", "median_ms", "p20_ms", "p80_ms",
    "page_faults", "floor_bytes", "fits_last_level_cache", "gb_per_s", "ratio_to_published_nchw",
    "ratio_to_published_nchw_per_round", "times_copy", "extra_bytes", "extra_resident_bytes", "loss_relative_error",
    "gradient_relative_l2", "gradient_cosine", "gradient_bias",
)  # fmt: skip
"""The columns of a measurement; those of the conditions follow. Times are milliseconds, GB are 1e9 bytes.

``page_faults`` is the median over rounds of the pages that forward + backward asked the system for: time that a loop of
training with a caching allocator does not spend."""


def rows(group: Group) -> list[dict[str, object]]:
    """One row per variant and phase. Only a right result has times, rates and ratios; None stands for what is not."""
    shape = group.case.shape
    found = []
    for result in group.results:
        name = result.variant.name
        for phase in ("both",) if name == COPY else PHASES:
            row: dict[str, object] = dict.fromkeys(ROW_FIELDS)
            row |= {
                "operation": "spectral_align",
                "match": group.case.match,
                "student_channels": shape.student,
                "teacher_channels": shape.teacher,
                "height": shape.height,
                "width": shape.width,
                "batch": shape.batch,
                "layout": group.case.layout,
                "dtype": group.case.dtype,
                "threads": group.threads,
                "variant": name,
                "variant_layout": "nchw" if result.variant.nchw else group.case.layout,
                "phase": phase,
                "status": result.status,
                "reason": result.reason,
                "floor_bytes": group.case.floor_bytes(phase),
                "fits_last_level_cache": _fits_cache(group.case),
                "extra_bytes": result.extra_bytes,
                "extra_resident_bytes": result.extra_resident_bytes,
            }
            row |= result.error_columns()
            times = group.timed(name)
            if times is not None:
                summary, baseline = times.summary(phase), group.timed(BASELINE)
                row["rounds"] = len(times.samples[phase])
                row["median_ms"], row["p20_ms"], row["p80_ms"] = summary.median, summary.p20, summary.p80
                row["page_faults"] = statistics.median_low(times.page_faults)
                row["gb_per_s"] = group.case.floor_bytes(phase) / summary.median / 1e6
                row["ratio_to_published_nchw"] = group.ratio(name, phase)
                if baseline is not None and name != COPY:
                    row["ratio_to_published_nchw_per_round"] = median_ratio(
                        baseline.samples[phase], times.samples[phase]
                    )
                row["times_copy"] = group.times_copy(name) if phase == "both" else None
            found.append(row)
    return found


def _fits_cache(case: Case) -> bool | None:
    """Whether all bytes to move fit the last-level cache; None if its size is unknown."""
    cache = env.last_level_cache_bytes()
    return None if cache is None else case.floor_bytes("both") <= cache


def _finite(value: float) -> float | None:
    """JSON has no NaN."""
    return value if math.isfinite(value) else None


# --- On the screen -----------------------------------------------------------------------------------------------

HEADINGS = (
    "implementation", "forward ms", "backward ms", "both ms", "20..80 %", "GB/s", "x published", "per round", "x copy",
    "extra MB", "gradient error",
)  # fmt: skip


def table(group: Group) -> tuple[str, list[list[str]]]:
    """Title and cells of one group, without the headings."""
    case = group.case
    megabytes = case.floor_bytes("both") / 1e6
    threads = f"{group.threads} thread{'s' * (group.threads != 1)}"
    fits = ", which fit the last-level cache" if _fits_cache(case) else ""
    title = f"spectral_align {case.name}, {threads}; at least {megabytes:.1f} MB to move{fits}"
    return title, [_cells(group, result) for result in group.results]


def _cells(group: Group, result: Result) -> list[str]:
    name = result.variant.name
    error = f"{result.errors.gradient:.1e}" if result.errors else ""
    if result.status != OK:
        note = result.status.upper() if result.status == WRONG else result.status
        return [name, f"{note}: {result.reason}", *[""] * 8, error]
    memory = "" if result.extra_bytes is None else f"{result.extra_bytes / 1e6:.2f}"
    times = group.timed(name)
    if times is None:
        return [name, *[""] * 8, memory, error]
    forward, backward, both = (times.summary(phase) for phase in PHASES)
    baseline = group.timed(BASELINE)
    per_round = median_ratio(baseline.samples["both"], times.samples["both"]) if baseline and name != COPY else None
    only_both = name == COPY
    return [
        name,
        "" if only_both else _milliseconds(forward.median),
        "" if only_both else _milliseconds(backward.median),
        _milliseconds(both.median),
        f"{_milliseconds(both.p20)}..{_milliseconds(both.p80)}",
        f"{group.case.floor_bytes('both') / both.median / 1e6:.2f}",
        _ratio(group.ratio(name, "both")),
        _ratio(per_round),
        _ratio(group.times_copy(name)),
        memory,
        error,
    ]


def _milliseconds(value: float) -> str:
    return f"{value:.3f}" if value < 10 else f"{value:.1f}"


def _ratio(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def plain_table(title: str, headings: Sequence[str], cells: Sequence[Sequence[str]]) -> str:
    """Columns of text: the first flush left, the others flush right; a note in the second column may run on."""
    notes = [len(line) > 1 and ": " in line[1] for line in cells]
    regular = [headings, *(line for line, note in zip(cells, notes, strict=True) if not note)]
    widths = [max(len(line[i]) for line in regular) for i in range(len(headings))]
    widths[0] = max(widths[0], *(len(line[0]) for line in cells)) if cells else widths[0]
    text = [title]
    for line, note in zip([headings, *cells], [False, *notes], strict=True):
        first = line[0].ljust(widths[0])
        others = [line[1]] if note else [cell.rjust(width) for cell, width in zip(line[1:], widths[1:], strict=True)]
        text.append("  ".join([first, *others]).rstrip())
    return "\n".join(text)


def show(group: Group) -> None:
    """Prints the table of a group, with rich on a terminal that is wide enough, and as plain text otherwise."""
    show_table(*table(group), HEADINGS)


def show_table(title: str, cells: Sequence[Sequence[str]], headings: Sequence[str]) -> None:
    """Prints a table; a line whose second cell is a note like ``unavailable: ...`` has only that."""
    text = plain_table(title, headings, cells)
    try:
        from rich.console import Console
        from rich.table import Table
    except ImportError:
        print(text, end="\n\n", flush=True)
        return
    console = Console(highlight=False)
    if not console.is_terminal or console.width < max(map(len, text.splitlines()[1:])) + 2 * len(headings):
        print(text, end="\n\n", flush=True)
        return
    notes = [line for line in cells if ": " in line[1]]
    pretty = Table(title=title, title_justify="left")
    for index, heading in enumerate(headings):
        pretty.add_column(heading, justify="right" if index else "left", no_wrap=True)
    for line in cells:
        if line not in notes:
            pretty.add_row(*line, style="bold" if line[0].startswith("skd-") else None)
    console.print(pretty)
    for line in notes:
        console.print(f"{line[0]}: {line[1]}", style="red" if line[1].startswith("WRONG") else "dim", markup=False)
    console.print()


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
        {"case": g.case.name, "threads": g.threads, "variant": r.variant.name, "milliseconds": r.times.samples}
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


# --- Progress ----------------------------------------------------------------------------------------------------


class Progress:
    """What is being done, on stderr: a line that replaces itself on a terminal, a line per configuration elsewhere."""

    def __init__(self, total: int, stream=None):
        self._total, self._done = total, 0
        self._stream = stream if stream is not None else sys.stderr
        self._live = self._stream.isatty()
        self._name = ""

    def begin(self, name: str) -> None:
        """The next configuration."""
        self._done += 1
        self._name = name
        if not self._live:
            print(f"[{self._done}/{self._total}] {name}", file=self._stream, flush=True)

    def stage(self, text: str) -> None:
        """What is being done for it."""
        if self._live:
            line = f"[{self._done}/{self._total}] {self._name}: {text}"
            self._stream.write("\r\x1b[K" + line[:110])
            self._stream.flush()

    def clear(self) -> None:
        """Makes room for a table."""
        if self._live:
            self._stream.write("\r\x1b[K")
            self._stream.flush()
