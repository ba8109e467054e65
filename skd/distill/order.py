"""In which order an epoch visits the images, and which of them are one process's share.

All of it is a function of a few numbers, so nothing has to be saved for a run to go on in the middle of an epoch.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from skd.distill.distributed import World
from skd.distill.seeds import derive


def epoch_order(images: int, seed: int, epoch: int, repeats: int = 1) -> Tensor:
    """Numbers of the images at the positions 0, 1, ... of an epoch: a permutation of all of them.

    With ``repeats`` R the first of every R images of the permutation come, each R times in a row, in an epoch of the
    same length: as timm's ``RepeatAugSampler`` has it, but also for a single process.

    Returns:
        int64 [images].
    """
    generator = torch.Generator().manual_seed(derive("order", seed, epoch))
    return torch.randperm(images, generator=generator).repeat_interleave(repeats)[:images]


def count_batches(positions: int, batch_size: int, world: World) -> int:
    """Batches of each process, the last of which may be smaller."""
    return -(-positions // (world.size * batch_size))


def batch_positions(positions: int, batch_size: int, world: World, start: int = 0) -> Iterator[range]:
    """The positions of each batch of this process, from batch number ``start`` on.

    Step k of all ``size`` processes together has ``size * batch_size`` positions that follow one another; the process
    of rank r takes the r-th of them and every ``size``-th after it. So the batches of two processes are those of a
    single one with twice the batch size.
    """
    together = world.size * batch_size
    for step in range(start, count_batches(positions, batch_size, world)):
        yield range(step * together + world.rank, min((step + 1) * together, positions), world.size)
