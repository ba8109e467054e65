"""Spectral distillation in a loop of your own: skd.FeatureTap gives the maps, skd.SpectralLoss compares them.

    python examples/plain_pytorch.py --steps 200

A wide convolutional network learns to tell the directions of generated gratings; a narrow one then learns from the
labels, from its logits and from its feature maps. Replace ``gratings`` by your loader and ``network`` by your models.
"""

import argparse
import math

import torch
import torch.nn.functional as F
from torch import nn

import skd

CLASSES, SIZE = 8, 16
LAYERS = ["0", "1", "2"]  # submodules by name, or the numbers of a model's blocks


def gratings(count: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Noisy waves [count, 1, SIZE, SIZE] and their directions [count], which are the classes."""
    labels = torch.randint(CLASSES, (count,), generator=generator)
    angle = (labels * math.pi / CLASSES).view(-1, 1, 1)
    frequency, phase = (torch.rand(count, 1, 1, generator=generator) for _ in range(2))
    x, y = torch.meshgrid(torch.linspace(0, 1, SIZE), torch.linspace(0, 1, SIZE), indexing="xy")
    waves = torch.sin(2 * math.pi * ((1.5 + 2 * frequency) * (x * angle.cos() + y * angle.sin()) + phase))
    return (waves + 0.5 * torch.randn(waves.shape, generator=generator)).unsqueeze(1), labels


def network(width: int) -> nn.Sequential:
    def block(channels: int, out: int, stride: int) -> nn.Sequential:
        return nn.Sequential(nn.Conv2d(channels, out, 3, stride, 1), nn.BatchNorm2d(out), nn.GELU())

    head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2 * width, CLASSES))
    return nn.Sequential(block(1, width, 1), block(width, 2 * width, 2), block(2 * width, 2 * width, 2), head)


def train_teacher(teacher: nn.Module, steps: int, generator: torch.Generator, device: str) -> None:
    optimizer = torch.optim.AdamW(teacher.parameters(), lr=5e-3)
    for _ in range(steps):
        images, labels = (x.to(device) for x in gratings(32, generator))
        optimizer.zero_grad()
        F.cross_entropy(teacher(images), labels).backward()
        optimizer.step()
    teacher.eval().requires_grad_(False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=100, help="of the teacher, and then of the student")
    steps = parser.parse_args().steps
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    teacher, student = network(32).to(device), network(8).to(device)
    train_teacher(teacher, steps, generator, device)

    teacher_tap, student_tap = skd.FeatureTap(teacher, LAYERS), skd.FeatureTap(student, LAYERS)
    spectral = skd.SpectralLoss(weights=2.0)  # the wider map is averaged over channels to the narrower
    optimizer = torch.optim.AdamW(student.parameters(), lr=5e-3)
    losses = []
    for step in range(steps):
        images, labels = (x.to(device) for x in gratings(32, generator))
        with torch.no_grad():
            teacher_logits, teacher_maps = teacher_tap(images)
        logits, maps = student_tap(images)
        soft = F.kl_div(logits.log_softmax(1), teacher_logits.log_softmax(1), reduction="batchmean", log_target=True)
        spectra = spectral(maps, teacher_maps)
        loss = 0.5 * F.cross_entropy(logits, labels) + 0.5 * soft + spectra
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())  # not .item(), which waits for the device
        if step % 10 == 0:
            print(f"step {step}: loss {loss.item():.3f}, of it spectral {spectra.item():.4f}")
    first, last = torch.stack(losses[:5]).mean().item(), torch.stack(losses[-5:]).mean().item()
    print(f"mean loss of five steps: {first:.3f} at first, {last:.3f} at last")


if __name__ == "__main__":
    main()
