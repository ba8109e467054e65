"""The definition of every operation in plain PyTorch.

It is the oracle of the tests, the baseline of the benchmarks, and what runs where no kernel can. Everything
here works for any device, any strides and any floating dtype; 16-bit maps are computed in float32, float64
maps in float64.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def compute_dtype(student: Tensor, teacher: Tensor) -> torch.dtype:
    """The dtype the arithmetic runs in: float64 if either map is float64, float32 otherwise."""
    return torch.float64 if torch.float64 in (student.dtype, teacher.dtype) else torch.float32


def pool_channels(x: Tensor, width: int) -> Tensor:
    """Adaptive average over channels, ``[B, C, H, W] -> [B, width, H, W]``, for ``width <= C``.

    Window i covers the channels ``floor(i*C/width) .. ceil((i+1)*C/width) - 1``; the windows overlap when C
    is no multiple of width (the definition of ``torch.nn.AdaptiveAvgPool1d``, applied to the channel axis).
    """
    batch, channels, height, columns = x.shape
    if channels == width:
        return x
    if x.numel() == 0:  # PyTorch refuses to pool an empty batch
        return x.new_zeros(batch, width, height, columns) + x.sum()
    # [B, C, H*W] is read as B images of C rows, so the pooled axis is the channel axis.
    pooled = F.adaptive_avg_pool2d(x.flatten(2), (width, height * columns))
    return pooled.unflatten(2, (height, columns))


def _pooled_pair(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    dtype = compute_dtype(student, teacher)
    width = min(student.shape[1], teacher.shape[1])
    return pool_channels(student.to(dtype), width), pool_channels(teacher.to(dtype), width)


def _zero(student: Tensor) -> Tensor:
    """A zero that still has the student in its graph: the loss of an empty batch, whose mean would be NaN."""
    return student.sum()


def spectral_align_published(student: Tensor, teacher: Tensor, match: str = "complex") -> Tensor:
    """The alignment loss of one layer as SpectralKD publishes it (arXiv 2412.19055), with a Fourier transform.

    Args:
        student: ``[B, Cs, H, W]``, any floating dtype.
        teacher: ``[B, Ct, H, W]``; the wider of the two is pooled over channels to the narrower.
        match: ``"complex"`` compares real and imaginary parts of ``rfft2(., norm="ortho")``; ``"mse"`` is the
            plain mean squared error in space.

    Returns:
        A scalar in float32, or float64 if either map is float64. Differentiable by autograd.
    """
    s, t = _pooled_pair(student, teacher)
    if s.numel() == 0:
        return _zero(s)
    if match == "mse":
        return F.mse_loss(s, t)
    s_hat = torch.fft.rfft2(s, norm="ortho")
    t_hat = torch.fft.rfft2(t, norm="ortho")
    return F.mse_loss(torch.stack([s_hat.real, s_hat.imag]), torch.stack([t_hat.real, t_hat.imag]))


def spectral_align_closed_form(student: Tensor, teacher: Tensor, match: str = "complex") -> Tensor:
    """The same number as :func:`spectral_align_published`, by Parseval's theorem and without a transform.

    With ``d = student - teacher`` after pooling, ``r`` the sums of its rows, ``a`` their alternating sums,
    ``e = 1`` for even W and 0 otherwise, and ``N = 2*B*C*H*(W//2+1)``::

        L = ( sum d^2 + (1/W) sum r^2 + (e/W) sum a^2 ) / (2 N)

    because the half spectrum holds the columns kx=0 and (for even W) kx=W/2 once and stands for every other
    column at half its weight. Arguments and result as in :func:`spectral_align_published`.
    """
    s, t = _pooled_pair(student, teacher)
    d = s - t
    if d.numel() == 0:
        return _zero(s)
    if match == "mse":
        return d.square().mean()
    batch, channels, height, width = d.shape
    total = d.square().sum() + d.sum(-1).square().sum() / width
    if width % 2 == 0:
        alternating = d[..., 0::2].sum(-1) - d[..., 1::2].sum(-1)
        total = total + alternating.square().sum() / width
    return total / (4 * batch * channels * height * (width // 2 + 1))


def same_parity_row_sums(d: Tensor) -> Tensor:
    """For every element the sum over those of its row that enter its gradient, in the shape of ``d``.

    The gradient's row terms ``r + (-1)^w a`` are twice the sum of the even columns at an even column and twice
    that of the odd columns at an odd one. So for even W these are the sums over columns of the same parity,
    and for odd W, where there is no alternating term, the sum of the whole row.
    """
    if d.shape[-1] % 2:
        return d.sum(-1, keepdim=True).expand_as(d)
    pairs = d.unflatten(-1, (-1, 2))
    return pairs.sum(-2, keepdim=True).expand_as(pairs).flatten(-2)


def unpool_channels(gradient: Tensor, channels: int) -> Tensor:
    """The adjoint of :func:`pool_channels`: ``[B, width, H, W] -> [B, channels, H, W]``."""
    width = gradient.shape[1]
    if channels == width:
        return gradient
    window = torch.arange(width, device=gradient.device)
    lengths = ((window + 1) * channels + width - 1) // width - window * channels // width
    shares = gradient / lengths[:, None, None]
    # A channel is in one window or, where two of them overlap, in both.
    channel = torch.arange(channels, device=gradient.device)
    first, last = channel * width // channels, ((channel + 1) * width - 1) // channels
    both = (first != last)[:, None, None]
    return shares[:, first] + torch.where(both, shares[:, last], 0)


def spectral_align(
    student: Tensor, teacher: Tensor, row_weight: float, loss_scale: float, gradient_scale: float
) -> tuple[Tensor, Tensor]:
    """One layer's loss and its gradient, in the form every backend computes them.

    With ``S`` from :func:`same_parity_row_sums`::

        loss     = loss_scale * sum d * (d + row_weight * S)
        gradient = gradient_scale * P^T (d + row_weight * S)

    Args:
        student: ``[B, Cs, H, W]``.
        teacher: ``[B, Ct, H, W]``.
        row_weight: 2/W (even W) or 1/W (odd W) for the complex match, 0 for plain mean squared error.
        loss_scale: factor of the loss.
        gradient_scale: factor of the gradient.

    Returns:
        The loss (scalar) and the gradient ``[B, Cs, H, W]``, both in :func:`compute_dtype`.
    """
    s, t = _pooled_pair(student, teacher)
    d = s - t
    g = d if row_weight == 0 else d + row_weight * same_parity_row_sums(d)
    pooled_student = student.shape[1] > teacher.shape[1]
    gradient = unpool_channels(g, student.shape[1]) if pooled_student else g
    return (d * g).sum() * loss_scale, gradient * gradient_scale
