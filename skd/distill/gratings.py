"""Synthetic images of known orientation and frequency: generated gratings, one class for each pair of the two.

What tells the classes apart is where their spectrum has its peak, and phase, contrast and noise differ from image to
image. All are drawn from one fixed seed, so there is nothing to download and every run has the same images.
"""

import math
from dataclasses import replace

import torch
from torch import Tensor

from skd.analysis.gratings import Grating, gratings
from skd.distill.data import DataSource
from skd.distill.memory import memory_source
from skd.distill.models import ModelSpec

IMAGE_SIZE = 16
CLASSES = tuple(gratings(IMAGE_SIZE))
TRAIN_IMAGES, TEST_IMAGES = 80, 20
"""Of each class."""
SEED = 0
"""The images have their own seed, so that every run and every seed has the same ones."""
LEAST_CONTRAST = 0.3
NOISE = 0.5
"""Standard deviation of the normal noise of each pixel; the greatest amplitude is 1."""

_VIT = {
    "img_size": IMAGE_SIZE,
    "patch_size": 4,
    "in_chans": 1,
    "num_classes": len(CLASSES),
    "weight_init": "reset",
}

# Registered name and what is changed of it, so that one line of timm builds the same model again.
TEACHER = ModelSpec("vit_tiny_patch16_224", {**_VIT, "embed_dim": 48, "depth": 4, "num_heads": 4})
STUDENT = ModelSpec("vit_tiny_patch16_224", {**_VIT, "embed_dim": 16, "depth": 3, "num_heads": 2})
TEACHER_NAME, STUDENT_NAME = "gratings-teacher", "gratings-student"
# First and last blocks, paired by their distance from the nearer end.
STUDENT_LAYERS, TEACHER_LAYERS = (0, 1, 2), (0, 2, 3)


def load_gratings(batch_size: int, device: torch.device | str = "cpu") -> DataSource:
    """1,440 images of 18 classes to train on and 360 to test on, with pixels around 0; they need no normalisation."""
    generator = torch.Generator().manual_seed(SEED)
    images = torch.stack([_draw(grating, TRAIN_IMAGES + TEST_IMAGES, generator) for grating in CLASSES]).to(device)
    target = torch.arange(len(CLASSES), device=device)[:, None].expand(images.shape[:2])
    parts = slice(None, TRAIN_IMAGES), slice(TRAIN_IMAGES, None)
    train, test = ((images[:, part].flatten(0, 1), target[:, part].flatten()) for part in parts)
    return memory_source("gratings (synthetic)", tuple(map(class_name, CLASSES)), train, test, batch_size)


def class_name(grating: Grating) -> str:
    """Orientation, of the direction in which it varies, and cycles over the image along that direction."""
    degrees = math.degrees(math.atan2(grating.ky, grating.kx))
    return f"{degrees:.0f} degrees, {math.hypot(grating.ky, grating.kx):.1f} cycles"


def _draw(grating: Grating, count: int, generator: torch.Generator) -> Tensor:
    """[count, 1, size, size]"""
    phases = 2 * math.pi * torch.rand(count, generator=generator, dtype=torch.float64)
    contrast = LEAST_CONTRAST + (1 - LEAST_CONTRAST) * torch.rand(count, 1, 1, 1, generator=generator)
    plain = torch.stack([replace(grating, phase=phase).image(IMAGE_SIZE, channels=1) for phase in phases.tolist()])
    return contrast * plain + NOISE * torch.randn(plain.shape, generator=generator)
