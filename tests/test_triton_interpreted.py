"""The Triton kernels without a GPU: every case of the matrix, and the contract of ``run``, in Triton's interpreter.

The tests are in triton_interpreted.py.
"""

import pytest
from in_interpreter import needs_triton, passed_in_interpreter


@pytest.mark.slow
@needs_triton
def test_the_kernels_pass_in_the_interpreter():
    assert passed_in_interpreter("tests/triton_interpreted.py") > 550  # the matrix for both matches, and the contract
