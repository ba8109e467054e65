"""The two pictures of SpectralKD (arXiv 2412.19055): intensity over depth, and over frequency for every layer."""

import re
import textwrap
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from skd.analysis.profile import SpectralProfile

KINDS = ("depth", "frequency", "both")
MOST_PROFILES = 3
_PANEL_WIDTH = {1: 8.0, 2: 6.0, 3: 5.2}  # inches, by the number of profiles side by side
_BLUE, _ORANGE, _GREEN = "#0072B2", "#D55E00", "#009E73"  # of Wong's palette, as in the learning curves
_LEGEND_LAYERS = 6  # up to here every layer has an entry in the legend, beyond it a place on the colour bar
_COMPARABLE = 5  # panels share a linear axis as long as none is pressed flat by it
_NAMED_TICKS = 8
_FLOOR = 1e-5  # of the greatest intensity: below it is what float32 rounds away, and no frequency
_SCALES = {"forward": "1/C", "ortho": "1/√C", "backward": "unscaled"}


def draw(path: Path, profiles: Sequence[SpectralProfile], *, kind: str = "both", chosen: Sequence[int] = ()) -> None:
    """Draw one to three profiles side by side as a PNG.

    Args:
        path: the file.
        profiles: left to right; all with one ``norm``.
        kind: ``"depth"``: a bar per layer, and below it the entropy where it was counted. ``"frequency"``: a line per
            layer over cycles per channel (k/C), logarithmic. ``"both"``: one above the other.
        chosen: layers of the first profile to mark over depth.

    Raises:
        ValueError: more than three profiles, profiles scaled differently, an unknown kind.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    if kind not in KINDS:
        raise ValueError(f"kind={kind!r} is no picture; use one of {', '.join(map(repr, KINDS))}")
    if len(profiles) > MOST_PROFILES:
        raise ValueError(f"{len(profiles)} profiles do not fit side by side; draw {MOST_PROFILES} at most")
    if len({profile.norm for profile in profiles}) > 1:
        norms = ", ".join(f"{profile.title}: {profile.norm}" for profile in profiles)
        raise ValueError(f"profiles of different norm do not compare ({norms}); analyse them with the same one")
    rows = []
    if kind != "frequency":
        rows.append((_draw_depth, 3.6))
        if all(profile.entropy is not None for profile in profiles):
            rows.append((_draw_entropy, 2.2))
    if kind != "depth":
        rows.append((_draw_frequency, 4.4))
    count = len(profiles)
    figure = Figure(
        figsize=(_PANEL_WIDTH[count] * count, sum(height for _, height in rows) + 0.5), dpi=130, layout="constrained"
    )
    FigureCanvasAgg(figure)
    grid = figure.subplots(len(rows), count, squeeze=False, height_ratios=[height for _, height in rows])
    for (draw_row, _), panels in zip(rows, grid, strict=True):
        if draw_row is _draw_depth:
            draw_row(panels, profiles, chosen)
        else:
            draw_row(panels, profiles)
    for axes, profile in zip(grid[0], profiles, strict=True):
        axes.set_title(_title(profile, _PANEL_WIDTH[count]), fontsize=11, loc="left")
    figure.savefig(path, format="png")


def _draw_depth(panels, profiles: Sequence[SpectralProfile], chosen: Sequence[int]) -> None:
    values = [profile.layer_intensity.numpy() for profile in profiles]
    for i, (axes, profile, height) in enumerate(zip(panels, profiles, values, strict=True)):
        marked = set(chosen) if i == 0 else set()
        _bars(axes, profile, height, [_ORANGE if layer in marked else _BLUE for layer in range(len(profile))])
        if marked:
            from matplotlib.patches import Patch

            handles = [Patch(color=_ORANGE, label=f"chosen ({len(marked)})"), Patch(color=_BLUE, label="not chosen")]
            axes.legend(handles=handles, loc="upper right", ncols=2, fontsize=8)
        axes.set_ylabel(f"mean intensity ({_SCALES[profile.norm]})")
    # Above the bars there is room for the legend.
    _share_linear(panels, values, room=0.2 if len(chosen) else 0.08)


def _draw_entropy(panels, profiles: Sequence[SpectralProfile]) -> None:
    values = [profile.entropy.numpy() for profile in profiles]
    for axes, profile, height in zip(panels, profiles, values, strict=True):
        _bars(axes, profile, height, _GREEN)
        axes.set_ylabel("entropy (bits)")
    _share_linear(panels, values)


def _draw_frequency(panels, profiles: Sequence[SpectralProfile]) -> None:
    from matplotlib import colormaps
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize
    from matplotlib.ticker import MaxNLocator

    values = np.concatenate([spectrum.numpy() for profile in profiles for spectrum in profile.intensity])
    positive = values[values > 0]
    top = positive.max() if len(positive) else 1.0
    # Zeros and what float32 rounds away are drawn at the floor.
    bottom = max(positive.min(), top * _FLOOR) if len(positive) else top * _FLOOR
    colours = colormaps["viridis"]
    for axes, profile in zip(panels, profiles, strict=True):
        depth = len(profile)
        scale = Normalize(0, max(depth - 1, 1))
        for layer, (spectrum, channels) in enumerate(zip(profile.intensity, profile.channels, strict=True)):
            frequency = np.arange(len(spectrum)) / channels
            # The last colour of the map, yellow, is too light for a line.
            colour = colours(0.92 * scale(layer))
            few = depth <= _LEGEND_LAYERS
            label = f"{profile.layers[layer]} (C={channels})" if few else None
            marker = "o" if len(spectrum) < 12 else None
            shown = np.maximum(spectrum.numpy(), bottom)
            axes.plot(frequency, shown, color=colour, linewidth=1.4 if few else 0.9, label=label, marker=marker)
        axes.set_xlabel("normalised frequency k/C (cycles per channel)")
        axes.set_ylabel(f"intensity ({_SCALES[profile.norm]})")
        axes.set_xlim(-0.005, 0.505)
        axes.set_yscale("log")
        axes.set_ylim(bottom / 1.3, top * 1.3)
        _label_log_axis(axes.yaxis, top / bottom)
        axes.grid(alpha=0.3)
        if depth <= _LEGEND_LAYERS:
            axes.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1.0, 1.0), frameon=False)
        else:
            bar = _bar_colours(colours)
            axes.figure.colorbar(
                ScalarMappable(scale, bar), ax=axes, label="layer", ticks=MaxNLocator(8, integer=True), pad=0.02
            )


def _label_log_axis(axis, ratio: float) -> None:
    """Numbers at 1, 2, 5 where less than two decades are shown, which would have one number or none else."""
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    if ratio < 100:
        axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axis.set_minor_formatter(NullFormatter())


def _bar_colours(colours):
    from matplotlib.colors import ListedColormap

    return ListedColormap(colours(np.linspace(0, 0.92, 256)))


def _bars(axes, profile: SpectralProfile, height: np.ndarray, colour) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.bar(np.arange(len(profile)), height, color=colour, width=0.75)
    axes.grid(axis="y", alpha=0.3)
    axes.set_axisbelow(True)
    axes.set_xlim(-0.7, len(profile) - 0.3)
    numbered = re.fullmatch(r"(.*?)(\d+)", profile.layers[0])
    in_order = numbered and all(name == f"{numbered[1]}{int(numbered[2]) + i}" for i, name in enumerate(profile.layers))
    if in_order:
        axes.xaxis.set_major_locator(MaxNLocator(12, integer=True))
        axes.set_xlabel(f"layer ({profile.layers[0]} to {profile.layers[-1]})")
    elif len(profile) <= _NAMED_TICKS:
        axes.set_xticks(range(len(profile)), profile.layers, rotation=20, ha="right", fontsize=8)
        axes.set_xlabel("layer")
    else:
        axes.xaxis.set_major_locator(MaxNLocator(12, integer=True))
        axes.set_xlabel("layer, in the order of analysis")


def _share_linear(panels, values: Sequence[np.ndarray], room: float = 0.08) -> None:
    """Axes from 0, with a share of ``room`` above; panels whose highest values are alike have the same one."""
    tops = [float(value.max()) for value in values]
    for axes, top in zip(panels, tops, strict=True):
        shared = max((other for other in tops if top <= _COMPARABLE * other and other <= _COMPARABLE * top), default=0)
        axes.set_ylim(0, (1 + room) * shared if shared > 0 else 1)


def _title(profile: SpectralProfile, width: float) -> str:
    """Model, weights and images, in lines that fit over a panel ``width`` inches wide."""
    images = f"{profile.images} image{'' if profile.images == 1 else 's'}"
    label = profile.label.replace("RANDOM W", "RANDOM\u00a0W")  # no line ends within these two words
    lines = (label, f"{images}{f', {profile.data}' if profile.data else ''}")
    return "\n".join(part for line in lines for part in textwrap.wrap(line, int(8.5 * width)))
