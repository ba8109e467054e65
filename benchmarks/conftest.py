"""Benchmarks run one after another, whatever pyproject.toml says of the tests."""

import pytest


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers():
    return 0
