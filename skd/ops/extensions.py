"""How tensors cross into ``skd._cpu`` and ``skd._cuda``, which know no PyTorch: as addresses, codes and strides.

For ``skd._cuda`` also what a launch needs of PyTorch: the device and its current stream.
"""

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor

DTYPE_CODES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}


def map_of(extension, x: Tensor):
    """A tensor [B, C, H, W] as the extension's ``Map``."""
    return extension.Map(x.data_ptr(), DTYPE_CODES[x.dtype], x.shape, x.stride())


@contextlib.contextmanager
def on(device: torch.device) -> Iterator[tuple[int, int]]:
    """Makes ``device`` the current one; gives its index and the address of PyTorch's current stream on it."""
    if device.type != "cuda":  # the tests' build for the CPU
        yield 0, 0
        return
    with torch.cuda.device(device):
        yield device.index, torch.cuda.current_stream(device).cuda_stream
