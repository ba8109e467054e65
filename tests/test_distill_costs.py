"""What the parts of a training step cost: the sums, what is watched, and what is left behind."""

import copy
import itertools
import time

import pytest
import torch
import torch.distributed as dist
from torch import nn

pytest.importorskip("timm", reason="the trainer is built on timm (extra 'train')")

from timm.task import ClassificationTask  # noqa: E402

from skd.distill.costs import PARTS, CostMeter  # noqa: E402
from skd.distill.task import SpectralDistillationTask  # noqa: E402

CPU = torch.device("cpu")


class Clock:
    """Stands still but for what is said to take time."""

    def __init__(self):
        self.seconds = 0.0

    def __call__(self):
        return self.seconds

    def pass_(self, seconds):
        self.seconds += seconds


class Model(nn.Module):
    """Images [B, 3, 4, 4] -> logits [B, 2], with a time that its forward takes on a clock."""

    num_classes = 2

    def __init__(self, clock=None, seconds=0.0):
        super().__init__()
        self.blocks = nn.ModuleList([nn.Conv2d(3, 3, 1)])
        self.head = nn.Linear(48, 2)
        self.clock, self.seconds = clock, seconds

    def forward(self, x):
        if self.clock is not None:
            self.clock.pass_(self.seconds)
        return self.head(self.blocks[0](x).flatten(1))


def make_task(clock=None, weight=0.2, criterion_seconds=0.0):
    def criterion(logits, target):
        if clock is not None:
            clock.pass_(criterion_seconds)
        return nn.functional.cross_entropy(logits, target)

    task = SpectralDistillationTask(Model(clock, 2.0), Model(clock, 3.0), [0], [0], weight=weight, criterion=criterion)
    return task.train()


def batch():
    return torch.zeros(2, 3, 4, 4), torch.tensor([0, 1])


def train_step(task, meter, clock=None, measured=True):
    """A step in which the data take 10 seconds, backward 1, the optimizer 0.5 and the rest of the loop 0.25."""
    pass_ = (lambda seconds: None) if clock is None else clock.pass_
    with meter.step(measured):
        with meter.part("data"):
            images, target = batch()
            pass_(10.0)
        result = task(images, target)
        with meter.part("student"):
            result["loss"].backward()
            pass_(1.0)
        with meter.part("optimizer"):
            pass_(0.5)
        pass_(0.25)


def hooks_on(task):
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in task.modules())


def test_the_parts_of_a_step_are_told_apart_and_add_up():
    clock = Clock()
    task = make_task(clock, criterion_seconds=0.125)
    meter = CostMeter(task, CPU, clock)
    train_step(task, meter, clock)
    expected = {"data": 10.0, "teacher": 3.0, "student": 3.0, "loss": 0.125, "optimizer": 0.5, "other": 0.25}
    assert meter.mean() == expected
    assert tuple(expected) == PARTS
    assert sum(meter.mean().values()) == clock.seconds
    clock.pass_(100.0)  # between the steps
    train_step(task, meter, clock)
    assert meter.mean() == expected and meter.steps == 2


def test_what_the_images_need_for_the_teacher_is_the_teachers():
    clock = Clock()
    task = make_task(clock)
    task.teacher_images.register_forward_pre_hook(lambda *_: clock.pass_(7.0))
    meter = CostMeter(task, CPU, clock)
    train_step(task, meter, clock)
    assert meter.mean()["teacher"] == 10.0 and meter.mean()["loss"] == 0.0


def test_only_measured_steps_count_and_the_hooks_go():
    clock = Clock()
    task = make_task(clock)
    taps = hooks_on(task)
    meter = CostMeter(task, CPU, clock)
    assert meter.mean() == dict.fromkeys(PARTS, 0.0)
    for step in range(6):
        seen = []
        task.criterion = lambda *args, seen=seen: seen.append(hooks_on(task)) or nn.functional.cross_entropy(*args)
        measured = step % 3 == 2
        train_step(task, meter, clock, measured)
        assert seen == [taps + 8 * measured]
        assert hooks_on(task) == taps
    assert meter.steps == 2
    assert meter.mean()["data"] == 10.0


def test_a_step_that_is_not_measured_makes_no_objects():
    meter = CostMeter(make_task(), CPU)
    assert meter.step(False) is meter.step(False) is meter.part("data")


def test_the_clock_of_the_machine():
    class Slow(Model):
        def forward(self, x):
            time.sleep(0.03)
            return super().forward(x)

    task = SpectralDistillationTask(Model(), Slow(), [0], [0]).train()
    meter = CostMeter(task, CPU)
    began = time.perf_counter()
    train_step(task, meter)
    took = time.perf_counter() - began
    mean = meter.mean()
    assert 0.03 <= mean["teacher"] <= sum(mean.values()) <= took
    assert mean["student"] > 0 and mean["loss"] > 0


def test_labels_alone_have_no_teacher():
    clock = Clock()
    task = ClassificationTask(Model(clock, 2.0), nn.CrossEntropyLoss(), verbose=False)
    meter = CostMeter(task, CPU, clock)
    train_step(task, meter, clock)
    assert meter.mean() == {"data": 10.0, "teacher": 0.0, "student": 3.0, "loss": 0.0, "optimizer": 0.5, "other": 0.25}


def test_parts_within_parts_and_gradient_accumulation():
    clock = Clock()
    task = make_task(clock)
    meter = CostMeter(task, CPU, clock)
    with meter.step(), meter.part("optimizer"):
        clock.pass_(1.0)
        for _ in range(2):
            with meter.part("data"):
                clock.pass_(4.0)
            task(*batch())
        clock.pass_(1.0)
    mean = meter.mean()
    assert meter.steps == 1
    assert (mean["optimizer"], mean["data"], mean["student"], mean["teacher"]) == (2.0, 8.0, 4.0, 6.0)


def test_a_step_that_fails_does_not_count_and_leaves_nothing_behind():
    clock = Clock()
    task = make_task(clock)
    taps = hooks_on(task)
    meter = CostMeter(task, CPU, clock)
    with pytest.raises(RuntimeError), meter.step():
        task(torch.zeros(2, 5, 4, 4), torch.tensor([0, 1]))
    assert meter.steps == 0 and hooks_on(task) == taps
    assert meter.part("data") is meter.step(False)
    train_step(task, meter, clock)
    assert meter.mean()["teacher"] == 3.0 and meter.steps == 1


def test_an_unknown_part_is_refused():
    meter = CostMeter(make_task(), CPU)
    with pytest.raises(ValueError, match="'dta' is no part of a step; use one of data, teacher"), meter.step():  # noqa: SIM117
        with meter.part("dta"):
            pass


def test_its_state_is_plain_numbers_to_go_on_from():
    clock = Clock()
    task = make_task(clock)
    meter = CostMeter(task, CPU, clock)
    train_step(task, meter, clock)
    state = copy.deepcopy(meter.state_dict())
    assert state == {"steps": 1, "seconds": meter.mean()}
    again = CostMeter(task, CPU, clock)
    again.load_state_dict(state)
    with again.step():
        clock.pass_(1.0)
    assert again.steps == 2
    assert again.mean()["data"] == 5.0 and again.mean()["other"] == 0.625
    assert state["steps"] == 1 and state["seconds"]["other"] == 0.25  # it keeps numbers of its own


def test_a_task_in_distributed_data_parallel(tmp_path):
    clock = Clock()
    task = make_task(clock)
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        meter = CostMeter(task, CPU, clock)
        task.prepare_distributed()  # after the meter was made
        train_step(task, meter, clock)
    finally:
        dist.destroy_process_group()
    mean = meter.mean()
    assert (mean["student"], mean["teacher"], mean["data"]) == (3.0, 3.0, 10.0)


TICKS = {"data": 1, "teacher": 2, "student": 2, "loss": 4, "optimizer": 1, "other": 5}
"""A step by a clock that ticks when it is read: the loss comes around student, teacher and the teacher's images."""


class CountingBackend:
    """torch.compile's "eager", which counts what it compiles."""

    def __init__(self):
        self.graphs = 0

    def __call__(self, graph, inputs):
        self.graphs += 1
        return graph.forward


def test_a_compiled_task_is_not_compiled_anew_for_being_measured():
    task = SpectralDistillationTask(Model(), Model(), [0], [0]).train()
    backend = CountingBackend()
    torch._dynamo.reset()
    task.compile(backend=backend)
    meter = CostMeter(task, CPU, itertools.count().__next__)
    train_step(task, meter, measured=False)
    compiled = backend.graphs
    assert compiled >= 2
    for measured in (True, False, True, True):
        train_step(task, meter, measured=measured)
    assert backend.graphs == compiled
    assert meter.steps == 3 and meter.mean() == TICKS


def test_a_model_compiled_in_place_is_not_compiled_anew_either():
    model = Model()
    backend = CountingBackend()
    torch._dynamo.reset()
    model.compile(backend=backend)
    task = ClassificationTask(model, nn.CrossEntropyLoss(), verbose=False)
    meter = CostMeter(task, CPU, itertools.count().__next__)
    train_step(task, meter, measured=False)
    compiled = backend.graphs
    assert compiled > 0
    for measured in (True, False, True):
        train_step(task, meter, measured=measured)
    assert backend.graphs == compiled
    assert meter.mean() == {**TICKS, "teacher": 0, "loss": 2}


class Event:
    """A CUDA event on a device that is ``behind`` the host: it passes when the test lets it."""

    device_done = 0.0
    waited = 0
    clock = Clock()

    def __init__(self, enable_timing):
        assert enable_timing

    def record(self, stream):
        self.moment = Event.clock.seconds

    def query(self):
        return self.moment <= Event.device_done

    def synchronize(self):
        Event.waited += 1
        Event.device_done = max(Event.device_done, self.moment)

    def elapsed_time(self, end):
        assert end.query()
        return 1000 * (end.moment - self.moment)


def test_on_cuda_nothing_waits_for_the_device_before_the_mean(monkeypatch):
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: None)
    clock = Event.clock
    task = make_task(clock)
    meter = CostMeter(task, torch.device("cuda", 0))
    for _ in range(3):
        train_step(task, meter, clock)
    assert meter.steps == 3 and Event.waited == 0
    Event.device_done = clock.seconds / 3  # the first step has passed: it is read at the next one, and let go
    train_step(task, meter, clock)
    assert len(meter._unread) == 3 and meter.steps == 4 and Event.waited == 0
    assert meter.mean() == {"data": 10.0, "teacher": 3.0, "student": 3.0, "loss": 0.0, "optimizer": 0.5, "other": 0.25}
    assert Event.waited == 3 and not meter._unread


@pytest.mark.gpu
def test_on_a_device_the_parts_are_what_the_device_takes():
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    device = torch.device("cuda")
    size = 2048

    class Busy(Model):
        def forward(self, x):
            noise = torch.randn(size, size, device=x.device)
            for _ in range(50):
                noise = noise @ noise / size
            return super().forward(x) + 0 * noise.mean()

    task = SpectralDistillationTask(Model().to(device), Busy().to(device), [0], [0]).train()
    meter = CostMeter(task, device)

    def step(measured):
        with meter.step(measured):
            with meter.part("data"):
                images, target = (x.to(device) for x in batch())
            result = task(images, target)
            with meter.part("student"):
                result["loss"].backward()

    step(False)
    torch.cuda.synchronize()
    began = time.perf_counter()
    step(True)
    torch.cuda.synchronize()
    took = time.perf_counter() - began
    mean = meter.mean()
    assert mean["teacher"] > 0.5 * sum(mean.values())
    assert sum(mean.values()) <= 1.05 * took
