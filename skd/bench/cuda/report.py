"""The rows of a measurement on CUDA: as tables on the screen, as CSV and JSON, and as a Markdown page.

What is shown and judged is computed from rows, which are plain dictionaries, so that a page can be made again from
``rows.json``::

    python -m skd.bench.cuda.report FOLDER
"""

import dataclasses
import json
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

from skd.bench.case import COPY
from skd.bench.cuda import goals
from skd.bench.cuda.losses import COPY_GRAPH
from skd.bench.cuda.sampling import MODES, Times
from skd.bench.cuda.workloads import AnyCase, fits_cache
from skd.bench.pairs import BASELINE
from skd.bench.report import OK, WRONG, Checked, TimedTogether, csv_text, write_files
from skd.bench.tables import show_table


@dataclasses.dataclass
class Result(Checked):
    """What is known of one variant in one case."""

    launches: dict[str, float | None] = dataclasses.field(default_factory=dict)
    kernels: list[str] = dataclasses.field(default_factory=list)
    times: Times | None = None


@dataclasses.dataclass
class Group(TimedTogether[Times]):
    """Variants of one case, all of them or those of one look at it."""

    number: int
    case: AnyCase
    l2_bytes: int
    results: list[Result]

    def median(self, name: str, cache: str, phase: str) -> float | None:
        """Milliseconds on the device."""
        times = self.timed(name)
        summary = None if times is None else times.summary(cache, phase)
        return None if summary is None else summary.median

    def copy(self, cache: str) -> float | None:
        """Milliseconds of the copy of the same bytes, the faster of the plain and the captured one."""
        found = [self.median(name, cache, "both") for name in (COPY, COPY_GRAPH)]
        return min((milliseconds for milliseconds in found if milliseconds is not None), default=None)


ROW_FIELDS = (
    "group", "operation", "match", "workload", "recipe", "layers", "batch", "layout", "dtype", "variant",
    "variant_layout", "cache", "phase", "status", "reason", "samples", "calls_per_sample", "late_samples", "median_ms",
    "p20_ms", "p80_ms", "host_ms", "floor_bytes", "student_bytes", "fits_l2", "gb_per_s", "percent_of_copy",
    "ratio_to_published_nchw", "launches", "extra_bytes", "loss_relative_error", "gradient_relative_l2",
    "gradient_cosine", "gradient_bias", "spectra_relative_error",
)  # fmt: skip
"""The columns of a measurement; those of the conditions follow. Times are milliseconds per call on the device, GB 1e9
bytes. ``host_ms`` is what the host takes to put a call into the queue: where it is longer than ``median_ms`` and
nothing else keeps the device busy, a caller waits for the host. ``percent_of_copy`` is the time of a copy of the same
bytes, measured in the same group and cache state, over the time of forward and backward. ``launches`` are kernels,
copies and fills on the device in one call. ``late_samples`` contain time in which the device waited for the host."""


def rows(group: Group) -> list[dict[str, object]]:
    """One row per variant, cache state and phase. Only a right result has times, rates and ratios."""
    case = group.case
    found = []
    for result in group.results:
        name = result.variant.name
        undivided = result.variant.graph or result.variant.is_copy or case.undivided
        for cache, phase in MODES:
            if undivided and phase != "both":
                continue
            row: dict[str, object] = dict.fromkeys(ROW_FIELDS)
            row |= {
                "group": group.number,
                "operation": case.operation,
                "match": case.match,
                "workload": case.workload,
                "recipe": case.recipe,
                "layers": "; ".join(shape.name for shape in case.layers),
                "batch": case.batch,
                "layout": case.layout,
                "dtype": case.dtype,
                "variant": name,
                "variant_layout": "nchw" if result.variant.nchw else case.layout,
                "cache": cache,
                "phase": phase,
                "status": result.status,
                "reason": result.reason,
                "floor_bytes": case.floor_bytes(phase),
                "student_bytes": case.student_bytes,
                "fits_l2": fits_cache(case, group.l2_bytes),
                "launches": result.launches.get(phase),
                "extra_bytes": result.extra_bytes,
            }
            row |= result.error_columns()
            times = group.timed(name)
            summary = None if times is None else times.summary(cache, phase)
            if times is not None and summary is not None:
                row["samples"] = len(times.device[cache, phase])
                row["calls_per_sample"] = times.calls[cache, phase]
                row["late_samples"] = times.late[cache, phase]
                row["median_ms"], row["p20_ms"], row["p80_ms"] = summary.median, summary.p20, summary.p80
                row["host_ms"] = times.host_milliseconds(cache, phase)
                row["gb_per_s"] = case.floor_bytes(phase) / summary.median / 1e6
                copy, baseline = group.copy(cache), group.median(BASELINE, cache, phase)
                if phase == "both" and copy is not None:
                    row["percent_of_copy"] = 100 * copy / summary.median
                if baseline is not None and not result.variant.is_copy:
                    row["ratio_to_published_nchw"] = baseline / summary.median
            found.append(row)
    return found


# --- Tables --------------------------------------------------------------------------------------------------------

HEADINGS = (
    "implementation", "forward ms", "backward ms", "both ms", "20..80 %", "warm ms", "host ms", "GB/s", "% of copy",
    "x published", "launches", "extra MB", "error",
)  # fmt: skip


def table(of_group: Sequence[dict]) -> tuple[str, list[list[str]]]:
    """Title and cells of the rows of one group, without the headings."""
    first = next(row for row in of_group if row["phase"] == "both")
    fits = ", which fit the L2 cache" if first["fits_l2"] else ""
    title = f"{first['workload']}, {first['layout']}, {first['dtype']}, {first['match']}"
    title += f"; at least {first['floor_bytes'] / 1e6:.1f} MB to move{fits}"
    names = list(dict.fromkeys(row["variant"] for row in of_group))
    return title, [_cells([row for row in of_group if row["variant"] == name]) for name in names]


def _cells(of_variant: Sequence[dict]) -> list[str]:
    by_mode = {(row["cache"], row["phase"]): row for row in of_variant}
    both = by_mode["cold", "both"]
    # Of the gradient, or of the spectra where there is no other result.
    error = both["gradient_relative_l2"] if both["gradient_relative_l2"] is not None else both["spectra_relative_error"]
    error = "" if error is None else f"{error:.1e}"
    if both["status"] != OK:
        note = "WRONG" if both["status"] == WRONG else both["status"]
        return [both["variant"], f"{note}: {both['reason']}", *[""] * (len(HEADINGS) - 3), error]

    def milliseconds(cache: str, phase: str, column: str = "median_ms") -> str:
        row = by_mode.get((cache, phase))
        return "" if row is None else _number(row[column], 4)

    spread = "" if both["p20_ms"] is None else f"{both['p20_ms']:.4f}..{both['p80_ms']:.4f}"
    if both["late_samples"]:
        spread += "*"
    return [
        both["variant"],
        milliseconds("cold", "forward"),
        milliseconds("cold", "backward"),
        milliseconds("cold", "both"),
        spread,
        milliseconds("warm", "both"),
        milliseconds("cold", "both", "host_ms"),
        _number(both["gb_per_s"], 0),
        _number(both["percent_of_copy"], 1),
        _number(both["ratio_to_published_nchw"], 2),
        "" if both["launches"] is None else f"{both['launches']:g}",
        "" if both["extra_bytes"] is None else f"{both['extra_bytes'] / 1e6:.2f}",
        error,
    ]


def _number(value: float | None, digits: int) -> str:
    return "" if value is None else f"{value:.{digits}f}"


def show(group: Group) -> None:
    """Prints the table of a group."""
    title, cells = table(rows(group))
    show_table(title, cells, HEADINGS)


def groups_of(all_rows: Iterable[dict]) -> list[list[dict]]:
    """The rows of each group, in their order; groups of different runs stay apart."""
    found: dict[tuple, list[dict]] = {}
    for row in all_rows:
        found.setdefault((row.get("date"), row["group"]), []).append(row)
    return list(found.values())


LEGEND = """\
Times are milliseconds per call on the device, medians, with a cold L2 cache unless the column says warm; "both" is
forward and backward. The queue is filled before the device begins, so the host is not in them: "host ms" is what it
takes to put one call into the queue. "% of copy" is the time of a copy of the same bytes over that of the call; "x
published" the speed against the published form in eager PyTorch on NCHW maps; "launches" kernels, copies and fills per
call; "extra MB" the peak of memory beyond the inputs; "error" the gradient's against float64, relative L2, or that of
the worst bin of an intensity, whose only phase is "both". `*`: the device waited for the host in some samples. A wrong
result has no time."""


def markdown(runs: Sequence[dict]) -> str:
    """The page of some runs (``conditions`` and ``rows`` each), with the goals' verdict over all their rows."""
    lines = ["# skd on CUDA", ""]
    for run in runs:
        conditions = run["conditions"]
        changed = " with uncommitted changes" if conditions.get("uncommitted_changes") else ""
        lines += [
            f"- {conditions.get('device')}, driver {conditions.get('driver')}, CUDA {conditions.get('cuda')}, "
            f"PyTorch {conditions.get('torch')}, Triton {conditions.get('triton')}; skd {conditions.get('skd')} at "
            f"{conditions.get('commit') or 'an unknown commit'}{changed}; {conditions.get('date')}"
            + (f"; left out: {conditions['left_out']}" if conditions.get("left_out") else "")
        ]
    lines += ["", LEGEND, ""]
    everything = all_rows(runs)
    lines += ["## Goals", "", *(f"- {line}" for line in goals.sentences(goals.verdicts(everything))), ""]
    lines += ["## Times", ""]
    for of_group in groups_of(everything):
        title, cells = table(of_group)
        lines += [f"### {title}", "", _markdown_line(HEADINGS), "|---" + "|---:" * (len(HEADINGS) - 1) + "|"]
        lines += [_markdown_line(line) for line in cells]
        lines.append("")
    return "\n".join(lines)


def _markdown_line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


# --- Files ---------------------------------------------------------------------------------------------------------


def all_rows(runs: Sequence[dict]) -> list[dict]:
    """The rows of several runs, each with its conditions."""
    return [row | run["conditions"] for run in runs for row in run["rows"]]


def record(groups: Sequence[Group], conditions: dict[str, object]) -> dict:
    """One run as it goes into ``rows.json``: conditions, rows, samples, and the kernels' names."""
    details = []
    for group in groups:
        for result in group.results:
            if result.status != OK or result.times is None:
                continue
            entry = {"group": group.number, "case": group.case.name, "variant": result.variant.name}
            entry["milliseconds"] = {f"{c} {p}": list(t) for (c, p), t in result.times.device.items()}
            # Each name once: a layer-by-layer form has dozens of launches of a few kernels.
            entry["kernels"] = list(dict.fromkeys(result.kernels))
            details.append(entry)
    return {"conditions": conditions, "rows": [row for group in groups for row in rows(group)], "samples": details}


def read(folder: Path) -> list[dict]:
    """The runs in a folder's ``rows.json``.

    Raises:
        ValueError: the file is no measurement on CUDA.
        OSError: it cannot be read.
    """
    path = Path(folder) / "rows.json"
    try:
        runs = json.loads(path.read_text(encoding="utf-8"))["runs"]
        for run in runs:
            run["conditions"], run["rows"]  # noqa: B018  (KeyError)
    except (ValueError, KeyError, TypeError):
        raise ValueError(f"{path} holds no measurement on CUDA") from None
    return runs


def write(folder: Path, runs: Sequence[dict]) -> list[Path]:
    """Writes ``rows.csv`` (every row with its conditions), ``rows.json`` and ``table.md``; each appears complete or not
    at all. Returns their paths."""
    fields = dict.fromkeys(ROW_FIELDS)
    for run in runs:
        fields |= dict.fromkeys(run["conditions"])
    return write_files(
        folder,
        {
            "rows.csv": csv_text(list(fields), all_rows(runs)),
            "rows.json": json.dumps({"runs": list(runs)}, allow_nan=False) + "\n",
            "table.md": markdown(runs),
        },
    )


def main(arguments: Sequence[str]) -> int:
    """Writes ``table.md`` of each folder anew from its ``rows.json``."""
    if not arguments:
        print("usage: python -m skd.bench.cuda.report FOLDER...", file=sys.stderr)
        return 2
    for folder in map(Path, arguments):
        try:
            write_files(folder, {"table.md": markdown(read(folder))})
        except (OSError, ValueError) as error:
            print(f"skd bench: {error}", file=sys.stderr)
            return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
