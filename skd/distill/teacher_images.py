"""What a teacher sees: the student's images in the teacher's normalisation, size and dtype."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from timm.utils import unwrap_model
from torch import Tensor, nn


class TeacherImages(nn.Module):
    """Turns images [B, channels, H, W] made for the student into the teacher's; what to do is decided here, once.

    Comparing means or sizes of tensors in every step would make the host wait for the device.

    Args:
        student, teacher: the models; where their ``pretrained_cfg`` name different mean and std, images are
            normalised anew.
        size: (height, width) to resize to after that, bicubic with antialiasing; None leaves them.
        dtype: what they are cast to in the end; None leaves it.

    Raises:
        ValueError: normalisations of another number of channels than the student takes.
    """

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module,
        size: tuple[int, int] | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        self.size, self.dtype = size, dtype
        parameter = next(student.parameters())
        renormalisation = _renormalisation(student, teacher)
        self.renormalises = renormalisation is not None
        for name, value in zip(("scale", "shift"), renormalisation or (None, None), strict=True):
            self.register_buffer(name, None if value is None else value.to(parameter), persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        """The teacher's images [B, channels, height, width]; the same tensor where nothing is to be done."""
        if self.renormalises:
            images = images * self.scale + self.shift
        if self.size is not None and tuple(images.shape[2:]) != self.size:
            # On the CPU there is no bicubic kernel for 16 bits.
            fine = images if images.dtype == torch.float64 else images.float()
            images = F.interpolate(fine, self.size, mode="bicubic", antialias=True).to(images.dtype)
        return images if self.dtype is None else images.to(self.dtype)

    @contextmanager
    def before(self, teacher: nn.Module) -> Iterator[None]:
        """Within it the teacher, called on its own, takes the student's images and does this to them first."""
        handle = teacher.register_forward_pre_hook(lambda _, inputs: (self(inputs[0]), *inputs[1:]))
        try:
            yield
        finally:
            handle.remove()

    def extra_repr(self) -> str:
        return f"renormalises={self.renormalises}, size={self.size}, dtype={self.dtype}"


def _renormalisation(student: nn.Module, teacher: nn.Module) -> tuple[Tensor, Tensor] | None:
    """Scale and shift [1, channels, 1, 1] from the student's normalisation to the teacher's; None if they agree.

    A model that does not name its normalisation takes the images as they are.
    """
    named = [getattr(unwrap_model(model), "pretrained_cfg", None) or {} for model in (student, teacher)]
    values = [cfg.get(key) for cfg in named for key in ("mean", "std")]
    if any(value is None for value in values):
        return None
    mean_s, std_s, mean_t, std_t = (torch.tensor(value, dtype=torch.float64).flatten() for value in values)
    if torch.equal(mean_s, mean_t) and torch.equal(std_s, std_t):
        return None
    scale, shift = std_s / std_t, (mean_s - mean_t) / std_t
    if (scale == scale[0]).all() and (shift == shift[0]).all():
        scale, shift = scale[:1], shift[:1]
    channels = getattr(unwrap_model(student), "in_chans", None)
    if isinstance(channels, int) and len(scale) not in (1, channels):
        raise ValueError(
            f"student and teacher name different normalisations of {len(scale)} channels, but the student takes "
            f"{channels}; give both models the same pretrained_cfg mean and std"
        )
    return scale.view(1, -1, 1, 1), shift.view(1, -1, 1, 1)
