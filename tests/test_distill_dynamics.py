"""Distillation dynamics: what is seen of student and teacher, that looking changes nothing, and the pictures of it."""

import copy
import dataclasses
import math
import random

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

timm = pytest.importorskip("timm", reason="the trainer needs timm (extra 'train')")
pytest.importorskip("matplotlib", reason="the pictures are drawn with matplotlib (extra 'train')")

from small_training import through_a_file  # noqa: E402
from small_vits import one_thread  # noqa: E402, F401  (a fixture)

from skd.distill import dynamics_plots  # noqa: E402
from skd.distill.data import DataSource  # noqa: E402
from skd.distill.distributed import World  # noqa: E402
from skd.distill.dynamics import COLUMNS, Dynamics  # noqa: E402
from skd.distill.probe import probe_images, spectral_gap  # noqa: E402
from skd.distill.tapped_model import TappedModel  # noqa: E402
from skd.features import FeatureTap  # noqa: E402

IMAGES = torch.randn(6, 1, 8, 8, generator=torch.Generator().manual_seed(5))
PAIRS = (0, 1, -1), (0, 2, -1)  # of a student with 3 blocks and a teacher with 4


def vit(width: int, depth: int, seed: int = 0, **kwargs) -> nn.Module:
    torch.manual_seed(seed)
    size = {"img_size": 8, "patch_size": 2, "in_chans": 1, "num_classes": 10, "num_heads": 2}
    return timm.create_model("vit_tiny_patch16_224", embed_dim=width, depth=depth, **{**size, **kwargs})


def intensities(maps: list[torch.Tensor]) -> list[np.ndarray]:
    """By definition: magnitudes of the transform over channels, scaled with 1/sqrt(C), all C bins."""
    found = []
    for x in maps:
        spectrum = np.abs(np.fft.fft(x.numpy().astype(np.float64), axis=1, norm="ortho"))
        found.append(spectrum.mean(axis=(0, 2, 3)))
    return found


def maps_of(model: nn.Module, layers, images=IMAGES) -> list[torch.Tensor]:
    with torch.no_grad(), FeatureTap(model.eval(), list(layers)) as tap:
        return tap(images)[1]


def pooled(x: torch.Tensor, width: int) -> torch.Tensor:
    tokens = x.flatten(2).transpose(1, 2)  # [B, H*W, C], whose last axis is pooled
    return F.adaptive_avg_pool1d(tokens, width).transpose(1, 2).unflatten(2, x.shape[2:])


def expected_gap(student: torch.Tensor, teacher: torch.Tensor) -> float:
    width = min(student.shape[1], teacher.shape[1])
    a, b = intensities([pooled(student, width), pooled(teacher, width)])
    half = width // 2 + 1
    return float(np.abs(np.log10(a[:half] / b[:half])).mean())


# --- What is seen ---


@pytest.mark.parametrize("widths", [(16, 24), (24, 16), (16, 16), (15, 22)])
def test_rows_are_the_intensities_and_the_gaps_of_what_the_loss_compares(widths):
    heads = {"num_heads": 1}
    student, teacher = vit(widths[0], 3, **heads), vit(widths[1], 4, seed=1, **heads)
    rows = Dynamics(IMAGES, teacher).observe("logits", 3, 7, student, *PAIRS)
    assert [tuple(row) for row in rows] == [COLUMNS] * 3
    assert {(row["arm"], row["seed"], row["epoch"]) for row in rows} == {("logits", 3, 7)}
    assert [(row["layer"], row["name"]) for row in rows] == [(i, f"blocks.{i}") for i in range(3)]
    assert [(row["teacher_layer"], row["teacher_name"]) for row in rows] == [(i, f"blocks.{i}") for i in (0, 2, 3)]
    own, theirs = maps_of(student, range(3)), maps_of(teacher, (0, 2, 3))
    for row, x, y in zip(rows, own, theirs, strict=True):
        assert row["intensity"] == pytest.approx(intensities([x])[0].mean(), rel=1e-5)
        assert row["teacher_intensity"] == pytest.approx(intensities([y])[0].mean(), rel=1e-5)
        assert row["gap"] == pytest.approx(expected_gap(x, y), rel=1e-4) and row["gap"] > 0.01


def test_the_gap_is_zero_for_equal_maps_and_grows_with_the_distance():
    teacher = vit(16, 3)
    gaps = []
    for factor in (1.0, 1.5, 4.0):
        student = copy.deepcopy(teacher)
        with torch.no_grad():
            for block in student.blocks:
                block.mlp.fc2.weight *= factor
        rows = Dynamics(IMAGES, teacher).observe("a", 0, 0, student, (0, 1, 2), (0, 1, 2))
        gaps.append([row["gap"] for row in rows])
    assert gaps[0] == [0.0, 0.0, 0.0]
    assert all(0 < near < far for near, far in zip(*gaps[1:], strict=True))


def test_the_gap_in_decades():
    spectrum = torch.tensor([1.0, 2.0, 0.5], dtype=torch.float64)
    assert spectral_gap(spectrum, spectrum) == 0
    assert spectral_gap(spectrum, 2 * spectrum) == pytest.approx(math.log10(2))
    assert spectral_gap(spectrum, spectrum * torch.tensor([10.0, 1.0, 0.1])) == pytest.approx(2 / 3)
    zero = torch.zeros(3, dtype=torch.float64)
    assert spectral_gap(zero, zero) == 0
    assert spectral_gap(zero, torch.ones(3, dtype=torch.float64)) == pytest.approx(5), "bounded, not infinite"


def test_layers_by_name_that_are_no_blocks_come_after_them_and_unpaired_layers_have_no_teacher():
    student, teacher = vit(16, 3), vit(24, 4, seed=1)
    dynamics = Dynamics(IMAGES, teacher)
    rows = dynamics.observe("a", 0, 0, student, ("blocks.1.mlp", 0, 0), ("blocks.2", 0, 1))
    assert [(row["layer"], row["name"], row["teacher_name"]) for row in rows] == [
        (0, "blocks.0", "blocks.0"),
        (0, "blocks.0", "blocks.1"),
        (1, "blocks.1", None),
        (2, "blocks.2", None),
        (3, "blocks.1.mlp", "blocks.2"),
    ]
    assert all((row["gap"] is None) == (row["teacher_layer"] is None) for row in rows)
    assert (dynamics.student_blocks, dynamics.teacher_blocks) == (3, 4)
    assert rows[-1]["gap"] == pytest.approx(
        expected_gap(maps_of(student, ["blocks.1.mlp"])[0], maps_of(teacher, [2])[0]), rel=1e-4
    )
    assert len(dynamics.teacher_profile) == 4


def test_a_model_without_blocks_is_seen_by_the_named_layers():
    class Plain(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.head = nn.Conv2d(1, 6, 3, padding=1), nn.Linear(6, 10)

        def forward(self, x):
            return self.head(self.stem(x).mean((2, 3)))

    dynamics = Dynamics(IMAGES, vit(16, 3))
    rows = dynamics.observe("a", 0, 0, Plain(), ("stem",), (1,))
    assert [(row["name"], row["teacher_name"]) for row in rows] == [("stem", "blocks.1")]
    assert dynamics.student_blocks == 1


def test_without_a_teacher_or_pairs_the_student_is_seen_alone():
    alone = Dynamics(IMAGES).observe("labels", 0, 0, vit(16, 3), *PAIRS)
    unpaired = Dynamics(IMAGES, vit(24, 4)).observe("labels", 0, 0, vit(16, 3), (), ())
    assert alone == unpaired and len(alone) == 3
    assert all(row["intensity"] > 0 and row["gap"] is None and row["teacher_layer"] is None for row in alone)


@pytest.mark.parametrize("given", ["tensor", "callable"])
def test_the_teacher_sees_its_own_images(given):
    teacher = vit(24, 4, img_size=16)
    own = F.interpolate(IMAGES, (16, 16)) * 2 + 1
    images = own if given == "tensor" else lambda images: F.interpolate(images, (16, 16)) * 2 + 1
    dynamics = Dynamics(IMAGES, teacher, teacher_images=images)
    dynamics.observe("a", 0, 0, vit(16, 3), *PAIRS)
    expected = [x.mean() for x in intensities(maps_of(teacher, range(4), own))]
    assert dynamics.teacher_profile.layer_intensity.tolist() == pytest.approx(expected, rel=1e-5)


def test_a_teacher_in_half_precision_is_fed_in_its_own():
    teacher = vit(24, 4).bfloat16()
    rows = Dynamics(IMAGES, teacher).observe("a", 0, 0, vit(16, 3), *PAIRS)
    exact = Dynamics(IMAGES, teacher.float()).observe("a", 0, 0, vit(16, 3), *PAIRS)
    for row, other in zip(rows, exact, strict=True):
        assert row["gap"] == pytest.approx(other["gap"], abs=0.02)


# --- What is not disturbed, and what does not disturb ---


class Noisy(nn.Module):
    """Draws random numbers and counts batches whenever it runs in training mode, and draws some in any mode."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.Conv2d(c, 6, 1), nn.BatchNorm2d(6)) for c in (1, 6))
        self.drop, self.head = nn.Dropout(0.5), nn.Linear(6, 10)

    def forward(self, x):
        for block in self.blocks:
            x = self.drop(block(x)) + 0 * torch.rand(1) + 0 * random.random() + 0 * np.random.rand()
        return self.head(x.mean((2, 3)))


def test_generators_modes_weights_and_hooks_stay_as_they_were():
    student, teacher = Noisy(), Noisy().eval()
    student.train().blocks[1].eval()
    generators = (torch.get_rng_state, random.getstate, lambda: np.random.get_state()[1].tolist())
    before = copy.deepcopy(student.state_dict())
    modes = [module.training for module in student.modules()]
    states = [str(get() if get is not torch.get_rng_state else get().tolist()) for get in generators]
    dynamics = Dynamics(IMAGES, teacher)
    assert len(dynamics.observe("a", 0, 0, student, (0, 1), (1, 1))) == 2
    assert states == [str(get() if get is not torch.get_rng_state else get().tolist()) for get in generators]
    assert modes == [module.training for module in student.modules()]
    assert not any(module.training for module in teacher.modules())
    for key, value in student.state_dict().items():
        assert torch.equal(value, before[key]), key
    assert all(p.requires_grad and p.grad is None for p in student.parameters())
    assert not any(module._forward_hooks for model in (student, teacher) for module in model.modules())


def test_autocast_does_not_change_what_is_seen():
    student, teacher = vit(16, 3), vit(24, 4)
    plain = Dynamics(IMAGES, teacher).observe("a", 0, 0, student, *PAIRS)
    with torch.autocast("cpu", torch.bfloat16):
        assert Dynamics(IMAGES, teacher).observe("a", 0, 0, student, *PAIRS) == plain


def test_a_compiled_training_is_neither_changed_nor_compiled_anew():
    from torch._dynamo.testing import CompileCounter

    torch._dynamo.reset()
    student, teacher, counter = nn.Sequential(nn.Conv2d(1, 6, 1), nn.Conv2d(6, 4, 1)), vit(16, 3), CompileCounter()
    plain = Dynamics(IMAGES, teacher).observe("a", 0, 0, student, (0, 1), (1, 2))
    trained = torch.compile(TappedModel(student, (0, 1)), backend=counter)
    dynamics = Dynamics(IMAGES, teacher)

    def step():
        student.train()
        return trained(IMAGES)[0].detach()

    first = step()
    compiled = counter.frame_count
    assert compiled >= 1
    assert dynamics.observe("a", 0, 0, torch.compile(student, backend=counter), (0, 1), (1, 2)) == plain
    assert torch.equal(step(), first) and counter.frame_count == compiled
    torch._dynamo.reset()


# --- A student that cannot be seen; mistakes ---


def test_a_diverged_student_is_skipped_with_a_note():
    student, teacher = vit(16, 3), vit(24, 4)
    dynamics = Dynamics(IMAGES, teacher)
    dynamics.observe("spectral", 1, 0, student, *PAIRS)
    ruined = copy.deepcopy(student)
    with torch.no_grad():
        ruined.blocks[1].mlp.fc2.bias[0] = math.inf
    before = dynamics.rows
    assert dynamics.observe("spectral", 1, 1, ruined, *PAIRS) == []
    assert dynamics.rows == before
    (note,) = dynamics.notes
    assert '"spectral", seed 1, after epoch 1' in note and "'blocks.1'" in note and "\n" not in note
    assert len(dynamics.observe("spectral", 1, 2, student, *PAIRS)) == 3
    assert dynamics.histories[0].epochs == [0, 2]


def test_a_teacher_that_cannot_be_seen_is_named():
    teacher = vit(24, 4)
    with torch.no_grad():
        teacher.patch_embed.proj.bias.fill_(math.nan)
    dynamics = Dynamics(IMAGES, teacher)
    assert dynamics.observe("a", 0, 0, vit(16, 3), *PAIRS) == [] and dynamics.rows == []
    assert "the teacher cannot be looked at" in dynamics.notes[0]


def test_pairs_that_change_or_do_not_pair_are_refused():
    dynamics = Dynamics(IMAGES, vit(24, 4))
    with pytest.raises(ValueError, match=r"\[0, 1\] and teacher layers \[0\] make no pairs"):
        dynamics.observe("a", 0, 0, vit(16, 3), (0, 1), (0,))
    dynamics.observe("a", 0, 0, vit(16, 3), *PAIRS)
    with pytest.raises(ValueError, match="keep them in a run"):
        dynamics.observe("a", 0, 1, vit(16, 3), (0, 1), (0, 1))


# --- Memory and resumption ---


def seen(seeds=(0,), arms=("labels", "logits", "spectral"), epochs=4, pairs=PAIRS, dynamics=None) -> Dynamics:
    dynamics = dynamics or Dynamics(IMAGES, vit(24, 4, seed=9))
    for seed in seeds:
        for i, arm in enumerate(arms):
            student = vit(16, 3, seed=seed)
            for epoch in range(epochs):
                dynamics.observe(arm, seed, epoch, student, *pairs)
                change(student, 1 + 0.1 * (i + 1))
    return dynamics


def change(student: nn.Module, factor: float) -> None:
    with torch.no_grad():
        for block in student.blocks:
            block.mlp.fc2.weight *= factor


def test_a_resumed_run_has_the_whole_history_and_looks_at_the_teacher_once():
    whole, first = seen(epochs=3), seen(epochs=3)
    calls = []
    teacher = vit(24, 4, seed=9)
    teacher.register_forward_pre_hook(lambda *_: calls.append(1))
    resumed = Dynamics(IMAGES, teacher)
    resumed.load_state_dict(through_a_file(first.state_dict()))
    assert resumed.rows == whole.rows and len(resumed.rows) == 3 * 3 * 3
    for dynamics in (whole, resumed):
        student = vit(16, 3)
        change(student, 3)
        dynamics.observe("spectral", 0, 3, student, *PAIRS)
    assert resumed.rows == whole.rows and not calls
    for one, other in zip(resumed.histories, whole.histories, strict=True):
        assert (one.arm, one.seed, one.epochs) == (other.arm, other.seed, other.epochs)
        for name in ("first", "latest"):
            mine, theirs = getattr(one, name), getattr(other, name)
            assert mine.layers == theirs.layers and mine.channels == theirs.channels
            assert all(map(torch.equal, mine.intensity, theirs.intensity))
        assert all(map(torch.equal, one.latest_aligned, other.latest_aligned))
    assert all(map(torch.equal, resumed.targets, whole.targets))
    with pytest.raises(ValueError, match="keep them in a run"):
        resumed.observe("spectral", 0, 4, vit(16, 3), (0,), (0,))


def test_the_state_of_nothing_seen_and_of_a_student_alone():
    for dynamics in (Dynamics(IMAGES), seen(epochs=2, dynamics=Dynamics(IMAGES))):
        again = Dynamics(IMAGES)
        again.load_state_dict(through_a_file(dynamics.state_dict()))
        assert again.rows == dynamics.rows and again.teacher_profile is None


def test_an_epoch_seen_again_replaces_it_and_what_came_after():
    dynamics, student = seen(epochs=3, arms=("labels",)), vit(16, 3)
    others = seen(epochs=1, arms=("labels",)).rows
    again = dynamics.observe("labels", 0, 1, student, *PAIRS)
    assert dynamics.rows == others + again and [row["epoch"] for row in dynamics.rows] == [0] * 3 + [1] * 3
    change(student, 2)
    afresh = dynamics.observe("labels", 0, 0, student, *PAIRS)
    assert dynamics.rows == afresh
    (history,) = dynamics.histories
    assert history.first is history.latest and history.first.layer_intensity[0] == afresh[0]["intensity"]


def test_spectra_are_kept_of_the_first_and_the_latest_epoch_alone():
    def numbers(value) -> int:
        if isinstance(value, torch.Tensor):
            return value.numel()
        values = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
        return sum(map(numbers, values))

    short, long = (seen(epochs=epochs, arms=("labels",)).state_dict() for epochs in (3, 8))
    layers, pairs = 3, 3
    assert numbers(long) - numbers(short) == 5 * (layers + pairs)


# --- The images ---


def test_probe_images_are_spread_over_all_classes_and_draw_nothing():
    images_of_all = torch.arange(100.0).view(100, 1, 1, 1).expand(100, 1, 8, 8)
    asked = []

    def make_test_loader(world):
        asked.append(world)
        share = torch.arange(100)[world.rank :: world.size]
        torch.rand(3), random.random(), np.random.rand()
        return [(images_of_all[part], part // 10) for part in share.split(4)]

    source = DataSource("digits", tuple("0123456789"), 1, 8, 1437, 100, None, make_test_loader)
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()
    world = World(rank=1, size=2)
    found = probe_images(source, world, 10)
    assert found[:, 0, 0, 0].tolist() == list(range(0, 100, 10)), "one of each class"
    assert asked[0].rank == 0 and asked[0].device == world.device
    assert torch.equal(before[0], torch.get_rng_state()) and before[1] == random.getstate()
    assert (before[2] == np.random.get_state()[1]).all()
    assert len(probe_images(source, world, 1000)) == 100, "all there are"
    assert len(probe_images(source, world, 7)) == 7
    for images_of_an_epoch, looked_at in ((1437, 14), (50, 8), (1_281_167, 32)):
        assert len(probe_images(dataclasses.replace(source, train_images=images_of_an_epoch), world)) == looked_at


# --- The picture ---

LABELS = {"labels": "labels only", "logits": "soft logits", "spectral": "soft logits + spectral loss"}


def legend_of(figure) -> list[str]:
    (legend,) = figure.legends
    return [text.get_text() for text in legend.get_texts()]


def test_the_picture_has_depth_epochs_and_pairs_and_one_legend():
    dynamics = seen(seeds=(0, 1))
    figure = dynamics_plots.make_figure(dynamics, LABELS, title="a title")
    depth, gaps, *pairs = figure.axes
    assert [axes.get_title(loc="left") for axes in pairs] == [
        "blocks.0 – teacher blocks.0, C=16",
        "blocks.1 – teacher blocks.2, C=16",
        "blocks.2 – teacher blocks.3, C=16",
    ]
    assert legend_of(figure) == [
        "teacher",
        "student before training",
        "student after 3 epochs: labels only",
        "student after 3 epochs: soft logits",
        "student after 3 epochs: soft logits + spectral loss",
        "teacher at the width of the student's layer",
    ]
    assert all(axes.get_legend() is None for axes in figure.axes)
    assert [len(axes.lines) for axes in figure.axes] == [6, 3, 5, 5, 5]
    assert all(axes.get_xlabel() for axes in figure.axes) and depth.get_ylabel() and gaps.get_ylabel()
    teacher, before, *after, targets = depth.lines
    assert teacher.get_xdata().tolist() == pytest.approx([0, 1 / 3, 2 / 3, 1])
    assert teacher.get_ydata() == pytest.approx(dynamics.teacher_profile.layer_intensity.numpy())
    assert list(before.get_xdata()) == list(targets.get_xdata()) == [0, 0.5, 1]
    runs = {(h.arm, h.seed): h for h in dynamics.histories}
    for line, arm in zip(after, LABELS, strict=True):
        mean = (runs[arm, 0].intensities[-1] + runs[arm, 1].intensities[-1]) / 2
        assert line.get_ydata() == pytest.approx(mean.numpy())
    expected = [pooled(x, 16) for x in maps_of(vit(24, 4, seed=9), (0, 2, 3))]
    assert targets.get_ydata() == pytest.approx([x.mean() for x in intensities(expected)], rel=1e-5)
    for line, band, arm in zip(gaps.lines, gaps.collections, LABELS, strict=True):
        over = torch.stack([torch.stack(runs[arm, seed].gaps) for seed in (0, 1)]).mean(0)
        assert list(line.get_xdata()) == [0, 1, 2, 3]
        assert line.get_ydata() == pytest.approx(over.mean(1).numpy())
        heights = band.get_paths()[0].vertices[:, 1]
        assert heights.min() == pytest.approx(over.min()) and heights.max() == pytest.approx(over.max())
    target, first, *latest = pairs[1].lines
    assert target.get_ydata() == pytest.approx(intensities(expected)[1][:9], rel=1e-5)
    assert target.get_xdata()[-1] == 0.5 and len(target.get_xdata()) == 9
    assert first.get_ydata() == pytest.approx(
        ((runs["labels", 0].first.intensity[1] + runs["labels", 1].first.intensity[1]) / 2).numpy()
    )
    assert len(latest) == 3


def test_of_many_pairs_the_first_the_middle_and_the_last_are_shown():
    teacher = Dynamics(IMAGES, vit(16, 8, seed=9))
    for epoch in range(2):
        teacher.observe("spectral", 0, epoch, vit(16, 8), range(8), range(8))
    titles = [axes.get_title(loc="left") for axes in dynamics_plots.make_figure(teacher, LABELS, title="").axes]
    assert titles[1] == "Aligned layers: mean and range of 8 pairs"
    assert [title.split()[0] for title in titles[2:]] == ["blocks.0", "blocks.4", "blocks.7"]


@pytest.mark.parametrize("count", [0, 1, 2])
def test_few_pairs_and_one_arm(count):
    pairs = tuple(layers[:count] for layers in PAIRS)
    dynamics = seen(arms=("spectral",), epochs=2, pairs=pairs)
    figure = dynamics_plots.make_figure(dynamics, LABELS, title="")
    assert len(figure.axes) == (2 + count if count else 1)
    assert "student after 1 epoch: soft logits + spectral loss" in legend_of(figure)
    assert not any("labels only" in text for text in legend_of(figure))
    if count == 1:
        assert figure.axes[1].get_title(loc="left") == "Aligned layer" and not figure.axes[1].collections


def test_an_arm_keeps_its_colour_whichever_others_there_are():
    def colour(arms):
        figure = dynamics_plots.make_figure(seen(arms=arms, epochs=2), LABELS, title="")
        return {line.get_color() for line in figure.axes[1].lines[-1:]}

    assert colour(("spectral",)) == colour(("labels", "logits", "spectral")) != colour(("labels",))


def test_a_student_alone_is_drawn_over_depth():
    figure = dynamics_plots.make_figure(seen(dynamics=Dynamics(IMAGES)), LABELS, title="")
    assert len(figure.axes) == 1 and "teacher" not in legend_of(figure) and len(figure.axes[0].lines) == 4


def test_before_training_is_not_drawn_when_it_was_not_seen():
    dynamics = Dynamics(IMAGES, vit(24, 4))
    dynamics.observe("labels", 0, 2, vit(16, 3), *PAIRS)
    assert legend_of(dynamics_plots.make_figure(dynamics, LABELS, title=""))[1] == "student after 2 epochs: labels only"


def test_seeds_that_were_seen_at_different_epochs_are_averaged_where_both_were():
    dynamics, student = Dynamics(IMAGES, vit(24, 4)), vit(16, 3)
    for seed, epoch in ((0, 0), (0, 1), (1, 2)):
        dynamics.observe("labels", seed, epoch, student, *PAIRS)
    assert len(dynamics_plots.make_figure(dynamics, LABELS, title="").axes[1].lines[0].get_xdata()) == 0
    dynamics.observe("labels", 0, 2, student, *PAIRS)
    assert list(dynamics_plots.make_figure(dynamics, LABELS, title="").axes[1].lines[0].get_xdata()) == [2]


def test_intensities_far_apart_are_drawn_on_a_logarithmic_axis():
    near = dynamics_plots.make_figure(seen(arms=("labels",), epochs=2), LABELS, title="")
    dynamics, student = seen(arms=("labels",), epochs=1), vit(16, 3)
    change(student, 1e4)
    dynamics.observe("labels", 0, 1, student, *PAIRS)
    far = dynamics_plots.make_figure(dynamics, LABELS, title="")
    assert near.axes[0].get_yscale() == "linear" and near.axes[0].get_ylim()[0] == 0
    assert far.axes[0].get_yscale() == "log"


def test_nothing_seen_cannot_be_drawn():
    with pytest.raises(ValueError, match="no dynamics of labels, logits, spectral"):
        dynamics_plots.make_figure(Dynamics(IMAGES), LABELS, title="")


def test_the_picture_is_a_png_of_readable_size(tmp_path):
    from PIL import Image

    dynamics_plots.draw(tmp_path / "dynamics.png", seen(epochs=2), LABELS, title="a title")
    with Image.open(tmp_path / "dynamics.png") as image:
        assert image.format == "PNG" and 1200 <= image.width <= 2400 and 900 <= image.height <= 2000
