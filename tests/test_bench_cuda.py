"""skd bench --device cuda without a GPU: whole measurements and what they leave, on a device made of Python.

What these tests and those in tests/test_bench_cuda_*.py cannot tell is whether ``skd.bench.cuda.device.CudaDevice``
speaks to a GPU rightly; that file is all there is between them and a real device, and the tests marked gpu are for
machines that have one.
"""

import json
import time

import pytest
import torch
from bench_cuda_helpers import TWO, CpuDevice, case_of, config, read_rows, spoilt, with_variants

from skd import bench, reference
from skd.bench import correctness
from skd.bench.case import COPY
from skd.bench.config import MATCHES
from skd.bench.cuda import intensity, losses, report, runner, sampling, workloads
from skd.bench.cuda.losses import COPY_GRAPH, Variant
from skd.bench.cuda.sampling import MODES
from skd.bench.pairs import BASELINE
from skd.bench.report import OK, UNAVAILABLE, WRONG


def test_a_measurement_leaves_complete_rows(tmp_path, capsys, monkeypatch):
    with_variants(monkeypatch, *(v for v in losses.VARIANTS if v.name == "skd-cuda"))
    monkeypatch.setattr(runner.backends, "backends", lambda: {"cuda": "no kernels here", "reference": True})
    assert runner.run(config(tmp_path), CpuDevice()) == 0
    found = read_rows(tmp_path)
    by = {(row["variant"], row["cache"], row["phase"], row["group"]): row for row in found}
    assert {row["group"] for row in found} == {"1", "2"}  # two looks
    absent = by["skd-cuda", "cold", "both", "1"]
    assert absent["status"] == UNAVAILABLE and absent["reason"] == "no kernels here" and not absent["median_ms"]
    for row in found:
        if row["status"] != OK:
            continue
        assert 0 < float(row["p20_ms"]) <= float(row["median_ms"]) <= float(row["p80_ms"]) and row["samples"] == "2"
        assert float(row["gb_per_s"]) == pytest.approx(int(row["floor_bytes"]) / float(row["median_ms"]) / 1e6)
        assert row["device"] == "no GPU at all" and row["driver"] == "1.2" and row["date"] and row["torch"]
        copies = [by[name, row["cache"], "both", row["group"]] for name in (COPY, COPY_GRAPH)]
        if row["phase"] == "both":
            copy = min(float(copied["median_ms"]) for copied in copies)
            assert float(row["percent_of_copy"]) == pytest.approx(100 * copy / float(row["median_ms"]))
        if row["variant"] in (COPY, COPY_GRAPH):
            assert row["phase"] == "both" and not row["ratio_to_published_nchw"]
            continue
        assert float(row["gradient_relative_l2"]) < 1e-6
        if not row["variant"].endswith("-graph"):
            base = by[BASELINE, row["cache"], row["phase"], row["group"]]
            ratio = float(base["median_ms"]) / float(row["median_ms"])
            assert float(row["ratio_to_published_nchw"]) == pytest.approx(ratio)
            assert row["launches"] == ("0" if row["phase"] == "backward" else "2")
    (run,) = json.loads((tmp_path / "out" / "rows.json").read_text())["runs"]
    assert len(run["rows"]) == len(found) and run["conditions"]["left_out"] == ""
    assert all(len(v) == 2 for sample in run["samples"] for v in sample["milliseconds"].values())
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["rows.csv", "rows.json", "table.md"]
    page = (tmp_path / "out" / "table.md").read_text()
    out = capsys.readouterr().out
    for text in (page, out):
        assert "12<-20 6x5 B3, tokens<-nchw, float32, complex; at least 0.0 MB" in text
        assert "not measured: skd-cuda, 12<-20 6x5 B3" in text and "no kernels here" in text
    assert "| implementation | forward ms |" in page and "driver 1.2" in page


def test_a_wrong_result_gets_no_time_and_no_ratio(tmp_path, capsys, monkeypatch):
    replays_only = spoilt("spoilt-graph", when=lambda: device.captured > 0, graph=True)
    device = CpuDevice()
    with_variants(monkeypatch, spoilt("spoilt"), replays_only)
    names = ("spoilt", "spoilt-graph", "closed-form")
    assert runner.run(config(tmp_path, variants=names), device) == 1
    found = read_rows(tmp_path)
    wrong = [row for row in found if row["variant"].startswith("spoilt")]
    assert len(wrong) == len(MODES) + 2
    for row in wrong:
        assert row["status"] == WRONG and "1.0e-02" in row["reason"]
        assert row["reason"].startswith("replayed from a CUDA graph") == (row["variant"] == "spoilt-graph")
        for empty in ("median_ms", "p20_ms", "host_ms", "gb_per_s", "ratio_to_published_nchw", "percent_of_copy"):
            assert row[empty] == ""
    out = capsys.readouterr().out
    assert "WRONG: spoilt on 12<-20 6x5 B3" in out
    (line,) = [line for line in out.splitlines() if line.startswith("spoilt ")]
    assert "WRONG: the gradient deviates" in line
    (run,) = json.loads((tmp_path / "out" / "rows.json").read_text())["runs"]
    assert not any(sample["variant"].startswith("spoilt") for sample in run["samples"])


def test_times_of_a_wrong_result_stay_hidden_even_if_there_are_some():
    times = sampling.Times(
        {("cold", "both"): [1.0]}, {("cold", "both"): [1.0]}, {("cold", "both"): 1}, {("cold", "both"): 0}
    )
    wrong = report.Result(spoilt("spoilt"), WRONG, "it is", times=times)
    right = report.Result(losses.VARIANTS[0], OK, times=times)
    group = report.Group(1, case_of(*TWO), 1, [right, wrong])
    hidden = [row for row in report.rows(group) if row["variant"] == "spoilt"]
    assert all(row["median_ms"] is row["ratio_to_published_nchw"] is None for row in hidden)
    assert [row["median_ms"] for row in report.rows(group) if row["variant"] == BASELINE][0] == 1.0


def failing(name, error, **options):
    def build(match):
        def loss(students, teachers):
            raise error

        return loss

    return Variant(name, build, **options)


def test_what_cannot_run_is_a_row_and_a_failing_kernel_is_wrong(tmp_path, monkeypatch):
    with_variants(
        monkeypatch,
        failing("uncompiled", OSError("no Triton here\nand more"), compiled=True),
        failing("uncaptured-graph", RuntimeError("operation not permitted when stream is capturing"), graph=True),
        failing("too-large", torch.OutOfMemoryError("out of memory")),
        failing("broken", RuntimeError("launch failed")),
    )
    names = ("uncompiled", "uncaptured-graph", "too-large", "broken", "closed-form")
    assert runner.run(config(tmp_path, variants=names, compile=True), CpuDevice()) == 1
    found = {row["variant"]: row for row in read_rows(tmp_path)}
    statuses = {name: found[name]["status"] for name in names}
    assert statuses == dict.fromkeys(names[:3], UNAVAILABLE) | {"broken": WRONG, "closed-form": OK}
    assert found["uncompiled"]["reason"] == "OSError: no Triton here" and found["closed-form"]["median_ms"]


def test_a_device_that_fails_ends_the_run_and_what_was_measured_is_kept(tmp_path, capsys, monkeypatch):
    device = CpuDevice()

    def build(match):
        def loss(students, teachers):
            device.broken = students[0].dtype == torch.bfloat16
            if device.broken:
                raise RuntimeError("CUDA error: an illegal memory access was encountered")
            return reference.spectral_align_published(students[0], teachers[0], match)

        return loss

    with_variants(monkeypatch, Variant("crashing", build))
    options = {"variants": ("crashing",), "dtypes": ("float32", "bfloat16", "float16")}
    assert runner.run(config(tmp_path, **options), device) == 1
    assert "the device failed in crashing" in capsys.readouterr().err
    assert {row["dtype"] for row in read_rows(tmp_path)} == {"float32"}


def test_a_run_that_is_cut_off_leaves_what_it_had(tmp_path, capsys, monkeypatch):
    with_variants(monkeypatch)
    measure, seen = runner.measure, []

    def interrupted(number, case, *rest):
        if number == 2:
            seen.append(read_rows(tmp_path))  # there already, before anything ends the run in order
            raise KeyboardInterrupt
        return measure(number, case, *rest)

    monkeypatch.setattr(runner, "measure", interrupted)
    options = {"variants": ("closed-form",), "dtypes": ("float32", "bfloat16")}
    assert runner.run(config(tmp_path, **options), CpuDevice()) == 130
    assert "interrupted" in capsys.readouterr().err
    assert seen[0] and {row["dtype"] for row in read_rows(tmp_path)} == {"float32"}
    assert "1 configurations for want of time" in seen[0][0]["left_out"]


def test_no_configuration_begins_after_the_last_second(tmp_path, capsys, monkeypatch):
    with_variants(monkeypatch)
    options = {"variants": ("closed-form",), "dtypes": ("float32", "bfloat16"), "total_seconds": 1e-9}
    device = CpuDevice()
    ticks = iter(range(10**9))
    device.seconds = lambda: 0.0 if next(ticks) < 2 else time.perf_counter()
    assert runner.run(config(tmp_path, **options), device) == 0
    assert {row["dtype"] for row in read_rows(tmp_path)} == {"float32"}
    assert "left out: 1 configurations for want of time" in capsys.readouterr().out
    assert "left out: 1 configurations" in (tmp_path / "out" / "table.md").read_text()


def test_a_measurement_is_gone_on_with_and_never_overwritten(tmp_path, capsys, monkeypatch):
    with_variants(monkeypatch)
    assert runner.run(config(tmp_path, variants=("closed-form",)), CpuDevice()) == 0
    first = read_rows(tmp_path)
    assert runner.run(config(tmp_path, variants=("closed-form",)), CpuDevice()) == 2
    assert "holds a measurement already" in capsys.readouterr().err
    more = {"variants": ("closed-form",), "dtypes": ("float32", "bfloat16"), "add": True}
    assert runner.run(config(tmp_path, **more), CpuDevice()) == 0
    both = read_rows(tmp_path)
    assert both[: len(first)] == first and {row["dtype"] for row in both[len(first) :]} == {"bfloat16"}
    assert len(json.loads((tmp_path / "out" / "rows.json").read_text())["runs"]) == 2
    page = (tmp_path / "out" / "table.md").read_text()
    assert page.count("### 12<-20 6x5 B3") == 2
    (tmp_path / "out" / "table.md").unlink()
    assert report.main([str(tmp_path / "out")]) == 0 and (tmp_path / "out" / "table.md").read_text() == page
    assert runner.run(config(tmp_path, **more), CpuDevice()) == 0 and read_rows(tmp_path) == both  # nothing is missing
    (tmp_path / "out" / "rows.json").write_text("{}")
    assert runner.run(config(tmp_path, **more), CpuDevice()) == 2
    assert "holds no measurement on CUDA" in capsys.readouterr().err


def test_a_quick_run_is_one_small_configuration(tmp_path, monkeypatch):
    with_variants(monkeypatch)
    monkeypatch.setattr(workloads, "RECIPES", (workloads.Recipe("r", ((4, 8, 4, 4),) * 2, "tokens", "nchw"),))
    monkeypatch.setattr(workloads, "SINGLE", ())
    assert runner.run(config(tmp_path, shapes=(), quick=True, variants=("closed-form",)), CpuDevice()) == 0
    assert {(row["workload"], row["batch"]) for row in read_rows(tmp_path)} == {("r B16", "16")}


def test_an_expected_ratio_that_is_missed_fails(tmp_path, capsys, monkeypatch):
    with_variants(monkeypatch)
    assert runner.run(config(tmp_path, variants=("closed-form",), expect_ratio=8.0), CpuDevice()) == 1
    assert "no ratio, expected 8.0" in capsys.readouterr().err


def test_a_copied_tree_can_be_told_its_commit(tmp_path, monkeypatch):
    monkeypatch.setattr(runner.circumstances.env, "git_commit", lambda: None)
    monkeypatch.setenv("SKD_COMMIT", "abc123")
    assert runner._conditions(config(tmp_path), CpuDevice())["commit"] == "abc123"


def test_losses_with_a_transform_are_measured_with_what_there_is_for_them(tmp_path, monkeypatch):
    with_variants(monkeypatch)
    assert runner.run(config(tmp_path, what=("magnitude",)), CpuDevice()) == 0
    found = read_rows(tmp_path)
    assert {row["match"] for row in found} == set(MATCHES["magnitude"])
    assert {row["operation"] for row in found} == {"fourier_align"} and {row["status"] for row in found} == {OK}
    names = {row["variant"] for row in found}
    assert {BASELINE, COPY, "skd-reference"} <= names and not any(name.startswith("closed-form") for name in names)


def test_intensities_are_measured_as_a_whole(tmp_path, capsys, monkeypatch):
    kept = [v for v in intensity.VARIANTS if not v.compiled and v.backend != "triton"]
    monkeypatch.setattr(intensity, "VARIANTS", kept)
    monkeypatch.setattr(runner.backends, "backends", lambda: {"reference": True, "cuda": "there is none"})
    options = {"shapes": ("24 6x5 B3",), "variants": ("published", "skd-cuda", "skd-reference")}
    assert runner.run(config(tmp_path, what=("intensity",), **options), CpuDevice()) == 0
    found = read_rows(tmp_path)
    assert {(row["operation"], row["phase"]) for row in found} == {("spectral_intensity", "both")}
    assert {row["match"] for row in found} == {"channel", "space"} and {row["layout"] for row in found} == {"tokens"}
    right = [row for row in found if row["variant"] in (BASELINE, "published", "skd-reference")]
    assert len(right) == 2 * 2 * 3 and all(float(row["spectra_relative_error"]) < 1e-5 for row in right)
    assert all(float(row["median_ms"]) > 0 and float(row["ratio_to_published_nchw"]) > 0 for row in right)
    assert {row["status"] for row in found if row["variant"] == "skd-cuda"} == {UNAVAILABLE}
    assert "24 6x5 B3, tokens, float32, channel; at least 0.0 MB to move" in capsys.readouterr().out


@pytest.mark.parametrize("factor", [1.0, 1.001])
def test_spectra_that_deviate_are_wrong(tmp_path, monkeypatch, factor):
    def build(match):
        def loss(students, teachers):
            pairs = [correctness.pooled_spectra(s, t) for s, t in zip(students, teachers, strict=True)]
            losses = [reference.fourier_align_published(*pair, match) for pair in zip(students, teachers, strict=True)]
            return sum(losses) / len(losses), [(s.float(), factor * t.float()) for s, t in pairs]

        return loss

    with_variants(monkeypatch, Variant("with-spectra", build))
    options = {"what": ("magnitude",), "match": "magnitude", "variants": ("with-spectra",)}
    assert runner.run(config(tmp_path, **options), CpuDevice()) == (factor != 1)
    row = next(row for row in read_rows(tmp_path) if row["variant"] == "with-spectra")
    assert row["status"] == (OK if factor == 1 else WRONG) and bool(row["median_ms"]) == (factor == 1)
    assert float(row["spectra_relative_error"]) == pytest.approx(factor - 1, abs=1e-6)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_measurement_on_a_gpu(tmp_path):
    ours = [name for name in ("cuda", "triton") if runner.backends.backends()[name] is True]
    names = tuple(f"skd-{name}{graph}" for name in ours for graph in ("", "-graph"))
    options = {"shapes": ("192<-384 14x14 B2",), "variants": names or ("closed-form",)}
    assert bench.run(config(tmp_path, **options)) == 0
    found = {(row["variant"], row["cache"], row["phase"]): row for row in read_rows(tmp_path)}
    for name in (BASELINE, COPY, *names):
        row = found[name, "cold", "both"]
        assert row["status"] == OK and float(row["median_ms"]) > 0, (name, row["reason"])
