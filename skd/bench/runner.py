"""The measurement from configuration to files: check, compare with float64, count memory, time, report."""

import contextlib
import dataclasses
import datetime
import logging
import math
import os
import platform
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

# A thread that spins at the end of a parallel region takes the processor from the next one's threads when there are as
# few cores as threads. The OpenMP library reads this when torch is loaded.
WAIT_POLICY_IN_TIME = "torch" not in sys.modules
if WAIT_POLICY_IN_TIME:
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import torch  # noqa: E402

from skd import env  # noqa: E402
from skd.bench import correctness, memory, report, timing  # noqa: E402
from skd.bench.config import BenchConfig  # noqa: E402
from skd.bench.report import OK, UNAVAILABLE, WRONG, Group, Result  # noqa: E402
from skd.bench.spectral_align import (  # noqa: E402
    COPY,
    Case,
    Maps,
    Run,
    Shape,
    Variant,
    make_maps,
    select_shapes,
    select_variants,
)
from skd.ops import backends  # noqa: E402


def run(config: BenchConfig) -> int:
    """See :func:`skd.bench.run`."""
    try:
        config.check()
        config = config.with_defaults()
        shapes = select_shapes(config.shapes)
        variants = select_variants(config.variants, config.compile and not config.quick)
        folder = new_folder(config.out)
    except ValueError as error:
        print(f"skd bench: {error}", file=sys.stderr)
        return 2
    if config.quick:
        shapes = shapes if config.shapes else shapes[:1]
        config = dataclasses.replace(config, rounds=min(3, config.rounds))
        shapes = [Shape(s.student, s.teacher, s.height, s.width, max(1, s.batch // 8)) for s in shapes]
    threads = config.threads or tuple(sorted({1, env.usable_cores()}))
    conditions = _conditions(config)
    print(_heading(conditions), end="\n\n", flush=True)
    try:
        groups = _measure_all(config, shapes, variants, threads)
        conditions["load_average_at_end"] = _load_average()
        written = report.write(folder, groups, conditions)
    except KeyboardInterrupt:
        print("\nskd bench: interrupted; nothing was written", file=sys.stderr)
        return 130
    print(_closing(groups))
    print("rows in " + " and ".join(map(str, written)))
    return _status(config, groups)


# --- Measuring -----------------------------------------------------------------------------------------------------


def _measure_all(config: BenchConfig, shapes: list[Shape], variants: list[Variant], threads) -> list[Group]:
    cases = [
        Case(shape, layout, dtype, config.match, config.upstream)
        for shape in shapes
        for dtype in config.dtypes
        for layout in config.layouts
    ]
    progress = report.Progress(len(cases) * len(threads))
    flush = timing.CacheFlush(env.last_level_cache_bytes() or 2**25) if config.cache == "cold" else None
    threads_before = torch.get_num_threads()
    groups = []
    try:
        for case in cases:
            maps = make_maps(case, config.seed)
            expected = correctness.truth(case, maps)
            for count in threads:
                progress.begin(f"{case.name}, {count} thread{'s' * (count != 1)}")
                torch.set_num_threads(count)
                groups.append(measure(case, maps, expected, variants, config, progress, flush))
                progress.clear()
                report.show(groups[-1])
    finally:
        torch.set_num_threads(threads_before)
    return groups


def measure(
    case: Case,
    maps: Maps,
    expected: correctness.Truth,
    variants: list[Variant],
    config: BenchConfig,
    progress: report.Progress,
    flush: timing.CacheFlush | None = None,
) -> Group:
    """One case with PyTorch's present number of threads. Only variants that are right are timed."""
    threads = torch.get_num_threads()
    if case.layout == "nchw":  # then this one is the baseline itself
        variants = [variant for variant in variants if variant.name != "published"]
    results, runs = [], {}
    with compiling_for(threads) if any(v.compiled for v in variants) else contextlib.nullcontext():
        for variant in variants:
            progress.stage(variant.name + (": compiling" if variant.compiled else ": comparing with float64"))
            ready = Run(variant, case, maps)
            result = examine(ready, expected, case)
            results.append(result)
            if result.status == OK:
                runs[variant.name] = ready
        if config.allocator == "recycle":
            memory.prefault(_LARGEST_EXTRA * case.floor_bytes("both"))
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


def examine(ready: Run, expected: correctness.Truth, case: Case) -> Result:
    """Whether a variant can run and is right, and what memory it takes; the calls warm it up as well."""
    variant = ready.variant
    if variant.backend is not None and (reason := backends.backends().get(variant.backend)) is not True:
        return Result(variant, UNAVAILABLE, str(reason))

    def step():
        loss = ready.forward()
        return loss, ready.backward(loss)

    try:
        loss, gradient = step()
    except Exception as error:  # a missing compiler, a kernel that refuses: the others are measured all the same
        return Result(variant, UNAVAILABLE if variant.compiled else WRONG, one_line(error))
    errors = None
    if variant.name != COPY:
        errors = correctness.compare(expected, loss, gradient)
        if verdict := errors.verdict(case.dtype):
            return Result(variant, WRONG, verdict, errors)
    del loss, gradient
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


# --- Conditions ----------------------------------------------------------------------------------------------------


def _conditions(config: BenchConfig) -> dict[str, object]:
    """What the figures depend on; goes into every row."""
    allocator = "as it is" if config.allocator == "default" else memory.recycle_freed_memory()
    policy = os.environ.get("OMP_WAIT_POLICY", "not set")
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "cpu": env.cpu_model(),
        "usable_cores": env.usable_cores(),
        "skd_instruction_set": env.instruction_set(),
        "torch_instruction_set": torch.backends.cpu.get_cpu_capability(),
        "last_level_cache_bytes": env.last_level_cache_bytes(),
        **software(),
        "allocator": allocator,
        "cache": config.cache,
        "omp_wait_policy": policy if WAIT_POLICY_IN_TIME else f"{policy} (torch was loaded before it was looked at)",
        "upstream_gradient": config.upstream,
        "seed": config.seed,
        "quick": config.quick,
        "load_average_at_start": _load_average(),
    }


def software() -> dict[str, object]:
    """System, versions and commit."""
    commit = env.git_commit()
    return {
        "os": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "skd": env.version(),
        "commit": commit[0] if commit else None,
        "uncommitted_changes": commit[1] if commit else None,
    }


def _load_average() -> float | None:
    """Processes that wanted a processor in the last minute, this one included."""
    return round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None


def _heading(conditions: dict[str, object]) -> str:
    """What the conditions are and what the columns mean."""
    cache = conditions["last_level_cache_bytes"]
    commit = conditions["commit"]
    changed = " with uncommitted changes" if conditions["uncommitted_changes"] else ""
    lines = [
        f"skd {conditions['skd']}" + (f" at {str(commit)[:12]}{changed}" if commit else ""),
        f"{conditions['cpu']}, {conditions['usable_cores']} usable cores, "
        + (f"last-level cache {cache / 2**20:g} MiB" if isinstance(cache, int) else "size of the caches unknown"),
        f"skd's kernels: {conditions['skd_instruction_set']}; "
        f"torch {conditions['torch']} uses {conditions['torch_instruction_set']}",
        f"malloc: {conditions['allocator']}",
        f"OMP_WAIT_POLICY: {conditions['omp_wait_policy']}",
        f"caches: {_CACHES[str(conditions['cache'])]}; upstream gradient {conditions['upstream_gradient']}",
        "x published: speed against the published loss in eager PyTorch on NCHW maps, forward + backward (medians);",
        "per round: the same as the median of the rounds' ratios; x copy: time over a copy of the least bytes to move;",
        "extra MB: peak of tensor memory beyond the inputs; forward may include work for the gradient.",
    ]
    load = conditions["load_average_at_start"]
    if isinstance(load, float) and load > 0.5:
        lines.append(f"NOTE: other programs are running (load average {load}); times will be longer and ratios unsure")
    return "\n".join(lines)


_CACHES = {
    "mixed": "as the implementation that ran before left them (random order)",
    "cold": "flushed before every run",
}


# --- The end -------------------------------------------------------------------------------------------------------


def _closing(groups: list[Group]) -> str:
    """The ratios of skd over all configurations, and what is wrong."""
    lines = []
    for name in ("skd-cpu", "skd-reference"):
        ratios = [ratio for group in groups if (ratio := group.ratio(name, "both")) is not None]
        copies = [factor for group in groups if (factor := group.times_copy(name)) is not None]
        if ratios:
            mean = math.exp(sum(map(math.log, ratios)) / len(ratios))
            line = f"{name}, forward + backward over {len(ratios)} configurations: {min(ratios):.2f} to "
            line += f"{max(ratios):.2f} times the published form, geometric mean {mean:.2f}"
            lines.append(line + (f"; {min(copies):.2f} to {max(copies):.2f} times the copy" if copies else ""))
    for group in groups:
        wrong = [result.variant.name for result in group.results if result.status == WRONG]
        lines += [f"WRONG: {name} on {group.case.name}, {group.threads} threads" for name in wrong]
    return "\n".join(lines)


def _status(config: BenchConfig, groups: list[Group]) -> int:
    status = 1 if any(result.status == WRONG for group in groups for result in group.results) else 0
    if config.expect_ratio is not None:
        for group in groups:
            ratio = group.ratio("skd-cpu", "both")
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
