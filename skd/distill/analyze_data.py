"""Images to analyse a model with: generated gratings, the digits, or a folder."""

from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import torch
from timm.data import create_dataset, create_transform
from torch import Tensor
from torch.nn.functional import interpolate
from torch.utils.data import DataLoader, Subset

from skd.analysis.gratings import grating_batches
from skd.distill.digits import load_digits
from skd.distill.distributed import World
from skd.distill.errors import DistillError


def image_batches(
    data: str, size: int, in_chans: int, batches: int, batch_size: int, normalisation: dict
) -> tuple[str, int, Iterator[Tensor]]:
    """Batches ``[B, in_chans, size, size]`` of the same images for every model.

    Args:
        data: "gratings", "digits" or a folder.
        size: side of the images in pixels.
        in_chans: 3, or what the model takes; the digits are repeated over channels, photographs averaged for one.
        batches: how many at most.
        batch_size: images in each; the last may be smaller.
        normalisation: "mean", "std", "interpolation", "crop_pct", "crop_mode", for a folder.

    Returns:
        What to call the images, how many there are, and the batches.

    Raises:
        DistillError: no such folder, or no images in it.
    """
    wanted = batches * batch_size
    if data == "gratings":
        return "generated gratings", wanted, grating_batches(size, in_chans, batches, batch_size)
    if data == "digits":
        source = load_digits(batch_size)
        digits = (
            _to_size(images, size).expand(-1, in_chans, -1, -1)
            for images, _ in islice(source.make_test_loader(World()), batches)
        )
        return "scikit-learn's digits", min(wanted, source.test_images), digits
    return _folder(Path(data), size, in_chans, wanted, batch_size, normalisation)


def _folder(root: Path, size: int, in_chans: int, wanted: int, batch_size: int, normalisation: dict):
    if not root.is_dir():
        raise DistillError(f"--data {root} is no folder; give gratings, digits or a folder of images")
    try:
        dataset = create_dataset("", root=str(root), search_split=False)
    except RuntimeError as error:  # timm's, for no images
        raise DistillError(f"--data {root} has no images: {error}") from error
    dataset.transform = create_transform(
        (3, size, size),
        is_training=False,
        mean=normalisation["mean"],
        std=normalisation["std"],
        interpolation=normalisation["interpolation"],
        crop_pct=normalisation["crop_pct"],
        crop_mode=normalisation["crop_mode"],
    )
    count = min(wanted, len(dataset))
    # At equal steps, because they are sorted by class.
    chosen = [index * len(dataset) // count for index in range(count)]
    loader = DataLoader(Subset(dataset, chosen), batch_size=batch_size)
    return root.name or str(root), count, (_to_channels(images, in_chans) for images, _ in loader)


def _to_size(images: Tensor, size: int) -> Tensor:
    if images.shape[-1] == size:
        return images
    return interpolate(images, size=(size, size), mode="bilinear", align_corners=False)


def _to_channels(images: Tensor, in_chans: int) -> Tensor:
    if images.shape[1] == in_chans:
        return images
    grey = images.mean(1, keepdim=True, dtype=torch.float32)
    return grey.expand(-1, in_chans, -1, -1)
