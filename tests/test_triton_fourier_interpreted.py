"""The Triton kernels of fourier_align and spectral_intensity without a GPU: the tests of both in Triton's interpreter.

They are the files that test every backend. triton_large_tiles.py makes the tiles larger and thins out the cases, unless
SKD_TEST_ALL_CASES=1.
"""

import pytest
from in_interpreter import needs_triton, passed_in_interpreter


@pytest.mark.slow
@needs_triton
def test_the_kernels_pass_in_the_interpreter():
    tests = ("tests/test_fourier_align.py", "tests/test_spectral_intensity.py")
    assert passed_in_interpreter("-p", "triton_large_tiles", *tests, SKD_TEST_KERNELS="triton") > 190
