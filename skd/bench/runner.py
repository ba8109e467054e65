"""The measurement from configuration to files: check, compare with float64, count memory, time, report."""

import contextlib
import dataclasses
import datetime
import logging
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from skd.bench import conditions as circumstances  # sets OpenMP's environment, so before torch

# isort: split
import torch

from skd import env
from skd.bench import memory, report, summary, tables, timing
from skd.bench.case import Case, Run, Variant
from skd.bench.config import BenchConfig
from skd.bench.plan import Plan, make_plan
from skd.bench.report import OK, UNAVAILABLE, WRONG, Group, Result
from skd.ops import backends


def run(config: BenchConfig) -> int:
    """See :func:`skd.bench.run`."""
    try:
        config.check()
        config = config.with_defaults()
        plan = make_plan(config)
        folder = new_folder(config.out)
    except ValueError as error:
        print(f"skd bench: {error}", file=sys.stderr)
        return 2
    if config.quick:
        config = dataclasses.replace(config, rounds=min(3, config.rounds))
    threads = config.threads or tuple(sorted({1, env.usable_cores()}))
    conditions = circumstances.conditions(config)
    print(circumstances.heading(conditions), end="\n\n", flush=True)
    try:
        groups = _measure_all(config, plan, threads)
        conditions["load_average_at_end"] = circumstances.load_average()
        written = report.write(folder, groups, conditions)
    except KeyboardInterrupt:
        print("\nskd bench: interrupted; nothing was written", file=sys.stderr)
        return 130
    print(summary.closing(groups, judge=not config.quick))
    print("rows in " + " and ".join(map(str, written)))
    return _status(config, groups)


# --- Measuring -----------------------------------------------------------------------------------------------------


def _measure_all(config: BenchConfig, plan: Plan, threads: tuple[int, ...]) -> list[Group]:
    progress = tables.Progress(len(plan) * len(threads))
    flush = timing.CacheFlush(env.last_level_cache_bytes() or 2**25) if config.cache == "cold" else None
    threads_before = torch.get_num_threads()
    groups = []
    try:
        for case, variants in plan:
            inputs = case.make_inputs(config.seed)
            expected = case.truth(inputs)
            for count in threads:
                progress.begin(f"{case.operation} {case.name}, {count} thread{'s' * (count != 1)}")
                torch.set_num_threads(count)
                groups.append(measure(case, inputs, expected, variants, config, progress, flush))
                progress.clear()
                tables.show(groups[-1])
            del inputs, expected
    finally:
        torch.set_num_threads(threads_before)
    return groups


def measure(
    case: Case,
    inputs: Any,
    expected: Any,
    variants: list[Variant],
    config: BenchConfig,
    progress: tables.Progress,
    flush: timing.CacheFlush | None = None,
) -> Group:
    """One case with PyTorch's present number of threads. Only variants that are right are timed."""
    threads = torch.get_num_threads()
    results, runs = [], {}
    with compiling_for(threads) if any(v.compiled for v in variants) else contextlib.nullcontext():
        for variant in variants:
            progress.stage(variant.name + (": compiling" if variant.compiled else ": comparing with float64"))
            ready = case.run(variant, inputs)
            result = examine(ready, expected, case)
            results.append(result)
            if result.status == OK:
                runs[variant.name] = ready
        if config.allocator == "recycle":
            memory.prefault(_LARGEST_EXTRA * case.floor_bytes(case.phases[-1]))
        times = timing.interleaved(
            runs,
            config.rounds,
            config.seconds,
            seed=config.seed,
            before_each=flush,
            after_round=lambda done: progress.stage(f"round {done}/{config.rounds}"),
        )
    for result in results:
        result.times = times.get(result.variant.name)
    return Group(case, threads, results)


# Plain PyTorch's peak of memory, with some room, in units of the floor.
_LARGEST_EXTRA = 8


def examine(ready: Run, expected: Any, case: Case) -> Result:
    """Whether a variant can run and is right, and what memory it takes; the calls warm it up as well."""
    variant = ready.variant
    if variant.backend is not None and (reason := backends.backends().get(variant.backend)) is not True:
        return Result(variant, UNAVAILABLE, str(reason))

    def step():
        forward = ready.forward()
        return forward, ready.backward(forward)

    try:
        forward, backward = step()
    except Exception as error:  # a missing compiler, a kernel that refuses: the others are measured all the same
        return Result(variant, UNAVAILABLE if variant.compiled else WRONG, one_line(error))
    errors = case.errors(expected, variant, forward, backward)
    if errors is not None and (verdict := errors.verdict(case.dtype)):
        return Result(variant, WRONG, verdict, errors)
    del forward, backward
    return Result(variant, OK, "", errors, memory.peak_tensor_bytes(step), memory.peak_resident_bytes(step))


@contextlib.contextmanager
def compiling_for(threads: int) -> Iterator[None]:
    """torch.compile anew, for this number of threads, without its remarks.

    The number is fixed in the generated code. It is set as an option because not every PyTorch has it in the key of its
    cache on disk, which would then hand out code for another number.
    """
    import torch._dynamo  # slow to import, and only torch.compile needs them
    import torch._inductor.config

    torch._dynamo.reset()
    loggers = [logging.getLogger(name) for name in ("torch._inductor", "torch._dynamo", "torch.utils.cpp_extension")]
    levels = [logger.level for logger in loggers]
    with torch._inductor.config.patch({"cpp.threads": threads}), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*complex operators.*")
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)


def one_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0] if lines else 'no message'}"[:200]


# --- The end -------------------------------------------------------------------------------------------------------


def _status(config: BenchConfig, groups: list[Group]) -> int:
    """1 for a wrong result or a ratio that was expected and missed; a missed goal changes nothing."""
    status = 1 if any(result.status == WRONG for group in groups for result in group.results) else 0
    if config.expect_ratio is not None:
        for group in groups:
            if not group.case.yardsticks:  # nothing here is meant to be faster than the baseline
                continue
            ratio = group.ratio("skd-cpu", group.headline)
            if ratio is None or ratio < config.expect_ratio:
                reached = "no ratio" if ratio is None else f"{ratio:.2f}"
                print(
                    f"skd bench: {group.case.name}, {group.threads} threads: {reached}, expected {config.expect_ratio}",
                    file=sys.stderr,
                )
                status = 1
    return status


def new_folder(out: Path | None) -> Path:
    """Where the rows go; nothing is created yet.

    Raises:
        ValueError: a measurement or a file is there already.
    """
    if out is None:
        stem = datetime.datetime.now().strftime("bench-%Y%m%d-%H%M%S")
        names = [stem, *(f"{stem}-{number}" for number in range(2, 1000))]
        return next(path for name in names if not (path := Path("runs") / name).exists())
    out = Path(out)
    if out.exists() and not out.is_dir():
        raise ValueError(f"out={str(out)!r} is a file; name a folder")
    taken = [name for name in ("rows.csv", "rows.json") if (out / name).exists()]
    if taken:
        raise ValueError(f"{out} holds a measurement already ({', '.join(taken)}); name another folder")
    return out
