"""The nasty cases: maps of every order, size and content that any backend has to get right.

A new backend passes when it passes these; a new operation on pairs of maps takes its cases from here.
"""

import zlib
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

# --- Memory orders: each returns a [B, C, H, W] view whose memory is laid out as its name says ---


def nchw(b, c, h, w):
    return torch.randn(b, c, h, w)


def tokens(b, c, h, w):
    """As DeiT hands it out: channels contiguous, every image's rows behind a class token."""
    return torch.randn(b, h * w + 1, c)[:, 1:].unflatten(1, (h, w)).permute(0, 3, 1, 2)


def nhwc(b, c, h, w):
    return torch.randn(b, h, w, c).permute(0, 3, 1, 2)


def cropped(b, c, h, w):
    """Channels contiguous, and a gap after every row of positions."""
    return torch.randn(b, h + 1, w + 2, c)[:, 1:, 1:-1].permute(0, 3, 1, 2)


def sliced(b, c, h, w):
    """Gaps in every dimension: neither channels nor planes are contiguous."""
    return torch.randn(b + 1, c + 2, h + 1, 2 * w)[1:, 1:-1, :h, ::2]


def padded_rows(b, c, h, w):
    """Rows contiguous, planes not."""
    return torch.randn(b, c, h, w + 3)[..., 1 : w + 1]


def transposed(b, c, h, w):
    return torch.randn(b, c, w, h).transpose(2, 3)


def expanded(b, c, h, w):
    """Stride 0 over batch and height."""
    return torch.randn(1, c, 1, w).expand(b, c, h, w)


ORDERS = {f.__name__: f for f in (nchw, tokens, nhwc, cropped, sliced, padded_rows, transposed, expanded)}

# --- Contents: applied to the maps of a layer ---


def random(s, t):
    return s, t


def zero_teacher(s, t):
    return s, t * 0


def constant_difference(s, t):
    return s * 0 + 3, t * 0 + 1


def one_pixel(s, t):
    s = s * 0
    s[0, 0, -1, -1] = 1
    return s, t * 0


def equal(s, t):
    return t.mean(1, keepdim=True).expand_as(s).clone(), t.mean(1, keepdim=True).expand_as(t).clone()


def tiny(s, t):
    return s * 1e-20, t * 1e-20


def large(s, t):
    return s * 1e4, t * 1e4


CONTENTS = (random, zero_teacher, constant_difference, one_pixel, equal, tiny, large)


@dataclass(frozen=True)
class Case:
    batch: int
    student_channels: int
    teacher_channels: int
    height: int
    width: int
    student_order: str = "nchw"
    teacher_order: str = "nchw"
    student_dtype: torch.dtype = torch.float32
    teacher_dtype: torch.dtype = torch.float32
    content: Callable = random

    def __str__(self):
        dtypes = f"{self.student_dtype}<-{self.teacher_dtype}".replace("torch.", "")
        return (
            f"{self.batch}x{self.student_channels}<-{self.teacher_channels}x{self.height}x{self.width}"
            f"-{self.student_order}<-{self.teacher_order}-{dtypes}-{self.content.__name__}"
        )

    def make(self) -> tuple[Tensor, Tensor]:
        """Student (a leaf that requires grad) and teacher, the same numbers at every call."""
        torch.manual_seed(zlib.crc32(str(self).encode()))
        s = ORDERS[self.student_order](self.batch, self.student_channels, self.height, self.width)
        t = ORDERS[self.teacher_order](self.batch, self.teacher_channels, self.height, self.width)
        s, t = (restride(new, old) for new, old in zip(self.content(s, t), (s, t), strict=True))
        s, t = cast(s, self.student_dtype), cast(t, self.teacher_dtype)
        return s.detach().requires_grad_(), t


def cast(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Another dtype with the same strides, gaps and all."""
    if x.dtype == dtype:
        return x
    storage = torch.empty(0, dtype=x.dtype).set_(x.untyped_storage(), 0, (x.untyped_storage().nbytes() // 4,), (1,))
    return storage.to(dtype).as_strided(x.shape, x.stride(), x.storage_offset())


def restride(values: Tensor, like: Tensor) -> Tensor:
    """`values` written into the memory of `like`, unless that is shared between elements."""
    if values is like:
        return like
    if 0 in like.stride():
        return values
    like.copy_(values)
    return like


# Sizes chosen to end inside, at and just after a vector of 4, 8 or 16 lanes; 24 and 20 leave lanes over; ratios 1, 2, 4
# and 3, non-integer ones in both directions; rows of 1, 2 and primes, more than one tile, the special widths 7 to 56.
SHAPES = [
    (2, 16, 16, 4, 4),
    (2, 16, 32, 7, 7),
    (2, 32, 128, 8, 14),
    (3, 8, 24, 14, 14),
    (1, 24, 24, 2, 56),
    (2, 20, 37, 5, 9),
    (2, 37, 20, 14, 3),
    (2, 32, 16, 5, 6),
    (2, 48, 16, 3, 7),
    (1, 1, 1, 1, 1),
    (3, 5, 5, 1, 1),
    (2, 3, 7, 1, 13),
    (2, 7, 3, 13, 1),
    (2, 64, 64, 2, 2),
    (1, 16, 16, 300, 1),
    (1, 5, 10, 1, 301),
    (2, 16, 16, 28, 28),
    (1, 32, 64, 16, 32),
    (5, 17, 33, 11, 10),
    (1, 200, 200, 30, 17),
]

F32, F64, BF16, F16 = torch.float32, torch.float64, torch.bfloat16, torch.float16


def matrix() -> list[Case]:
    """Every shape in the main orders, and orders, dtypes and contents on shapes that take different paths."""
    cases = [
        Case(*shape, student_order=s, teacher_order=t)
        for shape in SHAPES
        for s in ("nchw", "tokens")
        for t in ("nchw", "tokens")
    ]
    small = [Case(2, 16, 32, 7, 7), Case(2, 20, 37, 5, 9), Case(2, 32, 16, 5, 6), Case(1, 24, 24, 2, 56)]
    for base in small:
        pairs = [(s, t) for s in ORDERS for t in ORDERS if "cropped" not in (s, t) or {s, t} <= {"cropped", "tokens"}]
        cases += [replace(base, student_order=s, teacher_order=t) for s, t in pairs]
        for order in ("nchw", "tokens"):
            same = replace(base, student_order=order, teacher_order=order)
            cases += [
                replace(same, student_dtype=s, teacher_dtype=t)
                for s in (F32, F64, BF16, F16)
                for t in (F32, F64, BF16, F16)
            ]
            cases += [replace(same, content=content) for content in CONTENTS]
    return list(dict.fromkeys(cases))
