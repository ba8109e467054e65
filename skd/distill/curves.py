"""The picture of the learning curves."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from skd.distill.loop import EpochResult

# Wong's palette (Nature Methods 8, 441), which colour-blind readers can tell apart; the line styles help in print.
_STYLES = (("#000000", ":"), ("#0072B2", "--"), ("#D55E00", "-"))


@dataclass(frozen=True)
class Curve:
    """One arm: the results of every epoch, per seed."""

    label: str
    seeds: Sequence[Sequence[EpochResult]]

    def values(self, field: str) -> np.ndarray:
        """[seeds, epochs]"""
        return np.array([[getattr(result, field) for result in results] for results in self.seeds])


def draw(path: Path, curves: Sequence[Curve], *, title: str, teacher_top1: float | None) -> None:
    """Test accuracy and test cross-entropy of every arm over the epochs, as a PNG.

    Lines are means over seeds, bands reach from the lowest to the highest seed. (The training losses are no part of
    it: their totals have different terms and do not compare; metrics.csv has them.)
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9.6, 4.4), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    accuracy, entropy = figure.subplots(1, 2)
    panels = (
        (accuracy, "test_top1", "top-1 accuracy on the test images (%)"),
        (entropy, "test_ce", "cross-entropy on the test images (nats)"),
    )
    for axes, field, ylabel in panels:
        for index, curve in enumerate(curves):
            colour, line = _STYLES[index % len(_STYLES)]
            values = curve.values(field)
            epochs = np.arange(1, values.shape[1] + 1)
            marker = "o" if len(epochs) < 8 else None
            axes.plot(epochs, values.mean(0), color=colour, linestyle=line, marker=marker, label=curve.label)
            if len(values) > 1:
                axes.fill_between(epochs, values.min(0), values.max(0), color=colour, alpha=0.15, linewidth=0)
        axes.set_xlabel("epoch")
        axes.set_ylabel(ylabel)
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(alpha=0.3)
    if teacher_top1 is not None:
        accuracy.axhline(teacher_top1, color="#009E73", linewidth=1, label=f"teacher, {teacher_top1:.1f}%")
    _show_the_later_epochs(accuracy, [curve.values("test_top1") for curve in curves], teacher_top1)
    entropy.set_ylim(bottom=0)
    accuracy.legend(loc="lower right")
    figure.suptitle(title)
    figure.savefig(path, format="png")


def _show_the_later_epochs(axes, values: Sequence[np.ndarray], teacher_top1: float | None) -> None:
    """Arms differ by little at the end and by much in the first epochs, which would press them into one line."""
    later = [value[:, value.shape[1] // 5 :] for value in values]
    low = min(value.min() for value in later)
    high = max(value.max() for value in [*values, np.array(teacher_top1 or 0.0)])
    margin = max(0.05 * (high - low), 0.5)
    # The legend sits below the curves.
    axes.set_ylim(max(0, low - margin - 0.25 * (high - low)), min(100.5, high + margin))
