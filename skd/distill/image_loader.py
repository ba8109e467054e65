"""Batches of images in files, the same for any number of loader processes and from any step of an epoch on.

What is done to an image at random is drawn from seed, epoch and its position in the epoch alone, so nothing is carried
from one image to the next. A loader process is told all of it with each batch and has no state of its own.
"""

import ctypes
import multiprocessing.util
import os
import random
import signal
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from timm.data import Mixup
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler, default_collate

from skd.distill.config import DataConfig
from skd.distill.data import BadImages
from skd.distill.distributed import World
from skd.distill.errors import DistillError
from skd.distill.image_sets import ImageSet, reason_of
from skd.distill.order import batch_positions, count_batches, epoch_order
from skd.distill.seeds import derive


class ImageTrainLoader:
    """A :class:`TrainLoader` of batches of equal size; of the images those that fill none are left out of an epoch.

    Args:
        images: what to load.
        transform: from an image in RGB to a tensor [channels, H, W]; draws from the global generators.
        mixup: timm's, or None; images are mixed within a process's batch.
        data: ``batch_size``, ``workers``, ``repeats`` and ``max_bad_images`` are used.
        world: whose share.
        bad_images: takes the names of those that cannot be read; the next image that can comes in place of each.
        pinned: batches in pinned memory, for a CUDA device.

    Raises:
        DistillError: there are fewer images than one batch.
    """

    def __init__(
        self,
        images: ImageSet,
        transform: Callable,
        mixup: Mixup | None,
        data: DataConfig,
        world: World,
        bad_images: BadImages,
        *,
        pinned: bool = False,
    ):
        together = world.size * data.batch_size
        if len(images) < together:
            processes = f" in each of {world.size} processes" if world.size > 1 else ""
            raise DistillError(
                f"{images.title} has {len(images)} images, fewer than one batch of {data.batch_size}{processes}; "
                f"give --batch-size {max(1, len(images) // world.size)} or less"
            )
        self._images, self._data, self._world = images, data, world
        self._positions = len(images) - len(images) % together
        batches = _TrainBatches(images, transform, mixup, world.rank, data.max_bad_images)
        self._batches = _Batches(batches, data.workers, bad_images, pinned)

    def __len__(self) -> int:
        return count_batches(self._positions, self._data.batch_size, self._world)

    def epoch(self, seed: int, epoch: int, start: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """As :class:`TrainLoader` has it; a loader serves one epoch at a time.

        Raises:
            DistillError: too many images, or all, cannot be read, or a loader process has died.
        """
        order = epoch_order(len(self._images), seed, epoch, self._data.repeats)
        every = batch_positions(self._positions, self._data.batch_size, self._world, start)
        steps = (
            _Step(seed, epoch, number, positions, order[positions.start : positions.stop : positions.step].tolist())
            for number, positions in enumerate(every, start)
        )
        for batch in self._batches.load(steps):
            if batch.images is None:
                raise DistillError(f"none of the {len(self._images)} images of {self._images.title} can be read")
            yield batch.images, batch.target


class ImageTestLoader:
    """A :class:`TestLoader`; images that cannot be read are left out.

    Args:
        images, transform, data, world, bad_images, pinned: as of :class:`ImageTrainLoader`; nothing is drawn at random.
    """

    def __init__(
        self,
        images: ImageSet,
        transform: Callable,
        data: DataConfig,
        world: World,
        bad_images: BadImages,
        *,
        pinned: bool = False,
    ):
        self._share = range(world.rank, len(images), world.size)
        self._batch_size = data.batch_size
        self._batches = _Batches(_TestBatches(images, transform), data.workers, bad_images, pinned)

    def __len__(self) -> int:
        return -(-len(self._share) // self._batch_size)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        firsts = range(0, len(self._share), self._batch_size)
        for batch in self._batches.load(self._share[first : first + self._batch_size] for first in firsts):
            if batch.images is not None:
                yield batch.images, batch.target


class _Step(NamedTuple):
    """One process's part of a training step: positions in the epoch and the images there."""

    seed: int
    epoch: int
    number: int
    positions: range
    images: list[int]


class _Batch(NamedTuple):
    """What a loader process sends; ``bad`` holds names and reasons. Without any image there are no tensors."""

    images: Tensor | None
    target: Tensor | None
    bad: dict[str, str]


class _TrainBatches(Dataset):
    def __init__(self, images: ImageSet, transform: Callable, mixup: Mixup | None, rank: int, max_bad_images: int):
        self.images, self.transform, self.mixup = images, transform, mixup
        self.rank, self.max_bad_images = rank, max_bad_images

    def __getitem__(self, step: _Step) -> _Batch:
        bad: dict[str, str] = {}
        images, target = [], []
        with _undisturbed_generators():
            for position, index in zip(step.positions, step.images, strict=True):
                loaded = self._load(index, bad)
                if loaded is None:
                    return _Batch(None, None, bad)
                _seed_generators("image", step.seed, step.epoch, position)
                images.append(self.transform(loaded[0]))
                target.append(loaded[1])
            batch, target = default_collate(images), torch.tensor(target)
            if self.mixup is not None:
                _seed_generators("mix", step.seed, step.epoch, step.number, self.rank)
                batch, target = self.mixup(batch, target)
        return _Batch(batch, target, bad)

    def _load(self, index: int, bad: dict[str, str]):
        """The image ``index`` or the next that can be read; None if there is none, or too many cannot."""
        for offset in range(len(self.images)):
            loaded = _try_to_load(self.images, (index + offset) % len(self.images), bad)
            if loaded is not None or len(bad) > self.max_bad_images:
                return loaded
        return None


class _TestBatches(Dataset):
    def __init__(self, images: ImageSet, transform: Callable):
        self.images, self.transform = images, transform

    def __getitem__(self, indices: range) -> _Batch:
        bad: dict[str, str] = {}
        loaded = [_try_to_load(self.images, index, bad) for index in indices]
        loaded = [(self.transform(image), target) for image, target in filter(None, loaded)]
        if not loaded:
            return _Batch(None, None, bad)
        images, target = zip(*loaded, strict=True)
        return _Batch(default_collate(list(images)), torch.tensor(target), bad)


class _Batches:
    """Batches of a data set that makes whole ones, each from a description; its processes stay between epochs."""

    def __init__(self, batches: Dataset, workers: int, bad_images: BadImages, pinned: bool):
        self._plan = _Plan()
        self._bad_images = bad_images
        prepare_worker = None
        if workers > 0:
            ending = multiprocessing.RawValue(ctypes.c_bool)
            multiprocessing.util.Finalize(self, _end, (ending,), exitpriority=0)
            prepare_worker = partial(_leave_signals_to_the_main_process, ending)
        self._loader = DataLoader(
            batches,
            batch_size=None,
            sampler=self._plan,
            num_workers=workers,
            persistent_workers=workers > 0,
            pin_memory=pinned,
            worker_init_fn=prepare_worker,
            # A number is drawn for each epoch, which nothing here uses: not from the caller's generator.
            generator=torch.Generator(),
        )

    def load(self, descriptions: Iterable) -> Iterator[_Batch]:
        self._plan.descriptions = descriptions
        batches = iter(self._loader)
        while True:
            try:
                batch = next(batches)
            except StopIteration:
                return
            except RuntimeError as error:
                # Only the text tells this from an error that happened in a worker and was passed on.
                if not str(error).startswith("DataLoader worker"):
                    raise
                raise DistillError(
                    f"a process that loads images has died ({reason_of(error)}); if memory or shared memory "
                    "(/dev/shm) ran out, give fewer --workers or a smaller --batch-size"
                ) from error
            self._bad_images.add(batch.bad)
            yield batch


class _Plan(Sampler):
    """The descriptions of the batches that are to come."""

    def __init__(self):
        self.descriptions: Iterable = ()

    def __iter__(self) -> Iterator:
        return iter(self.descriptions)


def _try_to_load(images: ImageSet, index: int, bad: dict[str, str]):
    try:
        return images.load(index)
    except MemoryError:
        raise
    except Exception as error:  # PIL's readers raise nearly anything for a damaged file
        bad[images.name(index)] = reason_of(error)
        return None


@contextmanager
def _undisturbed_generators():
    """The global generators of the CPU are afterwards as they were before."""
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])


def _seed_generators(*place: int | str) -> None:
    seed = derive(*place)
    random.seed(seed)
    np.random.seed(seed)
    # Not torch.manual_seed, which would seed the CUDA generators too.
    torch.default_generator.manual_seed(seed)


def _leave_signals_to_the_main_process(ending: ctypes.c_bool, worker: int) -> None:
    """Ctrl-C, and a SIGTERM to the whole process group, must not end loaders before the run has saved itself."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # A SIGTERM is also what Python ends with, and then waits for, the processes that are left when it exits.
    signal.signal(signal.SIGTERM, lambda *_: os._exit(0) if ending.value else None)


def _end(ending: ctypes.c_bool) -> None:
    ending.value = True
