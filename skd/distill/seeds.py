"""Randomness of a training: every step draws from numbers that depend on its place alone.

No generator is carried from step to step, so a run that is resumed at any step, with any number of loader processes,
draws what it would have drawn without the interruption.
"""

import random
from hashlib import blake2b

import numpy as np
import torch


def derive(*place: int | str) -> int:
    """A seed below 2**32 for a place such as ``(seed, epoch, step)``; unlike for places that differ anywhere."""
    digest = blake2b("/".join(map(str, place)).encode(), digest_size=4).digest()
    return int.from_bytes(digest, "little")


def seed_everything(*place: int | str) -> None:
    """Seed the global generators of Python, numpy and torch for a place."""
    seed = derive(*place)
    random.seed(seed)
    np.random.seed(seed)
    # What torch.manual_seed does, without the half millisecond in which it notes the seed for a CUDA that never starts.
    torch.default_generator.manual_seed(seed)
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed_all(seed)
