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


# --- Operations that need the transform ---


def spectral_intensity(x: Tensor, axis: str = "channel", scale: float = 1.0) -> Tensor:
    """Per image the magnitudes of a map's Fourier transform, averaged over what is not transformed.

    Args:
        x: ``[B, C, H, W]``, any floating dtype.
        axis: ``"channel"``, the transform over C averaged over positions, or ``"space"``, the transform over H and W
            averaged over channels.
        scale: factor of every magnitude.

    Returns:
        ``[B, C//2+1]`` or ``[B, H, W//2+1]`` in float32, or float64 for a float64 map.
    """
    x = x.to(torch.float64 if x.dtype == torch.float64 else torch.float32)
    if x.numel() == 0:  # PyTorch refuses to transform an empty batch
        return x.new_zeros(0, *((x.shape[1] // 2 + 1,) if axis == "channel" else (x.shape[2], x.shape[3] // 2 + 1)))
    if axis == "channel":
        return torch.fft.rfft(x, dim=1).abs().mean((2, 3)) * scale
    return torch.fft.rfft2(x).abs().mean(1) * scale


def half_spectrum(d: Tensor) -> Tensor:
    """``rfft2(d, norm="ortho")`` of ``[B, C, H, W]``."""
    return torch.fft.rfft2(d, norm="ortho")


def half_spectrum_adjoint(g: Tensor, columns: int) -> Tensor:
    """The transpose of :func:`half_spectrum` as a map of real numbers: ``[B, C, H, W//2+1] -> [B, C, H, W]``.

    Every bin of the half spectrum counts once, where the inverse transform counts all but kx=0 and kx=W/2 twice.
    """
    full = g.new_zeros(*g.shape[:-1], columns)
    full[..., : g.shape[-1]] = g
    return torch.fft.ifft2(full, norm="ortho").real


def focal_weights(difference: Tensor, focal: float) -> Tensor:
    """``|difference|^focal`` over its maximum in each plane (Focal Frequency Loss, arXiv 2012.12821, eq. 8, 9).

    Args:
        difference: ``[B, C, H, W//2+1]``, complex or real.
        focal: exponent alpha > 0.

    Returns:
        The same shape, real, in [0, 1], detached; 0 in a plane without differences.
    """
    size = difference.detach().abs()
    largest = size.amax((-2, -1), keepdim=True)
    return torch.where(largest > 0, size / largest, 0).pow(focal)


def fourier_align_published(
    student: Tensor, teacher: Tensor, match: str, bands: Tensor | None = None, focal: float | None = None
) -> Tensor:
    """The loss of one layer whose half spectra are compared bin by bin, in the form its definition has.

    With S and T the half spectra ``rfft2(., norm="ortho")`` after channel pooling, the mean over all
    ``B*C*H*(W//2+1)`` bins of ``weight * difference^2``. The difference is ``|S| - |T|`` (``match="magnitude"``) or
    ``log1p|S| - log1p|T|`` (``"log_magnitude"``); for ``"complex"`` it is ``S - T``, and the mean is over real and
    imaginary parts. The weight is ``bands`` times :func:`focal_weights` of the difference.

    Args:
        student: ``[B, Cs, H, W]``, any floating dtype.
        teacher: ``[B, Ct, H, W]``; the wider of the two is pooled over channels to the narrower.
        match: ``"complex"``, ``"magnitude"`` or ``"log_magnitude"``.
        bands: ``[H, W//2+1]``, weights of the bins; None for 1.
        focal: exponent of the focal weights; None for none.

    Returns:
        A scalar in float32, or float64 if either map is float64. Differentiable by autograd.
    """
    s, t = _pooled_pair(student, teacher)
    if s.numel() == 0:
        return _zero(s)
    s_hat, t_hat = half_spectrum(s), half_spectrum(t)
    if match == "complex":
        difference = s_hat - t_hat
        squared = (difference.real.square() + difference.imag.square()) / 2
    else:
        difference = s_hat.abs() - t_hat.abs() if match == "magnitude" else s_hat.abs().log1p() - t_hat.abs().log1p()
        squared = difference.square()
    if focal is not None:
        squared = squared * focal_weights(difference, focal)
    if bands is not None:
        squared = squared * bands
    return squared.mean()


def fourier_align(
    student: Tensor,
    teacher: Tensor,
    match: str,
    bands: Tensor | None,
    focal: float | None,
    inner_weight: float,
    loss_scale: float,
    gradient_scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """One layer's loss, its gradient and the pooled magnitudes, in the form every backend computes them.

    With the difference and the weight of :func:`fourier_align_published`, ``w`` the weight times ``inner_weight`` for
    the columns 0 < kx < W/2, and A the :func:`half_spectrum_adjoint`::

        loss     = loss_scale * sum w |difference|^2
        gradient = gradient_scale * P^T A(w * G)
        G        = S - T    or    (|S| - |T|) S/|S|    or    (log1p|S| - log1p|T|) / (1 + |S|) S/|S|    (0 where S = 0)

    Args:
        student: ``[B, Cs, H, W]``.
        teacher: ``[B, Ct, H, W]``.
        match: ``"complex"``, ``"magnitude"`` or ``"log_magnitude"``.
        bands: ``[H, W//2+1]`` or None.
        focal: exponent or None.
        inner_weight: 1; or 2 with ``"complex"`` for the whole spectrum's sum, that is ``sum d^2`` in space.
        loss_scale: factor of the loss.
        gradient_scale: factor of the gradient.

    Returns:
        The loss (scalar), the gradient ``[B, Cs, H, W]``, and ``|S|`` and ``|T|`` averaged over batch and channels,
        ``[2, H, W//2+1]`` (0 for an empty batch); all in :func:`compute_dtype`.
    """
    s, t = _pooled_pair(student, teacher)
    height, columns = s.shape[2:]
    if s.numel() == 0:
        return s.new_zeros(()), torch.zeros_like(student, dtype=s.dtype), s.new_zeros(2, height, columns // 2 + 1)
    s_hat, t_hat = half_spectrum(s), half_spectrum(t)
    s_size, t_size = s_hat.abs(), t_hat.abs()
    if match == "complex":
        difference = half_spectrum(s - t)
        g = difference
    else:
        direction = torch.where(s_size > 0, s_hat / s_size, 0)
        if match == "magnitude":
            difference = s_size - t_size
            g = difference * direction
        else:
            difference = s_size.log1p() - t_size.log1p()
            g = difference / (1 + s_size) * direction
    weight = torch.ones_like(s_size)
    weight[..., 1 : (columns + 1) // 2] = inner_weight
    if focal is not None:
        weight = weight * focal_weights(difference, focal)
    if bands is not None:
        weight = weight * bands
    loss = (weight * difference.abs().square()).sum() * loss_scale
    gradient = half_spectrum_adjoint(weight * g, columns)
    if student.shape[1] > teacher.shape[1]:
        gradient = unpool_channels(gradient, student.shape[1])
    return loss, gradient * gradient_scale, torch.stack([s_size.mean((0, 1)), t_size.mean((0, 1))])
