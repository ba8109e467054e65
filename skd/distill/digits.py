"""scikit-learn's digits: 1,797 real handwritten digits of 8x8 pixels that come with the package.

From the UCI Optical Recognition of Handwritten Digits data. Small enough for a demonstration, and no more than that:
one of the 360 test images is 0.28 percentage points.
"""

import numpy as np
import torch

from skd.distill.data import DataSource
from skd.distill.memory import memory_source
from skd.distill.models import ModelSpec

TEST_IMAGES = 360
SPLIT_SEED = 0
"""The split has its own seed, so that every run and every seed is tested on the same images."""

_INTENSITY_MAX = 16
_VIT = {"img_size": 8, "patch_size": 2, "in_chans": 1, "num_classes": 10, "weight_init": "reset"}

# Registered name and what is changed of it, so that one line of timm builds the same model again.
TEACHER = ModelSpec("vit_tiny_patch16_224", {**_VIT, "embed_dim": 48, "depth": 4, "num_heads": 4})
STUDENT = ModelSpec("vit_tiny_patch16_224", {**_VIT, "embed_dim": 16, "depth": 3, "num_heads": 2})
TEACHER_NAME, STUDENT_NAME = "digits-teacher", "digits-student"
# First and last blocks, paired by their distance from the nearer end.
STUDENT_LAYERS, TEACHER_LAYERS = (0, 1, 2), (0, 2, 3)


def load_digits(batch_size: int, device: torch.device | str = "cpu") -> DataSource:
    """1,437 digits to train on and 360 to test on, stratified by class; pixels normalised with mean 0.5 and std 0.5."""
    import sklearn.datasets
    from sklearn.model_selection import train_test_split

    digits = sklearn.datasets.load_digits()
    train, test = train_test_split(
        np.arange(len(digits.target)), test_size=TEST_IMAGES, stratify=digits.target, random_state=SPLIT_SEED
    )
    images = torch.from_numpy(digits.images).float().unsqueeze(1) / _INTENSITY_MAX
    images = ((images - 0.5) / 0.5).to(device)
    target = torch.from_numpy(digits.target).long().to(device)
    train, test = ((images[part], target[part]) for part in (train, test))
    return memory_source("digits", tuple(map(str, range(10))), train, test, batch_size)
