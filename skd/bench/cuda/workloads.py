"""Maps of the losses that are measured on CUDA: single shapes and whole recipes, and the order of their worth."""

import dataclasses
import itertools
import math
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from skd.bench.config import MATCHES, BenchConfig
from skd.bench.maps import Shape, lay_out, select_shapes, split_layout
from skd.bench.pairs import LossCase


class AnyCase(Protocol):
    """What their order and the number of their sets depend on; see :class:`Case`."""

    workload: str
    student_order: str
    teacher_order: str
    dtype: str
    recipe: bool

    @property
    def batch(self) -> int: ...

    def floor_bytes(self, phase: str) -> int: ...


@dataclasses.dataclass(frozen=True)
class Case(LossCase):
    """One call of the loss: its layers, their memory orders and dtype.

    Attributes:
        workload: the name of the shape or recipe, with the batch.
        layers: one shape per layer, all of one batch.
        student_order, teacher_order: ``nchw``, ``tokens``, or ``nhwc``, which is tokens without a class token.
        recipe: whether it is all layers of a recipe.
        undivided: whether there is no backward to look at apart.
    """

    workload: str
    layers: tuple[Shape, ...]
    student_order: str
    teacher_order: str
    dtype: str
    match: str = "complex"
    upstream: float = 1.0
    recipe: bool = False

    undivided: ClassVar = False

    @property
    def name(self) -> str:
        return f"{self.workload}, {self.layout}, {self.dtype}, {self.match}"

    @property
    def layout(self) -> str:
        same = self.student_order == self.teacher_order
        return self.student_order if same else f"{self.student_order}<-{self.teacher_order}"

    @property
    def batch(self) -> int:
        return self.layers[0].batch

    def with_batch(self, batch: int) -> "Case":
        """The same with another batch."""
        layers = tuple(dataclasses.replace(layer, batch=batch) for layer in self.layers)
        return dataclasses.replace(self, layers=layers, workload=f"{self.workload.rpartition(' B')[0]} B{batch}")

    @property
    def student_bytes(self) -> int:
        """The bytes of all student maps, which are those of their gradients."""
        return self.torch_dtype.itemsize * sum(s.batch * s.student * s.height * s.width for s in self.layers)

    @property
    def teacher_bytes(self) -> int:
        return self.torch_dtype.itemsize * sum(s.batch * s.teacher * s.height * s.width for s in self.layers)


@dataclasses.dataclass(frozen=True)
class Recipe:
    """All layers of a distillation in one call, for any batch."""

    name: str
    layers: tuple[tuple[int, int, int, int], ...]
    student_order: str
    teacher_order: str


RECIPES = (
    Recipe("deit-tiny<-cait-s24", ((192, 384, 14, 14),) * 8, "tokens", "nchw"),
    Recipe(
        "swin-tiny<-swin-small",
        ((96, 96, 56, 56), (192, 192, 28, 28), (384, 384, 14, 14), (768, 768, 7, 7)),
        "nhwc",
        "nhwc",
    ),
    Recipe("deit-small<-cait-s24", ((384, 384, 14, 14),) * 8, "tokens", "nchw"),
)
"""SpectralKD's recipes, with the memory orders in which timm's models hand their block outputs out: DeiT's student
tokens lie behind a class token, CaiT's maps are contiguous NCHW, and Swin works in NHWC."""

SINGLE = (
    (192, 768, 14, 14),
    (192, 192, 14, 14),
    (192, 768, 7, 7),
    (192, 384, 14, 14),
    (96, 96, 56, 56),
    (768, 768, 7, 7),
)
"""One layer each, as student channels, teacher channels, height, width: those whose floors are known for the H100, then
those that are measured on the CPU."""


def select_cases(config: BenchConfig) -> list[Case]:
    """The cases a configuration asks for, in the order of their worth.

    Raises:
        ValueError: a shape that is neither known nor spelt out.
    """
    known = _known(config)
    chosen: list[tuple[Recipe | None, Shape]] = []
    for text in config.shapes:
        matching = [found for name, found in known.items() if text in name]
        if not matching:
            try:
                matching = [(None, shape) for shape in select_shapes((text,), [])]
            except ValueError:
                names = ", ".join(map(repr, known))
                raise ValueError(
                    f"shape {text!r} is part of no known shape or recipe ({names}); "
                    f"write one of your own like '192<-384 14x14 B64', with positive numbers"
                ) from None
        chosen += [found for found in matching if found not in chosen]
    if not config.shapes:
        chosen = list(known.values())
    cases = []
    matches = [match for kind in MATCHES if kind in config.measured() for match in config.matches(kind)]
    for (recipe, shape), match in itertools.product(chosen, matches):
        for dtype in config.dtypes:
            options = {"dtype": dtype, "match": match, "upstream": config.upstream}
            if recipe is not None:
                layers = tuple(Shape(*layer, shape.batch) for layer in recipe.layers)
                name = f"{recipe.name} B{shape.batch}"
                cases.append(Case(name, layers, recipe.student_order, recipe.teacher_order, **options, recipe=True))
            else:
                cases += [Case(shape.name, (shape,), *split_layout(layout), **options) for layout in config.layouts]
    return sorted(cases, key=worth)


def known_shapes(config: BenchConfig) -> list[str]:
    """The names of the default shapes and recipes."""
    return list(_known(config))


def _known(config: BenchConfig) -> dict[str, tuple[Recipe | None, Shape]]:
    known: dict[str, tuple[Recipe | None, Shape]] = {}
    for batch in config.batches:
        known |= {f"{recipe.name} B{batch}": (recipe, Shape(1, 1, 1, 1, batch)) for recipe in RECIPES}
        shapes = [Shape(*single, batch) for single in SINGLE]
        known |= {shape.name: (None, shape) for shape in shapes}
    return known


LARGE = 64_000_000
"""Bytes to move from which the goals ask for a share of the copy's bandwidth."""


def worth(case: AnyCase) -> int:
    """The place of a case in the order; equal ones stay as they are. Recipes first, then what fills the device."""
    common = case.batch == 128
    plain = case.student_order == case.teacher_order
    if case.recipe:
        return 0 if common and not case.workload.startswith("deit-small") else 2
    if case.floor_bytes("both") >= LARGE and plain:
        return 1
    return 3 if common and plain else 4


# --- Inputs ------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Maps:
    """The maps of one call, one student and one teacher per layer; the students require grad."""

    students: list[Tensor]
    teachers: list[Tensor]


@dataclasses.dataclass(frozen=True)
class Inputs:
    """As many sets of maps as it takes for a call not to find in the cache what an earlier one has left there.

    Attributes:
        sets: in the case's memory orders. All hold the same numbers.
        nchw: the same as contiguous NCHW maps; the very same sets where that is the case's own order.
    """

    sets: list[Maps]
    nchw: list[Maps]


MOST_SETS = 64


def number_of_sets(case: AnyCase, l2_bytes: int) -> int:
    """So many that together they move at least eight times what the L2 cache holds, which makes what stays behind in it
    at the end of a sample, written but not yet in memory, a small part."""
    return min(MOST_SETS, math.ceil(8 * l2_bytes / case.floor_bytes("both")))


def make_inputs(case: Case, device: torch.device, sets: int, seed: int = 0) -> Inputs:
    """Random maps; the numbers depend on the layers, dtype and seed, not on the memory orders."""
    generator = torch.Generator(device).manual_seed(seed)

    def normal(shape: Shape, channels: int, mean: float) -> Tensor:
        size = (shape.batch, channels, shape.height, shape.width)
        # Means that differ make row sums of d count: the Fourier coefficients at kx=0 are not lost in the noise.
        return (torch.randn(size, generator=generator, device=device) + mean).to(case.torch_dtype)

    base = [(normal(s, s.student, 0.0), normal(s, s.teacher, 0.25)) for s in case.layers]

    def laid_out(student_order: str, teacher_order: str) -> Maps:
        students = [in_order(s, student_order, prefix=1).requires_grad_() for s, _ in base]
        return Maps(students, [in_order(t, teacher_order, prefix=0) for _, t in base])

    own = [laid_out(case.student_order, case.teacher_order) for _ in range(sets)]
    return Inputs(own, own if case.layout == "nchw" else [laid_out("nchw", "nchw") for _ in range(sets)])


def in_order(x: Tensor, order: str, prefix: int) -> Tensor:
    """A copy in this memory order."""
    if order == "nchw":
        return x.clone()
    return lay_out(x, "tokens", prefix if order == "tokens" else 0)


def fits_cache(case: AnyCase, l2_bytes: int) -> bool:
    """Whether all bytes to move fit the L2 cache together."""
    return case.floor_bytes("both") <= l2_bytes
