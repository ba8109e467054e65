"""What every operation asks of a feature map."""

import torch
from torch import Tensor

FLOATING = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def check_map(role: str, x: Tensor) -> None:
    """Refuses what is no floating tensor of four dimensions.

    Args:
        role: what to call it.
        x: should be ``[B, C, H, W]``.

    Raises:
        TypeError: it is no tensor or not floating.
        ValueError: it has another number of dimensions.
    """
    if not isinstance(x, Tensor):
        raise TypeError(f"{role} is a {type(x).__name__}; give a Tensor [B, C, H, W]")
    if x.dtype not in FLOATING:
        raise TypeError(f"{role} is {x.dtype}; convert it to float32, float64, bfloat16 or float16")
    if x.ndim != 4:
        hint = "; skd.tokens_to_map turns tokens [B, N, C] into a map" if x.ndim == 3 else ""
        raise ValueError(f"{role} has shape {tuple(x.shape)}; give [B, C, H, W]{hint}")
