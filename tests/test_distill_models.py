"""timm models by name, checkpoints that fit and that do not, and the default pairs of layers."""

import pickle

import pytest
import torch

timm = pytest.importorskip("timm", reason="the trainer is built on timm (extra 'train')")
save_file = pytest.importorskip("safetensors.torch", reason="weights are kept in it (extra 'train')").save_file

from skd.distill import models  # noqa: E402
from skd.distill.errors import DistillError  # noqa: E402
from skd.distill.models import ModelSpec, default_layer_pairs, load_checkpoint, timm_spec  # noqa: E402

SPEC = ModelSpec("test_vit", {"num_classes": 3, "img_size": 32})


def other_weights(model):
    torch.manual_seed(5)
    return {key: torch.randn_like(value) for key, value in model.state_dict().items()}


@pytest.mark.parametrize("layout", ["safetensors", "pth", "training checkpoint", "distributed"])
def test_checkpoint_is_loaded(tmp_path, layout):
    model = SPEC.build()
    state = other_weights(model)
    path = tmp_path / ("weights.safetensors" if layout == "safetensors" else "weights.pth")
    if layout == "safetensors":
        save_file(state, path)
    elif layout == "pth":
        torch.save(state, path)
    elif layout == "training checkpoint":
        torch.save({"state_dict": {key: -value for key, value in state.items()}, "state_dict_ema": state}, path)
    else:
        torch.save({"model": {f"module.{key}": value for key, value in state.items()}}, path)
    load_checkpoint(model, path)
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


def test_position_embedding_of_another_size_is_converted_as_timm_does(tmp_path):
    large = timm.create_model("test_vit", num_classes=3, img_size=64)
    state = other_weights(large)
    save_file(state, tmp_path / "large.safetensors")
    small = SPEC.build()
    load_checkpoint(small, tmp_path / "large.safetensors")
    assert small.pos_embed.shape != large.pos_embed.shape
    assert torch.equal(small.head.weight, state["head.weight"])


def saved(tmp_path, change):
    state = SPEC.build().state_dict()
    change(state)
    path = tmp_path / "weights.pth"
    torch.save(state, path)
    return path


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda state: state.pop("norm.weight"), "1 keys are missing in the file: norm.weight"),
        (lambda state: state.update(extra=torch.ones(1)), "1 keys are unknown to the model: extra"),
        (
            lambda state: state.update({"blocks.0.norm1.weight": torch.ones(5)}),
            r"have another shape: blocks.0.norm1.weight \(\[5\] in the file, \[64\] in the model\)",
        ),
        (
            lambda state: state.update({"head.weight": torch.ones(1000, 64), "head.bias": torch.ones(1000)}),
            "its classifier head.weight knows 1000 classes and the data has 3",
        ),
    ],
)
def test_checkpoint_that_does_not_fit_says_which_keys(tmp_path, change, sentence):
    model = SPEC.build()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(DistillError, match=rf"weights.pth does not fit teacher test_vit: .*{sentence}"):
        load_checkpoint(model, saved(tmp_path, change))
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_checkpoint_of_another_model_names_a_few_keys(tmp_path):
    path = tmp_path / "resnet.pth"
    torch.save(timm.create_model("test_resnet", num_classes=3).state_dict(), path)
    with pytest.raises(
        DistillError, match=r"\d+ keys are missing in the file: .*, \.\.\.; \d+ keys are unknown"
    ) as error:
        load_checkpoint(SPEC.build(), path)
    assert len(str(error.value)) < 800


class Evil:
    def __reduce__(self):
        return print, ("executed",)


def test_files_without_weights_get_a_sentence(tmp_path, capsys):
    with pytest.raises(DistillError, match="is no file"):
        load_checkpoint(SPEC.build(), tmp_path / "none.pth")
    for name, content in (
        ("a.pth", b"no weights"),
        ("a.safetensors", b"no weights"),
        ("b.pth", pickle.dumps(Evil(), protocol=2)),
    ):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(DistillError, match=f"{name} cannot be read as weights"):
            load_checkpoint(SPEC.build(), tmp_path / name)
    torch.save({"model": {"weight": Evil()}}, tmp_path / "evil.pth")
    with pytest.raises(DistillError, match="cannot be read as weights"):
        load_checkpoint(SPEC.build(), tmp_path / "evil.pth")
    torch.save([1, 2], tmp_path / "list.pth")
    with pytest.raises(DistillError, match="list.pth (holds no state_dict|cannot be read)"):
        load_checkpoint(SPEC.build(), tmp_path / "list.pth")
    assert "executed" not in capsys.readouterr().out


def test_unknown_model_names_what_comes_close():
    with pytest.raises(DistillError, match=r"no model 'deit_tiny_patch16'; did you mean .*deit_tiny_patch16_224"):
        timm_spec("deit_tiny_patch16", 3)


def test_spec_changes_the_size_only_of_models_that_fix_it():
    assert timm_spec("test_vit", 3, 32).kwargs == {"num_classes": 3, "img_size": 32}
    assert timm_spec("test_vit", 3, 160).kwargs == {"num_classes": 3}
    assert timm_spec("test_resnet", 3, 32).kwargs == {"num_classes": 3}
    assert models.native_image_size("test_vit") == 160


def test_loading_code_builds_the_model_again(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = SPEC.build()
    save_file(model.state_dict(), "student.safetensors", metadata={"format": "pt"})
    again = eval(SPEC.loading_code("student.safetensors"), {"timm": timm})
    images = torch.randn(2, 3, 32, 32)
    assert torch.equal(again.eval()(images), model.eval()(images))


def test_pretrained_weights_that_cannot_be_had_get_a_sentence(monkeypatch):
    with pytest.raises(
        DistillError, match="1000 classes, the data has 3; .* 3 classes as --teacher-.* --train-teacher"
    ):
        models.build_pretrained(timm_spec("deit_tiny_patch16_224", 3))
    with pytest.raises(DistillError) as caught:
        models.build_pretrained(timm_spec("test_vit", 3), role="model", instead="--checkpoint FILE")
    assert str(caught.value) == (
        "timm's weights for model test_vit know 1000 classes, the data has 3; give weights for 3 classes as "
        "--checkpoint FILE"
    )

    def no_network(*args, **kwargs):
        raise OSError("no route to host\nand a long story")

    monkeypatch.setattr(timm, "create_model", no_network)
    with pytest.raises(
        DistillError, match=r"could not be fetched \(OSError: no route to host\); give them as --teacher-"
    ):
        models.build_pretrained(timm_spec("deit_tiny_patch16_224", 1000))
    without = next(name for name in timm.list_models() if not timm.get_pretrained_cfg(name).has_weights)
    with pytest.raises(DistillError, match=f"no weights for teacher {without}"):
        models.build_pretrained(timm_spec(without, 1000))


@pytest.mark.parametrize(
    ("depths", "expected"),
    [
        ((12, 24), ((0, 1, 6, 7, 8, 9, 10, 11), (0, 1, 18, 19, 20, 21, 22, 23))),  # SpectralKD's own, DeiT from CaiT
        ((4, 6), ((0, 1, 2, 3), (0, 3, 4, 5))),
        ((1, 3), ((0,), (2,))),
    ],
)
def test_default_pairs_are_the_first_two_and_last_six(depths, expected):
    student, teacher = (
        timm.create_model("test_vit", depth=depth, img_size=32, embed_dim=8, num_heads=1) for depth in depths
    )
    assert default_layer_pairs(student, teacher) == expected


def test_models_without_blocks_get_a_sentence():
    with pytest.raises(ValueError, match="no list of blocks"):
        models.count_blocks(torch.nn.Linear(2, 2))
