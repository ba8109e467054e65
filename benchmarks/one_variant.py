"""What the files for pytest-benchmark share: one implementation at a time, checked against float64 before it is timed.

One thread unless ``OMP_NUM_THREADS`` says otherwise. Unlike ``skd bench``, pytest-benchmark times one implementation
after the other, so a disturbance of the machine hits only some of them: take ratios from ``skd bench``, and this to
follow one implementation over time (``--benchmark-autosave``, ``--benchmark-compare``).

``extra_info`` holds the least bytes of the phase and the rate they make with the median. A result that deviates from
float64 fails instead of being timed.
"""

import contextlib
import functools
import os

import pytest
import torch

from skd.bench import memory, runner
from skd.bench.case import Case, Variant, fits
from skd.bench.report import UNAVAILABLE, WRONG


@pytest.fixture(scope="module", autouse=True)
def conditions():
    before = torch.get_num_threads()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    memory.recycle_freed_memory()
    yield
    torch.set_num_threads(before)


def parameters(cases: list[Case], variants: tuple[Variant, ...]) -> list:
    """Every variant of every case in every phase, as pytest's parameters ``case, variant, phase``."""
    return [
        pytest.param(
            case, variant, phase, id=f"{case.name.replace(', ', '-').replace(' ', '_')}-{variant.name}-{phase}"
        )
        for case in cases
        for variant in variants
        if fits(variant, case)
        for phase in (case.phases if variant.name != case.floor else case.phases[-1:])
    ]


@functools.lru_cache(maxsize=1)  # the cases come one after the other
def _inputs(case: Case):
    inputs = case.make_inputs(0)
    return inputs, case.truth(inputs)


def measure(benchmark, case: Case, variant: Variant, phase: str) -> None:
    """Times a phase of a variant, if it is right; skips it if it cannot run here."""
    inputs, expected = _inputs(case)
    compiling = runner.compiling_for(torch.get_num_threads()) if variant.compiled else contextlib.nullcontext()
    with compiling:
        run = case.run(variant, inputs)
        result = runner.examine(run, expected, case)
        if result.status == UNAVAILABLE:
            pytest.skip(result.reason)
        assert result.status != WRONG, result.reason

        kept = []  # results are freed in the set-up of the next round, outside of the timed region

        def prepare():
            kept.clear()
            return ((run.forward(),), {}) if phase == "backward" else ((), {})

        def forward():
            kept.append(run.forward())

        def backward(result):
            kept.append(run.backward(result))

        def both():
            result = run.forward()
            kept.extend((result, run.backward(result)))

        target = {"forward": forward, "backward": backward, "both": both}[phase]
        benchmark.pedantic(target, setup=prepare, rounds=10, warmup_rounds=1)
    floor = case.floor_bytes(phase)
    benchmark.extra_info["floor_bytes"] = floor
    benchmark.extra_info["extra_bytes"] = result.extra_bytes
    if benchmark.stats is not None:  # None under --benchmark-disable
        benchmark.extra_info["gb_per_s"] = floor / benchmark.stats.stats.median / 1e9
