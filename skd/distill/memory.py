"""Loaders of images that are in memory already; indexing them is far cheaper than collating single ones."""

from collections.abc import Iterator

from torch import Tensor

from skd.distill.data import DataSource
from skd.distill.distributed import World
from skd.distill.order import batch_positions, count_batches, epoch_order

ALIKE = 8
"""A training epoch has a multiple of this many images, and so the same ones in 1, 2, 4 or 8 processes, for which a
few images, others in every epoch, do not come."""


def memory_source(
    name: str,
    classes: tuple[str, ...],
    train: tuple[Tensor, Tensor],
    test: tuple[Tensor, Tensor],
    batch_size: int,
) -> DataSource:
    """A data set of tensors.

    Args:
        name, classes: as in :class:`DataSource`.
        train, test: images [N, channels, H, H] float32, normalised, and their classes int64 [N].
        batch_size: images per step and process.
    """
    return DataSource(
        name=name,
        classes=classes,
        in_chans=train[0].shape[1],
        image_size=train[0].shape[-1],
        train_images=len(train[1]),
        test_images=len(test[1]),
        make_train_loader=lambda world: MemoryTrainLoader(*train, batch_size, world),
        make_test_loader=lambda world: MemoryTestLoader(*test, batch_size, world),
    )


class MemoryTrainLoader:
    """A :class:`TrainLoader`; the last batch of an epoch may be smaller, but no less so in any process."""

    def __init__(self, images: Tensor, target: Tensor, batch_size: int, world: World):
        self.images, self.target, self.batch_size, self.world = images, target, batch_size, world
        positions = len(target) - len(target) % ALIKE
        self._positions = positions - positions % world.size

    def __len__(self) -> int:
        return count_batches(self._positions, self.batch_size, self.world)

    def epoch(self, seed: int, epoch: int, start: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        order = epoch_order(len(self.target), seed, epoch).to(self.target.device)
        for positions in batch_positions(self._positions, self.batch_size, self.world, start):
            batch = order[positions.start : positions.stop : positions.step]
            yield self.images[batch], self.target[batch]


class MemoryTestLoader:
    """A :class:`TestLoader`."""

    def __init__(self, images: Tensor, target: Tensor, batch_size: int, world: World):
        share = slice(world.rank, None, world.size)
        self.images, self.target, self.batch_size = images[share], target[share], batch_size

    def __len__(self) -> int:
        return -(-len(self.target) // self.batch_size)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return zip(self.images.split(self.batch_size), self.target.split(self.batch_size), strict=True)
