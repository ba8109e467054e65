"""What every measurement has: a case, which is one configuration of inputs, and its variants, the implementations."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, Protocol

COPY = "copy"
"""The floor of an operation that reads and writes: a copy of as many bytes together as it must move at least."""

READ = "read"
"""The floor of an operation that only reads: the sum of all numbers."""


@dataclasses.dataclass(frozen=True)
class Share:
    """How a variant's time is to be seen against another's: as the rest beyond it, or as a part of it.

    Attributes:
        of: the other variant.
        beyond: whether the variant does what the other one does and more.
        most: the bound in percent; None if there is none.
    """

    of: str
    beyond: bool
    most: float | None = None

    def percent(self, ratio: float) -> float:
        """From the variant's time over the other's."""
        return 100 * (ratio - 1 if self.beyond else ratio)

    @property
    def sentence(self) -> str:
        return f"beyond {self.of}" if self.beyond else f"of {self.of}"


@dataclasses.dataclass(frozen=True)
class Variant:
    """One implementation.

    Attributes:
        name: as on the command line.
        build: what the case calls to get the function to measure, with what distinguishes the case (for a loss its
            match); None for the floor.
        nchw: it gets contiguous NCHW maps whatever the layout of the case.
        compiled: it goes through torch.compile at its first call.
        backend: the backend of skd it needs; None if it is not skd.
        only: the matches, or axes, it is for; all if empty.
        share: what its time is to be seen against, besides the baseline.
    """

    name: str
    build: Callable[[str], Callable] | None
    nchw: bool = False
    compiled: bool = False
    backend: str | None = None
    only: tuple[str, ...] = ()
    share: Share | None = None


@dataclasses.dataclass(frozen=True)
class Yardstick:
    """A ratio that is told at the end: how many times as fast ``ours`` is as ``theirs``; and its goal, if any."""

    ours: str
    theirs: str
    least: float | None = None


class Errors(Protocol):
    """How far a result is from float64."""

    def verdict(self, dtype: str) -> str:
        """Why the result is wrong, in one sentence; empty if it is right."""

    def columns(self) -> dict[str, float | None]:
        """The columns of a row that say how far from float64 the result is."""

    @property
    def shown(self) -> float:
        """The figure for the table."""


class Run(Protocol):
    """A variant on the inputs of a case, ready to be called and timed."""

    variant: Variant

    def forward(self) -> Any: ...

    def backward(self, forward: Any) -> Any: ...


class Case(Protocol):
    """One configuration of inputs of one operation.

    Attributes:
        operation: its stem, as in the rows.
        kind: what distinguishes its variants, besides the inputs: the match of a loss, the axis of an intensity.
        layout, dtype: of the maps.
        phases: what is timed; the last one is the headline.
        baseline: the variant that the ratios refer to.
        floor: the variant that does the least that can be done, :data:`COPY` or :data:`READ`.
        yardsticks: what is told at the end.
    """

    operation: str
    kind: str
    layout: str
    dtype: str
    phases: tuple[str, ...]
    baseline: str
    floor: str

    @property
    def name(self) -> str: ...

    @property
    def yardsticks(self) -> Sequence[Yardstick]: ...

    def columns(self) -> dict[str, object]:
        """What describes it in a row."""

    def floor_bytes(self, phase: str) -> int:
        """The least traffic of a phase, in bytes."""

    def make_inputs(self, seed: int) -> Any:
        """Inputs that depend on shape, dtype and seed only, not on the layout."""

    def truth(self, inputs: Any) -> Any:
        """The result in float64."""

    def run(self, variant: Variant, inputs: Any) -> Run: ...

    def errors(self, expected: Any, variant: Variant, forward: Any, backward: Any) -> Errors | None:
        """How far the results of a run are from :meth:`truth`; None for a variant whose result is of no interest."""

    def quick(self) -> "Case":
        """The same with an eighth of the batch."""


def fits(variant: Variant, case: Case) -> bool:
    """Whether a variant is one of a case's, and not another variant by a second name."""
    if variant.only and case.kind not in variant.only:
        return False
    # On NCHW maps this one is the baseline itself.
    return not (case.layout == "nchw" and f"{variant.name}-nchw" == case.baseline)


def select_from(variants: Sequence, always: Sequence[str], names: Sequence[str], compile: bool, unknown: str) -> list:
    """The variants of these names, all if there are none; those of ``always`` are among them.

    Raises:
        ValueError: a name that is no variant; ``unknown`` is said of it.
    """
    known = [variant.name for variant in variants]
    for name in names:
        if name not in known:
            raise ValueError(f"variant {name!r} is {unknown}; use some of {', '.join(known)}")
    wanted = {*always, *(names or known)}
    return [v for v in variants if v.name in wanted and (compile or not v.compiled)]
