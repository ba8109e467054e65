"""fourier_align under pytest-benchmark: the shapes, implementations and checks of ``skd bench --what magnitude``.

    pytest benchmarks/bench_fourier_align.py --benchmark-only

See one_variant.py for the conditions. Bytes and operations are counted in :mod:`skd.bench.fourier_align`:
12 bytes and some 80 to 140 operations per number in float32 with equal widths; the copy is the floor.
"""

import pytest
from one_variant import conditions, measure, parameters  # noqa: F401

from skd.bench import fourier_align
from skd.bench.config import BenchConfig

CASES = fourier_align.cases(BenchConfig(what=("magnitude",)).with_defaults(), ())


@pytest.mark.parametrize(("case", "variant", "phase"), parameters(CASES, fourier_align.VARIANTS))
def test_fourier_align(benchmark, case, variant, phase):
    measure(benchmark, case, variant, phase)
