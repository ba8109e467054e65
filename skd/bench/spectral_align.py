"""What is measured of spectral_align: the shapes, the maps and the implementations, with their least cost.

Roofline. Let S and T be the bytes of the student and teacher maps and D the numbers after pooling (B*C*H*W with the
narrower C). Loss and gradient cannot be had for less than reading S and T once and writing S once, ``2 S + T`` bytes;
the loss alone needs ``S + T``, and the backward alone writes ``S``. In float32 with equal widths that is 12 bytes per
number. The arithmetic per number after pooling: 1 subtraction; 1 addition into the row sum of its parity (which gives
both r and a); 1 multiplication and 1 addition for the gradient ``d + row_weight * S``; 1 multiplication and 1 addition
for the loss ``sum d * g``; 1 multiplication by the factor of the gradient: 7 operations, and per teacher number 1
addition and 1/ratio multiplications for pooling, so 7 to 9 per 12 bytes and well under 1 operation per byte. A
processor core does tens of operations per byte of memory traffic: the operation is bound by memory at every
shape, and the figure to compare with is a copy of the same number of bytes.
"""

import dataclasses
import re
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

BASELINE = "published-nchw"
"""The variant all ratios refer to: the published loss in eager PyTorch on contiguous NCHW maps."""

COPY = "copy"
"""The floor: a copy that reads and writes as many bytes together as the operation must move at least."""


@dataclasses.dataclass(frozen=True)
class Shape:
    """One pair of maps: ``[batch, student, height, width]`` and ``[batch, teacher, height, width]``."""

    student: int
    teacher: int
    height: int
    width: int
    batch: int

    @property
    def name(self) -> str:
        return f"{self.student}<-{self.teacher} {self.height}x{self.width} B{self.batch}"

    @classmethod
    def parse(cls, text: str) -> "Shape | None":
        """The shape written like ``192<-384 14x14 B64``; None if the text is not of that form."""
        numbers = re.fullmatch(r"(\d+)<-(\d+) (\d+)x(\d+) B(\d+)", text.strip())
        return cls(*map(int, numbers.groups())) if numbers and all(map(int, numbers.groups())) else None


SHAPES = (Shape(192, 384, 14, 14, 64), Shape(96, 96, 56, 56, 32), Shape(768, 768, 7, 7, 64))
"""CaiT-S24 -> DeiT-Tiny; the first stage of Swin-Small -> Swin-Tiny; its last stage."""


def select_shapes(texts: Sequence[str], known: Sequence[Shape] = SHAPES) -> list[Shape]:
    """The known shapes whose name contains one of the texts, and the shapes that a text spells out.

    Raises:
        ValueError: a text that is neither.
    """
    if not texts:
        return list(known)
    chosen: list[Shape] = []
    for text in texts:
        matching = [shape for shape in known if text in shape.name] or list(filter(None, [Shape.parse(text)]))
        if not matching:
            names = ", ".join(repr(shape.name) for shape in known)
            raise ValueError(
                f"shape {text!r} is part of no default shape ({names}); "
                f"write one of your own like '192<-384 14x14 B64', with positive numbers"
            )
        chosen += [shape for shape in matching if shape not in chosen]
    return chosen


@dataclasses.dataclass(frozen=True)
class Case:
    """One configuration of inputs."""

    shape: Shape
    layout: str
    dtype: str
    match: str = "complex"
    upstream: float = 1.0

    @property
    def name(self) -> str:
        return f"{self.shape.name}, {self.layout}, {self.dtype}, {self.match}"

    @property
    def torch_dtype(self) -> torch.dtype:
        return getattr(torch, self.dtype)

    @property
    def student_bytes(self) -> int:
        shape = self.shape
        return shape.batch * shape.student * shape.height * shape.width * self.torch_dtype.itemsize

    @property
    def teacher_bytes(self) -> int:
        return self.student_bytes // self.shape.student * self.shape.teacher

    def floor_bytes(self, phase: str) -> int:
        """The least traffic of ``forward``, ``backward`` or ``both``, in bytes (see the module's text)."""
        read, written = self.student_bytes + self.teacher_bytes, self.student_bytes
        return {"forward": read, "backward": written, "both": read + written}[phase]

    def upstream_gradient(self) -> Tensor:
        """What arrives at the loss in backward: not 1, so that multiplying by it is measured, as in training.

        float16 gets a gradient scaler's factor, 2**16, without which its gradients are below the least float16 number.
        """
        return torch.tensor(self.upstream * (65536.0 if self.dtype == "float16" else 1.0))


@dataclasses.dataclass(frozen=True)
class Maps:
    """The inputs of one case: the same numbers in the case's layout and as contiguous NCHW; students require grad."""

    student: Tensor
    teacher: Tensor
    student_nchw: Tensor
    teacher_nchw: Tensor


def make_maps(case: Case, seed: int = 0) -> Maps:
    """Random maps of a case; the numbers depend on shape, dtype and seed only, not on the layout."""
    shape = case.shape
    generator = torch.Generator().manual_seed(seed)

    def normal(channels: int, mean: float) -> Tensor:
        size = (shape.batch, channels, shape.height, shape.width)
        return (torch.randn(size, generator=generator) + mean).to(case.torch_dtype)

    # Means that differ make row sums of d count: the Fourier coefficients at kx=0 are not lost in the noise.
    student, teacher = normal(shape.student, 0.0), normal(shape.teacher, 0.25)
    orders = split_layout(case.layout)
    student_map, teacher_map = lay_out(student, orders[0], prefix=1), lay_out(teacher, orders[1])
    return Maps(student_map.requires_grad_(), teacher_map, student.requires_grad_(), teacher)


def split_layout(layout: str) -> tuple[str, str]:
    """The memory orders of student and teacher.

    Raises:
        ValueError: a layout that is none.
    """
    student, _, teacher = layout.partition("<-")
    orders = student, teacher or student
    if not {"nchw", "tokens"}.issuperset(orders):
        raise ValueError(f"layout={layout!r} is not known; use 'nchw', 'tokens', 'tokens<-nchw' or 'nchw<-tokens'")
    return orders


def lay_out(x: Tensor, order: str, prefix: int = 0) -> Tensor:
    """A contiguous map itself, or the same numbers as a view of tokens ``[B, prefix + H*W, C]``."""
    if order == "nchw":
        return x
    batch, channels, height, width = x.shape
    tokens = x.new_zeros(batch, prefix + height * width, channels)
    tokens[:, prefix:] = x.flatten(2).transpose(1, 2)
    return tokens[:, prefix:].transpose(1, 2).unflatten(2, (height, width))


@dataclasses.dataclass(frozen=True)
class Variant:
    """One implementation.

    Attributes:
        name: as on the command line.
        build: match -> the loss of a student and a teacher map, or of a list of each; None for the copy.
        nchw: it gets contiguous NCHW maps whatever the layout of the case.
        compiled: it goes through torch.compile at its first call.
        backend: the backend of skd it needs; None if it is not skd.
    """

    name: str
    build: Callable[[str], Callable] | None
    nchw: bool = False
    compiled: bool = False
    backend: str | None = None


def plain_loss(form: str, compiled: bool = False) -> Callable[[str], Callable]:
    """match -> a form of :mod:`skd.reference` for a student and a teacher map, or its mean over a list of each."""

    def build(match: str) -> Callable:
        from skd import reference

        function = getattr(reference, form)

        def loss(students: Tensor | list[Tensor], teachers: Tensor | list[Tensor]) -> Tensor:
            if isinstance(students, Tensor):
                return function(students, teachers, match)
            total = function(students[0], teachers[0], match)
            for student, teacher in zip(students[1:], teachers[1:], strict=True):
                total = total + function(student, teacher, match)
            return total / len(students) if len(students) > 1 else total

        return torch.compile(loss, dynamic=False, fullgraph=True) if compiled else loss

    return build


def skd_loss(backend: str) -> Callable[[str], Callable]:
    """match -> skd's loss of a student and a teacher map, or of a list of each, with this backend."""

    def build(match: str) -> Callable:
        import skd

        return lambda student, teacher: skd.spectral_loss(student, teacher, match, backend=backend)

    return build


PUBLISHED, CLOSED_FORM = "spectral_align_published", "spectral_align_closed_form"

VARIANTS = (
    Variant(BASELINE, plain_loss(PUBLISHED), nchw=True),
    Variant("published", plain_loss(PUBLISHED)),
    Variant("published-compile", plain_loss(PUBLISHED, compiled=True), compiled=True),
    Variant("closed-form", plain_loss(CLOSED_FORM)),
    Variant("closed-form-compile", plain_loss(CLOSED_FORM, compiled=True), compiled=True),
    Variant("skd-reference", skd_loss("reference"), backend="reference"),
    Variant("skd-cpu", skd_loss("cpu"), backend="cpu"),
    Variant(COPY, None),
)
"""Every implementation that is measured.

``published-nchw``: the published form on contiguous NCHW maps, the baseline. ``published``, ``closed-form``: the plain
forms of :mod:`skd.reference` in eager PyTorch, on maps of the case's layout; ``-compile``: the same under
``torch.compile``. ``skd-...``: :func:`skd.spectral_loss` with that backend. ``copy``: the floor.
"""


def select_variants(names: Sequence[str], compile: bool = True) -> list[Variant]:
    """The variants of these names, all if there are none; the baseline and the copy are always among them.

    Raises:
        ValueError: a name that is no variant.
    """
    return select_from(VARIANTS, (BASELINE, COPY), names, compile, "not known")


def select_from(variants: Sequence, always: Sequence[str], names: Sequence[str], compile: bool, unknown: str) -> list:
    """The selection of :func:`select_variants` among any ``variants``; ``unknown`` is said of a name that is none."""
    known = [variant.name for variant in variants]
    for name in names:
        if name not in known:
            raise ValueError(f"variant {name!r} is {unknown}; use some of {', '.join(known)}")
    wanted = {*always, *(names or known)}
    return [v for v in variants if v.name in wanted and (compile or not v.compiled)]


class Run:
    """A variant on the maps of a case, ready to be called and timed."""

    def __init__(self, variant: Variant, case: Case, maps: Maps):
        self.variant = variant
        self._upstream = case.upstream_gradient()
        if variant.build is None:
            # Half of the bytes are read and half are written; the copy is a fresh tensor, as a gradient is.
            source = torch.zeros(case.floor_bytes("both") // 2, dtype=torch.uint8)
            self._loss = lambda _student, _teacher: source.clone()
        else:
            self._loss = variant.build(case.match)
        self._student = maps.student_nchw if variant.nchw else maps.student
        self._teacher = maps.teacher_nchw if variant.nchw else maps.teacher

    def forward(self) -> Tensor:
        """The loss (for the copy: the copy)."""
        return self._loss(self._student, self._teacher)

    def backward(self, loss: Tensor) -> Tensor:
        """The gradient with respect to the student map, where a model's own backward would take it over.

        It is asked for with ``torch.autograd.grad``: ``loss.backward()`` into a leaf would copy a gradient whose memory
        order is not the leaf's, which no map inside a model does.
        """
        if self.variant.build is None:
            return loss
        (gradient,) = torch.autograd.grad(loss, self._student, self._upstream.to(loss.dtype))
        return gradient
