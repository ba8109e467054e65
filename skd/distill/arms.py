"""What is compared."""

from dataclasses import dataclass

from skd.distill.config import LossConfig


@dataclass(frozen=True)
class Arm:
    """One way to train the student; all arms start from the same weights and see the same batches."""

    name: str
    label: str
    alpha: float
    weight: float


def make_arms(loss: LossConfig) -> list[Arm]:
    """Labels only; and the teacher's logits; and the spectral loss. A term whose factor is 0 makes no arm."""
    arms = [Arm("labels", "labels only", 0.0, 0.0)]
    if loss.alpha > 0:
        arms.append(Arm("logits", f"{loss.kd} logits", loss.alpha, 0.0))
    if loss.weight > 0:
        term = "spectral loss" if loss.match == "complex" else f"{loss.match} loss on maps"
        arms.append(Arm("spectral", f"{loss.kd} logits + {term}" if loss.alpha > 0 else term, loss.alpha, loss.weight))
    return arms
