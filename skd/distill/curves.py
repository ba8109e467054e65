"""The picture of the learning curves."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from skd.distill.engine import EpochResult

# Wong's palette (Nature Methods 8, 441), which colour-blind readers can tell apart; the line styles help in print.
STYLES = (
    ("#000000", ":"),
    ("#0072B2", "--"),
    ("#D55E00", "-"),
    ("#CC79A7", "-."),
    ("#56B4E9", (0, (5, 1, 1, 1, 1, 1))),
)
"""Colour and line of each arm, in the order of the arms."""

TEACHER_COLOUR = "#009E73"


@dataclass(frozen=True)
class Curve:
    """One arm: the results of every epoch, per seed."""

    label: str
    seeds: Sequence[Sequence[EpochResult]]

    def values(self, field: str) -> np.ndarray:
        """[seeds, epochs] of the epochs that all seeds have; NaN for a result that is None."""
        epochs = min((len(results) for results in self.seeds), default=0)
        values = [[getattr(result, field) for result in results[:epochs]] for results in self.seeds]
        return np.array(values, dtype=float).reshape(len(self.seeds), epochs)


def draw(path: Path, curves: Sequence[Curve], *, title: str, teacher_top1: float | None) -> None:
    """Test accuracy and test cross-entropy of every arm over the epochs, as a PNG (:func:`make_figure`)."""
    make_figure(curves, title=title, teacher_top1=teacher_top1).savefig(path, format="png")


def make_figure(curves: Sequence[Curve], *, title: str, teacher_top1: float | None):
    """Test accuracy and test cross-entropy of every arm over the epochs.

    Lines are means over seeds, bands reach from the lowest to the highest seed; thin lines in the same colour are the
    averaged weights (EMA), where there are any. (The training losses are no part of it: their totals have different
    terms and do not compare; metrics.csv has them.)
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    figure = Figure(figsize=(9.6, 4.8), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    accuracy, entropy = figure.subplots(1, 2)
    panels = (
        (accuracy, "test_top1", "top-1 accuracy on the test images (%)"),
        (entropy, "test_ce", "cross-entropy on the test images (nats)"),
    )
    # An arm without a finished epoch keeps its colour.
    drawn = [(STYLES[i % len(STYLES)], curve) for i, curve in enumerate(curves) if curve.values("test_top1").size]
    for axes, field, ylabel in panels:
        for (colour, line), curve in drawn:
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
    handles = list(accuracy.lines)
    averages = []
    for (colour, line), curve in drawn:
        average = curve.values("ema_top1").mean(0)
        if np.isfinite(average).any():
            averages.append(average)
            accuracy.plot(np.arange(1, len(average) + 1), average, color=colour, linestyle=line, linewidth=0.8)
    if averages:
        handles.append(Line2D([], [], color="#777777", linewidth=0.8, label="thin: averaged weights (EMA)"))
    if teacher_top1 is not None:
        label = f"teacher, {teacher_top1:.1f}%"
        handles.append(accuracy.axhline(teacher_top1, color=TEACHER_COLOUR, linewidth=1, label=label))
    if drawn:
        _show_the_later_epochs(accuracy, [curve.values("test_top1") for _, curve in drawn], averages, teacher_top1)
    highest = entropy.dataLim.y1  # infinite without finite values
    entropy.set_ylim(0, 1.05 * highest if 0 < highest < math.inf else 1)
    # Below the panels, where it covers nothing.
    figure.legend(handles=handles, loc="outside lower center", ncols=3, frameon=False)
    figure.suptitle(title)
    return figure


def _show_the_later_epochs(axes, values, averages, teacher_top1: float | None) -> None:
    """Arms differ by little at the end and by much in the first epochs, which would press them into one line."""
    later = [value[:, value.shape[1] // 5 :].min() for value in values]
    # An averaged model begins far below and is shown where it arrives.
    low = min([*later, *(average[-1] for average in averages)])
    high = max([*(value.max() for value in values), *(average.max() for average in averages), teacher_top1 or 0.0])
    margin = max(0.05 * (high - low), 0.5)
    axes.set_ylim(max(0, low - margin), min(100.5, high + margin))
