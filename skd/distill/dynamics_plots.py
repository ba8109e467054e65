"""The picture of the distillation dynamics: over depth, over the epochs, and over frequency."""

import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from skd.distill.curves import STYLES, TEACHER_COLOUR
from skd.distill.dynamics import Dynamics, History

_TEACHER = {"color": TEACHER_COLOUR, "linestyle": "-", "linewidth": 2.2}
_BEFORE = {"color": "#888888", "linestyle": "--", "linewidth": 1.3}
_PAIRS = 3  # panels over frequency
_TITLE_WIDTH = 40  # letters over one of them
_FLOOR = 1e-5  # of the greatest intensity: below it is what float32 rounds away, and no frequency
_LOGARITHMIC = 20  # from this ratio on a linear axis would hide the small values


def draw(path: Path, dynamics: Dynamics, labels: Mapping[str, str], *, title: str) -> None:
    """Draw :func:`make_figure` as a PNG."""
    make_figure(dynamics, labels, title=title).savefig(path, format="png")


def make_figure(dynamics: Dynamics, labels: Mapping[str, str], *, title: str):
    """What the students' layers looked like before and after, against the teacher's.

    Three kinds of panels: mean intensity over normalised depth, all blocks; the gap of the aligned pairs over the
    epochs, as mean and range over the pairs; and the spectra of the first, the middle and the last pair. Numbers of
    several seeds are averaged.

    Args:
        dynamics: what was seen.
        labels: names of the arms for people, in the order of their colours; arms that were not seen are left out.
        title: of the picture.

    Raises:
        ValueError: no student of these arms was seen.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    arms = _arms(dynamics, labels)
    if not arms:
        raise ValueError(f"there are no dynamics of {', '.join(labels)} to draw; observe a student first")
    shown = _shown_pairs(len(dynamics.pairs))
    figure = Figure(figsize=(11, 8.6 if shown else 4.8), dpi=140, layout="constrained")
    FigureCanvasAgg(figure)
    figure.get_layout_engine().set(h_pad=0.08, w_pad=0.08)
    grid = figure.add_gridspec(2 if shown else 1, 6)
    over_depth = figure.add_subplot(grid[0, :3] if shown else grid[0, :])
    _draw_depth(over_depth, dynamics, arms)
    if shown:
        _draw_gaps(figure.add_subplot(grid[0, 3:]), arms)
    for i, pair in enumerate(shown):
        width = 6 // len(shown)
        axes = figure.add_subplot(grid[1, width * i : width * (i + 1)])
        _draw_spectra(axes, dynamics, arms, pair)
        axes.set_ylabel("intensity (1/√C)" if i == 0 else None)
    # All panels draw the same things in the same way, so one legend serves them, where it covers nothing.
    handles, _ = over_depth.get_legend_handles_labels()
    figure.legend(handles=handles, loc="outside lower center", ncols=3, frameon=False)
    figure.suptitle(title)
    return figure


class _Arm:
    """The histories of one arm's seeds, and how to draw it."""

    def __init__(self, label: str, style: tuple, histories: Sequence[History]):
        self.histories = histories
        colour, line = style
        epoch = max(history.epochs[-1] for history in histories)
        after = f"after {epoch} epoch{'' if epoch == 1 else 's'}" if epoch else "before training"
        self.style = {"color": colour, "linestyle": line, "linewidth": 1.6}
        self.label = f"student {after}: {label}"

    @property
    def begins_untrained(self) -> bool:
        return all(history.epochs[0] == 0 for history in self.histories)

    def mean(self, values) -> np.ndarray:
        """Over the seeds, of a tensor per history."""
        return np.mean([np.asarray(values(history)) for history in self.histories], axis=0)

    def gaps(self) -> tuple[list[int], np.ndarray]:
        """The epochs at which all seeds were seen, and [epochs, pairs] means over the seeds."""
        epochs = sorted(set.intersection(*(set(history.epochs) for history in self.histories)))
        gaps = [[history.gaps[history.epochs.index(epoch)].numpy() for epoch in epochs] for history in self.histories]
        pairs = len(self.histories[0].gaps[0])
        return epochs, np.reshape(gaps, (len(gaps), len(epochs), pairs)).mean(0)


def _arms(dynamics: Dynamics, labels: Mapping[str, str]) -> list[_Arm]:
    arms = []
    for i, (name, label) in enumerate(labels.items()):
        histories = [history for history in dynamics.histories if history.arm == name]
        if histories:
            arms.append(_Arm(label, STYLES[i % len(STYLES)], histories))
    return arms


def _shown_pairs(count: int) -> list[int]:
    """The first, the middle and the last of the pairs, as far as there are so many."""
    return sorted({0, count // 2, count - 1}) if count >= _PAIRS else list(range(count))


def _draw_depth(axes, dynamics: Dynamics, arms: Sequence[_Arm]) -> None:
    depth, teacher = _depth(dynamics.student_blocks), dynamics.teacher_profile
    if teacher is not None:
        blocks = dynamics.teacher_blocks
        intensity = teacher.layer_intensity[:blocks].numpy()
        axes.plot(_depth(blocks), intensity, **_TEACHER, label="teacher", marker=_marker(blocks))
    if arms[0].begins_untrained:
        before = arms[0].mean(lambda history: history.intensities[0])[: len(depth)]
        axes.plot(depth, before, **_BEFORE, label="student before training", marker=_marker(len(depth)))
    for arm in arms:
        after = arm.mean(lambda history: history.intensities[-1])[: len(depth)]
        axes.plot(depth, after, **arm.style, label=arm.label, marker=_marker(len(depth)))
    targets = zip(dynamics.pairs, dynamics.target_intensity.tolist(), strict=True)
    targets = [(depth[student], value) for (student, _), value in targets if student < len(depth)]
    if targets:
        style = {"color": TEACHER_COLOUR, "linestyle": "none", "marker": "D", "markersize": 7, "fillstyle": "none"}
        axes.plot(*zip(*targets, strict=True), **style, zorder=3, label="teacher at the width of the student's layer")
    axes.set_xlabel("normalised depth (first block to last)")
    axes.set_ylabel("mean intensity (1/√C)")
    axes.set_title("All blocks", loc="left", fontsize=11)
    _scale(axes)


def _draw_gaps(axes, arms: Sequence[_Arm]) -> None:
    for arm in arms:
        epochs, gaps = arm.gaps()
        axes.plot(epochs, gaps.mean(1), **arm.style, marker="o" if len(epochs) < 8 else None)
        if gaps.shape[1] > 1:
            axes.fill_between(epochs, gaps.min(1), gaps.max(1), color=arm.style["color"], alpha=0.12, linewidth=0)
    axes.set_xlabel("epoch (0: before training)")
    axes.set_ylabel("gap to the teacher (decades)")
    pairs = gaps.shape[1]
    title = "Aligned layer" if pairs == 1 else f"Aligned layers: mean and range of {pairs} pairs"
    axes.set_title(title, loc="left", fontsize=11)
    axes.set_ylim(bottom=0)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.grid(alpha=0.3)


def _draw_spectra(axes, dynamics: Dynamics, arms: Sequence[_Arm], pair: int) -> None:
    student, teacher = dynamics.pairs[pair]
    width = dynamics.widths[pair]
    spectra = [(dynamics.targets[pair].numpy(), _TEACHER)]
    if arms[0].begins_untrained:
        spectra.append((arms[0].mean(lambda history: history.first_aligned[pair]), _BEFORE))
    spectra += [(arm.mean(lambda history: history.latest_aligned[pair]), arm.style) for arm in arms]
    for spectrum, style in spectra:
        marker = "o" if len(spectrum) < 12 else None
        axes.plot(np.arange(len(spectrum)) / width, spectrum, **style, marker=marker, markersize=3)
    axes.set_xlabel("frequency k/C (cycles per channel)")
    names = arms[0].histories[0].first.layers[student], dynamics.teacher_profile.layers[teacher]
    title = f"{names[0]} – teacher {names[1]}, C={width}"
    axes.set_title("\n".join(textwrap.wrap(title, _TITLE_WIDTH)), loc="left", fontsize=10)
    axes.set_xlim(-0.005, 0.505)
    _scale(axes)


def _depth(blocks: int) -> np.ndarray:
    return np.linspace(0, 1, blocks) if blocks > 1 else np.zeros(blocks)


def _marker(points: int) -> str | None:
    return "." if points <= 40 else None


def _scale(axes) -> None:
    """A linear axis from 0, or a logarithmic one where that would hide the small intensities."""
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    values = np.concatenate([line.get_ydata() for line in axes.lines])
    top = values.max()
    bottom = values.min(where=values > _FLOOR * top, initial=top)
    axes.grid(alpha=0.3)
    if top <= _LOGARITHMIC * bottom:
        axes.set_ylim(0, 1.08 * top or 1)
        return
    axes.set_yscale("log")
    axes.set_ylim(bottom / 1.3, top * 1.3)
    if top < 100 * bottom:  # where powers of ten alone would be one number or two
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axes.yaxis.set_minor_formatter(NullFormatter())
