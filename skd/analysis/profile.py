"""What the analysis of a model found, and its files."""

import csv
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from skd.files import replacing

_FORMAT = "skd spectral profile 1"
_COLUMNS = ("layer", "name", "channels", "layer_intensity", "entropy_bits", "k", "frequency", "intensity")


@dataclass(frozen=True, eq=False)
class SpectralProfile:
    """Spectral intensities of a model's layers, as :func:`skd.analyze` makes them.

    Attributes:
        layers: names of the submodules, in the order of analysis; "layer i" below is an index into it.
        intensity: per layer S[k], k = 0 .. C//2, as :func:`skd.spectral_intensity` defines it: [C_l//2+1] float64.
        channels: C of every layer.
        entropy: [L] in bits (:class:`skd.analysis.entropy.ChannelEntropy`), or None if it was not asked for.
        images: how many images the means are over.
        norm: scaling of the transform; with "forward" layers and models of different width do not compare.
        title: name of the model.
        data: name of the images.
        random_weights: whether the model was not trained.
        weights: where trained weights came from, if there is something to say.
    """

    layers: tuple[str, ...]
    intensity: list[Tensor]
    channels: tuple[int, ...]
    entropy: Tensor | None
    images: int
    norm: str
    title: str
    data: str = ""
    random_weights: bool = False
    weights: str = ""
    layer_intensity: Tensor = field(init=False)
    """[L] float64: the mean of each layer's S over all C bins, the negative frequencies included."""

    def __post_init__(self):
        means = [_mean_over_all_bins(s, c) for s, c in zip(self.intensity, self.channels, strict=True)]
        object.__setattr__(self, "layer_intensity", torch.stack(means))

    @property
    def label(self) -> str:
        """The model with what there is to say of its weights."""
        note = "RANDOM WEIGHTS" if self.random_weights else self.weights
        return f"{self.title} ({note})" if note else self.title

    def __len__(self) -> int:
        return len(self.layers)

    def ranked(self) -> list[int]:
        """Indices of all layers, the one of greatest ``layer_intensity`` first; of equal ones the earlier."""
        return torch.sort(self.layer_intensity, descending=True, stable=True).indices.tolist()

    def hottest(self, k: int) -> list[int]:
        """Indices of the k layers of greatest ``layer_intensity``, ascending; of equal ones the earlier.

        Raises:
            ValueError: k is not from 1 to the number of layers.
        """
        if isinstance(k, bool) or not isinstance(k, int) or not 1 <= k <= len(self):
            raise ValueError(f"k={k!r} layers cannot be chosen: {self.title} has {len(self)}; give k from 1 to that")
        return sorted(self.ranked()[:k])

    def plot(self, path: str | Path, *others: "SpectralProfile", kind: str = "both", chosen: Sequence[int] = ()):
        """Draw intensity over depth and over frequency as a PNG, beside the profiles ``others``, two at most.

        Args:
            path: the file; it is whole or absent.
            others: profiles to compare with, left to right.
            kind: ``"depth"``, ``"frequency"`` or ``"both"``.
            chosen: layers of this profile to mark in the picture over depth.
        """
        from skd.analysis import plots

        with replacing(Path(path)) as file:
            plots.draw(file, [self, *others], kind=kind, chosen=chosen)

    def to_csv(self, path: str | Path) -> None:
        """A row per layer and frequency: layer, name, channels, its intensity and entropy, k, k/C, S[k]."""
        with replacing(Path(path)) as part, part.open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(_COLUMNS)
            for i, name in enumerate(self.layers):
                channels = self.channels[i]
                bits = "" if self.entropy is None else self.entropy[i].item()
                layer = (i, name, channels, self.layer_intensity[i].item(), bits)
                writer.writerows((*layer, k, k / channels, value) for k, value in enumerate(self.intensity[i].tolist()))

    def save(self, path: str | Path) -> None:
        """Write everything as JSON; :meth:`load` gives the same bits back."""
        content = {
            "format": _FORMAT,
            "title": self.title,
            "random_weights": self.random_weights,
            "weights": self.weights,
            "data": self.data,
            "images": self.images,
            "norm": self.norm,
            "layers": list(self.layers),
            "channels": list(self.channels),
            "layer_intensity": self.layer_intensity.tolist(),
            "entropy": None if self.entropy is None else self.entropy.tolist(),
            "intensity": [spectrum.tolist() for spectrum in self.intensity],
        }
        text = json.dumps(content, ensure_ascii=False, allow_nan=False)
        with replacing(Path(path)) as file:
            file.write_text(text + "\n", encoding="utf-8")

    to_json = save

    @classmethod
    def load(cls, path: str | Path) -> "SpectralProfile":
        """Read what :meth:`save` wrote.

        Raises:
            ValueError: no such file, or none of :meth:`save`.
        """
        try:
            content = json.loads(Path(path).read_text(encoding="utf-8"))
        except OSError as error:
            raise ValueError(f"{path} cannot be read ({error.strerror}); give a profile.json of skd analyze") from error
        except ValueError as error:
            raise ValueError(f"{path} is no JSON ({error}); give a profile.json of skd analyze") from error
        if not isinstance(content, dict) or content.get("format") != _FORMAT:
            raise ValueError(f'{path} is no profile of skd analyze: it lacks "format": "{_FORMAT}"')
        try:
            return _from_json(content)
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            raise ValueError(f"{path} is a damaged profile ({type(error).__name__}: {error}); make it again") from error


def _from_json(content: dict) -> SpectralProfile:
    intensity = [torch.tensor(spectrum, dtype=torch.float64) for spectrum in content["intensity"]]
    channels, layers, entropy = content["channels"], content["layers"], content["entropy"]
    bits = None if entropy is None else torch.tensor(entropy, dtype=torch.float64)
    if not layers or len(layers) != len(channels) or (bits is not None and bits.shape != (len(layers),)):
        raise ValueError("layers, channels and entropy differ in length")
    if [tuple(spectrum.shape) for spectrum in intensity] != [(c // 2 + 1,) for c in channels]:
        raise ValueError("a layer of C channels has C // 2 + 1 intensities")
    return SpectralProfile(
        layers=tuple(map(str, layers)),
        intensity=intensity,
        channels=tuple(channels),
        entropy=bits,
        images=int(content["images"]),
        norm=str(content["norm"]),
        title=str(content["title"]),
        data=str(content["data"]),
        random_weights=bool(content["random_weights"]),
        weights=str(content["weights"]),
    )


def _mean_over_all_bins(spectrum: Tensor, channels: int) -> Tensor:
    """Mean over k = 0 .. C-1; a real signal has S[C-k] = S[k], so all but 0 and, for even C, C/2 are there twice."""
    if spectrum.shape != (channels // 2 + 1,):
        raise ValueError(f"{channels} channels have {channels // 2 + 1} intensities, not {list(spectrum.shape)}")
    counted = torch.full_like(spectrum, 2.0)
    counted[0] = 1
    if channels % 2 == 0:
        counted[-1] = 1
    return torch.tensor(math.fsum((spectrum * counted).tolist()) / channels, dtype=torch.float64)
