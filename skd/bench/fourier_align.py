"""What is measured of fourier_align, the losses that need a transform: the shapes and the implementations.

Beside the bytes (:mod:`skd.bench.pairs`) the arithmetic: student and teacher are real, so one complex 2-D transform of
``s + i t`` gives both spectra, and the gradient takes one back. With the usual 5 n log2 n operations for n complex
numbers that is 2 * 5 * log2(H W) = 76 operations per number at 14x14, 56 at 7x7 and 116 at 56x56, and about 20 for the
magnitudes, the comparison and the direction: 6 to 12 operations per byte, for 12 bytes per number in float32. A core
with 8 lanes and two units of fused multiplication is about as long at that as at the bytes, so a copy of the same bytes
is a floor that is not reached here; several threads that share one memory get nearer to it.
"""

from collections.abc import Sequence

from skd.bench.case import COPY, Share, Variant
from skd.bench.config import BenchConfig
from skd.bench.maps import Shape, select_shapes
from skd.bench.objectives import focal_frequency_loss, plain_loss, published, skd_loss
from skd.bench.pairs import BASELINE, FOCAL_FREQUENCY_LOSS, PairCase
from skd.bench.spectral_align import pair_cases

SHAPES = (Shape(192, 384, 14, 14, 32), Shape(768, 768, 7, 7, 32), Shape(96, 96, 56, 56, 16))
"""CaiT-S24 -> DeiT-Tiny; the last stage of Swin-Small -> Swin-Tiny; its first stage."""

ALWAYS = (BASELINE, COPY)

VARIANTS = (
    Variant(BASELINE, plain_loss(published), nchw=True),
    Variant("published", plain_loss(published), only=("magnitude",)),
    Variant("published-compile", plain_loss(published, compiled=True), compiled=True, only=("magnitude",)),
    Variant(FOCAL_FREQUENCY_LOSS, plain_loss(focal_frequency_loss), nchw=True, only=("complex+focal",)),
    Variant("skd-reference", skd_loss("reference"), backend="reference", only=("magnitude",)),
    Variant("skd-cpu", skd_loss("cpu"), backend="cpu"),
    Variant(
        "skd-cpu-spectra",
        skd_loss("cpu", spectra=True),
        backend="cpu",
        only=("magnitude",),
        share=Share("skd-cpu", beyond=True, most=15.0),
    ),
    Variant(COPY, None),
)
"""Every implementation that is measured.

``published-nchw``: the definition (:func:`skd.reference.fourier_align_published`) in eager PyTorch on contiguous NCHW
maps, the baseline. ``published``: the same on maps of the case's layout; ``-compile``: under ``torch.compile``.
``focal-frequency-loss``: the loss of arXiv 2012.12821 in eager PyTorch on NCHW maps, beside ``complex+focal``.
``skd-...``: :func:`skd.spectral_loss` with that backend; ``-spectra``: with ``return_spectra``. ``copy``: the floor.
What would say nothing new for every match is measured for ``magnitude`` alone.
"""


def known_shapes() -> Sequence[str]:
    return [shape.name for shape in SHAPES]


def cases(config: BenchConfig, texts: Sequence[str]) -> list[PairCase]:
    """The cases a configuration asks for, of shapes that are named by some of the texts."""
    return pair_cases(config, select_shapes(texts, SHAPES), config.matches("magnitude"))
