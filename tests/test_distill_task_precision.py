"""The distillation task: what its teacher sees, dtypes, autocast, soft targets, and no waiting for the device."""

import copy
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

pytest.importorskip("timm", reason="the trainer is built on timm (extra 'train')")

from gpu_helpers import needs_gpu  # noqa: E402
from small_vits import CLASSES, batch, models, one_thread, vit  # noqa: E402, F401
from timm.loss import SoftTargetCrossEntropy  # noqa: E402

from skd import FeatureTap, spectral_loss  # noqa: E402
from skd.distill.task import SpectralDistillationTask  # noqa: E402

F32, F64, BF16, F16 = torch.float32, torch.float64, torch.bfloat16, torch.float16
LAYERS = (0, 2), (1, 3)


def images_seen(task):
    """What reaches the teacher, in a list that grows with every call."""
    seen = []
    task.teacher.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    return seen


# --- Size ---


def test_a_teacher_of_another_size_sees_resized_images():
    student, teacher = vit(dtype=F32), vit(embed_dim=20, depth=4, seed=1, dtype=F32, img_size=12, patch_size=3)
    student.pretrained_cfg = {"mean": (0.5,) * 3, "std": (0.5,) * 3}
    teacher.pretrained_cfg = {"mean": (0.1, 0.2, 0.3), "std": (1.0, 0.5, 0.25)}
    task = SpectralDistillationTask(student, teacher, *LAYERS, teacher_size=12)
    seen = images_seen(task)
    images, target = batch(F32)
    result = task(images, target)

    mean, std = torch.tensor([0.1, 0.2, 0.3]).view(3, 1, 1), torch.tensor([1.0, 0.5, 0.25]).view(3, 1, 1)
    pixels = F.interpolate(images * 0.5 + 0.5, (12, 12), mode="bicubic", antialias=True)
    torch.testing.assert_close(seen[0], (pixels - mean) / std, rtol=1e-4, atol=1e-5)
    task.close()
    with torch.no_grad():
        logits, maps = FeatureTap(teacher, list(LAYERS[1]))(seen[0])
    _, student_maps = FeatureTap(student, list(LAYERS[0]))(images)
    expected = spectral_loss(student_maps, maps)
    torch.testing.assert_close(result["spectral_loss"], expected.detach(), rtol=1e-5, atol=0)
    assert result["kd_loss"] > 0 and expected > 1e-3


@pytest.mark.parametrize("dtype", [F32, F64, BF16])
def test_sizes_are_a_side_or_height_and_width(dtype):
    student, teacher = vit(dtype=dtype), vit(seed=1, dtype=dtype, img_size=(6, 10))
    task = SpectralDistillationTask(student, teacher, [], [], weight=0.0, teacher_size=[6, 10])
    seen = images_seen(task)
    task(*batch(dtype))
    assert seen[0].shape == (6, 3, 6, 10) and seen[0].dtype == dtype
    shrunk = F.interpolate(batch(F64)[0], (6, 10), mode="bicubic", antialias=True)
    torch.testing.assert_close(seen[0].double(), shrunk, rtol=0, atol=2e-2 if dtype == BF16 else 1e-5)


def test_images_of_the_right_size_and_dtype_are_passed_on():
    student, teacher = models(F32)
    task = SpectralDistillationTask(student, teacher, *LAYERS, teacher_size=8, teacher_dtype=F32)
    seen = images_seen(task)
    images, target = batch(F32)
    task(images, target)
    assert seen[0] is images


def test_resized_images_whose_maps_differ_are_refused():
    images, target = batch(F32)
    student, teacher = vit(dtype=F32), vit(seed=1, dtype=F32, img_size=12)
    with pytest.raises(ValueError, match=r"layer 0: the spatial sizes differ, student \(6, 12, 4, 4\) and teacher"):
        SpectralDistillationTask(student, teacher, [0], [0], teacher_size=12)(images, target)


# --- Dtype of the teacher ---


@pytest.mark.parametrize("dtype", [BF16, F16])
def test_a_16_bit_teacher_computes_in_its_dtype(dtype):
    student, teacher = models(F32)
    original = copy.deepcopy(teacher)
    task = SpectralDistillationTask(student, teacher, *LAYERS, teacher_dtype=dtype)
    assert {p.dtype for p in teacher.parameters()} == {dtype}
    assert {p.dtype for p in student.parameters()} == {F32}
    seen = images_seen(task)
    images, target = batch(F32)
    result = task(images, target)
    result["loss"].backward()
    assert seen[0].dtype == dtype
    assert {result[part].dtype for part in ("loss", "ce_loss", "kd_loss", "spectral_loss")} == {F32}
    gradients = [p.grad for p in student.parameters()]
    assert all(g.dtype == F32 and torch.isfinite(g).all() for g in gradients)

    twin = copy.deepcopy(student)
    fine = SpectralDistillationTask(twin, original, *LAYERS)(images, target)
    fine["loss"].backward()
    for part in ("kd_loss", "spectral_loss"):
        torch.testing.assert_close(result[part], fine[part], rtol=3e-2, atol=0)
        assert result[part] != fine[part]
    difference = sum((g - p.grad).square().sum() for g, p in zip(gradients, twin.parameters(), strict=True))
    assert difference.sqrt() < 0.05 * sum(p.grad.square().sum() for p in twin.parameters()).sqrt()


def test_the_teacher_keeps_its_dtype_when_the_task_changes():
    student, teacher = models(F32)
    task = SpectralDistillationTask(student, teacher, *LAYERS, teacher_dtype=BF16)
    task.double()
    assert {p.dtype for p in student.parameters()} == {F64} and {p.dtype for p in teacher.parameters()} == {BF16}
    result = task(*batch(F64))
    assert result["loss"].dtype == F64
    plain = SpectralDistillationTask(*models(F32), *LAYERS)
    assert {p.dtype for p in plain.double().teacher.parameters()} == {F64}


# --- Autocast ---


def test_autocast_reaches_a_teacher_without_a_dtype_only():
    outputs = {}
    for teacher_dtype in (None, F32, F16):
        task = SpectralDistillationTask(*models(F32), *LAYERS, teacher_dtype=teacher_dtype)
        task.teacher.register_forward_hook(
            lambda module, args, output, key=teacher_dtype: outputs.update({key: output})
        )
        with torch.autocast("cpu", BF16):
            task(*batch(F32))
            assert torch.is_autocast_enabled("cpu"), "it is on again behind the teacher"
    assert {key: logits.dtype for key, (logits, _) in outputs.items()} == {None: BF16, F32: F32, F16: F16}
    teacher = models(F32)[1]
    with torch.no_grad():
        assert torch.equal(outputs[F32][0], teacher(batch(F32)[0])), "the numbers of a call without autocast"


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("match", ["complex", "magnitude"])
def test_no_loss_is_cast_down_by_autocast(backend, match, monkeypatch):
    monkeypatch.setenv("SKD_BACKEND", backend)
    task = SpectralDistillationTask(*models(F32), *LAYERS, match=match)
    captured = []
    for tapped in (task.trainable_module, task.teacher):
        tapped.register_forward_hook(lambda module, args, output: captured.append(output))
    images, target = batch(F32)
    with torch.autocast("cpu", BF16), warnings.catch_warnings():
        warnings.simplefilter("error")
        result = task(images, target)
    (logits, maps), (teacher_logits, teacher_maps) = captured
    assert logits.dtype == teacher_logits.dtype == BF16 and result["output"] is logits
    assert {result[part].dtype for part in ("loss", "ce_loss", "kd_loss", "spectral_loss")} == {F32}

    wide = [[x.detach().double() for x in group] for group in (maps, teacher_maps)]
    expected = spectral_loss(*wide, match=match, backend="reference")
    torch.testing.assert_close(result["spectral_loss"].double(), expected, rtol=1e-5, atol=0)
    log_q, log_p = (x.detach().double().log_softmax(1) for x in (logits, teacher_logits))
    torch.testing.assert_close(result["ce_loss"].double(), F.nll_loss(log_q, target), rtol=1e-5, atol=0)
    kl = (log_p.exp() * (log_p - log_q)).sum() / len(target)
    torch.testing.assert_close(result["kd_loss"].double(), kl, rtol=1e-5, atol=0)


# --- Targets ---


@pytest.mark.parametrize("dtype", [F64, F32, BF16])
@pytest.mark.parametrize("criterion", [None, SoftTargetCrossEntropy(), nn.BCEWithLogitsLoss()])
def test_soft_targets(dtype, criterion):
    """As mixup makes them: float32 [B, classes], whatever the model computes in."""
    student, teacher = models(dtype)
    images, _ = batch(dtype)
    target = torch.rand(len(images), CLASSES, generator=torch.Generator().manual_seed(4)).softmax(1)
    result = SpectralDistillationTask(student, teacher, *LAYERS, criterion=criterion)(images, target)
    result["loss"].backward()
    logits = student(images).detach().double()
    if isinstance(criterion, nn.BCEWithLogitsLoss):
        expected = (F.softplus(logits) - logits * target).mean()
    else:
        expected = -(target * logits.log_softmax(1)).sum(1).mean()
    torch.testing.assert_close(result["ce_loss"].double(), expected, rtol=1e-5, atol=0)


# --- No waiting for the device ---


class NoReading(TorchDispatchMode):
    """Fails at what makes the host read a tensor, and with it wait for the device."""

    READERS = ("_local_scalar_dense", "equal", "is_nonzero", "nonzero", "item")

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func.overloadpacket.__name__ not in self.READERS, f"{func} waits for the device"
        return func(*args, **(kwargs or {}))


def busy_task(**options):
    """A task that renormalises, resizes and casts for its teacher."""
    student, teacher = vit(dtype=F32), vit(seed=1, dtype=F32, img_size=12, patch_size=3)
    student.pretrained_cfg = {"mean": (0.5,) * 3, "std": (0.5,) * 3}
    teacher.pretrained_cfg = {"mean": (0.1, 0.2, 0.3), "std": (1.0,) * 3}
    return SpectralDistillationTask(student, teacher, [0], [0], teacher_size=12, teacher_dtype=BF16, **options)


@pytest.mark.parametrize("kd", ["soft", "hard"])
def test_a_step_reads_nothing_from_the_device(kd):
    task = busy_task(kd=kd)
    with NoReading():
        result = task(*batch(F32))
        result["loss"].backward()
    assert all(isinstance(part, torch.Tensor) for part in result.values())
    with pytest.raises(AssertionError, match="waits for the device"), NoReading():
        result["loss"].item()


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("kd", ["soft", "hard"])
def test_a_step_does_not_synchronise_with_a_gpu(kd):
    task = busy_task(kd=kd).cuda()
    images, target = (x.cuda() for x in batch(F32))
    task(images, target)["loss"].backward()  # what is set up once
    torch.cuda.set_sync_debug_mode("error")
    try:
        with torch.autocast("cuda", BF16):
            loss = task(images, target)["loss"]
        loss.backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.isfinite(loss)
