"""skd eval: what a run reported comes out again of its files."""

import json
import re
import shutil

import pytest
import torch

pytest.importorskip("timm", reason="the trainer is built on timm (extra 'train')")
for name in ("sklearn", "matplotlib", "rich", "tyro", "yaml", "safetensors"):
    pytest.importorskip(name, reason="the trainer needs it (extra 'train')")

import timm  # noqa: E402
from photos import COLOURS, write_photos  # noqa: E402
from safetensors.torch import save_file  # noqa: E402

from skd import cli  # noqa: E402

QUICK = ["--threads", "1", "--tensorboard", "False"]


def train(out, *options):
    assert cli.main(["distill", "--out", str(out), *QUICK, *map(str, options)]) == 0


@pytest.fixture
def tested(capsys):
    """Runs skd eval: (images recognised, images, percent, cross-entropy), and all that it printed."""

    def run(*arguments):
        capsys.readouterr()
        threads = torch.get_num_threads()
        status = cli.main(["eval", *map(str, arguments), "--threads", "1"])
        assert status == 0, capsys.readouterr().err
        assert torch.get_num_threads() == threads
        text = capsys.readouterr().out
        found = re.search(r"(\d+) of (\d+) test images of .* \((.*)%\), cross-entropy ([\d.]+)\n", text)
        return (*map(int, found.groups()[:2]), *map(float, found.groups()[2:])), text

    return run


def refusal(capsys, *arguments):
    capsys.readouterr()
    assert cli.main(["eval", *map(str, arguments)]) == 2
    return capsys.readouterr().err


def reported(folder, entry):
    """The same four numbers, from the files of the run."""
    summary = json.loads((folder / "summary.json").read_text())
    images = summary["data"]["test_images"]
    if entry == "teacher":
        top1 = summary["teacher"]["test_top1_mean"]
    else:
        top1 = (
            summary["student_file"]["test_top1"]
            if entry == "student"
            else summary["student_file"]["average"]["test_top1"]
        )
    return round(top1 * images / 100), images, pytest.approx(top1, abs=0.005)


@pytest.fixture(scope="module")
def digits_run(tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "digits"
    train(out, "--quick", "--ema", 0.9)
    return out


@pytest.mark.parametrize("which", ["student", "ema", "teacher"])
def test_a_run_gives_the_accuracy_it_reported(digits_run, tested, which):
    found, text = tested(digits_run, "--which", which, "--batch-size", 100)
    assert found[:3] == reported(digits_run, which)
    assert f"{which if which != 'ema' else 'student-ema'}.safetensors: " in text


def test_the_models_of_a_run_are_three(digits_run, tested):
    assert len({tested(digits_run, "--which", which)[0][3] for which in ("student", "ema", "teacher")}) == 3


def test_a_run_may_have_been_moved(digits_run, tested, tmp_path):
    shutil.copytree(digits_run, tmp_path / "elsewhere")
    assert tested(tmp_path / "elsewhere")[0] == tested(digits_run)[0]


@pytest.fixture(scope="module")
def photos_run(tmp_path_factory):
    """A frozen teacher with other normalisation and image size; a size and a crop that are not the student's own."""
    root = tmp_path_factory.mktemp("photos")
    write_photos(root, train=12, val=7)
    torch.manual_seed(0)
    teacher = timm.create_model("test_efficientnet", num_classes=len(COLOURS))
    with torch.no_grad():
        teacher.get_classifier().weight *= 30  # not the same class for every image
    save_file(teacher.state_dict(), root / "teacher-weights.safetensors")
    train(
        root / "run",
        *("--data", root, "--image-size", 32, "--crop-pct", 0.8, "--teacher-image-size", 64, "--batch-size", 12),
        *("--student", "test_vit", "--teacher", "test_efficientnet", "--weight", 0, "--mixup", 0.2),
        *("--teacher-checkpoint", root / "teacher-weights.safetensors", "--epochs", 2, "--lr", 1e-3),
    )
    return root


@pytest.mark.parametrize("which", ["student", "teacher"])
def test_images_are_cropped_resized_and_normalised_as_in_the_run(photos_run, tested, which):
    # 64 images a batch: more than there are to train on.
    found, text = tested(photos_run / "run", "--which", which)
    assert found[:3] == reported(photos_run / "run", which)
    assert ("teacher-weights.safetensors: " if which == "teacher" else "student.safetensors: ") in text


def test_other_images_of_the_same_classes(photos_run, tested, tmp_path):
    write_photos(tmp_path, train=1, val=5)
    (tmp_path / "val" / next(iter(COLOURS)) / "0.png").write_bytes(b"not an image")
    found, text = tested(photos_run / "run", "--data", tmp_path, "--workers", 1)
    assert found[1] == 5 * len(COLOURS) - 1
    assert re.search(r"\n1 image cannot be read and was left out: .*0\.png", text)


def test_any_model_of_timm(photos_run, tested, capsys):
    torch.manual_seed(1)
    model = timm.create_model("test_vit", num_classes=len(COLOURS))
    file = photos_run / "any.safetensors"
    save_file(model.state_dict(), file)
    found, _ = tested("--model", "test_vit", "--checkpoint", file, "--data", photos_run)

    transform = timm.data.create_transform(**timm.data.resolve_data_config(model=model))
    dataset = timm.data.create_dataset("", str(photos_run), split="val", transform=transform)
    images, target = map(torch.stack, zip(*((image, torch.tensor(label)) for image, label in dataset), strict=True))
    with torch.no_grad():
        logits = model.eval()(images)
    assert found[:2] == ((logits.argmax(1) == target).sum(), len(dataset))
    assert found[3] == pytest.approx(torch.nn.functional.cross_entropy(logits, target).item(), abs=1e-4)

    assert "1000 classes, the data has 3" in refusal(capsys, "--model", "test_vit", "--data", photos_run)


def test_what_cannot_be_tested_gets_a_sentence(digits_run, photos_run, tmp_path, capsys):
    assert "nowhere is no folder; give the folder of a run" in refusal(capsys, tmp_path / "nowhere")
    assert "has no config.yaml; give the folder of a run" in refusal(capsys, tmp_path)
    assert "is on digits, which need no --data" in refusal(capsys, digits_run, "--data", photos_run)
    assert "has no student-ema.safetensors; the run has no --ema" in refusal(
        capsys, photos_run / "run", "--which", "ema"
    )
    shutil.copytree(digits_run, tmp_path / "run")
    (tmp_path / "run" / "student.safetensors").unlink()
    assert "has no student.safetensors; is it finished?" in refusal(capsys, tmp_path / "run")
    (tmp_path / "run" / "student.safetensors").write_bytes(b"cut")
    assert "student.safetensors cannot be read as weights" in refusal(capsys, tmp_path / "run")
