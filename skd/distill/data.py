"""What the trainer needs to know of a data set, whichever it is."""

import logging
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Protocol

from torch import Tensor

from skd.distill.distributed import World
from skd.distill.errors import DistillError

_SHOWN = 3


class TrainLoader(Protocol):
    """One process's share of the training images.

    The order of an epoch is a permutation that depends on seed and epoch; of ``size`` processes the one of rank ``r``
    takes its positions r, r + size, ...; what is done to an image depends on seed, epoch and its position alone.
    """

    def __len__(self) -> int:
        """Batches in an epoch, equally many in every process."""
        ...

    def epoch(self, seed: int, epoch: int, start: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """Batches from number ``start`` on, each the same whatever ``start`` was.

        Yields:
            Images [B, channels, H, W] float32, normalised for the student, and their targets: int64 [B], or
            float32 [B, classes] where images are mixed.
        """
        ...


class TestLoader(Protocol):
    """One process's share of the test images: all of them over the processes, none twice."""

    def __len__(self) -> int:
        """Batches, or fewer where all images of one cannot be read; not equally many in every process."""
        ...

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Images [B, channels, H, W] float32 and their classes int64 [B]."""
        ...


@dataclass
class BadImages:
    """Images that could not be read, by name, with the reason; each is counted, and told of, once.

    Attributes:
        found: name to reason, in the order of discovery.
        limit: more than so many end the run; None is no limit.
        tell: called with a sentence about each.
    """

    found: dict[str, str] = field(default_factory=dict)
    limit: int | None = None
    tell: Callable[[str], None] = field(default=logging.getLogger(__name__).warning, repr=False)

    def __len__(self) -> int:
        return len(self.found)

    def add(self, found: Mapping[str, str]) -> None:
        """Count those that are new.

        Raises:
            DistillError: there are more than the limit.
        """
        for name, reason in found.items():
            if name not in self.found:
                self.found[name] = reason
                self.tell(f"{name} cannot be read ({reason}) and is left out")
        if self.limit is not None and len(self) > self.limit:
            first = ", ".join(f"{name} ({reason})" for name, reason in list(self.found.items())[:_SHOWN])
            raise DistillError(
                f"{len(self)} images cannot be read, which is more than --max-bad-images {self.limit}: {first}"
                f"{', ...' if len(self) > _SHOWN else ''}; mend or remove them, or give a larger --max-bad-images"
            )


@dataclass(frozen=True)
class DataSource:
    """Training and test images of one task.

    Attributes:
        name: for people.
        classes: their names.
        in_chans, image_size: of the images, square.
        train_images, test_images: how many, over all processes.
        make_train_loader, make_test_loader: loaders of a process's share.
        bad_images: what this process could not read so far.
        mixes: targets are probabilities [B, classes], because images are mixed.
    """

    name: str
    classes: tuple[str, ...]
    in_chans: int
    image_size: int
    train_images: int
    test_images: int
    make_train_loader: Callable[[World], TrainLoader]
    make_test_loader: Callable[[World], TestLoader]
    bad_images: BadImages = field(default_factory=BadImages)
    mixes: bool = False
