"""What the parts of a training step cost, measured in a few steps of a run."""

import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from itertools import pairwise

import torch
from timm.task import TrainingTask
from torch import nn

PARTS = ("data", "teacher", "student", "loss", "optimizer", "other")
_NOTHING = nullcontext()


class CostMeter:
    """Shares out the time of measured steps among :data:`PARTS`; a step that is not measured costs nothing.

    ::

        with meter.step(measured=step % 50 == 49):
            with meter.part("data"):
                images, target = next(batches)
            result = task(images, target)
            with meter.part("student"):
                result["loss"].backward()
            with meter.part("optimizer"):
                optimizer.step()

    During ``task(...)`` the forward of the task's teacher, with what its images need, is "teacher", that of the
    trainable module "student", and what remains, the losses of labels, logits and maps, is "loss". (The spectral loss
    computes its gradient there too; what little its backward does is in "student" with the rest of it.) What nobody
    claims is "other", so the parts of a step add up to the step.

    The calls are seen from outside of DistributedDataParallel and torch.compile: their own work counts, and compiled
    code is never compiled anew for it. On a CUDA device the moments are events in its stream, which nothing waits for
    before :meth:`mean`: a part is what the device spent on it or idle in it, so "data" is the wait that remains.

    The first steps of a process compile and allocate; they are better not measured.

    Args:
        task: whose calls are watched; wrapped and compiled already, or later.
        device: where it computes.
        now: the clock of the host, in seconds.
    """

    def __init__(self, task: TrainingTask, device: torch.device, now: Callable[[], float] = time.perf_counter):
        self._task = task
        self._clock = _DeviceClock(device) if device.type == "cuda" else _HostClock(now)
        self._seconds = dict.fromkeys(PARTS, 0.0)
        self._steps = 0
        # Of the step in progress: each part it came to and when; and the parts it is in, the innermost last.
        self._timeline: list[tuple[str, object]] | None = None
        self._within: list[str] = []
        self._unread: deque[list[tuple[str, object]]] = deque()

    def step(self, measured: bool = True) -> AbstractContextManager:
        """Around a whole step; one that ends with an exception does not count."""
        return self._measure() if measured else _NOTHING

    def part(self, name: str) -> AbstractContextManager:
        """Around what belongs to a part, which may lie within another one; outside of measured steps nothing.

        Raises:
            ValueError: from entering it in a measured step, for a name that is not in :data:`PARTS`.
        """
        return _NOTHING if self._timeline is None else self._claim(name)

    @property
    def steps(self) -> int:
        """How many were measured."""
        return self._steps + len(self._unread)

    def mean(self) -> dict[str, float]:
        """Seconds per step of every part, all 0 before the first measured step; waits for the device."""
        self._read(wait=True)
        return {part: seconds / max(1, self._steps) for part, seconds in self._seconds.items()}

    def state_dict(self) -> dict:
        """Plain numbers; waits for the device."""
        self._read(wait=True)
        return {"steps": self._steps, "seconds": dict(self._seconds)}

    def load_state_dict(self, state: dict) -> None:
        """Go on from there."""
        self._unread.clear()
        self._steps = state["steps"]
        self._seconds = {part: state["seconds"].get(part, 0.0) for part in PARTS}

    @contextmanager
    def _measure(self) -> Iterator[None]:
        self._read(wait=False)
        with self._watching():
            self._timeline = [("other", self._clock.now())]
            self._within = ["other"]
            try:
                yield
                self._timeline.append(("", self._clock.now()))
                self._unread.append(self._timeline)
            finally:
                self._timeline = None

    @contextmanager
    def _claim(self, part: str) -> Iterator[None]:
        self._enter(part)
        try:
            yield
        finally:
            self._leave()

    def _enter(self, part: str) -> None:
        if part not in PARTS:
            raise ValueError(f"{part!r} is no part of a step; use one of {', '.join(PARTS)}")
        self._within.append(part)
        self._timeline.append((part, self._clock.now()))

    def _leave(self) -> None:
        self._within.pop()
        self._timeline.append((self._within[-1], self._clock.now()))

    @contextmanager
    def _watching(self) -> Iterator[None]:
        """The task's modules report their calls."""
        hooks = []
        try:
            for part, module in self._modules():
                # What torch.compile or DistributedDataParallel returned has hooks of its own, outside of what it wraps.
                hooks.append(module.register_forward_pre_hook(lambda *_, part=part: self._enter(part), prepend=True))
                hooks.append(module.register_forward_hook(lambda *_: self._leave()))
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _modules(self) -> list[tuple[str, nn.Module]]:
        task, student = self._task, self._task.get_trainable_module()
        found = [("student", student), ("teacher", getattr(task, "teacher", None))]
        # What is done to the images for the teacher's sake.
        found.append(("teacher", getattr(task, "teacher_images", None)))
        if student is not task:  # else it has no module of its own for the student
            found.append(("loss", task))
        return [(part, module) for part, module in found if isinstance(module, nn.Module)]

    def _read(self, wait: bool) -> None:
        while self._unread:
            timeline = self._unread[0]
            if wait:
                self._clock.wait(timeline[-1][1])
            elif not self._clock.has_passed(timeline[-1][1]):
                return
            for (part, begun), (_, ended) in pairwise(timeline):
                self._seconds[part] += self._clock.seconds(begun, ended)
            self._steps += 1
            self._unread.popleft()


class _HostClock:
    """The present time of the host."""

    def __init__(self, now: Callable[[], float]):
        self.now = now

    def has_passed(self, moment: float) -> bool:
        return True

    def wait(self, moment: float) -> None:
        pass

    def seconds(self, begun: float, ended: float) -> float:
        return ended - begun


class _DeviceClock:
    """Moments in the stream of a CUDA device, which come when the device has done what was asked of it before."""

    def __init__(self, device: torch.device):
        self._device = device

    def now(self) -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self._device))
        return event

    def has_passed(self, moment: torch.cuda.Event) -> bool:
        return moment.query()

    def wait(self, moment: torch.cuda.Event) -> None:
        moment.synchronize()

    def seconds(self, begun: torch.cuda.Event, ended: torch.cuda.Event) -> float:
        return begun.elapsed_time(ended) / 1000
