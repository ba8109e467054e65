"""skd distill --layers: pairs of layers from a file, and from the spectra of the teacher."""

import io

import pytest
import torch

timm = pytest.importorskip("timm", reason="the trainer is built on timm (extra 'train')")
for name in ("sklearn", "matplotlib", "rich", "yaml", "safetensors"):
    pytest.importorskip(name, reason="the trainer needs it (extra 'train')")

import yaml  # noqa: E402
from rich.console import Console  # noqa: E402

from skd.analysis.layers_file import LayerChoice, read_layers, write_layers  # noqa: E402
from skd.analysis.measure import analyze  # noqa: E402
from skd.distill import digits, layer_choice  # noqa: E402
from skd.distill.config import DistillConfig, fill_defaults  # noqa: E402
from skd.distill.data import DataSource  # noqa: E402
from skd.distill.distributed import World  # noqa: E402
from skd.distill.errors import DistillError  # noqa: E402
from skd.distill.experiment import run  # noqa: E402
from skd.distill.models import ModelSpec, load_checkpoint  # noqa: E402
from skd.distill.prepare import prepare  # noqa: E402


def with_layers(layers, **run_fields):
    return DistillConfig().replace(models={"layers": str(layers)}, run={"quick": True, **run_fields})


def test_pairs_from_a_file(tmp_path):
    write_layers(tmp_path / "l.yaml", LayerChoice((0, -1), (1, "blocks.3"), "digits-student", "digits-teacher"))
    chosen = prepare(with_layers(tmp_path / "l.yaml")).config.models
    assert (chosen.student_layers, chosen.teacher_layers) == ((0, -1), (1, "blocks.3"))


def test_without_the_option_nothing_has_changed():
    chosen = prepare(DistillConfig()).config.models
    assert (chosen.student_layers, chosen.teacher_layers) == (digits.STUDENT_LAYERS, digits.TEACHER_LAYERS)
    assert chosen.layers is None


@pytest.mark.parametrize(
    ("choice", "sentence"),
    [
        (LayerChoice((0,), (4,)), "no layer 4 for teacher_layers .* has 4"),
        (LayerChoice((3,), (0,)), "no layer 3 for student_layers .* has 3"),
        (
            LayerChoice((0,), (0,), "deit_tiny_patch16_224"),
            "is for the student deit_tiny_patch16_224, and this",
        ),
        (
            LayerChoice((0,), (0,), None, "cait_s24_224"),
            'digits-teacher; .* remove the line "teacher: cait_s24',
        ),
        (LayerChoice((0,), ("block.1",)), "do not go together: .* no submodule 'block.1'"),
    ],
)
def test_files_that_do_not_fit(tmp_path, choice, sentence):
    write_layers(tmp_path / "l.yaml", choice)
    with pytest.raises(DistillError, match=sentence):
        prepare(with_layers(tmp_path / "l.yaml"))
    with pytest.raises(DistillError, match="--layers: the layers file .*none.yaml cannot be read"):
        prepare(with_layers(tmp_path / "none.yaml"))


def test_two_ways_at_once_are_refused():
    config = with_layers("auto").replace(models={"student_layers": (0,), "teacher_layers": (0,)})
    with pytest.raises(DistillError, match="say the same thing twice; give one"):
        fill_defaults(config)


def test_auto_takes_the_teacher_s_hottest_layers_and_keeps_them(tmp_path):
    console = Console(file=io.StringIO(), width=200)
    config = with_layers("auto", out=tmp_path / "run").replace(optim={"epochs": 1, "teacher_epochs": 1})
    assert run(config, console) == 0
    text = console.file.getvalue()
    choice = read_layers(tmp_path / "run" / "layers.yaml", 3, 4)
    teacher = digits.TEACHER.build()
    load_checkpoint(teacher, tmp_path / "run" / "teacher.safetensors")
    training_images = digits.load_digits(64).make_train_loader(World()).epoch(config.run.seed, 0)
    batches = [next(training_images) for _ in range(2)]
    profile = analyze(teacher, batches, norm="ortho")
    assert list(choice.teacher_layers) == profile.hottest(3)
    assert "greatest mean spectral intensity" in text and "over 128 images (training images of digits)" in text
    kept = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())["models"]
    assert kept["teacher_layers"] == list(choice.teacher_layers) and kept["layers"] == "auto"
    assert (choice.student, choice.teacher) == ("digits-student", "digits-teacher")
    # The run's file gives a second run the same layers.
    assert prepare(with_layers(tmp_path / "run" / "layers.yaml")).config.models.teacher_layers == choice.teacher_layers


def test_the_same_teacher_gives_the_same_choice_whatever_was_drawn_before():
    setup = prepare(with_layers("auto"))
    torch.manual_seed(7)
    teacher, student = setup.build_teacher(), setup.build_student()
    first = layer_choice.choose(setup.config, setup.source, student, teacher)
    torch.rand(100)
    assert layer_choice.choose(setup.config, setup.source, student, teacher) == first


def test_auto_refuses_a_teacher_with_nan():
    setup = prepare(with_layers("auto"))
    teacher = setup.build_teacher()
    with torch.no_grad():
        teacher.blocks[1].mlp.fc1.weight.fill_(float("nan"))
    with pytest.raises(DistillError, match="--layers auto: the map of layer 'blocks.1' has NaN"):
        layer_choice.choose(setup.config, setup.source, setup.build_student(), teacher)


def test_auto_refuses_pyramids_of_different_depth_before_training():
    source = DataSource("x", ("a",), 3, 64, 1, 1, list, list)
    resnet = ModelSpec("test_resnet", {}).build()
    vit = ModelSpec("test_vit", {"img_size": 64}).build()
    layer_choice.check_auto(source, resnet, resnet)
    layer_choice.check_auto(source, vit, ModelSpec("test_vit2", {"img_size": 64}).build())
    with pytest.raises(
        DistillError, match=r"differ in size .*\(student 16x16 .* and teacher 4x4\); give --layers FILE"
    ):
        layer_choice.check_auto(source, resnet, vit)
