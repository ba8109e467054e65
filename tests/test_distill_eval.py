"""skd eval: what a run reported comes out again of its files."""

import csv
import json
import math
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


@pytest.mark.parametrize("teacher", ["test_efficientnet", None], ids=["frozen teacher", "trained teacher"])
def test_unreadable_images_count_nowhere(photos_run, tested, tmp_path, capsys, monkeypatch, teacher):
    """The accuracies of metrics.csv, of the reports and of skd eval are of the same images."""
    colour = next(iter(COLOURS))
    for split in ("train", "val"):
        shutil.copytree(photos_run / split, tmp_path / split)
    bad = [tmp_path / "train" / colour / "3.png", tmp_path / "val" / colour / "2.png"]
    for file in bad:
        file.write_bytes(b"not an image")
    monkeypatch.setenv("COLUMNS", "200")  # of the table
    out = tmp_path / "run"
    models = ("--teacher", teacher, "--teacher-checkpoint", photos_run / "teacher-weights.safetensors")
    train(
        out,
        *("--data", tmp_path, "--workers", 1, "--image-size", 32, "--batch-size", 12, "--student", "test_vit"),
        *(models if teacher else ("--teacher", "test_vit2", "--train-teacher", "--teacher-epochs", 1)),
        *("--arms", "labels", "logits", "--weight", 0, "--epochs", 2, "--lr", 1e-3, "--ema", 0.5),
    )
    text = capsys.readouterr().out
    summary, page = json.loads((out / "summary.json").read_text()), (out / "report.html").read_text(encoding="utf-8")
    arms = {"teacher": summary["teacher"], **summary["students"]["arms"]}
    images = 7 * len(COLOURS) - 1
    with (out / "metrics.csv").open(newline="") as file:
        rows = {row["arm"]: row for row in csv.DictReader(file)}  # the last of each
    assert list(rows) == (["labels", "logits"] if teacher else ["teacher", "labels", "logits"])
    for name, arm in arms.items():
        correct, top1 = arm["test_correct"][0], arm["test_top1_mean"]
        assert arm["test_images"] == [images] and arm["test_top1"] == [top1] == [100 * correct / images]
        if name in rows:
            row = rows[name]
            assert (int(row["test_correct"]), int(row["test_images"])) == (correct, images)
            assert float(row["test_top1"]) == top1
        shown = [f"{top1:.2f}", *(f"{average:.2f}" for average in arm["ema_top1"]), f"{correct} of {images}"]
        for place in (text, page):
            row = next(line for line in place.splitlines() if arm["label"] in line and f" of {images}" in line)
            cells = [cell.strip() for cell in re.split(r"│|<[^>]*>", row)]
            assert set(shown) <= set(cells) and next(filter(None, cells[cells.index(arm["label"]) + 1 :])) == shown[0]
    assert f"tested on {images} images" in text and summary["data"]["test_images"] == images + 1

    for which, arm in (("student", "logits"), ("teacher", "teacher"), ("ema", "logits")):
        (correct, of, top1, _), text = tested(out, "--which", which)
        wanted = arms[arm]["ema_top1"][0] if which == "ema" else arms[arm]["test_top1"][0]
        assert of == images and top1 == pytest.approx(wanted, abs=0.005) and correct == round(wanted * images / 100)
        assert f"1 image cannot be read and was left out: {bad[1]}" in text

    assert sorted(summary["bad_images"]) == list(map(str, bad))
    assert "could not be read: 2. In training the next one took the place of each; in tests they were left out" in page
    assert all(f"<td>{file}</td>" in page for file in bad)


def test_a_run_with_all_its_options(photos_run, tested):
    """Precision, accumulation, clipping, average, augmentation, mixing, loader processes, a teacher in 16 bits."""
    out = photos_run / "all"
    train(
        out,
        *("--data", photos_run, "--image-size", 32, "--batch-size", 4, "--workers", 1, "--repeats", 2),
        *("--auto-augment", "rand-m9-mstd0.5-inc1", "--random-erasing", 0.5, "--mixup", 0.8, "--cutmix", 1.0),
        *("--student", "test_vit", "--teacher", "test_vit2", "--train-teacher", "--teacher-dtype", "bfloat16"),
        *("--drop-path", 0.1, "--amp", "bf16", "--accumulate", 2, "--clip-grad", 1.0, "--ema", 0.5),
        *("--channels-last", "--schedule", "epoch-late", "--epochs", 2, "--teacher-epochs", 1, "--lr", 1e-3),
        *("--tensorboard", True, "--log-interval", 1, "--arms", "spectral"),
    )
    with (out / "metrics.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["arm"] for row in rows] == ["teacher", "spectral", "spectral"]
    assert all(float(row[name]) > 0 for row in rows[1:] for name in ("train_ce", "train_kd", "train_spectral"))
    assert all(math.isfinite(float(row["train_loss"])) and row["bad_steps"] == "0" for row in rows)
    assert list((out / "tensorboard").rglob("events.*"))
    summary = json.loads((out / "summary.json").read_text())
    costs = summary["costs"]["spectral"]
    assert costs["teacher"] > 0 and costs["optimizer"] > 0 and costs["data"] > 0
    for which in ("student", "teacher", "ema"):
        assert tested(out, "--which", which)[0][:3] == reported(out, which)


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
