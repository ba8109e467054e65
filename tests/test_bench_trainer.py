"""What skd bench measures of the trainer: its loop beside a bare one, the spectral loss within a step."""

import csv
import math

import pytest
import torch

pytest.importorskip("timm", reason="the trainer is built on timm (extra 'train')")

from skd import bench  # noqa: E402
from skd.bench import report, trainer  # noqa: E402
from skd.bench.plan import make_plan  # noqa: E402
from skd.bench.trainer import StepCase, all_cases  # noqa: E402
from skd.bench.training_steps import bare_loop, engine_loop  # noqa: E402
from skd.ops import backends  # noqa: E402

LAYERS = (0, 2), (1, 5)


def small(kind):
    return StepCase(kind, "test_vit3", *LAYERS, student="test_vit", size=160, batch=2)


@pytest.fixture
def small_cases(monkeypatch):
    monkeypatch.setattr(trainer, "all_cases", lambda: [small("loop"), small("share")])


def config(tmp_path, **options):
    given = {"what": ("trainer",), "threads": (1,), "rounds": 2, "allocator": "default", "out": tmp_path / "out"}
    return bench.BenchConfig(**given | options)


def variant(name):
    return next(variant for variant in trainer.VARIANTS if variant.name == name)


def test_both_measurements_are_right_and_their_shares_are_told(tmp_path, capsys, small_cases):
    if backends.backends()["cpu"] is not True:
        pytest.skip("the CPU extension is not built")
    assert bench.run(config(tmp_path)) == 0
    with (tmp_path / "out" / "rows.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["variant"] for row in rows] == [
        *("bare-loop", "skd-loop", "copy"),
        *("bare-loop", "skd-spectral", "published-spectral", "copy"),
    ]
    for row in rows:
        assert row["status"] == report.OK and row["phase"] == "both" and float(row["median_ms"]) > 0
        assert row["model"] == "test_vit <- test_vit3" and row["operation"] == "trainer" and row["batch"] == "2"
        if row["variant"] != "copy":
            assert float(row["loss_relative_error"]) < 1e-5
    loop, share = rows[:3], rows[3:]
    ratio = float(loop[1]["median_ms"]) / float(loop[0]["median_ms"])
    assert float(loop[1]["share_percent"]) == pytest.approx(100 * (ratio - 1))
    assert loop[1]["share"] == "beyond bare-loop"
    for row in share[1:3]:
        assert row["share"] == "of bare-loop"
        part = 100 * float(row["median_ms"]) / float(share[0]["median_ms"])
        assert float(row["share_percent"]) == pytest.approx(part)
        assert float(row["gradient_relative_l2"]) < 1e-5
    printed = capsys.readouterr().out
    assert "% beyond bare-loop" in printed and "goals:" in printed


def test_the_two_loops_train_alike():
    case = small("loop")
    inputs = case.make_inputs()
    before = {name: x.clone() for name, x in inputs.student.state_dict().items()}
    by_hand, ours = bare_loop(inputs), engine_loop(inputs)
    first, second = ([step().item() for _ in range(6)] for step in (by_hand, ours))
    assert first == pytest.approx(second, rel=1e-4)
    assert first[-1] < first[0]
    assert first[0] == pytest.approx(case.truth(inputs)[0], rel=1e-5)
    for name, x in inputs.student.state_dict().items():
        assert torch.equal(x, before[name])  # each loop trains a copy


def test_a_wrong_loop_and_a_wrong_loss_are_found_out():
    case = small("share")
    inputs = case.make_inputs()
    expected = case.truth(inputs)

    def verdict(name, forward, backward=None):
        return case.errors(expected, variant(name), forward, backward).verdict("float32")

    right = torch.tensor(expected[0])
    assert verdict("bare-loop", right) == ""
    assert "deviates from float64 by 1.0e-03" in verdict("bare-loop", right * 1.001)
    assert verdict("skd-loop", right * math.nan)
    run = case.run(variant("published-spectral"), inputs)
    loss = run.forward()
    gradients = run.backward(loss)
    assert len(gradients) == 2 and verdict("published-spectral", loss, gradients) == ""
    assert verdict("published-spectral", loss, [gradients[0], gradients[1] * 1.001])
    assert verdict("published-spectral", loss * 1.001, gradients)
    assert case.errors(expected, variant("copy"), right, None) is None


def test_the_defaults_are_the_models_of_the_issue():
    loop, share = all_cases()
    assert loop.teacher == loop.student == share.student == "deit_tiny_patch16_224"
    assert share.teacher == "cait_s24_224"
    assert share.student_layers == (0, 1, 6, 7, 8, 9, 10, 11)
    assert share.teacher_layers == (0, 1, 18, 19, 20, 21, 22, 23)
    assert loop.floor_bytes("both") == 7 * 4 * 5_717_416
    assert share.floor_bytes("both") == 8 * 4 * share.batch * 14 * 14 * (2 * 192 + 384)
    plan = make_plan(bench.BenchConfig(what=("trainer",)).with_defaults())
    assert [case for case, _ in plan] == [loop, share]
    assert [[v.name for v in variants] for _, variants in plan] == [
        ["bare-loop", "skd-loop", "copy"],
        ["bare-loop", "skd-spectral", "published-spectral", "copy"],
    ]
    (only,) = make_plan(bench.BenchConfig(what=("trainer",), shapes=("cait",), quick=True).with_defaults())
    assert only[0].kind == "share" and only[0].batch == 1


def test_what_cannot_be_measured_ends_with_one_sentence(tmp_path, capsys, monkeypatch):
    assert bench.run(config(tmp_path, shapes=("14x14",))) == 2
    assert "shape '14x14' is no part of 'loop, deit_tiny" in capsys.readouterr().err
    monkeypatch.setattr(trainer.importlib.util, "find_spec", lambda name: None)
    assert bench.run(config(tmp_path)) == 2
    assert "what='trainer' needs timm" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
