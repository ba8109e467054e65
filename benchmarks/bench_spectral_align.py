"""spectral_align under pytest-benchmark: the shapes, implementations and checks of ``skd bench``.

    pytest benchmarks/bench_spectral_align.py --benchmark-only

One thread unless ``OMP_NUM_THREADS`` says otherwise. Unlike ``skd bench``, pytest-benchmark times one implementation
after the other, so a disturbance of the machine hits only some of them: take ratios from ``skd bench``, and this to
follow one implementation over time (``--benchmark-autosave``, ``--benchmark-compare``).

Bytes and operations are counted in :mod:`skd.bench.spectral_align`: 12 bytes and 7 operations per number in float32
with equal widths, so memory is the limit and the copy is the floor. ``extra_info`` holds the least bytes of the phase
and the rate they make with the median. A result that deviates from float64 fails instead of being timed.
"""

import contextlib
import functools
import os

import pytest
import torch

from skd.bench import correctness, memory, runner
from skd.bench.report import UNAVAILABLE, WRONG
from skd.bench.spectral_align import COPY, SHAPES, VARIANTS, Case, Run, make_maps
from skd.bench.timing import PHASES

CASES = [Case(shape, layout, "float32") for shape in SHAPES for layout in ("nchw", "tokens")]


@pytest.fixture(scope="module", autouse=True)
def _conditions():
    before = torch.get_num_threads()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    memory.recycle_freed_memory()
    yield
    torch.set_num_threads(before)


@functools.lru_cache(maxsize=1)  # the cases come one after the other
def _inputs(case: Case):
    maps = make_maps(case)
    return maps, correctness.truth(case, maps)


@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize("variant", VARIANTS, ids=lambda variant: variant.name)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name.replace(", ", "-").replace(" ", "_"))
def test_spectral_align(benchmark, case, variant, phase):
    if variant.name == COPY and phase != "both":
        pytest.skip("a copy has no backward of its own; it stands for both")
    if variant.name == "published" and case.layout == "nchw":
        pytest.skip("this is published-nchw")
    maps, expected = _inputs(case)
    compiling = runner.compiling_for(torch.get_num_threads()) if variant.compiled else contextlib.nullcontext()
    with compiling:
        run = Run(variant, case, maps)
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

        def backward(loss):
            kept.append(run.backward(loss))

        def both():
            loss = run.forward()
            kept.extend((loss, run.backward(loss)))

        target = {"forward": forward, "backward": backward, "both": both}[phase]
        benchmark.pedantic(target, setup=prepare, rounds=10, warmup_rounds=1)
    floor = case.floor_bytes(phase)
    benchmark.extra_info["floor_bytes"] = floor
    benchmark.extra_info["extra_bytes"] = result.extra_bytes
    if benchmark.stats is not None:  # None under --benchmark-disable
        benchmark.extra_info["gb_per_s"] = floor / benchmark.stats.stats.median / 1e9
