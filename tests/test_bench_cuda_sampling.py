"""How calls are timed on a device with a queue, in a time of its own."""

import collections

import pytest
from bench_cuda_helpers import CpuDevice

from skd.bench import timing
from skd.bench.cuda import sampling
from skd.bench.cuda.sampling import MODES, Subject


class Queue(CpuDevice):
    """A device behind a queue, in a time of its own: the host goes on while the device does what it was given."""

    def __init__(self):
        super().__init__()
        self.host = self.done = 0.0
        self.log = []

    def work(self, host, device, note=None):
        self.host += host
        self.done = max(self.done, self.host) + device
        self.log.append(note)

    def seconds(self):
        return self.host / 1e3

    def mark(self):
        self.log.append("mark")
        return max(self.done, self.host)

    def passed(self, mark):
        return self.host >= mark

    def milliseconds(self, start, end):
        self.host = max(self.host, end)
        return end - start

    def hold(self, milliseconds):
        self.work(0, milliseconds, "hold")

    def flush_cache(self):
        self.work(0.001, 0.01, "flush")


class Job:
    """Costs the host and the device known times per call."""

    def __init__(self, device, sets=8, host=0.1, forward=0.02, backward=0.01):
        self.device, self.sets, self.costs = device, sets, (host, forward, backward)
        self.alive, self.most_alive = 0, 0

    def forward(self, index):
        self.device.work(self.costs[0], self.costs[1], ("forward", index))
        return Result(self)

    def backward(self, forward):
        self.device.work(self.costs[0], self.costs[2], "backward")
        return Result(self)

    def both(self, index):
        return self.backward(self.forward(index))


class Result:
    """Counts how many of its kind are kept."""

    def __init__(self, job):
        self.job = job
        job.alive += 1
        job.most_alive = max(job.most_alive, job.alive)

    def __del__(self):
        self.job.alive -= 1


def test_a_sample_holds_the_devices_time_though_the_host_is_slower():
    device = Queue()
    times = sampling.interleaved(device, {"x": Subject(Job(device))}, 5, 60.0)["x"]
    for mode, expected in zip(MODES, (0.03, 0.02, 0.01, 0.03, 0.02), strict=True):
        assert times.device[mode] == pytest.approx([expected] * 5) and times.late[mode] == 0, mode
        assert times.host[mode] == pytest.approx([0.2 if mode[1] == "both" else 0.1] * 5)
        assert times.calls[mode] == 8


def test_a_device_that_cannot_be_held_is_reported_as_late():
    device = Queue()
    device.hold = lambda milliseconds: None
    times = sampling.interleaved(device, {"x": Subject(Job(device))}, 5, 60.0)["x"]
    assert times.late["cold", "both"] == 5
    assert min(times.device["cold", "both"]) > 0.1  # that is the host's time, and marked as such


def test_a_host_that_became_slower_is_held_for_longer():
    device = Queue()
    job = Job(device)
    sampler = sampling._Sampler(device, Subject(job), "cold", "both")
    job.costs = (0.25, 0.02, 0.01)
    milliseconds, _, late = sampler.take()
    assert milliseconds == pytest.approx(0.03) and not late


def test_cold_calls_take_turns_and_keep_their_results_and_warm_ones_do_neither():
    device = Queue()
    job = Job(device, sets=4)
    cold = sampling._Sampler(device, Subject(job), "cold", "both")
    device.log, job.most_alive = [], 0
    cold.take()
    forwards = [("forward", index) for index in range(4)]
    interleaved = [note for forward in forwards for note in (forward, "backward")]
    assert device.log == ["flush", "hold", "mark", *interleaved, "mark"] and job.most_alive >= 4
    warm = sampling._Sampler(device, Subject(job), "warm", "both")
    device.log, job.most_alive = [], 0
    warm.take()
    assert device.log == [("forward", 0), "backward", "hold", "mark", *[("forward", 0), "backward"] * 4, "mark"]
    assert job.most_alive <= 2


def test_the_forwards_before_a_backward_are_not_timed():
    device = Queue()
    sampler = sampling._Sampler(device, Subject(Job(device, sets=3)), "cold", "backward")
    device.log = []
    sampler.take()
    assert device.log[:3] == [("forward", index) for index in range(3)]
    assert device.log[3:] == ["flush", "hold", "mark", *["backward"] * 3, "mark"]


def test_a_sample_is_no_longer_than_the_queue_and_patience_allow():
    device = Queue()
    slow = sampling._Sampler(device, Subject(Job(device, sets=64, host=0.5)), "cold", "both")
    assert slow.calls == 4  # of 1 ms each for the host
    many = sampling._Sampler(device, Subject(Job(device, sets=64, host=0.001), launches=100), "cold", "both")
    assert many.calls == 5
    slowest = sampling._Sampler(device, Subject(Job(device, host=50.0), launches=9000), "cold", "both")
    assert slowest.calls == 1


def test_a_graph_is_replayed_as_a_whole():
    device = Queue()
    replays = {cache: (lambda cache=cache: device.work(0.02, 0.5, cache), 5) for cache in ("cold", "warm")}
    times = sampling.interleaved(device, {"g": Subject(Job(device), replays=replays)}, 5, 60.0)["g"]
    assert set(times.device) == {("cold", "both"), ("warm", "both")}
    assert times.device["cold", "both"] == pytest.approx([0.1] * 5) and times.calls["cold", "both"] == 5
    assert times.summary("cold", "forward") is None and times.host_milliseconds("cold", "forward") is None


def test_rounds_are_interleaved_in_changing_order_until_time_is_over():
    device = Queue()
    jobs = {name: Subject(Job(device), undivided=True) for name in "abc"}
    order = []

    class Noted(sampling._Sampler):
        def take(self):
            order.append(next(name for name, subject in jobs.items() if subject.run is self._run))
            return super().take()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sampling, "_Sampler", Noted)
        sampling.interleaved(device, jobs, 8, 60.0, seed=1)
    rounds = [tuple(order[6 * i : 6 * i + 6]) for i in range(8)]
    assert all(collections.Counter(r) == {"a": 2, "b": 2, "c": 2} for r in rounds) and len(set(rounds)) > 2
    times = sampling.interleaved(device, {"a": jobs["a"]}, 1000, 0.0)["a"]
    assert len(times.device["cold", "both"]) == timing.LEAST_ROUNDS
