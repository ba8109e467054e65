"""A folder of small photographs that anything can tell apart."""

from pathlib import Path

import numpy as np
from PIL import Image

COLOURS = {"red": (200, 50, 50), "green": (50, 200, 50), "blue": (50, 50, 200)}


def write_photos(root: Path, train: int = 16, val: int = 8) -> Path:
    """``train`` and ``val`` images of each colour with noise, 40 pixels wide and 36 high."""
    random = np.random.default_rng(0)
    for split, count in (("train", train), ("val", val)):
        for name, colour in COLOURS.items():
            folder = root / split / name
            folder.mkdir(parents=True)
            for i in range(count):
                pixels = np.clip(np.array(colour) + random.normal(0, 20, (36, 40, 3)), 0, 255).astype(np.uint8)
                Image.fromarray(pixels).save(folder / f"{i}.png")
    return root
