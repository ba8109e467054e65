"""What the trainer needs to know of a data set, whichever it is."""

from collections.abc import Callable, Iterable, Sized
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor


class Loader(Iterable[tuple[Tensor, Tensor]], Sized, Protocol):
    """Batches of (images [B, channels, H, W] float32, target [B] int64); ``len`` is the number of batches."""


@dataclass(frozen=True)
class DataSource:
    """Training and test images of one task.

    The training loader draws its order and augmentation from the global random number generators, which the loop
    seeds at the start of every epoch: two arms with one seed see the same batches.
    """

    name: str
    classes: tuple[str, ...]
    in_chans: int
    image_size: int
    train_images: int
    test_images: int
    make_train_loader: Callable[[], Loader]
    make_test_loader: Callable[[], Loader]
