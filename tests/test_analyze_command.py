"""skd analyze: its files, what it refuses, and the way from a distillation run and back to one."""

import io
import json

import numpy as np
import pytest
import torch

timm = pytest.importorskip("timm", reason="the command is built on timm (extra 'train')")
for name in ("sklearn", "matplotlib", "rich", "tyro", "yaml", "safetensors"):
    pytest.importorskip(name, reason="the command needs it (extra 'train')")

from PIL import Image  # noqa: E402
from rich.console import Console  # noqa: E402
from safetensors.torch import save_file  # noqa: E402

from skd import cli  # noqa: E402
from skd.analysis.layers_file import read_layers  # noqa: E402
from skd.analysis.profile import SpectralProfile  # noqa: E402
from skd.distill import analyze, digits  # noqa: E402
from skd.distill.analyze_config import AnalyzeConfig  # noqa: E402
from skd.distill.analyze_data import image_batches  # noqa: E402
from skd.distill.errors import DistillError  # noqa: E402

FILES = {"profile.json", "profile.csv", "intensity-over-depth.png", "intensity-over-frequency.png"}
NORMALISATION = {
    "mean": (0.5,) * 3,
    "std": (0.5,) * 3,
    "interpolation": "bilinear",
    "crop_pct": 1.0,
    "crop_mode": "center",
}


def analyze_quietly(model, **options):
    console = Console(file=io.StringIO(), width=120)
    options = {"batches": 2, "batch_size": 3, **options}
    assert analyze.run(AnalyzeConfig(model, **options), console) == 0
    return console.file.getvalue()


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """Files of the digits' teacher and student, as a run of skd distill leaves them."""
    folder = tmp_path_factory.mktemp("runs") / "digits"
    folder.mkdir()
    torch.manual_seed(0)
    for name, spec in (("teacher", digits.TEACHER), ("student", digits.STUDENT)):
        state = {key: 1.5 * value for key, value in spec.build().state_dict().items()}
        save_file(state, folder / f"{name}.safetensors")
    return folder


def test_a_model_with_random_weights_says_so_everywhere(tmp_path):
    text = analyze_quietly("test_vit", random_init=True, image_size=32, out=tmp_path / "out")
    assert {path.name for path in (tmp_path / "out").iterdir()} == FILES
    profile = SpectralProfile.load(tmp_path / "out" / "profile.json")
    assert profile.random_weights and profile.images == 6 and profile.data == "generated gratings"
    assert profile.layers == tuple(f"blocks.{i}" for i in range(6)) and profile.entropy is not None
    assert "RANDOM WEIGHTS" in text and "blocks.5" in text and str(tmp_path / "out") in text.replace("\n", "")
    for name in ("depth", "frequency"):
        assert Image.open(tmp_path / "out" / f"intensity-over-{name}.png").size[0] > 1000


def test_batches_and_seeds(tmp_path, monkeypatch):
    monkeypatch.setattr(SpectralProfile, "plot", lambda *args, **kwargs: None)  # it is the slow part

    def profile(**options):
        out = tmp_path / str(len(list(tmp_path.iterdir())))
        analyze_quietly("digits-teacher", random_init=True, out=out, **options)
        return SpectralProfile.load(out / "profile.json").layer_intensity

    one = profile(batches=6, batch_size=1)
    torch.testing.assert_close(profile(batches=2, batch_size=3), one, rtol=1e-5, atol=0)
    assert torch.equal(profile(batches=6, batch_size=1), one)
    assert not torch.allclose(profile(seed=1), one, rtol=1e-3)


def test_before_after_and_teacher_with_a_choice_of_layers(tmp_path, weights):
    analyze_quietly("digits-student", random_init=True, data="digits", out=tmp_path / "before")
    text = analyze_quietly(
        "digits-teacher",
        checkpoint=weights / "teacher.safetensors",
        compare=("digits-student", str(tmp_path / "before" / "profile.json")),
        compare_checkpoint=weights / "student.safetensors",
        data="digits",
        pair=3,
        out=tmp_path / "out",
    )
    assert {path.name for path in (tmp_path / "out").iterdir()} == {*FILES, "compare-1.json", "layers.yaml"}
    teacher = SpectralProfile.load(tmp_path / "out" / "profile.json")
    student = SpectralProfile.load(tmp_path / "out" / "compare-1.json")
    assert teacher.weights == "digits/teacher.safetensors" and not teacher.random_weights
    assert student.weights == "digits/student.safetensors" and len(student) == 3
    choice = read_layers(tmp_path / "out" / "layers.yaml", 3, 4)
    assert choice.student == "digits-student" and choice.teacher == "digits-teacher"
    assert list(choice.teacher_layers) == teacher.hottest(3)
    assert "RANDOM WEIGHTS" in text and "rank 1 of 4" in text


def test_a_checkpoint_brings_its_own_number_of_classes(tmp_path):
    torch.manual_seed(0)
    model = timm.create_model("test_vit", num_classes=7, img_size=32)
    save_file(model.state_dict(), tmp_path / "w.safetensors")
    analyze_quietly("test_vit", checkpoint=tmp_path / "w.safetensors", image_size=32, out=tmp_path / "out")
    profile = SpectralProfile.load(tmp_path / "out" / "profile.json")
    images = torch.cat(list(image_batches("gratings", 32, 3, 2, 3, NORMALISATION)[2]))
    with torch.no_grad():
        x = model.eval().forward_intermediates(images, intermediates_only=True, norm=False)[-1]
    expected = np.abs(np.fft.fft(x.numpy(), axis=1)).mean() / x.shape[1]
    assert profile.layer_intensity[-1].item() == pytest.approx(expected, rel=1e-5)


# --- Images ---


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Ten images in two classes: every image of one value, so that it can be told which were taken."""
    root = tmp_path_factory.mktemp("images")
    for i in range(10):
        path = root / ("a" if i < 5 else "b") / f"{i}.png"
        path.parent.mkdir(exist_ok=True)
        Image.new("RGB", (20, 24), (25 * i, 25 * i, 25 * i)).save(path)
    return root


def test_a_folder_gives_images_at_equal_steps(folder):
    title, count, batches = image_batches(str(folder), 8, 3, 2, 2, NORMALISATION)
    images = list(batches)
    assert (title, count) == (folder.name, 4) and [x.shape for x in images] == [(2, 3, 8, 8)] * 2
    shown = ((torch.cat(images)[:, 0, 0, 0] * 0.5 + 0.5) * 255 / 25).round().tolist()
    assert shown == [0, 2, 5, 7]
    _, count, batches = image_batches(str(folder / "a"), 8, 1, 100, 2, NORMALISATION)
    assert count == 5 and torch.cat(list(batches)).shape == (5, 1, 8, 8), "a flat folder, fewer images than asked for"


def test_digits_are_made_to_fit(folder):
    title, count, batches = image_batches("digits", 32, 3, 2, 4, NORMALISATION)
    assert (title, count) == ("scikit-learn's digits", 8)
    images = torch.cat(list(batches))
    assert images.shape == (8, 3, 32, 32) and torch.equal(images[:, 0], images[:, 2])
    assert image_batches("digits", 8, 1, 1000, 4, NORMALISATION)[1] == 360
    assert next(image_batches("digits", 8, 1, 1, 4, NORMALISATION)[2]).shape == (4, 1, 8, 8)


def test_a_folder_of_photographs(tmp_path, folder):
    analyze_quietly("test_vit", random_init=True, image_size=32, data=str(folder), out=tmp_path / "out")
    assert SpectralProfile.load(tmp_path / "out" / "profile.json").data == folder.name


# --- Refusals ---


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"model": "test_vi"}, "timm has no model 'test_vi'; did you mean test_vit"),
        (
            {"random_init": False},
            "has no pretrained weights; .* as --checkpoint FILE, or .*--random-init",
        ),
        ({"checkpoint": "none.pth"}, "--checkpoint none.pth is no file"),
        ({"data": "nowhere"}, "--data nowhere is no folder; give gratings, digits or a folder"),
        ({"layers": (9,)}, "no layer 9: VisionTransformer has 4"),
        ({"layers": ("block.1",)}, "no submodule 'block.1'"),
        ({"batches": 0}, "--batches is 0"),
        ({"image_size": 16}, "digits-teacher takes images of 8x8 pixels"),
        ({"pair": 2}, "--pair needs --compare STUDENT"),
        ({"pair": 4, "compare": ("digits-student",)}, "--pair 4 needs as many layers of digits-student, which has 3"),
        ({"pair": 5, "compare": ("digits-teacher", "x.json")}, "x.json cannot be read"),
        ({"pair": 2, "compare": ("digits-student",), "layers": (0,)}, "leave out --layers"),
        ({"compare": ("digits-student",) * 3}, "--compare takes 2 others at most, not 3"),
        ({"compare_checkpoint": "a.pth"}, "--compare-checkpoint belongs to one model"),
        ({"compare": ("digits-student",), "compare_checkpoint": "a.pth"}, "--compare-checkpoint a.pth is no file"),
        ({"device": "warp"}, "--device warp cannot be used"),
    ],
)
def test_refusals_leave_nothing_behind(tmp_path, monkeypatch, options, sentence):
    from pathlib import Path

    monkeypatch.chdir(tmp_path)
    options = {key: Path(value) if key.endswith("checkpoint") else value for key, value in options.items()}
    with pytest.raises(DistillError, match=sentence):
        analyze_quietly(**{"model": "digits-teacher", "random_init": True, "out": tmp_path / "out", **options})
    assert not list(tmp_path.iterdir())


def test_profiles_scaled_differently_are_not_compared(tmp_path):
    analyze_quietly("digits-student", random_init=True, norm="ortho", out=tmp_path / "ortho")
    with pytest.raises(DistillError, match="analysed with --norm ortho and does not compare with --norm forward"):
        analyze_quietly("digits-teacher", random_init=True, compare=(str(tmp_path / "ortho" / "profile.json"),))


def test_a_folder_without_images(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(DistillError, match="empty has no images"):
        analyze_quietly("digits-teacher", random_init=True, data=str(tmp_path / "empty"), out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_weights_that_cannot_be_fetched_name_the_way_out(monkeypatch, tmp_path):
    def no_network(*args, **kwargs):
        raise OSError("no route to host")

    monkeypatch.setattr(timm, "create_model", no_network)
    with pytest.raises(
        DistillError, match=r"could not be fetched .*; give them as --checkpoint FILE, or look .* with --random-init"
    ):
        analyze_quietly("test_vit", out=tmp_path / "out")


def test_the_command_line(tmp_path, capsys):
    line = f"analyze digits-teacher --random-init --batches 1 --batch-size 2 --layers 0 -1 --out {tmp_path / 'out'}"
    assert cli.main(line.split()) == 0
    assert "blocks.3" in capsys.readouterr().out
    assert json.loads((tmp_path / "out" / "profile.json").read_text())["layers"] == ["blocks.0", "blocks.3"]
    assert cli.main(["analyze", "digits-teacher"]) == 2
    assert capsys.readouterr().err.startswith("skd: digits-teacher has no pretrained weights")
