"""What the report says of numbers: no more than they show."""

import io
import math

import pytest

pytest.importorskip("rich", reason="the table is drawn with rich (extra 'train')")

from rich.console import Console  # noqa: E402

from skd.distill.report import ArmResult, conclusions, noise, print_table  # noqa: E402


def arm(label, *correct, images=360):
    return ArmResult(label, label, correct, images, 10_410, tuple(1.5 for _ in correct))


def test_mean_and_deviation():
    result = arm("a", 340, 345, 350)
    assert result.mean == pytest.approx(100 * 345 / 360)
    assert result.deviation == pytest.approx(100 * 5 / 360)
    assert arm("a", 340).deviation is None


def test_noise_is_two_binomial_standard_errors_and_the_spread_of_seeds():
    p, q = 0.9, 0.8
    expected = 2 * 100 * math.sqrt(p * (1 - p) / 100 + q * (1 - q) / 100)
    assert noise(arm("a", 90, images=100), arm("b", 80, images=100)) == pytest.approx(expected)
    seeds = noise(arm("a", 88, 92, images=100), arm("b", 80, 80, images=100))
    assert seeds == pytest.approx(math.sqrt(expected**2 + 4 * 8 / 2))
    assert noise(arm("a", 100, images=100), arm("b", 100, images=100)) > 1, "a perfect score is no certainty"


def sentences(teacher, students, task="digits", quick=False):
    return conclusions(teacher, students, task=task, quick=quick)


def test_small_differences_are_called_noise_in_both_directions():
    for last in (350, 338):
        text = sentences(arm("teacher", 351), [arm("labels", 341), arm("logits", 347), arm("spectral", last)])
        compared = [line for line in text if "against" in line]
        assert len(compared) == 3 and all("no difference is shown" in line for line in compared)
        assert f'"spectral" against "logits": {(last - 347) / 3.6:+.2f} points ({last - 347:+d} images)' in compared[1]


def test_large_differences_are_limited_to_these_images_and_seeds():
    text = " ".join(sentences(arm("teacher", 351), [arm("labels", 250, 252), arm("logits", 341, 345)]))
    assert "+25.56 points (+92 images), more than the noise of" in text
    assert "for these images and 2 seeds" in text and "One seed" not in text
    worse = " ".join(sentences(arm("teacher", 351), [arm("labels", 343), arm("logits", 251)]))
    assert "-25.56 points (-92 images), more than the noise of" in worse


def test_demonstration_quick_run_and_useless_teacher_are_named():
    students = [arm("labels", 301), arm("logits", 302)]
    quick = " ".join(sentences(arm("teacher", 300), students, quick=True))
    assert "its accuracies mean nothing" in quick and "against" not in quick and "not better" not in quick
    text = " ".join(sentences(arm("teacher", 300), students))
    for shown in (quick, text):
        assert "demonstration on 360 test images" in shown and "one image is 0.28 points" in shown
    assert "quick" not in text and "One seed cannot show" in text
    assert "teacher (83.33%) is not better than the student trained on labels only (83.61%)" in text
    assert "+1 image)" in " ".join(sentences(arm("t", 350), [arm("labels", 301), arm("logits", 302)]))
    images = " ".join(sentences(arm("teacher", 350), [arm("labels", 301), arm("logits", 302)], task="images"))
    assert "demonstration" not in images and "not better" not in images and "quick" not in images


def test_table_has_mean_deviation_parameters_and_seconds():
    out = io.StringIO()
    print_table(Console(file=out, width=100), [arm("teacher", 351), arm("labels only", 340, 350)], "a title")
    text = out.getvalue()
    for piece in ("a title", "97.50", "351 of 360", "95.83 ± 1.96", "345 of 360", "10,410", "3.0", "over 2 seeds"):
        assert piece in text, f"{piece!r} is not in\n{text}"
