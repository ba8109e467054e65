"""When a goal of the kernels is reached, missed or not measured."""

import pytest

from skd.bench.case import COPY
from skd.bench.cuda import goals, report
from skd.bench.report import OK, UNAVAILABLE, WRONG


def row(variant="skd-cuda", **changes):
    """A row that reaches every goal."""
    made = dict.fromkeys(report.ROW_FIELDS) | {
        "group": 1, "operation": "spectral_align", "match": "complex",
        "variant": variant, "cache": "cold", "phase": "both", "status": OK, "reason": "",
        "dtype": "float32", "workload": "w", "layout": "nchw",
        "layers": "192<-384 14x14 B128", "floor_bytes": 90_000_000, "student_bytes": 30_000_000, "median_ms": 0.03,
        "gb_per_s": 3000.0, "percent_of_copy": 91.0,
        "ratio_to_published_nchw": 8.5, "launches": 2, "extra_bytes": 30_500_000, "loss_relative_error": 1e-7,
        "gradient_relative_l2": 1e-7,
    }  # fmt: skip
    return made | changes


def judged(goal, *rows):
    return [v.status for v in goals.verdicts(rows) if v.goal == goal]


@pytest.mark.parametrize(
    ("goal", "changes", "status"),
    [
        ("bandwidth", {}, goals.REACHED),
        ("bandwidth", {"percent_of_copy": 89.9}, goals.MISSED),
        ("bandwidth", {"variant": "skd-triton", "percent_of_copy": 86.0}, goals.REACHED),
        ("bandwidth", {"variant": "skd-triton", "percent_of_copy": 84.0}, goals.MISSED),
        ("bandwidth", {"layers": "768<-768 7x7 B256", "percent_of_copy": 81.0}, goals.REACHED),
        ("bandwidth", {"layers": "96<-96 56x56 B9; 768<-768 7x7 B9", "percent_of_copy": 81.0}, goals.MISSED),
        ("bandwidth", {"percent_of_copy": None}, goals.UNKNOWN),
        ("published", {}, goals.REACHED),
        ("published", {"ratio_to_published_nchw": 7.9}, goals.MISSED),
        ("published", {"dtype": "bfloat16", "ratio_to_published_nchw": 13.9}, goals.MISSED),
        ("published", {"dtype": "bfloat16", "ratio_to_published_nchw": 14.0}, goals.REACHED),
        ("memory", {"extra_bytes": 31_500_000}, goals.MISSED),
        ("memory", {}, goals.REACHED),
        ("accuracy", {}, goals.REACHED),
        ("accuracy", {"gradient_relative_l2": 2e-6}, goals.MISSED),
        ("accuracy", {"loss_relative_error": 2e-6}, goals.MISSED),
        ("all", {"status": UNAVAILABLE, "reason": "no kernels", "median_ms": None}, goals.UNKNOWN),
        ("all", {"status": WRONG, "reason": "it is", "median_ms": None}, goals.UNKNOWN),
    ],
)
def test_a_goal_is_reached_missed_or_not_measured(goal, changes, status):
    assert judged(goal, row(**changes)) == [status]


def test_small_maps_are_held_against_the_floor_and_four_microseconds():
    copy = row(COPY, floor_bytes=300_000_000, gb_per_s=3000.0)
    small = {"floor_bytes": 15_000_000, "group": 2}  # 5 us at 3 TB/s
    forward = row(phase="forward", launches=1, group=2)
    assert judged("small", copy, row(median_ms=0.0089, **small), forward) == [goals.REACHED]
    assert judged("small", copy, row(median_ms=0.0091, **small), forward) == [goals.MISSED]
    assert judged("small", copy, row(median_ms=0.0089, **small), forward | {"launches": 2}) == [goals.MISSED]
    assert judged("small", copy, row(median_ms=0.0089, **small)) == [goals.UNKNOWN]
    assert judged("small", copy, row(median_ms=0.5, floor_bytes=20_000_000), forward) == []  # no goal in between


def test_the_compiled_closed_form_is_compared_within_its_group():
    compiled = row("closed-form-compile", median_ms=0.045)
    assert judged("compiled", row(), compiled) == [goals.REACHED]
    assert judged("compiled", row(), compiled | {"median_ms": 0.035}) == [goals.MISSED]
    assert judged("compiled", row(), compiled | {"group": 2}) == []


def test_verdicts_read_as_sentences_with_the_missed_ones_first():
    lines = goals.sentences(goals.verdicts([row(percent_of_copy=70.0)]))
    assert lines[0] == "bandwidth: 1 NOT REACHED"
    assert lines[4] == "NOT REACHED: skd-cuda, w, nchw, float32: 70.0% of the copy bandwidth (goal 90%)"
    assert all(line.startswith("reached: ") for line in lines[5:])
    assert goals.sentences([]) == ["no goal was measured: there are no rows of skd-cuda or skd-triton"]


@pytest.mark.parametrize(
    ("changes", "status"),
    [
        ({"median_ms": 0.039}, [goals.REACHED]),
        ({"median_ms": 0.04}, [goals.MISSED]),
        ({"workload": "elsewhere"}, [goals.UNKNOWN]),
        ({"layers": "96<-96 56x56 B64"}, []),
    ],
)
def test_a_loss_with_a_transform_is_held_against_spectral_align(changes, status):
    transformed = row(group=2, operation="fourier_align", match="magnitude", percent_of_copy=10.0, **changes)
    mse = row(group=3, match="mse", median_ms=1.0)
    assert judged("transform", row(), mse, transformed) == status
    found = [v for v in goals.verdicts([row(), transformed]) if "magnitude" in v.text]
    assert not {"bandwidth", "published", "compiled", "small"}.intersection(v.goal for v in found)


def test_the_gradient_of_a_loss_with_a_transform_may_be_ten_times_as_far_off():
    transformed = {"operation": "fourier_align", "match": "magnitude"}
    assert judged("accuracy", row(gradient_relative_l2=9e-6)) == [goals.MISSED]
    assert judged("accuracy", row(gradient_relative_l2=9e-6, **transformed)) == [goals.REACHED]
    assert judged("accuracy", row(loss_relative_error=2e-6, **transformed)) == [goals.MISSED]


@pytest.mark.parametrize(
    ("goal", "changes", "statuses"),
    [
        ("intensity", {}, [goals.REACHED]),
        ("intensity", {"percent_of_copy": 79.9}, [goals.MISSED]),
        ("intensity", {"percent_of_copy": None}, [goals.UNKNOWN]),
        ("intensity", {"floor_bytes": 60_000_000, "percent_of_copy": 10.0}, []),
        ("intensity", {"dtype": "bfloat16", "percent_of_copy": 10.0}, []),
        ("accuracy", {}, [goals.REACHED]),
        ("accuracy", {"spectra_relative_error": 2e-6}, [goals.MISSED]),
        ("bandwidth", {"percent_of_copy": 10.0}, []),
        ("all", {"status": WRONG, "reason": "it is", "median_ms": None}, [goals.UNKNOWN]),
    ],
)
def test_intensities_are_held_against_the_bandwidth_of_a_copy(goal, changes, statuses):
    of_map = {"operation": "spectral_intensity", "match": "channel", "layers": "384 14x14 B256", "workload": "m"}
    of_map |= {"percent_of_copy": 81.0, "spectra_relative_error": 1e-7, "student_bytes": 0}
    of_map |= {"loss_relative_error": None, "gradient_relative_l2": None, "ratio_to_published_nchw": 9.0}
    assert judged(goal, row(**(of_map | changes))) == statuses
