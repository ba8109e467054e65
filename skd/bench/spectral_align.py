"""What is measured of spectral_align: the shapes and the implementations.

Beside the bytes (:mod:`skd.bench.pairs`) the arithmetic per number after pooling: 1 subtraction; 1 addition into the
row sum of its parity (which gives both r and a); 1 multiplication and 1 addition for the gradient ``d + row_weight *
S``; 1 multiplication and 1 addition for the loss ``sum d * g``; 1 multiplication by the factor of the gradient: 7
operations, and per teacher number 1 addition and 1/ratio multiplications for pooling, so 7 to 9 per 12 bytes and well
under 1 operation per byte. A processor core does tens of operations per byte of memory traffic: the operation is bound
by memory at every shape, and the figure to compare with is a copy of the same number of bytes.
"""

from collections.abc import Sequence

from skd.bench.case import COPY, Variant
from skd.bench.config import BenchConfig
from skd.bench.maps import Shape, select_shapes
from skd.bench.objectives import closed_form, plain_loss, published, skd_loss
from skd.bench.pairs import BASELINE, PairCase

SHAPES = (Shape(192, 384, 14, 14, 64), Shape(96, 96, 56, 56, 32), Shape(768, 768, 7, 7, 64))
"""CaiT-S24 -> DeiT-Tiny; the first stage of Swin-Small -> Swin-Tiny; its last stage."""

ALWAYS = (BASELINE, COPY)

VARIANTS = (
    Variant(BASELINE, plain_loss(published), nchw=True),
    Variant("published", plain_loss(published)),
    Variant("published-compile", plain_loss(published, compiled=True), compiled=True),
    Variant("closed-form", plain_loss(closed_form)),
    Variant("closed-form-compile", plain_loss(closed_form, compiled=True), compiled=True),
    Variant("skd-reference", skd_loss("reference"), backend="reference"),
    Variant("skd-cpu", skd_loss("cpu"), backend="cpu"),
    Variant(COPY, None),
)
"""Every implementation that is measured.

``published-nchw``: the published form on contiguous NCHW maps, the baseline. ``published``, ``closed-form``: the plain
forms of :mod:`skd.reference` in eager PyTorch, on maps of the case's layout; ``-compile``: the same under
``torch.compile``. ``skd-...``: :func:`skd.spectral_loss` with that backend. ``copy``: the floor.
"""


def known_shapes() -> Sequence[str]:
    return [shape.name for shape in SHAPES]


def cases(config: BenchConfig, texts: Sequence[str]) -> list[PairCase]:
    """The cases a configuration asks for, of shapes that are named by some of the texts."""
    return pair_cases(config, select_shapes(texts, SHAPES), config.matches("align"))


def pair_cases(config: BenchConfig, shapes: Sequence[Shape], matches: Sequence[str]) -> list[PairCase]:
    """All combinations with the configuration's dtypes and layouts."""
    return [
        PairCase(shape, layout, dtype, match, config.upstream)
        for shape in shapes
        for match in matches
        for dtype in config.dtypes
        for layout in config.layouts
    ]
