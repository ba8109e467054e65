"""What one of several processes does in tests/test_distill_distributed.py: python two_processes.py OUT [CASE]"""

import os
import sys
from pathlib import Path

import torch
from small_training import BrokenLoss, Watch, make_training, numbers, weights
from small_vits import vit
from timm.task import ClassificationTask
from torch import nn

from skd.distill.distributed import join, leave
from skd.distill.errors import DistillError
from skd.distill.interruption import Stopped

PLAIN = {"epochs": 2, "opt": "momentum", "lr": 0.05, "ema": 0.9}


def broken_on_last(world, steps) -> BrokenLoss:
    """NaN in one process only."""
    return BrokenLoss(steps if world.rank == world.size - 1 else ())


def sharing_the_work(world) -> dict:
    """Half of each batch; no dropped paths, whose draws are each process's own."""
    batch_size = 8 // world.size
    training = make_training(world, student=vit(dtype=torch.float32), data={"batch_size": batch_size}, optim=PLAIN)
    training.run(Watch())
    average = training.task.get_eval_model(ema=True).state_dict()
    return {"weights": weights(training), "average": average, "results": numbers(training.results)}


def broken_on_one(world) -> dict:
    criterion = broken_on_last(world, [1, 4])
    batch = {"batch_size": 8 // world.size}
    training = make_training(world, student=vit(dtype=torch.float32), criterion=criterion, data=batch, optim=PLAIN)
    training.run(Watch())
    return {"weights": weights(training), "results": numbers(training.results)}


def always_broken_on_one(world) -> dict:
    criterion = broken_on_last(world, range(100))
    training = make_training(world, criterion=criterion, data={"batch_size": 8 // world.size})
    try:
        training.run(Watch())
    except DistillError as error:
        return {"sentence": str(error)}
    return {}


def stopped_on_one(world) -> dict:
    """Only the last process hears the signal; all end after the same step."""
    batch = {"batch_size": 8 // world.size}
    training = make_training(world, data=batch, engine={"log_interval": 1000}, optim={"epochs": 100})
    watch = Watch(stop_after=2 if world.rank == world.size - 1 else None)
    watch.training = training
    try:
        training.run(watch)
    except Stopped:
        return {"steps": watch.steps, "saved": [watch.states[-1]["epoch"], watch.states[-1]["step"]]}
    return {}


def batch_norms(world) -> dict:
    torch.manual_seed(0)
    student = nn.Sequential(nn.Conv2d(3, 4, 4, stride=4), nn.BatchNorm2d(4), nn.Flatten(), nn.LazyLinear(5))
    student(torch.zeros(2, 3, 8, 8))
    task = ClassificationTask(student, nn.CrossEntropyLoss(), verbose=False)
    training = make_training(world, task=task, data={"batch_size": 8 // world.size}, optim=PLAIN)
    training.run(Watch())
    average = training.task.get_eval_model(ema=True).state_dict()
    return {"weights": weights(training), "average": average, "results": numbers(training.results)}


class _Spare(nn.Module):
    """A model with a parameter that no loss reaches."""

    def __init__(self, model):
        super().__init__()
        self.model, self.spare = model, nn.Parameter(torch.ones(3))

    def forward(self, x):
        return self.model(x)


def unused_parameters(world) -> dict:
    task = ClassificationTask(_Spare(vit(dtype=torch.float32)), nn.CrossEntropyLoss(), verbose=False)
    training = make_training(world, task=task, unused=True, data={"batch_size": 8 // world.size}, optim=PLAIN)
    training.run(Watch())
    return {"weights": weights(training)}


class _Fatal:
    """Test images that kill their process."""

    def __iter__(self):
        os._exit(9)


def lost_in_a_test(world) -> dict:
    """The last process goes when the first epoch is tested; a single one goes on from what the first one saved."""
    training = make_training(world, student=vit(dtype=torch.float32), data={"batch_size": 8 // world.size}, optim=PLAIN)
    if world.rank == world.size - 1:
        training.test_loader = _Fatal()
    watch = Watch()
    watch.training = training
    try:
        training.run(watch)
    except DistillError as error:
        sentence = str(error)
    (state,) = watch.states
    alone = make_training(student=vit(dtype=torch.float32), optim=PLAIN)
    alone.load_state_dict(state)
    alone.run(Watch())
    at = [state["epoch"], state["step"]]
    return {"sentence": sentence, "at": at, "weights": weights(alone), "results": numbers(alone.results)}


CASES = (sharing_the_work, broken_on_one, always_broken_on_one, stopped_on_one, batch_norms, unused_parameters)


def main(out: Path, only: str | None = None) -> None:
    torch.set_num_threads(1)
    world = join(torch.device("cpu"))
    if only is not None:
        torch.save(globals()[only](world), out / f"rank{world.rank}.pt")
        os._exit(0)  # without a farewell to those who are gone
    torch.save({case.__name__: case(world) for case in CASES}, out / f"rank{world.rank}.pt")
    world.wait()
    leave(world)


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
