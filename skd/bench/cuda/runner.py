"""The measurement on CUDA from configuration to files: check, compare with float64, count, capture, sample, report.

The most valuable configurations come first, and the files are written anew after each of them, so that a run that is
cut off leaves everything it had measured.
"""

import contextlib
import dataclasses
import datetime
import os
import sys
from pathlib import Path
from typing import Any

import torch

from skd import env
from skd.bench import conditions as circumstances
from skd.bench import runner as cpu
from skd.bench.config import BenchConfig
from skd.bench.cuda import goals, plan, report, sampling
from skd.bench.cuda.device import Device, Failed, open_device
from skd.bench.cuda.losses import Variant
from skd.bench.cuda.plan import Step
from skd.bench.cuda.report import Group, Result
from skd.bench.cuda.sampling import Subject
from skd.bench.cuda.workloads import AnyCase, number_of_sets
from skd.bench.pairs import BASELINE
from skd.bench.report import OK, UNAVAILABLE, WRONG
from skd.bench.tables import Progress
from skd.ops import backends


def run(config: BenchConfig, device: Device | None = None) -> int:
    """See :func:`skd.bench.run`; another device than the CUDA one is for the tests."""
    try:
        config.check()
        config = config.with_defaults()
        steps = plan.select(config)
        runs = _earlier(config)
        folder = config.out if config.add else cpu.new_folder(config.out)
        device = open_device() if device is None else device
    except (ValueError, OSError) as error:
        print(f"skd bench: {error}", file=sys.stderr)
        return 2
    if config.quick:
        steps = plan.quick(steps, config)
        config = dataclasses.replace(config, rounds=min(3, config.rounds))
    steps = plan.in_order(steps, in_two_looks=not config.variants)
    steps = plan.without_what_is_there(steps, report.all_rows(runs))
    conditions = _conditions(config, device)
    print(_heading(conditions), end="\n\n", flush=True)
    groups: list[Group] = []
    status = 0

    def save() -> list[Path]:
        conditions["state_at_end"] = device.state()
        return report.write(folder, [*runs, report.record(groups, conditions)])

    try:
        left_out = _measure_all(config, device, steps, groups, conditions, save)
        conditions["left_out"] = _left_out(left_out)
    except KeyboardInterrupt:
        print("\nskd bench: interrupted; what was measured before is kept", file=sys.stderr)
        status = 130
    except Failed as failed:
        print(f"skd bench: {failed}", file=sys.stderr)
        status = 1
    written = save() if groups else []
    print(_closing(groups, conditions["left_out"]))
    print("rows in " + " and ".join(map(str, written)) if written else "nothing was measured")
    return status or _status(config, groups)


def _earlier(config: BenchConfig) -> list[dict]:
    """The runs in the folder that is added to.

    Raises:
        ValueError: it holds something else.
    """
    if not config.add or not (Path(config.out) / "rows.json").exists():
        return []
    return report.read(Path(config.out))


# --- Measuring -----------------------------------------------------------------------------------------------------


def _measure_all(config, device, steps, groups, conditions, save) -> list[Step]:
    """Measures step after step; returns those for which there was no time."""
    progress = Progress(len(steps))
    began = device.seconds()
    for done, step in enumerate(steps):
        if config.total_seconds and device.seconds() - began > config.total_seconds:
            return steps[done:]
        conditions["left_out"] = _left_out(steps[done + 1 :])  # as long as the files say nothing else
        progress.begin(step.case.name)
        groups.append(measure(len(groups) + 1, step, config, device, progress))
        progress.clear()
        report.show(groups[-1])
        save()
    return []


def measure(number: int, step: Step, config: BenchConfig, device: Device, progress: Progress) -> Group:
    """One case. Only variants that are right are timed.

    Raises:
        Failed: the device has failed.
    """
    case, variants = step.case, step.variants
    results, subjects = [], {}
    compiles = any(variant.compiled for variant in variants)
    with cpu.compiling_for(torch.get_num_threads()) if compiles else contextlib.nullcontext():
        try:
            sets = number_of_sets(case, device.l2_bytes)
            inputs = step.operation.make_inputs(case, device.torch_device, sets, config.seed)
            expected = step.operation.truth(case, inputs, device)
        except torch.OutOfMemoryError as error:
            device.release()
            results = [Result(variant, UNAVAILABLE, cpu.one_line(error)) for variant in variants]
            return Group(number, case, device.l2_bytes, results)
        for variant in variants:
            progress.stage(variant.name + (": compiling" if variant.compiled else ": comparing with float64"))
            result, subject = examine(step, variant, inputs, expected, device)
            results.append(result)
            if subject is not None:
                subjects[variant.name] = subject
        del expected
        device.release()
        try:
            times = sampling.interleaved(
                device,
                subjects,
                config.rounds,
                config.seconds,
                seed=config.seed,
                after_round=lambda done: progress.stage(f"round {done}/{config.rounds}"),
            )
        except torch.OutOfMemoryError as error:
            times = {}
            for result in results:
                if result.status == OK:
                    result.status, result.reason = UNAVAILABLE, f"right, but not timed: {cpu.one_line(error)}"
        except RuntimeError as error:
            raise Failed(f"the timing of {case.name} ({cpu.one_line(error)})") from error
    for result in results:
        result.times = times.get(result.variant.name)
    subjects.clear()
    device.release()
    return Group(number, case, device.l2_bytes, results)


def examine(step: Step, variant: Variant, inputs: Any, expected: Any, device: Device) -> tuple[Result, Subject | None]:
    """Whether a variant can run and is right, what memory it takes and what it starts; the calls warm it up as well.

    Returns:
        The result, and what can be sampled if it is right.

    Raises:
        Failed: the device has failed.
    """
    if variant.backend is not None and (reason := backends.backends().get(variant.backend)) is not True:
        return Result(variant, UNAVAILABLE, str(reason)), None
    subject, errors, case = None, None, step.case
    try:
        run = step.operation.Run(variant, case, inputs, device)
        # Old results are overwritten, those of the variant before would be right ones.
        device.poison(2 * case.floor_bytes("both"))
        results = run.both(0)
        device.synchronize()
        errors = run.with_spectra(run.errors(expected, results))
        del results
        verdict = "" if errors is None else errors.verdict(case.dtype)
        if not verdict:
            extra = device.peak_extra_bytes(lambda: run.both(0))
            kernels = {"forward": device.kernels(lambda: run.forward(0)), "both": device.kernels(lambda: run.both(0))}
            launches = {phase: None if names is None else len(names) for phase, names in kernels.items()}
            if None not in launches.values():
                launches["backward"] = launches["both"] - launches["forward"]
            subject = Subject(run, launches["both"], undivided=variant.is_copy or case.undivided)
            if variant.graph:
                verdict = _capture(subject, case, expected, device)
            if variant.graph and not verdict:
                replay, calls = subject.replays["cold"]
                kernels["both"] = device.kernels(replay)  # a graph may have other nodes than the calls it was made of
                launches = {"both": None if kernels["both"] is None else len(kernels["both"]) / calls}
    except Exception as error:
        return _failed(variant, error, device), None
    if verdict:
        return Result(variant, WRONG, verdict, errors), None
    return Result(variant, OK, "", errors, extra, launches, kernels["both"] or []), subject


def _capture(subject: Subject, case: AnyCase, expected: Any, device: Device) -> str:
    """Captures a sample's calls, cold and warm, and says what is wrong with a replay's results; empty if nothing."""
    run = subject.run
    # Without a limit a long layer-by-layer form would be captured thousands of kernels long.
    calls = min(run.sets, max(1, int(4 * sampling.MOST_LAUNCHES / (subject.launches or 1))))
    subject.replays = {}
    # The warm calls give up their results at once, as a training step does.
    for cache, step in (
        ("cold", lambda: [run.both(index) for index in range(calls)]),
        ("warm", lambda: [run.both(0) for _ in range(calls)][-1:]),
    ):
        replay, outputs = device.capture(step)
        loss, gradients = outputs[0]
        with torch.no_grad():
            for written in (loss, *gradients):
                written.fill_(255 if written.dtype == torch.uint8 else torch.nan)
        replay()
        device.synchronize()
        errors = run.errors(expected, (loss, gradients))
        if errors is not None and (verdict := errors.verdict(case.dtype)):
            return f"replayed from a CUDA graph ({cache}): {verdict}"
        subject.replays[cache] = replay, calls
    return ""


def _failed(variant: Variant, error: Exception, device: Device) -> Result:
    """A compiler that cannot, too little memory or a step that cannot be captured is no wrong result; the rest is.

    Raises:
        Failed: the device itself has failed.
    """
    try:
        device.synchronize()
        device.release()
    except RuntimeError:
        raise Failed(f"{variant.name} ({cpu.one_line(error)})") from error
    cannot = variant.compiled or variant.graph or isinstance(error, torch.OutOfMemoryError)
    return Result(variant, UNAVAILABLE if cannot else WRONG, cpu.one_line(error))


# --- Conditions ----------------------------------------------------------------------------------------------------


def _conditions(config: BenchConfig, device: Device) -> dict[str, object]:
    """What the figures depend on; goes into every row."""
    software = circumstances.software()
    # A copy of a tree without its repository can be told what it is a copy of.
    software["commit"] = software["commit"] or os.environ.get("SKD_COMMIT") or None
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="microseconds"),
        **device.conditions(),
        "cpu": env.cpu_model(),
        **software,
        "upstream_gradient": config.upstream,
        "seed": config.seed,
        "quick": config.quick,
        "state_at_start": device.state(),
        "state_at_end": None,
        "left_out": "",
    }


def _heading(conditions: dict[str, object]) -> str:
    """What the conditions are and what the columns mean."""
    commit = conditions["commit"]
    changed = " with uncommitted changes" if conditions["uncommitted_changes"] else ""
    lines = [
        f"skd {conditions['skd']}" + (f" at {str(commit)[:12]}{changed}" if commit else ""),
        f"{conditions['device']}, driver {conditions['driver']}, CUDA {conditions['cuda']}, "
        f"torch {conditions['torch']}, Triton {conditions['triton']}",
        f"clocks, power, temperature: {conditions['state_at_start'] or 'unknown'}",
        report.LEGEND,
    ]
    return "\n".join(lines)


def _left_out(steps: list[Step]) -> str:
    """How much of the plan there was no time for."""
    names = list(dict.fromkeys(step.case.workload for step in steps))
    if not names:
        return ""
    shown = ", ".join(names[:4]) + (", ..." if len(names) > 4 else "")
    return f"{len(steps)} configurations for want of time ({shown})"


# --- The end -------------------------------------------------------------------------------------------------------


def _closing(groups: list[Group], left_out: object) -> str:
    """The goals, what was left out and what is wrong."""
    rows = [row for group in groups for row in report.rows(group)]
    lines = ["goals:", *("  " + line for line in goals.sentences(goals.verdicts(rows)))]
    if left_out:
        lines.append(f"left out: {left_out}")
    for group in groups:
        lines += [f"WRONG: {r.variant.name} on {group.case.name}" for r in group.results if r.status == WRONG]
    return "\n".join(lines)


def _status(config: BenchConfig, groups: list[Group]) -> int:
    """1 for a wrong result or a ratio that was expected and missed; a missed goal changes nothing."""
    status = 1 if any(result.status == WRONG for group in groups for result in group.results) else 0
    if config.expect_ratio is not None:
        for group in groups:
            baseline, ours = (group.median(name, "cold", "both") for name in (BASELINE, "skd-cuda"))
            ratio = None if baseline is None or ours is None else baseline / ours
            if ratio is None or ratio < config.expect_ratio:
                reached = "no ratio" if ratio is None else f"{ratio:.2f}"
                print(f"skd bench: {group.case.name}: {reached}, expected {config.expect_ratio}", file=sys.stderr)
                status = 1
    return status
