"""Accuracy of a model on the test images."""

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from skd.distill.data import TestLoader
from skd.distill.distributed import World


@dataclass(frozen=True)
class TestResult:
    """Over the test images of all processes.

    Attributes:
        ce: mean cross-entropy in nats.
        correct, images: how many were recognised, of how many.
    """

    ce: float
    correct: int
    images: int

    @property
    def top1(self) -> float:
        """Percent of the images."""
        return 100 * self.correct / max(self.images, 1)


def evaluate(
    model: nn.Module, loader: TestLoader, world: World, precision: AbstractContextManager | None = None
) -> TestResult:
    """Test a model, which is put into eval mode; every process tests its share.

    Args:
        model: images -> logits [B, classes].
        loader: this process's share of the images.
        world: the processes.
        precision: the autocast to run in.
    """
    model.eval()
    totals = torch.zeros(3, dtype=torch.float64, device=world.device)
    with torch.no_grad(), precision or nullcontext():
        for images, target in loader:
            images, target = images.to(world.device), target.to(world.device)
            logits = model(images).float()
            ce = F.cross_entropy(logits, target, reduction="sum")
            correct = (logits.argmax(dim=-1) == target).sum()
            totals += torch.stack([ce.double(), correct.double(), ce.new_tensor(len(target)).double()])
    ce, correct, images = world.total(totals).tolist()
    return TestResult(ce / max(images, 1), int(correct), int(images))
