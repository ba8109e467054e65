"""spectral_intensity under pytest-benchmark: the shapes, implementations and checks of ``skd bench --what intensity``.

    pytest benchmarks/bench_spectral_intensity.py --benchmark-only

See one_variant.py for the conditions. Bytes and operations are counted in :mod:`skd.bench.spectral_intensity`:
4 bytes and some 20 to 30 operations per number in float32; one sum over the map is the floor.
"""

import pytest
from one_variant import conditions, measure, parameters  # noqa: F401

from skd.bench import spectral_intensity
from skd.bench.config import BenchConfig

CASES = spectral_intensity.cases(BenchConfig(what=("intensity",)).with_defaults(), ())


@pytest.mark.parametrize(("case", "variant", "phase"), parameters(CASES, spectral_intensity.VARIANTS))
def test_spectral_intensity(benchmark, case, variant, phase):
    measure(benchmark, case, variant, phase)
