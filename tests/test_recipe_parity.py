"""The task against SpectralKD's published training step, written here from its formulas without the package.

The features come from timm's ``forward_intermediates``, the spectra from ``torch.fft``; only the weights, the images
and the labels are shared. Models have the recipes' sizes and random weights.
"""

import copy
import functools
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F

timm = pytest.importorskip("timm", reason="the trainer is built on timm (extra 'train')")

from small_vits import one_thread  # noqa: E402, F401

from skd.distill.task import SpectralDistillationTask  # noqa: E402

CLASSES, SMOOTHING, ALPHA = 1000, 0.1, 0.9


@dataclass(frozen=True)
class Recipe:
    """What SpectralKD's table says of a pair of models."""

    teacher: str
    student: str
    teacher_layers: tuple
    student_layers: tuple
    weight: float


CAIT_LAYERS, DEIT_LAYERS = (0, 1, 18, 19, 20, 21, 22, 23), (0, 1, 6, 7, 8, 9, 10, 11)
DEIT_TINY = Recipe("cait_s24_224", "deit_tiny_patch16_224", CAIT_LAYERS, DEIT_LAYERS, 0.2)
DEIT_SMALL = Recipe("cait_s24_224", "deit_small_patch16_224", CAIT_LAYERS, DEIT_LAYERS, 0.2)
SWIN_STAGES = (0, 1, 2, 3)
SWIN_TINY = Recipe(
    "swin_small_patch4_window7_224", "swin_tiny_patch4_window7_224", SWIN_STAGES, SWIN_STAGES, weight=0.05
)

SOFT, HARD, SOFTER = ("soft", 1.0), ("hard", 1.0), ("soft", 3.0)
F64, F32 = torch.float64, torch.float32

# Recipe, dtype, images, cases. Two images and a temperature besides 1 once: what divides by the batch or multiplies by
# tau^2 is the same code for all pairs.
STEPS = {
    "deit-tiny-float32": (DEIT_TINY, F32, 2, (SOFT, HARD, SOFTER)),
    "deit-tiny-float64": (DEIT_TINY, F64, 1, (SOFT, HARD)),
    "deit-small-float32": (DEIT_SMALL, F32, 1, (SOFT, HARD)),
    "deit-small-float64": (DEIT_SMALL, F64, 1, (SOFT, HARD)),
    "swin-tiny-float32": (SWIN_TINY, F32, 1, (SOFT, HARD)),
    "swin-tiny-float64": (SWIN_TINY, F64, 1, (SOFT, HARD)),
}


@functools.cache
def random_model(name, image_size=224):
    """A model whose blocks, heads and biases all matter, as they do not in one that was just initialised."""
    torch.manual_seed(sum(map(ord, name)))
    size = {} if image_size == 224 else {"img_size": image_size}
    model = timm.create_model(name, num_classes=CLASSES, drop_path_rate=0.0, **size)
    with torch.no_grad():
        for key, p in model.named_parameters():
            if "gamma" in key:  # CaiT's scale of a block starts at 1e-5, where all its layers are alike
                p.normal_(0.5, 0.1)
            elif key == "head.weight":
                p.normal_(std=0.2)
            elif p.ndim == 1:
                p.add_(torch.randn_like(p), alpha=0.1)
            else:
                p.mul_(1.5)
    return model


def make_pair(recipe, dtype, image_size=224):
    models = (copy.deepcopy(random_model(name, image_size)).to(dtype) for name in (recipe.student, recipe.teacher))
    student, teacher = models
    return student.train(), teacher.eval().requires_grad_(False)


def make_batch(count, dtype, image_size=224, seed=0):
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(count, 3, image_size, image_size, generator=generator, dtype=torch.float64).to(dtype)
    return images, torch.randint(CLASSES, (count,), generator=generator)


# --- The published step ---


def published_forward(model, images, layers):
    final, maps = model.forward_intermediates(images, indices=list(layers), norm=False, output_fmt="NCHW")
    return model.forward_head(final), maps


def published_spectral(student_map, teacher_map):
    channels = student_map.shape[1]
    pooled = F.adaptive_avg_pool1d(teacher_map.flatten(2).transpose(1, 2), channels)
    pooled = pooled.transpose(1, 2).unflatten(2, teacher_map.shape[2:])
    numbers = []
    for x in (student_map, pooled):
        spectrum = torch.fft.rfft2(x, norm="ortho")
        numbers.append(torch.stack((spectrum.real, spectrum.imag)))
    return F.mse_loss(*numbers)


def published_labels(logits, labels):
    log_q = torch.log_softmax(logits, 1)
    on_label = -log_q.gather(1, labels[:, None]).squeeze(1)
    return ((1 - SMOOTHING) * on_label + SMOOTHING * -log_q.mean(1)).mean()


def published_distillation(logits, teacher_logits, kd, tau):
    if kd == "hard":
        best = teacher_logits.argmax(1)
        return -torch.log_softmax(logits, 1).gather(1, best[:, None]).mean()
    log_q, log_p = torch.log_softmax(logits / tau, 1), torch.log_softmax(teacher_logits / tau, 1)
    return (log_p.exp() * (log_p - log_q)).sum() * tau * tau / logits.numel()


def published_losses(student_output, teacher_output, labels, cases):
    """The parts of the total loss by name: labels, spectra, and the logits for each (kd, tau)."""
    (logits, maps), (teacher_logits, teacher_maps) = student_output, teacher_output
    layers = [published_spectral(s, t) for s, t in zip(maps, teacher_maps, strict=True)]
    parts = {"ce_loss": published_labels(logits, labels), "spectral_loss": sum(layers) / len(layers)}
    return parts | {case: published_distillation(logits, teacher_logits, *case) for case in cases}


# --- One step ---


def make_task(recipe, student, teacher, kd="soft", tau=1.0):
    task = SpectralDistillationTask(
        student,
        teacher,
        recipe.student_layers,
        recipe.teacher_layers,
        alpha=ALPHA,
        tau=tau,
        weight=recipe.weight,
        kd=kd,
        kd_reduction="numel",
        criterion=torch.nn.CrossEntropyLoss(label_smoothing=SMOOTHING),
    )
    return task.train()


def flat(tensors):
    return torch.cat([x.flatten() for x in tensors])


def norm(x):
    return torch.linalg.vector_norm(x, dtype=F64).item()


def distance(mine, expected):
    """Relative L2."""
    return norm(mine - expected) / norm(expected)


@pytest.mark.parametrize("step", STEPS)
def test_losses_and_gradients_are_the_published_ones(step):
    recipe, dtype, count, cases = STEPS[step]
    student, teacher = make_pair(recipe, dtype)
    images, labels = make_batch(count, dtype)
    parameters = list(student.parameters())
    with torch.no_grad():
        teacher_output = published_forward(teacher, images, recipe.teacher_layers)
    student_output = published_forward(student, images, recipe.student_layers)
    for maps in (student_output[1], teacher_output[1]):
        # Otherwise a wrong layer would go unseen.
        assert all(a.shape != b.shape or distance(a, b) > 0.03 for a, b in zip(maps, maps[1:], strict=False))
    parts = published_losses(student_output, teacher_output, labels, cases)
    gradients = {
        name: flat(torch.autograd.grad(part, parameters, retain_graph=True, materialize_grads=True))
        for name, part in parts.items()
    }
    loss_tolerance, tolerance = (1e-12, 1e-12) if dtype == F64 else (2e-6, 1e-5)

    for kd, tau in cases:
        shares = {"ce_loss": 1 - ALPHA, (kd, tau): ALPHA, "spectral_loss": recipe.weight}
        expected = torch.zeros_like(gradients["ce_loss"])
        for name, share in shares.items():
            expected.add_(gradients[name], alpha=share)
        whole = norm(expected)
        for name, share in shares.items():
            assert share * norm(gradients[name]) > 20e-5 * whole, f"{name} is too small to be seen"
        student.zero_grad()
        task = make_task(recipe, student, teacher, kd, tau)
        result = task(images, labels)
        result["loss"].backward()
        task.close()

        mine = {"ce_loss": result["ce_loss"], (kd, tau): result["kd_loss"], "spectral_loss": result["spectral_loss"]}
        for name, value in mine.items():
            torch.testing.assert_close(
                value, parts[name].detach(), rtol=loss_tolerance, atol=0, msg=lambda m, name=name: f"{name}: {m}"
            )
        total = sum(share * parts[name].detach() for name, share in shares.items())
        torch.testing.assert_close(result["loss"].detach(), total, rtol=loss_tolerance, atol=0)
        assert distance(flat([p.grad for p in parameters]), expected) < tolerance
        pieces = expected.split([p.numel() for p in parameters])
        for (name, p), piece in zip(student.named_parameters(), pieces, strict=True):
            # Each by itself too, where it is not all but zero beside the others.
            if norm(piece) > 1e-4 * whole:
                assert distance(p.grad.flatten(), piece) < 10 * tolerance, name


# --- Ten steps ---


@pytest.mark.parametrize(("dtype", "tolerance"), [(F64, 1e-11), (F32, 2e-3)], ids=["float64", "float32"])
def test_ten_optimizer_steps_are_the_published_ones(dtype, tolerance):
    """AdamW on one image a step, two in turn, of half the side: maps of 7x7, the full depth, a quarter of the time."""
    recipe, image_size = DEIT_TINY, 112
    student, teacher = make_pair(recipe, dtype, image_size)
    twin = copy.deepcopy(student)
    start = copy.deepcopy(student.state_dict())
    batches = [make_batch(1, dtype, image_size, seed) for seed in range(2)]
    with torch.no_grad():
        teacher_outputs = [published_forward(teacher, images, recipe.teacher_layers) for images, _ in batches]
    optimizer = torch.optim.AdamW(twin.parameters(), lr=5e-4, weight_decay=0.05)
    expected = []
    for step in range(10):
        images, labels = batches[step % 2]
        output = published_forward(twin, images, recipe.student_layers)
        parts = published_losses(output, teacher_outputs[step % 2], labels, [SOFT])
        total = (1 - ALPHA) * parts["ce_loss"] + ALPHA * parts[SOFT] + recipe.weight * parts["spectral_loss"]
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
        expected.append(total.detach())

    task = make_task(recipe, student, teacher)
    optimizer = torch.optim.AdamW(task.get_trainable_module().parameters(), lr=5e-4, weight_decay=0.05)
    losses = []
    for step in range(10):
        loss = task(*batches[step % 2])["loss"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())

    assert expected[-1] < 0.9 * expected[0], "the steps must change something"
    torch.testing.assert_close(torch.stack(losses), torch.stack(expected), rtol=tolerance, atol=0)
    moved = flat([p.detach() - start[name] for name, p in twin.named_parameters()])
    mine = flat([p.detach() - start[name] for name, p in student.named_parameters()])
    assert distance(mine, moved) < tolerance
