"""What the report says of numbers, no more than they show; the learning curves; the page."""

import base64
import csv
import io
import json
import math
import re
from html.parser import HTMLParser
from types import SimpleNamespace

import pytest

pytest.importorskip("rich", reason="the table is drawn with rich (extra 'train')")
pytest.importorskip("matplotlib", reason="the curves are drawn with matplotlib (extra 'train')")

from rich.console import Console  # noqa: E402

from skd.distill import curves  # noqa: E402
from skd.distill.html_report import write_report  # noqa: E402
from skd.distill.report import ArmResult, conclusions, noise, print_table  # noqa: E402


def arm(label, *correct, images=360, **kwargs):
    """``images``: that were tested, one number for all seeds or one for each."""
    tested = images if isinstance(images, tuple) else (images,) * len(correct)
    return ArmResult(label, label, correct, tested, 10_410, tuple(1.5 for _ in correct), **kwargs)


def test_mean_and_deviation():
    result = arm("a", 340, 345, 350)
    assert result.mean == pytest.approx(100 * 345 / 360)
    assert result.deviation == pytest.approx(100 * 5 / 360)
    assert arm("a", 340).deviation is None


def test_accuracies_are_of_the_images_that_were_tested():
    result = arm("a", 23, 12, images=(23, 24))
    assert result.top1 == [100, 50] and result.mean == 75
    found = result.to_dict()
    assert (found["test_top1"], found["test_correct"], found["test_images"]) == ([100, 50], [23, 12], [23, 24])
    assert arm("a", 0, images=0).top1 == [0]


def test_noise_is_two_binomial_standard_errors_and_the_spread_of_seeds():
    p, q = 0.9, 0.8
    expected = 2 * 100 * math.sqrt(p * (1 - p) / 100 + q * (1 - q) / 100)
    assert noise(arm("a", 90, images=100), arm("b", 80, images=100)) == pytest.approx(expected)
    seeds = noise(arm("a", 88, 92, images=100), arm("b", 80, 80, images=100))
    assert seeds == pytest.approx(math.sqrt(expected**2 + 4 * 8 / 2))
    assert noise(arm("a", 100, images=100), arm("b", 100, images=100)) > 1, "a perfect score is no certainty"

    # Of seeds that could read different numbers of images, the fewest count.
    unread = noise(arm("a", 81, 90, images=(90, 100)), arm("b", 80, 80, images=100))
    assert unread == pytest.approx(2 * 100 * math.sqrt(p * (1 - p) / 90 + q * (1 - q) / 100))
    assert noise(arm("a", 0, images=0), arm("b", 0, images=0)) > 1, "none could be read"


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


def test_conclusions_count_the_images_that_were_tested():
    text = sentences(
        arm("t", 20, images=20), [arm("labels", 10, images=20), arm("logits", 12, images=20)], task="images"
    )
    assert "The models were tested on 20 images; one image is 5 points." in text
    assert '"logits" against "labels": +10.00 points (+2 images)' in text[1] and "at one time" not in " ".join(text)
    text = sentences(
        arm("t", 24, images=24), [arm("labels", 23, images=23), arm("logits", 24, images=24)], task="images"
    )
    assert "tested on 23 images" in text[0] and "a test was on 23 to 24 of them" in text[1]
    assert '"logits" against "labels": +0.00 points (+0 images)' in text[2]
    assert "tested on 0 images" in sentences(arm("t", 0, images=0), [arm("labels", 0, images=0)], task="images")[0]


def test_one_arm_is_compared_with_nothing():
    for name in ("labels", "logits", "spectral"):
        text = sentences(arm("teacher", 351), [arm(name, 340, 342)])
        assert len(text) == 1 and "demonstration" in text[0]
    assert "trained on labels only (94.72%)" in sentences(arm("teacher", 340), [arm("labels", 341)])[1]


def test_an_arm_that_had_a_teacher_is_not_called_labels_only():
    text = " ".join(sentences(arm("teacher", 300), [arm("logits", 341), arm("spectral", 342)]))
    assert "labels only" not in text and "not better" not in text
    assert '"spectral" against "logits": +0.28 points (+1 image)' in text and text.count("against") == 1
    text = " ".join(sentences(arm("teacher", 300), [arm("spectral", 341), arm("labels", 301)]))
    assert "not better than the student trained on labels only (83.61%)" in text


def test_gratings_are_called_a_demonstration():
    text = " ".join(sentences(arm("teacher", 351), [arm("labels", 340)], task="gratings"))
    assert "demonstration on 360 generated images of gratings" in text and "8x8" not in text


def table_text(*results):
    out = io.StringIO()
    print_table(Console(file=out, width=120), results, "a title")
    return out.getvalue()


def test_table_has_mean_deviation_parameters_and_seconds():
    text = table_text(arm("teacher", 351), arm("labels only", 340, 350))
    for piece in ("a title", "97.50", "351 of 360", "95.83 ± 1.96", "345 of 360", "10,410", "3.0", "over 2 seeds"):
        assert piece in text, f"{piece!r} is not in\n{text}"
    assert "averaged" not in text
    assert "340.5 of 360" in table_text(arm("labels only", 340, 341))


def test_table_counts_the_images_that_were_tested():
    text = table_text(arm("teacher", 23, images=23), arm("labels only", 22, 24, images=(23, 24)))
    for piece in ("100.00", "23 of 23", "97.83 ± 3.07", "23 of 23.5"):
        assert piece in text, f"{piece!r} is not in\n{text}"


def test_table_has_the_averaged_weights_where_there_are_any():
    averaged = arm("labels only", 340, 350, ema_top1=(95.0, 97.0))
    text = table_text(arm("teacher", 351), averaged)
    assert "averaged (%)" in text and "96.00 ± 1.41" in text
    assert averaged.to_dict()["ema_top1"] == [95.0, 97.0] and arm("a", 1).to_dict()["ema_top1"] == []


# --- The learning curves ---


def curve(label, *seeds, ema=None):
    """Of top-1 per seed and epoch."""
    results = [
        [
            SimpleNamespace(test_top1=top1, test_ce=2 - top1 / 100, ema_top1=None if ema is None else ema[epoch])
            for epoch, top1 in enumerate(seed)
        ]
        for seed in seeds
    ]
    return curves.Curve(label, results)


def legend_of(figure):
    (legend,) = figure.legends
    return [text.get_text() for text in legend.get_texts()]


def test_curves_are_means_over_seeds_with_bands():
    lines = [curve("labels only", [50, 80], [70, 90]), curve("soft logits", [60, 81], [60, 85])]
    figure = curves.make_figure(lines, title="a title", teacher_top1=97.5)
    accuracy, entropy = figure.axes
    assert legend_of(figure) == ["labels only", "soft logits", "teacher, 97.5%"]
    assert [list(line.get_ydata()) for line in accuracy.lines[:2]] == [[60, 85], [60, 83]]
    assert list(accuracy.lines[0].get_xdata()) == [1, 2]
    assert list(entropy.lines[0].get_ydata()) == pytest.approx([1.4, 1.15])
    assert entropy.get_ylim() == (0, pytest.approx(1.05 * 1.5)), "the highest seed's band"
    heights = accuracy.collections[0].get_paths()[0].vertices[:, 1]
    assert (heights.min(), heights.max()) == (50, 90)
    low, high = accuracy.get_ylim()
    assert low < 50 and 97.5 < high <= 100.5
    assert accuracy.get_xlabel() == "epoch" and "%" in accuracy.get_ylabel() and "nats" in entropy.get_ylabel()


def test_averaged_weights_are_thin_lines_of_the_same_colour():
    lines = [curve("labels only", [50, 80]), curve("soft logits", [60, 85], ema=[10, 84])]
    figure = curves.make_figure(lines, title="", teacher_top1=None)
    accuracy = figure.axes[0]
    *full, thin = accuracy.lines
    assert len(full) == 2 and list(thin.get_ydata()) == [10, 84]
    assert thin.get_color() == full[1].get_color() and thin.get_linewidth() < full[1].get_linewidth()
    assert legend_of(figure) == ["labels only", "soft logits", "thin: averaged weights (EMA)"]
    assert accuracy.get_ylim()[0] > 10, "where an average begins would press the curves together"


def test_curves_of_an_unfinished_run():
    lines = [curve("labels only", [50, 80, 90], [60]), curve("soft logits"), curve("all", [70, 80, 90])]
    figure = curves.make_figure(lines, title="", teacher_top1=None)
    labels, both = figure.axes[0].lines
    assert list(labels.get_ydata()) == [55] and list(both.get_ydata()) == [70, 80, 90]
    assert both.get_color() == curves.STYLES[2][0], "an arm without results keeps its colour"
    assert curves.make_figure([curve("labels only")], title="", teacher_top1=95.0).axes


def test_a_diverged_arm_can_be_drawn():
    for entropy in (math.nan, math.inf):
        results = [SimpleNamespace(test_top1=10.0, test_ce=entropy, ema_top1=None)]
        figure = curves.make_figure([curves.Curve("labels only", [results])], title="", teacher_top1=None)
        assert figure.axes[1].get_ylim() == (0, 1) and len(figure.axes[0].lines) == 1


def test_curves_are_a_png(tmp_path):
    from PIL import Image

    curves.draw(tmp_path / "curves.png", [curve("labels only", [50, 80])], title="a title", teacher_top1=90.0)
    with Image.open(tmp_path / "curves.png") as image:
        assert image.format == "PNG" and image.width > 1000


# --- The page ---

PNG = base64.b64decode(
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="
)
TITLES = (
    "What was found",
    "Learning curves",
    "Distillation dynamics",
    "Cost of a training step",
    "What was skipped",
    "The student",
    "Data and models",
    "Versions",
    "Aligned layers",
    "Configuration",
)
NASTY = "<script src='https://x.example/y.js'>alert(1)</script> & \"quoted\""


def summary_of(teacher, students, others):
    return {
        "title": "A demonstration of three arms",
        "conclusions": ["The first sentence.", "The second one."],
        "tested": "after the last epoch",
        "data": {"name": "digits", "classes": ["0", "1"], "train_images": 1437, "test_images": 360, "image_size": 8},
        "teacher": {"model": "vit_big", "trained_here": True, **teacher.to_dict()},
        "students": {"model": "vit_small", "arms": {student.name: student.to_dict() for student in students}},
        "student_file": {
            "file": "student.safetensors",
            "arm": "spectral",
            "seed": 0,
            "test_top1": 93.06,
            "load_with": "timm.create_model('vit_small', checkpoint_path='student.safetensors')",
            "average": {"file": "student-ema.safetensors", "test_top1": 92.5},
        },
        "costs": {
            "teacher": {"data": 0, "teacher": 0, "student": 0, "loss": 0, "optimizer": 0, "other": 0},
            "labels": {"data": 0.001, "teacher": 0, "student": 0.008, "loss": 0.0005, "optimizer": 0.0005, "other": 0},
            "spectral": {"data": 0.001, "teacher": 0.01, "student": 0.008, "loss": 0.0005, "optimizer": 0.0005},
        },
        "bad_steps": 3,
        "bad_images": {"train/7/broken.png": "image file is truncated"},
        "environment": {"skd": "0.1.0", "torch": "2.9", "threads": 1},
        "seconds": 7300.0,
        **others,
    }


def run_folder(path, **others):
    """A folder with all files of a run of two seeds."""
    students = [arm("labels", 300, 310), arm("spectral", 335, 333)]
    summary = summary_of(arm("teacher", 344), students, others)
    (path / "summary.json").write_text(json.dumps(summary), encoding="utf-8")
    (path / "config.yaml").write_text("optim:\n  epochs: 2\n", encoding="utf-8")
    (path / "layers.yaml").write_text("student_layers: [0, 1]\n", encoding="utf-8")
    for name in ("curves.png", "dynamics.png"):
        (path / name).write_bytes(PNG)
    metrics = [
        {"arm": name, "seed": seed, "epoch": epoch, "test_top1": 90 + epoch + seed, "ema_top1": ema}
        for name, seed, ema in (("teacher", 0, ""), ("labels", 0, 80.0), ("labels", 1, 82.0), ("spectral", 0, 85.5))
        for epoch in (1, 2)
    ]
    gaps = {("labels", 0): 0.5, ("labels", 1): 0.25, ("labels", 2): 0.3, ("spectral", 0): 0.5, ("spectral", 2): 0.125}
    dynamics = [
        {"arm": name, "seed": seed, "epoch": epoch, "name": "blocks.1", "teacher_name": "blocks.9", "gap": gap + seed}
        for (name, epoch), gap in gaps.items()
        for seed in (0, 1)
    ]
    dynamics.append({"arm": "labels", "seed": 0, "epoch": 2, "name": "blocks.2", "teacher_name": "", "gap": ""})
    for name, rows in (("metrics.csv", metrics), ("dynamics.csv", dynamics)):
        with (path / name).open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, rows[0])
            writer.writeheader()
            writer.writerows(rows)
    return path


class Page(HTMLParser):
    """Checks the nesting, and collects what is on the page."""

    VOID = ("meta", "img", "br", "rect")

    def __init__(self, text):
        super().__init__(convert_charrefs=True)
        self.open, self.tags, self.attributes, self.headings, self.cells, self.words = [], [], [], [], [], []
        self.feed(text)
        self.close()
        assert not self.open, f"left open: {self.open}"
        self.text = " ".join(" ".join(self.words).split())

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += [(tag, *attribute) for attribute in attributes]
        if tag not in self.VOID:
            self.open.append(tag)
        if tag == "tr":
            self.cells.append([])
        if tag in ("td", "th"):
            self.cells[-1].append("")

    def handle_startendtag(self, tag, attributes):
        assert tag in self.VOID
        self.tags.append(tag)
        self.attributes += [(tag, *attribute) for attribute in attributes]

    def handle_endtag(self, tag):
        assert self.open and self.open[-1] == tag, f"</{tag}> closes {self.open[-1:]}"
        self.open.pop()

    def handle_data(self, data):
        if self.open[-1:] == ["style"]:
            return
        self.words.append(data)
        if self.open[-1:] == ["h2"]:
            self.headings.append(data)
        if self.open[-1:] in (["td"], ["th"]):
            self.cells[-1][-1] += data


def page_of(folder):
    path = write_report(folder)
    assert path == folder / "report.html" and not list(folder.glob(".part-*"))
    return Page(path.read_text(encoding="utf-8"))


def test_the_page_has_every_section_and_the_numbers(tmp_path):
    page = page_of(run_folder(tmp_path))
    assert page.headings == list(TITLES)
    assert page.cells[0][:4] == ["model and training", "test top-1 (%)", "averaged weights (%)", "images recognised"]
    assert page.cells[1] == ["teacher", "95.56", "", "344 of 360", "10,410", "1.5 s"]
    assert page.cells[2] == ["labels", "84.72 ± 1.96", "81.00 ± 1.41", "305 of 360", "10,410", "3.0 s"]
    assert page.cells[3] == ["spectral", "92.78 ± 0.39", "85.50", "334 of 360", "10,410", "3.0 s"]
    assert ["blocks.1 – blocks.9", "1.000 → 0.800", "1.000 → 0.625"] in page.cells
    assert ["training", "data", "teacher", "student", "loss", "optimizer", "together"] in page.cells
    costs = ["labels", "1.00 (10.0%)", "", "8.00 (80.0%)", "0.50 (5.0%)", "0.50 (5.0%)", "10.00"]
    assert costs in page.cells and not any(row[0] == "teacher" for row in page.cells[4:] if len(row) == len(costs))
    assert ["train/7/broken.png", "image file is truncated"] in page.cells
    assert ["torch", "2.9"] in page.cells and ["student", "vit_small"] in page.cells and ["classes", "2"] in page.cells
    for piece in (
        "A demonstration of three arms",
        "The first sentence.",
        "Mean ± standard deviation over 2 seeds",
        "The whole run took 2.0 h.",
        "infinite or NaN: 3.",
        "could not be read: 1. In training the next one took the place of each; in tests they were left out",
        'student.safetensors has the weights of "spectral", seed 0 (93.06% of the test images).',
        "student-ema.safetensors has their average (92.50%).",
        "timm.create_model('vit_small', checkpoint_path='student.safetensors')",
        "student_layers: [0, 1]",
        "optim: epochs: 2",
    ):
        assert piece in page.text, piece


def test_the_bars_are_as_long_as_their_costs(tmp_path):
    page = page_of(run_folder(tmp_path))
    rects = re.findall(r'x="([\d.]+)" y="0" width="([\d.]+)"', (tmp_path / "report.html").read_text("utf-8"))
    widths = [float(width) for _, width in rects]
    assert widths == [50, 400, 25, 25, 50, 500, 400, 25, 25], "of 1000, which the longer step takes"
    assert [float(x) for x, _ in rects][-5:] == [0, 50, 550, 950, 975]
    assert [value for tag, name, value in page.attributes if name == "aria-label"] == ["labels", "spectral"]


def test_the_page_needs_nothing_but_itself(tmp_path):
    page = page_of(run_folder(tmp_path))
    pictures = [value for tag, name, value in page.attributes if (tag, name) == ("img", "src")]
    assert [base64.b64decode(value.removeprefix("data:image/png;base64,")) for value in pictures] == [PNG, PNG]
    assert not {"script", "link", "iframe", "object", "a"} & set(page.tags)
    assert {name for _, name, _ in page.attributes if name in ("src", "href", "srcset", "action")} == {"src"}
    assert all(value for tag, name, value in page.attributes if (tag, name) == ("img", "alt"))
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "url(" not in text and "@import" not in text and "http" not in text.replace("http-equiv", "")
    assert ("meta", "name", "viewport") in page.attributes and ("meta", "charset", "utf-8") in page.attributes


def test_whatever_is_in_the_files_is_text_on_the_page(tmp_path):
    teacher, labels = ({**arm(name, 300).to_dict(), "label": NASTY} for name in ("teacher", "labels"))
    others = {
        "title": NASTY,
        "conclusions": [NASTY],
        "tested": NASTY,
        "environment": {NASTY: NASTY},
        "bad_images": {NASTY: NASTY},
        "dynamics_notes": [NASTY],
        "costs": {NASTY: {"data": 1.0}},
        "teacher": {"model": NASTY, **teacher},
        "students": {"model": "vit_small", "arms": {"labels": labels}},
    }
    run_folder(tmp_path, **others)
    for name in ("config.yaml", "layers.yaml"):
        (tmp_path / name).write_text(NASTY, encoding="utf-8")
    page = page_of(tmp_path)
    assert "script" not in page.tags and page.headings == list(TITLES)
    assert page.text.count(NASTY) == 17
    assert ("svg", "aria-label", NASTY) in page.attributes


@pytest.mark.parametrize(
    ("file", "gone"),
    [
        ("curves.png", {"Learning curves"}),
        ("dynamics.png", set()),
        ("dynamics.csv", set()),
        ("metrics.csv", set()),
        ("layers.yaml", {"Aligned layers"}),
        ("config.yaml", {"Configuration"}),
    ],
)
def test_a_missing_file_leaves_its_part_out(tmp_path, file, gone):
    run_folder(tmp_path)
    (tmp_path / file).unlink()
    page = page_of(tmp_path)
    assert page.headings == [title for title in TITLES if title not in gone]
    assert page.tags.count("img") == (1 if file.endswith(".png") else 2)
    assert any("→" in cell for row in page.cells for cell in row) == (file != "dynamics.csv")
    assert ("averaged weights (%)" in page.text) == (file != "metrics.csv")


def test_what_did_not_happen_is_not_mentioned(tmp_path):
    page = page_of(run_folder(tmp_path, bad_steps=0, bad_images={}, costs={}, student_file=None))
    gone = {"Cost of a training step", "What was skipped", "The student"}
    assert page.headings == [title for title in TITLES if title not in gone]


def test_skipped_steps_may_be_told_by_arm(tmp_path):
    page = page_of(run_folder(tmp_path, bad_steps={"labels": 0, "spectral": 4}, bad_images={}))
    assert 'Updates of "spectral" skipped' in page.text and 'of "labels" skipped' not in page.text


def test_the_page_counts_the_images_that_were_tested(tmp_path):
    students = [arm("labels", 20, 22, images=(22, 22)), arm("spectral", 22, 24, images=(22, 24))]
    others = summary_of(arm("teacher", 23, images=23), students, {})
    page = page_of(run_folder(tmp_path, **others))
    assert [row[1:4:2] for row in page.cells[1:4]] == [
        ["100.00", "23 of 23"],
        ["95.45 ± 6.43", "21 of 22"],
        ["100.00 ± 0.00", "23 of 23"],
    ]


def test_very_many_unreadable_images_are_counted_and_the_first_shown(tmp_path):
    page = page_of(run_folder(tmp_path, bad_images={f"{i}.png": "gone" for i in range(500)}))
    assert "could not be read: 500 (the first 200 are below). In training" in page.text
    assert sum(row[1:] == ["gone"] for row in page.cells) == 200


def test_a_run_that_has_not_ended_shows_how_far_it_came(tmp_path):
    run_folder(tmp_path)
    (tmp_path / "summary.json").unlink()
    page = page_of(tmp_path)
    assert page.headings[0] == "How far it came" and "What was found" not in page.headings
    assert ["labels", "1", "2", "93.00"] in page.cells
    assert "has no summary" in page.text


def test_an_empty_folder_makes_an_empty_page(tmp_path):
    page = page_of(tmp_path)
    assert page.headings == [] and page.text == "Distillation Distillation"


def test_dynamics_without_a_teacher_are_not_explained_by_one(tmp_path):
    run_folder(tmp_path)
    rows = "arm,seed,epoch,name,teacher_name,gap\nlabels,0,0,blocks.0,,\n"
    (tmp_path / "dynamics.csv").write_text(rows, encoding="utf-8")
    page = page_of(tmp_path)
    assert "decades" not in page.text and "before and after the training" in page.text
    assert "Distillation dynamics" in page.headings
