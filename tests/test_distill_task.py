"""The distillation task: its loss against one written by hand in float64, and timm's contract."""

import copy

import pytest
import torch
from torch import nn

pytest.importorskip("timm", reason="the trainer is built on timm (extra 'train')")

from small_vits import CLASSES, batch, models, one_thread, vit  # noqa: E402, F401
from timm.models.vision_transformer import VisionTransformer  # noqa: E402
from timm.optim import create_optimizer_v2  # noqa: E402
from timm.task import TrainingTask  # noqa: E402

import skd  # noqa: E402
from skd import reference  # noqa: E402
from skd.distill.task import SpectralDistillationTask  # noqa: E402

STUDENT_LAYERS, TEACHER_LAYERS = (0, 2), (1, 3)


def make_task(student, teacher, **kwargs):
    return SpectralDistillationTask(student, teacher, STUDENT_LAYERS, TEACHER_LAYERS, **kwargs)


def logits_and_maps(model, images, layers):
    """Through timm's own way to the intermediate maps, not through FeatureTap."""
    final, maps = model.forward_intermediates(images, indices=list(layers), norm=False, output_fmt="NCHW")
    return model.forward_head(final), maps


def total_by_hand(student, teacher, images, target, alpha, tau, weight, match, kd, kd_reduction):
    logits, student_maps = logits_and_maps(student, images, STUDENT_LAYERS)
    with torch.no_grad():
        teacher_logits, teacher_maps = logits_and_maps(teacher, images, TEACHER_LAYERS)
    rows = torch.arange(len(target))
    ce = -(logits - logits.logsumexp(1, keepdim=True))[rows, target].mean()
    if kd == "hard":
        distil = -(logits - logits.logsumexp(1, keepdim=True))[rows, teacher_logits.argmax(1)].mean()
    else:
        p = torch.softmax(teacher_logits / tau, 1)
        q = torch.softmax(logits / tau, 1)
        shares = len(target) * (CLASSES if kd_reduction == "numel" else 1)
        distil = tau**2 * (p * (p / q).log()).sum() / shares
    pairs = list(zip(student_maps, teacher_maps, strict=True))
    spectral = sum(reference.spectral_align_published(s, t, match) for s, t in pairs) / len(pairs)
    return (1 - alpha) * ce + alpha * distil + weight * spectral, ce, distil, spectral


@pytest.mark.parametrize(
    ("alpha", "tau", "weight", "match", "kd", "kd_reduction"),
    [
        (0.9, 1.0, 0.2, "complex", "soft", "batchmean"),
        (0.5, 4.0, 3.0, "complex", "soft", "batchmean"),
        (0.5, 4.0, 3.0, "complex", "soft", "numel"),
        (0.3, 2.0, 0.7, "complex", "hard", "batchmean"),
        (0.9, 1.0, 0.2, "mse", "soft", "batchmean"),
        (1.0, 1.0, 50.0, "complex", "soft", "batchmean"),
        (0.0, 1.0, 0.2, "complex", "soft", "batchmean"),
    ],
)
def test_total_and_gradient_equal_the_formula(alpha, tau, weight, match, kd, kd_reduction):
    student, teacher = models()
    images, target = batch()
    twin = copy.deepcopy(student)
    options = {"alpha": alpha, "tau": tau, "weight": weight, "match": match, "kd": kd, "kd_reduction": kd_reduction}
    task = make_task(student, teacher, **options)
    result = task(images, target)
    result["loss"].backward()
    total, ce, distil, spectral = total_by_hand(twin, teacher, images, target, **options)
    total.backward()

    torch.testing.assert_close(result["loss"].double(), total, rtol=1e-9, atol=0)
    torch.testing.assert_close(result["ce_loss"], ce.detach(), rtol=1e-9, atol=0)
    torch.testing.assert_close(result["spectral_loss"].double(), spectral.detach(), rtol=1e-9, atol=0)
    if alpha > 0:
        torch.testing.assert_close(result["kd_loss"], distil.detach(), rtol=1e-9, atol=0)
    assert not any(result[part].requires_grad for part in ("ce_loss", "kd_loss", "spectral_loss"))
    assert spectral > 1e-3 and distil > 1e-3, "the terms must be large enough for the comparison to see them"
    for (name, mine), expected in zip(student.named_parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(
            mine.grad, expected.grad, rtol=1e-8, atol=1e-12, msg=lambda m, name=name: f"{name}: {m}"
        )


def test_output_is_the_plain_student():
    student, teacher = models()
    images, target = batch()
    assert torch.equal(make_task(student, teacher)(images, target)["output"], student(images))


def test_criterion_of_the_caller_is_used():
    student, teacher = models()
    images, target = batch()
    smooth = nn.CrossEntropyLoss(label_smoothing=0.3)
    result = make_task(student, teacher, criterion=smooth)(images, target)
    torch.testing.assert_close(result["ce_loss"], smooth(student(images), target).detach())
    assert not torch.isclose(result["ce_loss"], nn.functional.cross_entropy(student(images), target))


def test_kd_of_16_bit_logits_is_taken_in_float32():
    student, teacher = models(torch.bfloat16)
    images, target = batch(torch.bfloat16)
    result = make_task(student, teacher, weight=0.0)(images, target)
    log_q = torch.log_softmax(student(images).double(), 1)
    log_p = torch.log_softmax(teacher(images).double(), 1)
    expected = (log_p.exp() * (log_p - log_q)).sum() / len(target)
    assert result["kd_loss"].dtype == torch.float32
    torch.testing.assert_close(result["kd_loss"].double(), expected.detach(), rtol=1e-5, atol=0)


class ConvNet(nn.Module):
    """A teacher with batch statistics, dropout and a record of how it is called."""

    num_classes = CLASSES

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 2, stride=2)
        self.norm = nn.BatchNorm2d(8)
        self.drop = nn.Dropout(0.5)
        self.head = nn.Linear(8, CLASSES)
        self.calls = []

    def forward(self, x):
        self.calls.append((x, torch.is_grad_enabled(), torch.is_inference_mode_enabled(), self.training))
        return self.head(self.drop(self.norm(self.stem(x))).mean((2, 3)))


def convnet_task(**kwargs):
    torch.manual_seed(3)
    teacher = ConvNet()
    return SpectralDistillationTask(vit(dtype=torch.float32), teacher, [0], ["stem"], **kwargs), teacher


def test_teacher_is_frozen_in_eval_mode_and_outside_the_graph():
    task, teacher = convnet_task()
    before = copy.deepcopy(teacher.state_dict())
    images, target = batch(torch.float32)
    assert task.train() is task and task.training and task.trainable_module.training
    task(images, target)["loss"].backward()
    assert not teacher.training and not teacher.norm.training
    assert [call[1:] for call in teacher.calls] == [(False, False, False)]
    assert all(not p.requires_grad and p.grad is None for p in teacher.parameters())
    assert all(torch.equal(before[key], value) for key, value in teacher.state_dict().items())
    assert all(p.grad is not None for p in task.get_trainable_module().parameters())


def test_only_the_student_is_trainable():
    student, teacher = models()
    task = make_task(student, teacher)
    trainable = {id(p) for p in task.get_trainable_module().parameters()}
    assert trainable == {id(p) for p in student.parameters()}
    assert {id(p) for p in task.get_clip_parameters()} == trainable
    assert len(task.get_clip_parameters(exclude_head=True)) == len(trainable) - 2
    assert {id(p) for p in task.parameters() if p.requires_grad} == trainable


def test_labels_only_leaves_the_teacher_alone():
    task, teacher = convnet_task(alpha=0.0, weight=0.0)
    images, target = batch(torch.float32)
    result = task(images, target)
    assert not teacher.calls
    assert result["kd_loss"] == 0 and result["spectral_loss"] == 0
    torch.testing.assert_close(result["loss"], result["ce_loss"])


def test_logits_only_needs_no_layers_and_no_hooks():
    student, teacher = models()
    task = SpectralDistillationTask(student, teacher, [], [], weight=0.0)
    hooks = sum(len(module._forward_hooks) for model in (student, teacher) for module in model.modules())
    images, target = batch()
    result = task(images, target)
    assert hooks == 0 and result["spectral_loss"] == 0 and result["kd_loss"] > 0


def test_close_takes_the_hooks_off():
    student, teacher = models()

    def hooks():
        return sum(len(module._forward_hooks) for model in (student, teacher) for module in model.modules())

    task = make_task(student, teacher)
    assert hooks() == 4
    task.close()
    assert hooks() == 0


@pytest.mark.parametrize("differs", [True, False])
def test_images_are_renormalised_for_a_teacher_that_differs(differs):
    torch.manual_seed(3)
    student, teacher = vit(dtype=torch.float32), ConvNet()
    student.pretrained_cfg = {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)}
    mean, std = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)) if differs else ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
    teacher.pretrained_cfg = {"mean": mean, "std": std}
    task = SpectralDistillationTask(student, teacher, [0], ["stem"])
    images, target = batch(torch.float32)
    task(images, target)
    seen = teacher.calls[0][0]
    pixels = images * 0.5 + 0.5
    expected = (pixels - torch.tensor(mean).view(1, 3, 1, 1)) / torch.tensor(std).view(1, 3, 1, 1)
    torch.testing.assert_close(seen, expected, rtol=1e-5, atol=1e-5)
    assert (seen is images) is not differs
    assert not any("scale" in key or "shift" in key for key in task.state_dict())


def test_a_single_channel_takes_one_normalisation_for_three():
    student, teacher = vit(dtype=torch.float32, in_chans=1), vit(dtype=torch.float32, in_chans=1, seed=1)
    student.pretrained_cfg = {"mean": (0.5,) * 3, "std": (0.5,) * 3}
    teacher.pretrained_cfg = {"mean": (0.0,) * 3, "std": (1.0,) * 3}
    task = SpectralDistillationTask(student, teacher, [0], [0])
    assert task.teacher_images.scale.shape == (1, 1, 1, 1)
    teacher.pretrained_cfg = {"mean": (0.1, 0.2, 0.3), "std": (1.0,) * 3}
    with pytest.raises(ValueError, match=r"normalisations of 3 channels, but the student takes 1"):
        SpectralDistillationTask(student, teacher, [0], [0])


def test_weight_decay_and_layer_groups_are_the_plain_students():
    student, teacher = models()
    task = make_task(student, teacher)
    names = {name for name, _ in task.get_trainable_module().named_parameters()}
    excluded = task.get_trainable_module().no_weight_decay()
    # timm also lists tokens that this model does not have.
    assert {name.rsplit(".", 1)[-1] for name in excluded & names} == {"pos_embed", "cls_token"}

    def groups(model):
        optimizer = create_optimizer_v2(model, opt="adamw", lr=1.0, weight_decay=0.05, layer_decay=0.5)
        return {
            id(p): (group["weight_decay"], group["lr_scale"])
            for group in optimizer.param_groups
            for p in group["params"]
        }

    plain = groups(student)
    assert groups(task.get_trainable_module()) == plain
    assert len(set(plain.values())) > 3
    without_taps = SpectralDistillationTask(student, teacher, [], [], weight=0.0)
    assert groups(without_taps.get_trainable_module()) == plain


def train_steps(task, optimizer, steps=2):
    for step in range(steps):
        optimizer.zero_grad()
        task(*batch(torch.float32, seed=10 + step))["loss"].backward()
        optimizer.step()
        task.update_ema(step + 10)  # the first two steps copy the weights


def test_checkpoint_and_average_round_trip():
    student, teacher = models(torch.float32)
    task = make_task(student, teacher)
    assert isinstance(task, TrainingTask) and not task.has_ema() and task.get_eval_model(ema=True) is None
    task.setup_ema(decay=0.5)
    train_steps(task, torch.optim.AdamW(task.get_trainable_module().parameters(), lr=1e-2))
    state = {**task.get_checkpoint_state(), **task.get_checkpoint_state(ema=True)}
    assert set(state) == {"state_dict", "state_dict_ema"}
    assert list(state["state_dict"]) == list(student.state_dict()) == list(state["state_dict_ema"])
    assert not torch.equal(state["state_dict"]["head.weight"], state["state_dict_ema"]["head.weight"])

    fresh = make_task(vit(seed=7, dtype=torch.float32), vit(20, 4, seed=1, dtype=torch.float32))
    fresh.setup_ema()
    fresh.load_checkpoint_state(state["state_dict"])
    fresh.load_checkpoint_state(state["state_dict_ema"], ema=True)
    images, _ = batch(torch.float32)
    for ema in (False, True):
        mine, loaded = task.get_eval_model(ema=ema).eval(), fresh.get_eval_model(ema=ema).eval()
        assert isinstance(mine, VisionTransformer)
        assert torch.equal(mine(images), loaded(images))


def half_batch_gradients(index, rank, store):
    torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    try:
        task = make_task(*models()).prepare_distributed()
        images, target = batch()
        task(images.chunk(2)[rank], target.chunk(2)[rank])["loss"].backward()
    finally:
        torch.distributed.destroy_process_group()
    return [p.grad for p in task.get_eval_model().parameters()]


def test_two_processes_have_the_gradient_of_the_whole_batch(tmp_path):
    other = torch.multiprocessing.spawn(half_batch_gradients, args=(1, tmp_path / "store"), nprocs=1, join=False)
    gradients = half_batch_gradients(None, 0, tmp_path / "store")
    while not other.join():
        pass
    student, teacher = models()
    make_task(student, teacher)(*batch())["loss"].backward()
    for mine, expected in zip(gradients, student.parameters(), strict=True):
        torch.testing.assert_close(mine, expected.grad, rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize(
    ("kwargs", "error", "sentence"),
    [
        ({"student_layers": [0, 1]}, ValueError, r"2 student layers \[0, 1\] but 1 teacher layers \[0\]"),
        ({"student_layers": [], "teacher_layers": []}, ValueError, "no layers to align"),
        ({"student_layers": "0"}, TypeError, "student_layers is '0'"),
        ({"student_layers": [9]}, ValueError, "no layer 9"),
        ({"student_layers": ["blocks.0.nope"]}, ValueError, "no submodule 'blocks.0.nope'"),
        ({"alpha": 1.5}, ValueError, "alpha=1.5"),
        ({"alpha": float("nan")}, ValueError, "alpha=nan"),
        ({"tau": 0.0}, ValueError, "tau=0.0"),
        ({"weight": -1.0}, ValueError, "weight=-1.0"),
        ({"kd": "firm"}, ValueError, "kd='firm'"),
        ({"kd_reduction": "sum"}, ValueError, "kd_reduction='sum' is not known; use one of 'batchmean', 'numel'"),
        ({"teacher_size": 0}, ValueError, "teacher_size=0"),
        ({"teacher_size": (8,)}, TypeError, r"teacher_size is \(8,\); give the side"),
        ({"teacher_size": True}, TypeError, "teacher_size is True"),
        ({"teacher_size": 8.0}, TypeError, "teacher_size is 8.0"),
        ({"teacher_dtype": "bfloat16"}, TypeError, "teacher_dtype is 'bfloat16'"),
        ({"teacher_dtype": torch.int8}, ValueError, "teacher_dtype=torch.int8 cannot hold a model"),
        ({"match": "phase"}, ValueError, "match='phase'"),
        ({"teacher": vit(num_classes=7)}, ValueError, "the student has 5 classes and the teacher 7"),
        ({"teacher": "deit"}, TypeError, "the teacher is a str"),
        ({"student": nn.Identity()}, ValueError, "no parameters"),
    ],
)
def test_bad_arguments_get_a_sentence(kwargs, error, sentence):
    arguments = {"student": vit(), "teacher": vit(seed=1), "student_layers": [0], "teacher_layers": [0], **kwargs}
    positional = [arguments.pop(name) for name in ("student", "teacher", "student_layers", "teacher_layers")]
    with pytest.raises(error, match=sentence):
        SpectralDistillationTask(*positional, **arguments)


def test_student_and_teacher_must_not_share_parameters():
    model = vit()
    with pytest.raises(ValueError, match="share parameters"):
        make_task(model, model)
    assert all(p.requires_grad for p in model.parameters())


def test_maps_and_logits_that_do_not_go_together_get_a_sentence():
    coarse = vit(patch_size=4, seed=1)
    images, target = batch()
    with pytest.raises(ValueError, match="spatial sizes differ"):
        SpectralDistillationTask(vit(), coarse, [0], [0])(images, target)
    other = vit(seed=1, num_classes=7)
    other.num_classes = CLASSES  # what a model says of itself may be wrong
    with pytest.raises(ValueError, match=r"\[6, 5\] and the teacher \[6, 7\]"):
        SpectralDistillationTask(vit(), other, [0], [0])(images, target)


def test_a_tuple_of_logits_gets_a_sentence():
    class TwoHeads(ConvNet):
        def forward(self, x):
            logits = super().forward(x)
            return logits, logits

    images, target = batch(torch.float32)
    with pytest.raises(ValueError, match="the teacher returns a tuple"):
        SpectralDistillationTask(vit(dtype=torch.float32), TwoHeads(), [0], ["stem"])(images, target)


def test_public_name():
    assert skd.SpectralDistillationTask is SpectralDistillationTask
