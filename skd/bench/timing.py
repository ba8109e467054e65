"""Interleaved timing: every implementation once per round, in random order, in one process."""

import dataclasses
import gc
import random
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import torch

from skd.bench import memory

PHASES = ("forward", "backward", "both")
"""What is timed. ``forward`` is the forward of training, with a student that requires grad: an implementation may
compute the gradient there. ``backward`` asks for the student's gradient. ``both`` is one after the other."""

LEAST_ROUNDS = 5
"""Rounds that are done however long they take, unless fewer are asked for."""


class Timed(Protocol):
    """What can be timed (every :class:`skd.bench.case.Run` is)."""

    def forward(self) -> Any: ...

    def backward(self, forward: Any) -> Any: ...


@dataclasses.dataclass(frozen=True)
class Summary:
    """Median and 20th and 80th percentile of some times, in milliseconds."""

    median: float
    p20: float
    p80: float

    @classmethod
    def of(cls, times: list[float]) -> "Summary":
        """Of at least one time."""
        if len(times) == 1:
            return cls(times[0], times[0], times[0])
        fifths = statistics.quantiles(times, n=5, method="inclusive")
        return cls(statistics.median(times), fifths[0], fifths[3])


@dataclasses.dataclass
class Times:
    """Milliseconds of one implementation, ``samples[phase][round]``, and the page faults of each round."""

    samples: dict[str, list[float]]
    page_faults: list[int]

    def summary(self, phase: str) -> Summary:
        return Summary.of(self.samples[phase])


def once(run: Timed) -> dict[str, float]:
    """One forward and backward, in milliseconds per phase. The results are freed after the clock has stopped."""
    start = time.perf_counter_ns()
    loss = run.forward()
    middle = time.perf_counter_ns()
    gradient = run.backward(loss)
    end = time.perf_counter_ns()
    del loss, gradient
    return {"forward": (middle - start) / 1e6, "backward": (end - middle) / 1e6, "both": (end - start) / 1e6}


def interleaved(
    runs: Mapping[str, Timed],
    rounds: int,
    seconds: float,
    *,
    seed: int = 0,
    before_each: Callable[[], object] | None = None,
    after_round: Callable[[int], object] | None = None,
) -> dict[str, Times]:
    """Times of all implementations, warmed up before, from rounds in which each runs once.

    Whatever disturbs the machine for a while disturbs all of them alike, and in a new order each time. The garbage
    collector is off.

    Args:
        runs: name -> implementation.
        rounds: how often each runs.
        seconds: no round begins after that time, once :data:`LEAST_ROUNDS` are done.
        seed: of the order.
        before_each: called untimed before each run (for example to flush the caches).
        after_round: called with the number of rounds done.
    """
    order = list(runs)
    shuffle = random.Random(seed).shuffle
    times = {name: Times({phase: [] for phase in PHASES}, []) for name in runs}
    gc.collect()
    with memory.no_garbage_collection():
        for run in runs.values():  # warm-up
            once(run)
        began = time.monotonic()
        for done in range(1, rounds + 1):
            shuffle(order)
            for name in order:
                if before_each is not None:
                    before_each()
                faults = memory.page_faults()
                milliseconds = once(runs[name])
                times[name].page_faults.append(memory.page_faults() - faults)
                for phase in PHASES:
                    times[name].samples[phase].append(milliseconds[phase])
            if after_round is not None:
                after_round(done)
            if done >= LEAST_ROUNDS and time.monotonic() - began > seconds:
                break
    return times


def median_ratio(slower: list[float], faster: list[float]) -> float:
    """The median over rounds of ``slower / faster`` of the same round."""
    return statistics.median(a / b for a, b in zip(slower, faster, strict=True))


class CacheFlush:
    """Called before a run, evicts the maps from all caches by going over memory of twice the last level's size."""

    def __init__(self, cache_bytes: int):
        self._memory = torch.ones(2 * cache_bytes // 8, dtype=torch.int64)

    def __call__(self) -> None:
        self._memory.add_(1)
