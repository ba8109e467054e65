"""A pytest plugin for the tests of the Fourier operations in Triton's interpreter: few programs, and fewer cases.

A program takes the interpreter some 10 ms, whatever its tile's size: tiles are made larger than registers would allow.
Of the large matrices it keeps the same share of the cases in every run, and nothing that takes minutes.
"""

import os
import zlib

from hypothesis import settings

KEPT = {
    "test_loss_and_gradient_are_those_of_float64": 12,
    "test_every_combination_of_options": 40,
    "test_larger_maps": 5,
    "test_intensity_is_that_of_float64": 12,
    "test_equal_magnitudes_add_up_without_drift": 3,  # of which the larger map's are left out below
    "test_every_dtype": 2,
    "test_very_small_and_very_large_numbers": 2,
    "test_the_mean_of_vectors_that_images_share": 12,
}
"""One of so many cases of a test."""

LEFT_OUT = (
    "test_training_with_each_backend_follows_one_curve",  # 40 steps
    "test_the_same_bits_from_run_to_run_and_for_any_number_of_threads",  # the interpreter has no threads
    "test_the_same_bits_for_any_number_of_threads",
    "test_the_mean_when_threads_begin_anywhere",
    "test_every_number_of_float16",  # as many programs
    "test_spectra_of_equal_planes_do_not_drift",  # a minute each; larger tiles would be summed by NumPy, which drifts
    *(f"test_equal_magnitudes_add_up_without_drift[triton-(1, 4, 96, 128)-{order}]" for order in ("nchw", "tokens")),
    *(f"test_opcheck[triton-{order}]" for order in ("nchw", "tokens", "transposed")),  # backends get outputs, make none
)


def pytest_configure(config):
    settings.register_profile("interpreter", max_examples=6, derandomize=True, deadline=None)
    settings.load_profile("interpreter")


def pytest_runtest_setup(item):
    from skd.kernels import fourier_align, fourier_large, spectral_intensity

    # Still several tiles of most maps, so that their ends are met; one of a map of ten thousand planes.
    numbers = 1 << (17 if item.originalname == "test_seventy_thousand_planes" else 12)
    fourier_align._TILE = spectral_intensity._TILE = numbers
    fourier_large._LINES, fourier_large._BLOCK = 512, 4096


def pytest_collection_modifyitems(config, items):
    def is_kept(item):
        name = item.originalname
        left_out = name in LEFT_OUT or item.name in LEFT_OUT
        return not left_out and zlib.crc32(item.nodeid.encode()) % KEPT.get(name, 1) == 0

    if os.environ.get("SKD_TEST_ALL_CASES") == "1":
        return
    kept = [item for item in items if is_kept(item)]
    config.hook.pytest_deselected(items=[item for item in items if not is_kept(item)])
    items[:] = kept
