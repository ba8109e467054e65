"""Spectral knowledge distillation for PyTorch vision models.

The public names are loaded on first use, so that ``import skd`` touches neither CUDA nor Triton and a
program that only needs the loss never imports timm.
"""

import importlib

__version__ = "0.1.0"

_HOME = {
    "SpectralLoss": "skd.losses",
    "spectral_loss": "skd.losses",
    "tokens_to_map": "skd.features",
    "FeatureTap": "skd.features",
    "SpectralDistillationTask": "skd.distill.task",
    "spectral_intensity": "skd.ops.spectral_intensity",
    "analyze": "skd.analysis.measure",
    "SpectralProfile": "skd.analysis.profile",
    "pair_layers": "skd.analysis.pairs",
    "backends": "skd.ops.backends",
}

__all__ = ["__version__", *_HOME]


def __getattr__(name: str):
    if name not in _HOME:
        raise AttributeError(f"module 'skd' has no attribute {name!r}; it has {', '.join(_HOME)}")
    value = getattr(importlib.import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__():
    return sorted(__all__)
