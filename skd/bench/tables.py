"""Groups as tables on the screen, and what is being done meanwhile."""

import sys
from collections.abc import Sequence

from skd.bench.report import OK, WRONG, Group, Result, fits_cache
from skd.bench.timing import median_ratio


def headings(group: Group) -> tuple[str, ...]:
    """The columns of a group's table."""
    case = group.case
    shares = ("share",) if any(r.variant.share is not None for r in group.results) else ()
    gradient = "gradient error" if len(case.phases) > 1 else "error"
    timed = tuple(f"{phase} ms" for phase in case.phases)
    speed = f"x {case.baseline.removesuffix('-nchw')}", "per round", f"x {case.floor}"
    return ("implementation", *timed, "20..80 %", "GB/s", *speed, *shares, "extra MB", gradient)


def table(group: Group) -> tuple[str, list[list[str]]]:
    """Title and cells of one group, without the headings."""
    case = group.case
    megabytes = case.floor_bytes(group.headline) / 1e6
    threads = f"{group.threads} thread{'s' * (group.threads != 1)}"
    fits = ", which fit the last-level cache" if fits_cache(case) else ""
    title = f"{case.operation} {case.name}, {threads}; at least {megabytes:.1f} MB to move{fits}"
    columns = headings(group)
    return title, [[_cells(group, result).get(name, "") for name in columns] for result in group.results]


def _cells(group: Group, result: Result) -> dict[str, str]:
    """Heading -> text, for those that have one."""
    case, name = group.case, result.variant.name
    gradient = "gradient error" if len(case.phases) > 1 else "error"
    cells = {"implementation": name, gradient: f"{result.errors.shown:.1e}" if result.errors else ""}
    if result.status != OK:
        note = result.status.upper() if result.status == WRONG else result.status
        return cells | {f"{case.phases[0]} ms": f"{note}: {result.reason}"}
    cells["extra MB"] = "" if result.extra_bytes is None else f"{result.extra_bytes / 1e6:.2f}"
    times = group.timed(name)
    if times is None:
        return cells
    whole, baseline = times.summary(group.headline), group.timed(case.baseline)
    for phase in case.phases:
        if name != case.floor or phase == group.headline:
            cells[f"{phase} ms"] = _milliseconds(times.summary(phase).median)
    cells["20..80 %"] = f"{_milliseconds(whole.p20)}..{_milliseconds(whole.p80)}"
    cells["GB/s"] = f"{case.floor_bytes(group.headline) / whole.median / 1e6:.2f}"
    cells[f"x {case.baseline.removesuffix('-nchw')}"] = _ratio(group.ratio(name, group.headline))
    if baseline is not None and name != case.floor:
        per_round = median_ratio(baseline.samples[group.headline], times.samples[group.headline])
        cells["per round"] = _ratio(per_round)
    cells[f"x {case.floor}"] = _ratio(group.times_floor(name))
    percent = group.share(result.variant)
    cells["share"] = "" if percent is None else f"{percent:.1f}% {result.variant.share.sentence}"
    return cells


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
    show_table(*table(group), headings(group))


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
