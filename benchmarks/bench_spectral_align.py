"""spectral_align under pytest-benchmark: the shapes, implementations and checks of ``skd bench --what align``.

    pytest benchmarks/bench_spectral_align.py --benchmark-only

See one_variant.py for the conditions. Bytes and operations are counted in :mod:`skd.bench.spectral_align`:
12 bytes and 7 operations per number in float32 with equal widths, so memory is the limit and the copy is the floor.
"""

import pytest
from one_variant import conditions, measure, parameters  # noqa: F401

from skd.bench import spectral_align
from skd.bench.config import BenchConfig

CASES = spectral_align.cases(BenchConfig(what=("align",)).with_defaults(), ())


@pytest.mark.parametrize(("case", "variant", "phase"), parameters(CASES, spectral_align.VARIANTS))
def test_spectral_align(benchmark, case, variant, phase):
    measure(benchmark, case, variant, phase)
