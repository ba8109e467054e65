"""Which cases and variants a configuration asks for, over all operations that can be measured on the CPU."""

from types import ModuleType

from skd.bench import fourier_align, model_analysis, spectral_align, spectral_intensity, trainer
from skd.bench.case import Case, Variant, fits, select_from
from skd.bench.config import BenchConfig
from skd.bench.maps import unknown_shape

OPERATIONS: dict[str, ModuleType] = {
    "align": spectral_align,
    "magnitude": fourier_align,
    "intensity": spectral_intensity,
    "analyze": model_analysis,
    "trainer": trainer,
}
"""Each has ``cases``, ``known_shapes``, ``VARIANTS``, and ``ALWAYS``, the variants without which nothing compares."""

Plan = list[tuple[Case, list[Variant]]]


def make_plan(config: BenchConfig) -> Plan:
    """The cases, each with its variants.

    Raises:
        ValueError: a shape or variant that no measured operation has, or a measurement that is not possible here.
    """
    modules = [OPERATIONS[kind] for kind in config.measured()]
    texts = _texts_of(config, modules)
    names = _names_of(config, modules)
    plan = []
    for module in modules:
        if config.shapes and not texts[module]:
            continue
        cases = module.cases(config, texts[module])
        if config.quick:
            cases = [case.quick() for case in (cases if config.shapes else _of_first_shape(cases))]
        for case in cases:
            compile = config.compile and not config.quick
            chosen = select_from(module.VARIANTS, module.ALWAYS, names[module], compile, "not known")
            plan.append((case, [variant for variant in chosen if fits(variant, case)]))
    return plan


def _texts_of(config: BenchConfig, modules: list[ModuleType]) -> dict[ModuleType, list[str]]:
    """For each operation the texts that name shapes of its own; a text must name one of some operation."""
    found: dict[ModuleType, list[str]] = {module: [] for module in modules}
    reason = ""
    for text in config.shapes:
        taken = False
        for module in modules:
            try:
                module.cases(config, [text])
            except ValueError as error:
                reason = reason or str(error)
            else:
                found[module].append(text)
                taken = True
        if not taken:
            if len(modules) == 1:
                raise ValueError(reason)
            raise ValueError(unknown_shape(text, list(dict.fromkeys(n for m in modules for n in m.known_shapes()))))
    return found


def _names_of(config: BenchConfig, modules: list[ModuleType]) -> dict[ModuleType, list[str]]:
    """For each operation the names of variants it has; a name must be known to some operation."""
    known = {module: [variant.name for variant in module.VARIANTS] for module in modules}
    everything = list(dict.fromkeys(name for names in known.values() for name in names))
    for name in config.variants:
        if name not in everything:
            raise ValueError(f"variant {name!r} is not known; use some of {', '.join(everything)}")
    # An operation that has none of those asked for is left with what it always has.
    return {
        module: [name for name in config.variants if name in names] or list(module.ALWAYS if config.variants else ())
        for module, names in known.items()
    }


def _of_first_shape(cases: list[Case]) -> list[Case]:
    """The cases of one shape in all its layouts and kinds."""
    first = getattr(cases[0], "shape", None) if cases else None
    return [case for case in cases if getattr(case, "shape", None) == first]
