"""Which cases and variants a configuration asks for on CUDA, and what comes first."""

import dataclasses
from types import ModuleType

from skd.bench.case import fits, select_from
from skd.bench.config import BenchConfig
from skd.bench.cuda import intensity, losses
from skd.bench.cuda.losses import Variant
from skd.bench.cuda.workloads import AnyCase, worth
from skd.bench.maps import unknown_shape

OPERATIONS = (losses, intensity)
"""Each has ``KINDS``, ``known_shapes``, ``select_cases``, ``VARIANTS``, ``ALWAYS``, ``make_inputs``, ``truth`` and
``Run``."""


@dataclasses.dataclass(frozen=True)
class Step:
    """What is timed together."""

    operation: ModuleType
    case: AnyCase
    variants: list[Variant]


def select(config: BenchConfig) -> list[Step]:
    """Every case with all its variants.

    Raises:
        ValueError: a shape or variant that no measured operation has.
    """
    operations = [operation for operation in OPERATIONS if set(operation.KINDS) & set(config.measured())]
    texts = _texts_of(config, operations)
    names = list(dict.fromkeys(variant.name for operation in operations for variant in operation.VARIANTS))
    if unknown := [name for name in config.variants if name not in names]:
        raise ValueError(f"variant {unknown[0]!r} is not known on CUDA; use some of {', '.join(names)}")
    steps = []
    for operation in operations:
        if config.shapes and not texts[operation]:
            continue
        known = [variant.name for variant in operation.VARIANTS]
        wanted = [name for name in config.variants if name in known]
        if config.variants and not wanted:
            continue
        compile = config.compile and not config.quick
        variants = select_from(operation.VARIANTS, operation.ALWAYS, wanted, compile, "not known on CUDA")
        for case in operation.select_cases(dataclasses.replace(config, shapes=texts[operation])):
            steps.append(Step(operation, case, [variant for variant in variants if fits(variant, case)]))
    return steps


def _texts_of(config: BenchConfig, operations: list[ModuleType]) -> dict[ModuleType, tuple[str, ...]]:
    """For each operation the texts that name shapes of its own; a text must name one of some operation."""
    found: dict[ModuleType, tuple[str, ...]] = dict.fromkeys(operations, ())
    for text in config.shapes:
        reasons = []
        for operation in operations:
            try:
                operation.select_cases(dataclasses.replace(config, shapes=(text,)))
            except ValueError as error:
                reasons.append(str(error))
            else:
                found[operation] += (text,)
        if len(reasons) == len(operations):
            known = [name for operation in operations for name in operation.known_shapes(config)]
            raise ValueError(reasons[0] if len(reasons) == 1 else unknown_shape(text, known))
    return found


def quick(steps: list[Step], config: BenchConfig) -> list[Step]:
    """The same with an eighth of the batch, of all operations the first case only unless shapes are named."""
    if not config.shapes:
        steps = [next(step for step in steps if step.operation is o) for o in dict.fromkeys(s.operation for s in steps)]
    return [dataclasses.replace(s, case=s.case.with_batch(max(1, s.case.batch // 8))) for s in steps]


# Which look at cases of which worth comes when: the quick look at almost everything before what takes long.
_ORDER = {
    (True, 0): 0, (True, 1): 1, (False, 0): 2, (True, 2): 3, (True, 3): 4, (False, 1): 5, (True, 4): 6, (False, 2): 7,
    (False, 3): 8, (False, 4): 9,
}  # fmt: skip


def in_order(steps: list[Step], in_two_looks: bool) -> list[Step]:
    """The same, the most valuable first.

    A first look has skd, the baseline and the copies; a second one has the other plain forms, which take most of the
    time because they are compiled, beside the same again, so that their ratios come from one group.
    """
    if not in_two_looks:
        return sorted(steps, key=lambda step: worth(step.case))
    looks = []
    for step in steps:
        first = [variant for variant in step.variants if variant.first]
        looks += [(True, dataclasses.replace(step, variants=first)), (False, step)]
    return [step for _, step in sorted(looks, key=lambda look: _ORDER[look[0], worth(look[1].case)])]


def without_what_is_there(steps: list[Step], rows: list[dict]) -> list[Step]:
    """The steps of which some variant is in no row."""
    there = {tuple(row[name] for name in ("workload", "layout", "dtype", "match", "variant")) for row in rows}

    def is_there(step: Step, variant: Variant) -> bool:
        case = step.case
        return (case.workload, case.layout, case.dtype, case.match, variant.name) in there

    return [step for step in steps if not all(is_there(step, variant) for variant in step.variants)]
