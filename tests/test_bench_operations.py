"""What skd bench measures beside spectral_align: losses with a transform, spectra of maps, the analysis of a model."""

import csv
import json
import sys

import numpy as np
import pytest
import torch

from skd import bench, reference
from skd.bench import correctness, fourier_align, model_analysis, report, runner, spectral_intensity, summary, timing
from skd.bench.case import COPY, READ, Share, Variant, fits
from skd.bench.config import MATCHES
from skd.bench.maps import MapShape, Shape
from skd.bench.model_analysis import ModelCase
from skd.bench.objectives import OBJECTIVES, focal_frequency_loss, focal_frequency_loss_float64
from skd.bench.pairs import BASELINE, FOCAL_FREQUENCY_LOSS, PairCase
from skd.bench.plan import make_plan
from skd.bench.spectral_intensity import AXES, IntensityCase
from skd.ops import backends

PAIR, MAP = "12<-20 6x5 B3", "12 6x5 B3"
TRANSFORMED = MATCHES["magnitude"]


def config(tmp_path, **options):
    given = {"what": ("magnitude",), "shapes": (PAIR,), "threads": (1,), "rounds": 2, "compile": False}
    return bench.BenchConfig(**(given | {"allocator": "default", "out": tmp_path / "out"} | options))


def read_rows(tmp_path):
    with open(tmp_path / "out" / "rows.csv", newline="") as file:
        return list(csv.DictReader(file))


def plan(**options):
    return make_plan(bench.BenchConfig(**options).with_defaults())


# --- What is asked for ---


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"what": ()}, "what is empty"),
        ({"match": "complex"}, "belongs to what='align'"),
        ({"what": ("align",), "match": "complex+focal"}, "belongs to what='magnitude'"),
        ({"shapes": ("12 6x5 B3",)}, "'12 6x5 B3' is part of no default shape"),
        ({"what": ("intensity",), "shapes": (PAIR,)}, "write one of your own like '384 14x14 B32'"),
        ({"what": ("magnitude", "intensity"), "shapes": ("13x14",)}, "192 14x14 B32"),
        ({"variants": (FOCAL_FREQUENCY_LOSS, "numpy")}, "'numpy' is not known"),
        ({"what": ("analyze",)}, "no part of 'cait_s24_224 224x224 B4'"),
        ({"what": ("analyze",), "device": "cuda", "threads": ()}, "measured on the CPU only"),
    ],
)
def test_a_configuration_that_cannot_be_meant_ends_with_one_sentence(options, sentence, tmp_path, capsys):
    assert bench.run(config(tmp_path, **options)) == 2
    error = capsys.readouterr().err
    assert sentence in error and error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_the_analysis_needs_timm(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(model_analysis.importlib.util, "find_spec", lambda name: None)
    assert bench.run(config(tmp_path, what=("all",), shapes=())) == 2
    assert "needs timm" in capsys.readouterr().err


def test_the_defaults_are_the_shapes_that_have_goals():
    assert [case.name for case, _ in plan()] == [
        f"{shape}, {order}, float32, complex"
        for shape in ("192<-384 14x14 B64", "96<-96 56x56 B32", "768<-768 7x7 B64")
        for order in ("nchw", "tokens")
    ]
    losses = [case for case, _ in plan(what=("magnitude",))]
    assert {case.shape.name for case in losses} == {"192<-384 14x14 B32", "768<-768 7x7 B32", "96<-96 56x56 B16"}
    assert len(losses) == len(set(losses)) == 3 * 2 * 4 and {case.match for case in losses} == set(TRANSFORMED)
    maps = [case for case, _ in plan(what=("intensity",))]
    assert {case.shape.name for case in maps} == {"192 14x14 B32", "384 14x14 B32", "768 7x7 B32"}
    assert len(maps) == len(set(maps)) == 3 * 2 * 2 and {case.axis for case in maps} == set(AXES)
    pytest.importorskip("timm")
    everything = [case.operation for case, _ in plan(what=("all",))]
    assert list(dict.fromkeys(everything)) == [
        "spectral_align",
        "fourier_align",
        "spectral_intensity",
        "analyze",
        "trainer",
    ]


def test_a_text_or_a_name_counts_where_it_is_known():
    both = plan(what=("magnitude", "intensity"), shapes=("7x7", PAIR), variants=("numpy",))
    assert {case.shape for case, _ in both} == {
        Shape(768, 768, 7, 7, 32), Shape(12, 20, 6, 5, 3), MapShape(768, 7, 7, 32)
    }  # fmt: skip
    for case, variants in both:
        names = [variant.name for variant in variants]
        if case.operation == "fourier_align":
            assert names == [BASELINE, COPY]
        else:
            assert names == ["eager-nchw", *(["numpy"] if case.axis == "channel" else []), READ]


def test_variants_are_measured_where_they_say_something():
    def names(match, layout):
        case = PairCase(Shape(12, 20, 6, 5, 3), layout, "float32", match)
        return [variant.name for variant in fourier_align.VARIANTS if fits(variant, case)]

    assert "published" in names("magnitude", "tokens") and "published" not in names("magnitude", "nchw")
    assert "skd-cpu-spectra" in names("magnitude", "nchw")
    assert names("complex+focal", "tokens") == [BASELINE, FOCAL_FREQUENCY_LOSS, "skd-cpu", COPY]
    assert names("log_magnitude", "nchw") == names("complex+bands", "tokens") == [BASELINE, "skd-cpu", COPY]


def test_a_quick_run_is_one_small_shape():
    quick = plan(what=("magnitude", "intensity"), quick=True)
    assert {case.shape.name for case, _ in quick} == {"192<-384 14x14 B4", "192 14x14 B4"}
    assert not any(variant.compiled for _, variants in quick for variant in variants)


# --- Losses with a transform ---


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("layout", ["nchw", "tokens"])
@pytest.mark.parametrize("match", TRANSFORMED)
def test_every_loss_is_right_on_its_own_terms(layout, dtype, match):
    case = PairCase(Shape(12, 20, 6, 5, 3), layout, dtype, match, upstream=0.2)
    inputs = case.make_inputs()
    expected = case.truth(inputs)
    for variant in fourier_align.VARIANTS:
        if variant.compiled or not fits(variant, case):
            continue
        result = runner.examine(case.run(variant, inputs), expected, case)
        if variant.backend == "cpu" and backends.backends()["cpu"] is not True:
            assert result.status == report.UNAVAILABLE and result.reason
            continue
        assert (result.status, result.reason) == (report.OK, ""), variant.name
        has_spectra = variant.name == "skd-cpu-spectra"
        assert (result.errors is not None and result.errors.spectra is not None) == has_spectra


@pytest.mark.parametrize("widths", [(3, 3), (2, 5), (5, 2)])
def test_focal_frequency_loss_is_the_formula_of_its_paper(widths):
    torch.manual_seed(0)
    student, teacher = torch.randn(2, widths[0], 4, 6), torch.randn(2, widths[1], 4, 6)
    objective = OBJECTIVES["complex+focal"]
    s, t = (reference.pool_channels(x.double(), min(widths)).numpy() for x in (student, teacher))
    difference = np.fft.fft2(s, norm="ortho") - np.fft.fft2(t, norm="ortho")
    weight = np.abs(difference)
    weight /= weight.max((2, 3), keepdims=True)
    by_hand = (weight * np.abs(difference) ** 2).mean()
    assert focal_frequency_loss_float64(student, teacher, objective).item() == pytest.approx(by_hand, rel=1e-12)
    assert focal_frequency_loss(student, teacher, objective, None).item() == pytest.approx(by_hand, rel=1e-5)


def test_bands_differ_from_bin_to_bin():
    bands = OBJECTIVES["complex+bands"].bands(torch.ones(1, 1, 6, 5))
    assert bands.shape == (6, 3) and bands.min() > 0.3 and bands.unique().numel() > 6
    assert OBJECTIVES["magnitude"].bands(torch.ones(1, 1, 6, 5)) is None


def spoilt_spectra(match):
    def loss(student, teacher):
        right = reference.fourier_align_published(student, teacher, match)
        spectra = [x.float() for x in correctness.pooled_spectra(student, teacher)]
        spectra[1][0, 0] *= 1.001
        return right, [spectra]

    return loss


def test_a_wrong_spectrum_gets_no_time(tmp_path, capsys, monkeypatch):
    wrong = Variant("spoilt", spoilt_spectra, share=Share(BASELINE, beyond=True, most=15))
    monkeypatch.setattr(fourier_align, "VARIANTS", (wrong, *fourier_align.VARIANTS))
    options = {"variants": ("spoilt",), "layouts": ("nchw",), "match": "magnitude"}
    assert bench.run(config(tmp_path, **options)) == 1
    rows = [row for row in read_rows(tmp_path) if row["variant"] == "spoilt"]
    assert len(rows) == 3
    for row in rows:
        assert row["status"] == report.WRONG and row["spectra_relative_error"] and "a bin deviates" in row["reason"]
        assert row["median_ms"] == row["share_percent"] == row["ratio_to_baseline"] == ""
    assert "WRONG: a bin deviates" in capsys.readouterr().out


def test_losses_leave_rows_with_the_share_of_the_spectra(tmp_path, capsys):
    if backends.backends()["cpu"] is not True:
        pytest.skip("the share is that of the CPU kernel")
    assert bench.run(config(tmp_path, layouts=("tokens",))) == 0
    rows = {(row["match"], row["variant"]): row for row in read_rows(tmp_path) if row["phase"] == "both"}
    assert {match for match, _ in rows} == set(TRANSFORMED)
    assert all(row["operation"] == "fourier_align" and row["baseline"] == BASELINE for row in rows.values())
    alone, spectra = rows["magnitude", "skd-cpu"], rows["magnitude", "skd-cpu-spectra"]
    percent = 100 * (float(spectra["median_ms"]) / float(alone["median_ms"]) - 1)
    assert float(spectra["share_percent"]) == pytest.approx(percent) and spectra["share"] == "beyond skd-cpu"
    assert spectra["share_percent_per_round"] and not alone["share"] and not alone["share_percent"]
    assert float(spectra["spectra_relative_error"]) < 1e-6 and not alone["spectra_relative_error"]
    out = capsys.readouterr().out
    assert "% beyond skd-cpu" in out and "times as fast as focal-frequency-loss" in out


# --- Spectra of maps ---


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("layout", ["nchw", "tokens"])
@pytest.mark.parametrize("axis", AXES)
def test_every_intensity_is_right(axis, layout, dtype):
    case = IntensityCase(MapShape(12, 6, 5, 3), layout, dtype, axis)
    inputs = case.make_inputs()
    expected = case.truth(inputs)
    assert inputs.x.is_contiguous() == (layout == "nchw") and torch.equal(inputs.x, inputs.nchw)
    for variant in spectral_intensity.VARIANTS:
        if variant.compiled or not fits(variant, case):
            continue
        result = runner.examine(case.run(variant, inputs), expected, case)
        if variant.backend != "cpu" or backends.backends()["cpu"] is True:
            assert (result.status, result.reason) == (report.OK, ""), variant.name
            assert (result.errors is None) == (variant.name == READ)


def test_the_floor_of_an_intensity_is_one_read():
    case = IntensityCase(MapShape(384, 14, 14, 32), "nchw", "float32", "channel")
    assert case.floor_bytes("forward") == 32 * 384 * 196 * 4
    assert IntensityCase(case.shape, "nchw", "bfloat16", "space").floor_bytes("forward") == 32 * 384 * 196 * 2


def test_intensities_leave_rows_of_a_forward_alone(tmp_path, capsys):
    assert bench.run(config(tmp_path, what=("intensity",), shapes=(MAP,))) == 0
    rows = read_rows(tmp_path)
    assert {(row["operation"], row["phase"]) for row in rows} == {("spectral_intensity", "forward")}
    by = {(row["axis"], row["layout"], row["variant"]): row for row in rows}
    assert len(by) == len(rows) and ("channel", "nchw", "numpy") in by and ("space", "nchw", "numpy") not in by
    for (axis, layout, name), row in by.items():
        if row["status"] != report.OK or name == READ:
            continue
        eager, read = by[axis, layout, "eager-nchw"], by[axis, layout, READ]
        ratio = float(eager["median_ms"]) / float(row["median_ms"])
        assert float(row["ratio_to_baseline"]) == pytest.approx(ratio) and row["baseline"] == "eager-nchw"
        assert float(row["times_floor"]) == pytest.approx(float(row["median_ms"]) / float(read["median_ms"]))
        assert float(row["spectra_relative_error"]) < 1e-6 and not row["gradient_relative_l2"]
    samples = json.loads((tmp_path / "out" / "rows.json").read_text())["samples"]
    assert all(set(sample["milliseconds"]) == {"forward"} for sample in samples)
    out = capsys.readouterr().out
    assert "x eager" in out and "x read" in out and "backward ms" not in out


@pytest.mark.parametrize(
    ("found", "error"),
    [([1.0, 0.0, 2.0], 0.0), ([1.0, 0.0, 2.002], 1e-3), ([1.0, 1e-9, 2.0], float("inf")), ([1.0, 0.0], float("nan"))],
)
def test_the_worst_bin_counts(found, error):
    errors = correctness.compare_spectra([torch.tensor([1.0, 0.0, 2.0]).double()], [torch.tensor(found)])
    assert errors.worst == pytest.approx(error, rel=1e-3, nan_ok=True)
    assert (errors.verdict("float32") == "") == (error == 0)
    assert correctness.compare_spectra([torch.ones(2)], [torch.tensor([torch.nan, 1])]).verdict("float32")


# --- A model ---


@pytest.fixture
def small_model(monkeypatch):
    pytest.importorskip("timm")
    case = ModelCase("deit_tiny_patch16_224", 1)
    monkeypatch.setattr(model_analysis, "ModelCase", lambda: case)
    return case


def test_the_analysis_of_a_model_is_right_and_its_shares_are_told(tmp_path, capsys, small_model):
    assert bench.run(config(tmp_path, what=("analyze",), shapes=(), rounds=1)) == 0
    rows = {row["variant"]: row for row in read_rows(tmp_path)}
    assert set(rows) == {variant.name for variant in model_analysis.VARIANTS}
    forward = float(rows["forward"]["median_ms"])
    for name in ("analyze", "analyze-no-entropy", "intensities", "intensities-and-entropy"):
        row, beyond = rows[name], name.startswith("analyze")
        ratio = float(row["median_ms"]) / forward
        assert float(row["share_percent"]) == pytest.approx(100 * (ratio - 1 if beyond else ratio))
        assert row["share"] == ("beyond forward" if beyond else "of forward")
        assert row["status"] == report.OK and float(row["spectra_relative_error"]) < 1e-5
    assert {row["model"] for row in rows.values()} == {"deit_tiny_patch16_224"}
    assert {row["floor_bytes"] for row in rows.values()} == {str(12 * 192 * 196 * 4)}
    assert "% of forward" in capsys.readouterr().out


def test_a_spoilt_analysis_is_found_out(small_model):
    inputs = small_model.make_inputs()
    expected = intensities, entropy = small_model.truth(inputs)
    analyze = next(v for v in model_analysis.VARIANTS if v.name == "analyze")

    def verdict(*found):
        return small_model.errors(expected, analyze, list(found), None).verdict("float32")

    assert verdict(*intensities, entropy) == "" and verdict(*intensities) == ""
    assert verdict(*intensities[:-1], intensities[-1] * 1.001, entropy)
    assert verdict(*intensities, entropy * 1.01)
    assert verdict(*intensities[:-1], entropy)


# --- The end ---


def group(case, milliseconds):
    """A group in which every variant takes these times, in every phase and round."""
    results = []
    for variant in fourier_align.VARIANTS:
        if (time := milliseconds.get(variant.name)) is not None:
            times = timing.Times({phase: [time] * 3 for phase in timing.PHASES}, [0] * 3)
            results.append(report.Result(variant, report.OK, times=times))
    return report.Group(case, 1, results)


@pytest.mark.parametrize(
    ("height", "published", "spectra", "reached"),
    [(14, 10.1, 1.1, 2), (14, 9.9, 1.1, 1), (56, 5.1, 1.1, 2), (56, 4.9, 1.16, 0), (14, 10.1, 1.16, 1)],
)
def test_goals_are_counted_and_named_if_missed(height, published, spectra, reached):
    case = PairCase(Shape(12, 20, height, height, 3), "nchw", "float32", "magnitude")
    times = {BASELINE: published, "skd-cpu": 1.0, "skd-cpu-spectra": spectra, COPY: 0.5}
    text = summary.closing([group(case, times)])
    assert f"goals: {reached} reached, {2 - reached} not reached" in text
    assert text.count("NOT REACHED") == 2 - reached
    assert f"{published:.2f} times as fast as {BASELINE}" in text and "2.00 times the copy" in text
    assert f"{100 * (spectra - 1):.1f}% beyond skd-cpu" in text
    assert "goals" not in summary.closing([group(case, times)], judge=False)


def test_an_expected_ratio_is_that_of_the_baseline(tmp_path, capsys):
    options = {"what": ("intensity",), "shapes": (MAP,), "layouts": ("nchw",), "expect_ratio": 1e9}
    assert bench.run(config(tmp_path, **options)) == 1
    assert capsys.readouterr().err.count("expected 1000000000.0") == 2


def test_plain_text_without_rich(tmp_path, capsys, monkeypatch):
    for name in ("rich", "rich.console", "rich.table"):
        monkeypatch.setitem(sys.modules, name, None)
    assert bench.run(config(tmp_path, layouts=("nchw",), match="complex+focal")) == 0
    assert FOCAL_FREQUENCY_LOSS in capsys.readouterr().out
