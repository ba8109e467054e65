"""Fixtures shared by all tests."""

import importlib.util
import os
import sys
from pathlib import Path

# Threads of PyTorch that wait for each other take no time from other processes. Read when PyTorch is loaded.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import pytest  # noqa: E402
import torch  # noqa: E402
from hypothesis import settings  # noqa: E402

pytest.register_assert_rewrite("pair_contract")

# Other builds of the kernels to be tested in place of the installed ones.
for name, variable in (("skd._cpu", "SKD_TEST_EXTENSION"), ("skd._cuda", "SKD_TEST_CUDA_EXTENSION")):
    if variable in os.environ:
        spec = importlib.util.spec_from_file_location(name, os.environ[variable])
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])

# Generated cases are the same in every run, unless a number of new ones is asked for.
settings.register_profile("same", max_examples=60, derandomize=True, deadline=None)
settings.register_profile("new", max_examples=int(os.environ.get("SKD_TEST_EXAMPLES", "1")), deadline=None)
settings.load_profile("new" if "SKD_TEST_EXAMPLES" in os.environ else "same")

from kernels_here import kernels, using  # noqa: E402  (it loads the extension)

SLOWEST = (
    *("test_cuda_on_cpu", "test_distribution", "test_triton_fourier_interpreted", "test_triton_interpreted"),
    *("test_avx512_emulated", "test_triton_fourier_ahead_of_time", "test_cuda_machine_code", "test_fft"),
    *("test_recipe_parity", "test_distill_resume", "test_distill_distributed", "test_distill_run", "test_examples"),
)
"""The files that take longest, in this order."""


def pytest_collection_modifyitems(items):
    """The slowest files begin, so that no process is left alone with one of them when all others have finished."""
    places = {name: place for place, name in enumerate(SLOWEST)}
    items.sort(key=lambda item: places.get(item.path.stem, len(SLOWEST)))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers(config):
    """No other processes for one file, which they could not share, nor where the tests need a GPU for themselves."""
    files = {argument.partition("::")[0] for argument in config.args}
    one = len(files) == 1 and Path(*files).is_file()
    return 0 if one or torch.cuda.is_available() else None


@pytest.fixture(params=kernels())
def backend(request):
    """The name of a backend; for the CPU each instruction set of this processor in turn."""
    with using(request.param) as name:
        yield name


@pytest.fixture
def poisoned(monkeypatch):
    """Memory that the package asks for uninitialised comes filled with NaN, so an unwritten output fails."""

    def fill(allocate):
        def allocate_poisoned(*args, **kwargs):
            out = allocate(*args, **kwargs)
            return out.fill_(float("nan")) if out.is_floating_point() else out

        return allocate_poisoned

    for owner, name in ((torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty")):
        monkeypatch.setattr(owner, name, fill(getattr(owner, name)))


@pytest.fixture
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)
