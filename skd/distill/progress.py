"""How far a run is: a bar on a terminal, a line per epoch elsewhere."""

import time
from collections import deque
from collections.abc import Callable, Iterable

from rich.console import Console, RenderableType
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn
from rich.text import Text

_REDRAW = 0.2
"""Seconds between two changes of the bar; a step may be much shorter."""


class RunProgress:
    """Shows one run of several trainings, as one bar over its whole cost.

    On a terminal the bar has the training's name, the time left and, on a line below, what the last reading gave. Where
    there is no terminal, such as in the log of a job, every epoch gets one line.

    Args:
        console: where to show it.
        total: cost of the whole run, in the units of :meth:`advance`; costs in proportion to time make the time left
            right from the start.
        completed: cost that is done already, if the run is resumed.
        enabled: False in the processes that do not speak; then nothing is ever shown.
        now: the clock, in seconds.
    """

    def __init__(
        self,
        console: Console,
        total: float,
        *,
        completed: float = 0.0,
        enabled: bool = True,
        now: Callable[[], float] = time.monotonic,
    ):
        self._console, self._total, self._enabled, self._now = console, total, enabled, now
        self._completed = completed
        self._pace = Pace(now(), completed)
        self._drawn = -_REDRAW
        self._label, self._epochs, self._epoch = "", 1, 1
        self._losses = self._rate = ""
        live = enabled and console.is_terminal and not console.is_dumb_terminal
        self._bar = _Bar(console, total, completed) if live else None

    def __enter__(self) -> "RunProgress":
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(self, *exc_info) -> None:
        if self._bar is not None:
            self._draw()
            self._bar.stop()

    def training(self, label: str, epochs: int, finished: int = 0) -> None:
        """The next training begins.

        Args:
            label: what to call it.
            epochs: how many it takes.
            finished: how many of them are done already.
        """
        self._label, self._epochs, self._epoch = label, epochs, finished + 1
        self._losses = self._rate = ""
        if self._bar is not None:
            self._bar.title = label
            self._draw()

    def advance(self, cost: float) -> None:
        """So much more is done; cheap enough for every step."""
        self._completed += cost
        now = self._now()
        if now - self._drawn >= _REDRAW:
            self._drawn = now
            if self._bar is None:
                self._pace.add(now, self._completed)
            else:
                self._draw()

    def show(self, images_per_second: float, losses: dict[str, float]) -> None:
        """A reading of the training under way.

        Args:
            images_per_second: of all processes.
            losses: by name, the total first, then its parts, of which those that are 0 are left out.
        """
        self._losses, self._rate = losses_text(losses), _rate_text(images_per_second)
        if self._bar is not None:
            self._draw()

    def finish_epoch(self, top1: float) -> None:
        """An epoch has been tested, ``top1`` in percent; call :meth:`show` with the whole epoch's means before."""
        if self._bar is not None:
            self._bar.title = f"{self._label} {top1:.1f}%"
        elif self._enabled:
            left = self.seconds_left()
            time_left = "" if left is None else f"about {duration_text(left)} left"
            where = f"{self._label}: epoch {self._epoch}/{self._epochs}"
            self.say(_joined(where, self._losses, f"top-1 {top1:.1f}%", self._rate, time_left))
        self._epoch = min(self._epoch + 1, self._epochs)
        if self._bar is not None:
            self._draw()

    def say(self, text: str) -> None:
        """Print a text, above the bar if there is one."""
        if self._enabled:
            self._console.print(text, soft_wrap=True, highlight=False, markup=False)

    def seconds_left(self) -> float | None:
        """Until the end of the run, at the pace of late; None before anything is known of it."""
        self._pace.add(self._now(), self._completed)
        return self._pace.seconds_until(self._total)

    def _draw(self) -> None:
        left = self.seconds_left()
        self._bar.left = "" if left is None else f"{duration_text(left)} left"
        where = f"epoch {self._epoch}/{self._epochs}" if self._label else ""
        self._bar.reading = _joined(where, self._losses, self._rate)
        self._bar.move_to(self._completed)


class Pace:
    """How fast something advances: over the later half of its time, or the last minute if that is longer.

    So a first guess that was wrong is forgotten, and the tests between the epochs count.

    Args:
        began: seconds on some clock.
        done: how much was done then.
    """

    _LEAST = 60.0
    _SAMPLES = 200

    def __init__(self, began: float, done: float = 0.0):
        self._began = began
        self._samples: deque[tuple[float, float]] = deque([(began, done)])

    def add(self, now: float, done: float) -> None:
        """So much is done now."""
        window = max(self._LEAST, (now - self._began) / 2)
        samples = self._samples
        # The last sample is the present one; it stays as a sample when it is far enough from the one before it.
        if len(samples) > 1 and samples[-1][0] - samples[-2][0] < window / self._SAMPLES:
            samples.pop()
        samples.append((now, done))
        while len(samples) > 2 and samples[1][0] <= now - window:
            samples.popleft()

    def seconds_until(self, total: float) -> float | None:
        """None if nothing has advanced."""
        (earlier, before), (later, done) = self._samples[0], self._samples[-1]
        if done >= total:
            return 0.0
        return (total - done) * (later - earlier) / (done - before) if done > before and later > earlier else None


class _Bar(Progress):
    """One bar, and a line below it."""

    def __init__(self, console: Console, total: float, completed: float):
        self.title = self.left = self.reading = ""
        columns = (
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            TaskProgressColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.fields[left]}"),
        )
        # Drawing takes a millisecond or two of Python's time, so it is not done ten times a second.
        super().__init__(*columns, console=console, refresh_per_second=2)
        self._run = self.add_task("", total=total, completed=completed, left="")

    def move_to(self, completed: float) -> None:
        self.update(self._run, description=self.title, completed=completed, left=self.left)

    def get_renderables(self) -> Iterable[RenderableType]:
        yield self.make_tasks_table(self.tasks)
        if self.reading:
            yield Text(self.reading, style="dim", no_wrap=True, overflow="ellipsis")


def losses_text(losses: dict[str, float]) -> str:
    """``{"train_loss": 1.2, "train_ce": 0.9, "train_kd": 1.1, "train_spectral": 0}`` as "loss 1.2 (ce 0.9, kd 1.1)"."""
    (name, total), *parts = ((name.removeprefix("train_"), value) for name, value in losses.items())
    shown = [f"{part} {value:.3g}" for part, value in parts if value != 0]
    # A single part is the whole.
    return f"{name} {total:.3g}" + (f" ({', '.join(shown)})" if len(shown) > 1 else "")


def duration_text(seconds: float) -> str:
    """A time to wait, in the unit that suits it."""
    for unit, length, most in (("s", 1, 90), ("min", 60, 90), ("h", 3600, 36)):
        if seconds < most * length:
            number = seconds / length
            return f"{number:.1f} {unit}" if unit == "h" and number < 10 else f"{number:.0f} {unit}"
    return f"{seconds / 86400:.1f} days"


def _joined(*parts: str) -> str:
    return ", ".join(part for part in parts if part)


def _rate_text(images_per_second: float) -> str:
    return f"{images_per_second:.{0 if images_per_second >= 10 else 1}f} images/s"
