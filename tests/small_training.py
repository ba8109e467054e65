"""A training of milliseconds: two small transformers and images in memory."""

import io
import math

import torch
from small_vits import batch, vit
from timm.utils import unwrap_model
from torch import nn

from skd.distill.config import DistillConfig
from skd.distill.distributed import World
from skd.distill.engine import EpochResult, Training
from skd.distill.memory import memory_source
from skd.distill.seeds import seed_everything
from skd.distill.task import SpectralDistillationTask

IMAGES, CLASSES = 48, 5
TIMES = ("seconds", "images_per_second")


class Watch:
    """Notes what a training tells.

    Args:
        stop_after: steps after which it asks to stop.
        save_every: steps between the states it keeps.
    """

    class _Stop:
        signum = 0

    def __init__(self, stop_after: int | None = None, save_every: int | None = None):
        self.stop, self.stop_after, self.save_every = self._Stop(), stop_after, save_every
        self.steps, self.readings, self.results, self.states = 0, [], [], []
        self.training = None

    def stepped(self) -> None:
        self.steps += 1
        if self.steps == self.stop_after:
            self.stop.signum = 15

    def read(self, losses, images_per_second) -> None:
        self.readings.append(losses)

    def epoch_ended(self, result: EpochResult) -> None:
        self.results.append(result)

    def save_if_due(self) -> None:
        if self.save_every is not None and self.steps % self.save_every == 0:
            self.save()

    def save(self) -> None:
        if self.training is not None:
            self.states.append(self.training.state_dict())


class BrokenLoss(nn.Module):
    """Cross-entropy that is NaN, or has a gradient that is, at some steps."""

    def __init__(self, steps, gradient: bool = False):
        super().__init__()
        self.steps, self.gradient, self.calls = set(steps), gradient, 0

    def forward(self, logits, target):
        self.calls += 1
        loss = nn.functional.cross_entropy(logits, target)
        if self.calls - 1 not in self.steps:
            return loss
        return loss + ((logits.sum() * 0).sqrt() if self.gradient else math.nan * logits.sum())


def through_a_file(state: dict) -> dict:
    """As a checkpoint keeps it."""
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def config(**sections) -> DistillConfig:
    """Filled in for this training."""
    defaults = {
        "data": {"batch_size": 8},
        "loss": {"label_smoothing": 0.0},
        "optim": {"epochs": 3, "lr": 1e-3, "warmup_lr": 1e-4, "min_lr": 1e-5, "warmup_epochs": 1, "weight_decay": 0.05},
    }
    base = DistillConfig().replace(**defaults)
    return base.replace(**sections)


def images(batch_size: int = 8):
    pixels, target = batch(dtype=torch.float32, size=IMAGES)
    tested = batch(dtype=torch.float32, size=17, seed=3)  # not as many batches in each of two processes
    return memory_source("noise", tuple("abcde"), (pixels, target), tested, batch_size)


def make_training(
    world: World | None = None, criterion=None, student=None, task=None, unused=False, **sections
) -> Training:
    """One that is ready to run; the same weights every time."""
    seed_everything("weights")
    settings = config(**sections)
    if task is None:
        student = student or vit(dtype=torch.float32, drop_path_rate=0.2)
        teacher = vit(embed_dim=20, depth=4, seed=1, dtype=torch.float32)
        task = SpectralDistillationTask(student, teacher, [0, 2], [1, 3], criterion=criterion)
    return Training(
        task,
        images(settings.data.batch_size),
        settings,
        world or World(),
        epochs=settings.optim.epochs,
        seed=5,
        label='"spectral"',
        unused=unused,
    )


def weights(training: Training) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in unwrap_model(training.task.get_eval_model()).state_dict().items()}


def numbers(results: list[EpochResult]) -> list[dict]:
    """What does not depend on how fast the machine is."""
    return [{name: value for name, value in vars(result).items() if name not in TIMES} for result in results]
