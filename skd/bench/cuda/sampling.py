"""Times of a device that works through a queue: samples between two time stamps, implementations interleaved.

A sample is a number of calls in a row. Before it the queue is held by a kernel that does nothing, for about as long as
the host needs to put the calls into the queue, so that the device finds one call after the other as it does in the
middle of a training step, and the time is the device's own. What the host needs is measured beside it. A sample that
the device began before the host was done is taken again after a longer hold.

cold: the L2 cache is flushed before the sample, each call of it works on maps of its own, and what the calls return is
kept until the end, so that nothing is found in the cache that an earlier call read or wrote.
warm: every call works on the same maps, after one call that is not timed.
"""

import dataclasses
import gc
import random
from collections.abc import Callable, Mapping
from typing import Any, Protocol

from skd.bench import memory
from skd.bench.cuda.device import Device
from skd.bench.timing import LEAST_ROUNDS, Summary

MODES = (("cold", "both"), ("cold", "forward"), ("cold", "backward"), ("warm", "both"), ("warm", "forward"))
"""Cache and phase of what is sampled. A backward has no warm state: its maps are results of forwards before it."""

MOST_HOST_MILLISECONDS = 4.0
"""A sample has no more calls than the host puts into the queue in this time."""

MOST_LAUNCHES = 500
"""And no more launches: a queue has room for about a thousand, and a full one makes the host wait."""

MOST_TRIES = 3


class Timed(Protocol):
    """What can be sampled (:class:`skd.bench.cuda.losses.Run` is one)."""

    sets: int

    def forward(self, index: int) -> Any: ...

    def backward(self, forward: Any) -> Any: ...

    def both(self, index: int) -> Any: ...


@dataclasses.dataclass
class Subject:
    """One implementation with what its sampling needs.

    Attributes:
        run: the implementation.
        launches: how many kernels a call starts; None if unknown.
        replays: for a captured one, cache -> (replay, calls in the graph); it is sampled in whole replays.
        undivided: there is no forward and backward to sample apart, as in a copy.
    """

    run: Timed
    launches: float | None = None
    replays: dict[str, tuple[Callable[[], None], int]] | None = None
    undivided: bool = False

    def modes(self) -> tuple[tuple[str, str], ...]:
        """A captured implementation has forward and backward in one graph."""
        undivided = self.undivided or self.replays is not None
        return tuple(mode for mode in MODES if not undivided or mode[1] == "both")


@dataclasses.dataclass
class Times:
    """Milliseconds per call of one implementation, ``device[cache, phase][sample]`` and ``host[cache, phase][sample]``.

    Attributes:
        calls: calls per sample.
        late: samples that the device began before the host was done, which therefore contain waiting for the host.
    """

    device: dict[tuple[str, str], list[float]] = dataclasses.field(default_factory=dict)
    host: dict[tuple[str, str], list[float]] = dataclasses.field(default_factory=dict)
    calls: dict[tuple[str, str], int] = dataclasses.field(default_factory=dict)
    late: dict[tuple[str, str], int] = dataclasses.field(default_factory=dict)

    def summary(self, cache: str, phase: str) -> Summary | None:
        """Of the device's times; None if there are none."""
        samples = self.device.get((cache, phase))
        return Summary.of(samples) if samples else None

    def host_milliseconds(self, cache: str, phase: str) -> float | None:
        samples = self.host.get((cache, phase))
        return Summary.of(samples).median if samples else None


class _Sampler:
    """Takes the samples of one implementation in one mode."""

    def __init__(self, device: Device, subject: Subject, cache: str, phase: str):
        self._device, self._run, self._cache, self._phase = device, subject.run, cache, phase
        self._replay = None if subject.replays is None else subject.replays[cache][0]
        self.calls = subject.run.sets if subject.replays is None else subject.replays[cache][1]
        self._hold = 0.0
        _, host, _ = self._once()  # a warm-up, and what a call costs the host
        if self._replay is None:
            per_call = host / self.calls
            by_host = int(MOST_HOST_MILLISECONDS / per_call) if per_call > 0 else self.calls
            by_launches = int(MOST_LAUNCHES / subject.launches) if subject.launches else self.calls
            self.calls = max(1, min(self.calls, by_host, by_launches))
            host = per_call * self.calls
        self._hold = 1.5 * host + 0.05

    def take(self) -> tuple[float, float, bool]:
        """Milliseconds per call on the device and on the host, and whether the device had to wait for the host."""
        for attempt in range(MOST_TRIES):
            device, host, late = self._once()
            if not late:
                break
            if attempt + 1 < MOST_TRIES:
                self._hold *= 2
        return device / self.calls, host / self.calls, late

    def _once(self) -> tuple[float, float, bool]:
        cold = self._cache == "cold"
        index = range(self.calls) if cold else [0] * self.calls
        forwards = [self._run.forward(i) for i in index] if self._phase == "backward" else None
        if cold:
            self._device.flush_cache()
        else:
            self._replay() if self._replay is not None else self._call(0, None)
        self._device.hold(self._hold)
        start = self._device.mark()
        began = self._device.seconds()
        kept = []
        if self._replay is not None:
            self._replay()
        else:
            for i in index:
                result = self._call(i, None if forwards is None else forwards[i])
                if cold:
                    kept.append(result)
                del result
        end = self._device.mark()
        host = (self._device.seconds() - began) * 1e3
        late = self._device.passed(start)
        return self._device.milliseconds(start, end), host, late

    def _call(self, index: int, forward: Any) -> Any:
        if self._phase == "backward":
            return self._run.backward(forward)
        return self._run.forward(index) if self._phase == "forward" else self._run.both(index)


def interleaved(
    device: Device,
    subjects: Mapping[str, Subject],
    rounds: int,
    seconds: float,
    *,
    seed: int = 0,
    after_round: Callable[[int], object] | None = None,
) -> dict[str, Times]:
    """Times of all implementations from rounds in which each gives one sample per mode, in a new order each time.

    Args:
        device: what they run on.
        subjects: name -> implementation.
        rounds: how many samples of each.
        seconds: no round begins after that time, once :data:`skd.bench.timing.LEAST_ROUNDS` are done.
        seed: of the order.
        after_round: called with the number of rounds done.
    """
    shuffle = random.Random(seed).shuffle
    gc.collect()
    with memory.no_garbage_collection():
        samplers = {
            (name, mode): _Sampler(device, subject, *mode)
            for name, subject in subjects.items()
            for mode in subject.modes()
        }
        times = {name: Times() for name in subjects}
        for (name, mode), sampler in samplers.items():
            times[name].calls[mode] = sampler.calls
            times[name].late[mode] = 0
        order = list(samplers)
        began = device.seconds()
        for done in range(1, rounds + 1):
            shuffle(order)
            for key in order:
                name, mode = key
                milliseconds, host, late = samplers[key].take()
                times[name].device.setdefault(mode, []).append(milliseconds)
                times[name].host.setdefault(mode, []).append(host)
                times[name].late[mode] += late
            if after_round is not None:
                after_round(done)
            if done >= LEAST_ROUNDS and device.seconds() - began > seconds:
                break
    return times
