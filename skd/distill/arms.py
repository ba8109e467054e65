"""What is compared."""

from dataclasses import dataclass

from skd.distill.config import DistillConfig


@dataclass(frozen=True)
class Arm:
    """One way to train the student; all arms start from the same weights and see the same batches."""

    name: str
    label: str
    alpha: float
    weight: float

    @property
    def uses_teacher(self) -> bool:
        return self.alpha > 0 or self.weight > 0


def make_arms(config: DistillConfig) -> list[Arm]:
    """The arms of ``config.run.arms``, or all that apply: a term whose factor is 0 makes no arm."""
    loss = config.loss
    term = {"complex": "spectral loss", "mse": "mse loss on maps"}.get(loss.match, f"{loss.match} loss")
    both = f"{loss.kd} logits + {term}" if loss.alpha > 0 else term
    arms = {
        "labels": Arm("labels", "labels only", 0.0, 0.0),
        "logits": Arm("logits", f"{loss.kd} logits", loss.alpha, 0.0),
        "spectral": Arm("spectral", both, loss.alpha, loss.weight),
    }
    apply = [name for name, factor in (("labels", 1), ("logits", loss.alpha), ("spectral", loss.weight)) if factor > 0]
    return [arms[name] for name in config.run.arms or apply]
