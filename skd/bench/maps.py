"""Shapes and memory orders of feature maps, as they are named on the command line."""

import dataclasses
import re
from collections.abc import Sequence
from typing import TypeVar

from torch import Tensor


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
        return _parse(cls, r"(\d+)<-(\d+) (\d+)x(\d+) B(\d+)", text)


@dataclasses.dataclass(frozen=True)
class MapShape:
    """One map: ``[batch, channels, height, width]``."""

    channels: int
    height: int
    width: int
    batch: int

    @property
    def name(self) -> str:
        return f"{self.channels} {self.height}x{self.width} B{self.batch}"

    @classmethod
    def parse(cls, text: str) -> "MapShape | None":
        """The shape written like ``384 14x14 B32``; None if the text is not of that form."""
        return _parse(cls, r"(\d+) (\d+)x(\d+) B(\d+)", text)


AnyShape = TypeVar("AnyShape", Shape, MapShape)


def _parse(kind: type[AnyShape], form: str, text: str) -> AnyShape | None:
    numbers = re.fullmatch(form, text.strip())
    return kind(*map(int, numbers.groups())) if numbers and all(map(int, numbers.groups())) else None


def matching(text: str, known: Sequence[AnyShape], kind: type[AnyShape]) -> list[AnyShape]:
    """The known shapes whose name contains a text, or else the one it spells out; empty if it is neither."""
    return [shape for shape in known if text in shape.name] or list(filter(None, [kind.parse(text)]))


def select_shapes(texts: Sequence[str], known: Sequence[AnyShape], kind: type[AnyShape] = Shape) -> list[AnyShape]:
    """The known shapes whose name contains one of the texts, and the shapes that a text spells out.

    Raises:
        ValueError: a text that is neither.
    """
    if not texts:
        return list(known)
    chosen: list[AnyShape] = []
    for text in texts:
        found = matching(text, known, kind)
        if not found:
            raise ValueError(unknown_shape(text, [shape.name for shape in known]))
        chosen += [shape for shape in found if shape not in chosen]
    return chosen


def unknown_shape(text: str, known: Sequence[str]) -> str:
    """What to say of a text that names no shape."""
    names = ", ".join(map(repr, known))
    example = "'192<-384 14x14 B64'" if not known or any("<-" in name for name in known) else "'384 14x14 B32'"
    return (
        f"shape {text!r} is part of no default shape ({names}); "
        f"write one of your own like {example}, with positive numbers"
    )


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
