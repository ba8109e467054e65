"""What ``skd analyze`` is told. Nothing here imports torch, so ``skd analyze --help`` is quick."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro

from skd.distill.config import LayerId


@dataclass(frozen=True)
class AnalyzeConfig:
    """Look at a model's spectra: intensity over depth and over frequency (SpectralKD), and entropy.

    Writes profile.json, profile.csv, intensity-over-depth.png and intensity-over-frequency.png; with --pair K also
    layers.yaml for skd distill --layers. docs/spectra.md says how to read the pictures.
    """

    model: tyro.conf.Positional[str]
    """timm name of the model, or digits-teacher or digits-student for the models of skd distill's demonstration."""
    checkpoint: Path | None = None
    """Weights of MODEL, .safetensors or .pth. Default: timm's pretrained ones."""
    random_init: bool = False
    """Random weights for every model without a checkpoint, in place of pretrained ones; the pictures say so."""
    data: str = "gratings"
    """gratings (generated), digits (scikit-learn's), or a folder of images, in folders of their classes or not."""
    image_size: int | None = None
    """Side of the square images in pixels. Default: each model's own size."""
    batches: int = 4
    """Number of batches; of a folder the images are taken at equal steps."""
    batch_size: int = 8
    """Images per batch; the results do not depend on it."""
    layers: tuple[LayerId, ...] | None = None
    """Layers of MODEL: block numbers (negative from the end) or submodule names. Default: all blocks or stages."""
    norm: Literal["forward", "ortho"] = "forward"
    """Scale of the transform: forward (1/C, the authors'), or ortho, in which layers of different width compare."""
    compare: tuple[str, ...] = ()
    """One or two others beside MODEL: names as for MODEL, or a profile.json of an earlier analysis."""
    compare_checkpoint: Path | None = None
    """Weights of the model named by --compare."""
    pair: int | None = None
    """Write layers.yaml with this many pairs: MODEL's hottest layers as teacher, the first of --compare as student."""
    out: Path | None = None
    """New or empty folder for the results. Default: runs/analyze-<date>-<time>."""
    seed: int = 0
    """Seed of random weights."""
    device: str = "auto"
    """Where to compute: auto (a CUDA device if there is one), cpu, cuda, cuda:1, ..."""
