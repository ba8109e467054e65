"""How far a run is: the bar of a terminal, the lines of a log, the time left."""

import io
import re
import time

import pytest

pytest.importorskip("rich", reason="the trainer needs it (extra 'train')")

from rich.console import Console  # noqa: E402

from skd.distill.progress import Pace, RunProgress, duration_text, losses_text  # noqa: E402

LOSSES = {"train_loss": 1.25, "train_ce": 0.5, "train_kd": 2.0, "train_spectral": 0.0625}


class Clock:
    def __init__(self):
        self.seconds = 1000.0

    def __call__(self):
        return self.seconds


def make(total=100.0, terminal=False, **options):
    console = Console(file=io.StringIO(), width=100, force_terminal=terminal, _environ={"TERM": "xterm"})
    clock = Clock()
    return RunProgress(console, total, now=clock, **options), clock, console


def plain(text):
    """Without the terminal's control sequences."""
    return re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", text)


def train(progress, clock, label="logits", epochs=2, steps=5, cost=10.0, finished=0):
    progress.training(label, epochs, finished)
    for epoch in range(finished, epochs):
        for _ in range(steps):
            clock.seconds += 3.0
            progress.advance(cost)
        progress.show(1234.4, LOSSES)
        progress.finish_epoch(45.55 + epoch)


def test_without_a_terminal_every_epoch_is_one_line():
    progress, clock, console = make()
    with progress:
        progress.say("before [1, 2]")
        train(progress, clock, "label [x]")
    losses = "loss 1.25 (ce 0.5, kd 2, spectral 0.0625)"
    assert console.file.getvalue().splitlines() == [
        "before [1, 2]",
        f"label [x]: epoch 1/2, {losses}, top-1 45.5%, 1234 images/s, about 15 s left",
        f"label [x]: epoch 2/2, {losses}, top-1 46.5%, 1234 images/s, about 0 s left",
    ]


def test_a_long_line_of_a_log_is_not_broken():
    progress, clock, console = make()
    with progress:
        train(progress, clock, "x" * 150, epochs=1)
    assert len(console.file.getvalue().splitlines()) == 1


def test_a_run_that_goes_on_begins_where_it_was():
    progress, clock, console = make(completed=50.0)
    with progress:
        assert progress.seconds_left() is None
        train(progress, clock, epochs=2, finished=1, steps=1, cost=10.0)
    assert "epoch 2/2" in console.file.getvalue()
    assert "about 12 s left" in console.file.getvalue()  # 10 of the 50 that remained took 3 seconds, not 60


def test_what_was_read_of_one_training_is_not_told_of_the_next():
    progress, clock, console = make()
    with progress:
        train(progress, clock, epochs=1, steps=2)
        progress.training("spectral", 1)
        progress.finish_epoch(50.0)
    assert console.file.getvalue().splitlines()[-1].startswith("spectral: epoch 1/1, top-1 50.0%, about")


def test_other_processes_are_silent():
    for terminal in (False, True):
        progress, clock, console = make(terminal=terminal, enabled=False)
        with progress:
            progress.say("hello")
            train(progress, clock)
        assert console.file.getvalue() == ""


def test_on_a_terminal_there_is_one_bar_with_a_reading_below():
    progress, clock, console = make(terminal=True)
    with progress:
        train(progress, clock, "logits", epochs=2, steps=1)
        progress.say("said above [the bar]")
    shown = plain(console.file.getvalue())
    last = [line.strip() for line in shown.splitlines() if line.strip()][-2:]
    assert last[0].startswith("logits 46.5%") and "20%" in last[0] and "24 s left" in last[0]
    assert last[1] == "epoch 2/2, loss 1.25 (ce 0.5, kd 2, spectral 0.0625), 1234 images/s"
    assert "said above [the bar]" in shown
    assert shown.index("said above") < shown.rindex("logits 46.5%")
    assert "top-1" not in shown  # no line per epoch beside the bar


def test_the_bar_of_a_run_that_goes_on_is_not_empty():
    progress, _, console = make(terminal=True, completed=50.0)
    with progress:
        pass
    assert "50%" in plain(console.file.getvalue())


def test_a_dumb_terminal_gets_lines():
    console = Console(file=io.StringIO(), width=100, force_terminal=True, _environ={"TERM": "dumb"})
    clock = Clock()
    with RunProgress(console, 100.0, now=clock) as progress:
        train(progress, clock)
    assert len(console.file.getvalue().splitlines()) == 2


@pytest.mark.parametrize("terminal", [False, True])
def test_a_step_costs_microseconds(terminal):
    console = Console(file=io.StringIO(), force_terminal=terminal)
    steps = 20_000
    with RunProgress(console, steps) as progress:
        progress.training("labels", 1)
        began = time.process_time()
        for _ in range(steps):
            progress.advance(1.0)
        assert (time.process_time() - began) / steps < 50e-6


def test_the_pace_follows_what_changed():
    pace = Pace(0.0)
    for second in range(1, 1001):
        pace.add(float(second), float(second))  # 1 per second
    assert pace.seconds_until(2000.0) == pytest.approx(1000.0)
    done = 1000.0
    for second in range(1001, 2201):
        done += 0.1  # what comes later is slower than its cost said
        pace.add(float(second), done)
    assert pace.seconds_until(done + 10.0) == pytest.approx(100.0, rel=0.05)
    assert pace.seconds_until(done) == 0.0
    assert len(pace._samples) < 500


def test_the_pace_counts_the_pauses():
    pace, now, done = Pace(0.0), 0.0, 0.0
    for _ in range(50):
        for _ in range(100):  # an epoch of 10 seconds
            now, done = now + 0.1, done + 1.0
            pace.add(now, done)
        now += 10.0  # its test
    pace.add(now, done)
    assert pace.seconds_until(done + 100.0) == pytest.approx(20.0, rel=0.05)


def test_nothing_is_known_before_something_advanced():
    pace = Pace(5.0, done=3.0)
    assert pace.seconds_until(10.0) is None
    pace.add(6.0, 3.0)
    assert pace.seconds_until(10.0) is None
    pace.add(6.0, 4.0)
    assert pace.seconds_until(10.0) == pytest.approx(6.0)
    same_moment = Pace(5.0)
    same_moment.add(5.0, 1.0)
    assert same_moment.seconds_until(10.0) is None


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0 s"),
        (89, "89 s"),
        (100, "2 min"),
        (5399, "90 min"),
        (5400, "1.5 h"),
        (86400, "24 h"),
        (200_000, "2.3 days"),
    ],
)
def test_durations(seconds, text):
    assert duration_text(seconds) == text


def test_losses_with_one_part_are_their_total():
    assert losses_text({"train_loss": 0.5, "train_ce": 0.5, "train_kd": 0.0, "train_spectral": 0.0}) == "loss 0.5"
    assert losses_text({"loss": float("nan"), "ce": 1.0, "kd": float("nan")}) == "loss nan (ce 1, kd nan)"
