"""Spectral distillation with Lightning: skd.SpectralDistillationTask inside a LightningModule, timm models.

    pip install "skd[train]" lightning
    python examples/lightning_module.py --steps 200

Student and teacher are small vision transformers with random weights, the images are generated, and nothing is
downloaded. With models of your own: ``timm.create_model(name, pretrained=True)``.
"""

import argparse
import math

import lightning
import timm
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import skd

CLASSES, SIZE = 8, 16


class Labels(lightning.LightningModule):
    """A model that learns from labels alone."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model, self.criterion = model, nn.CrossEntropyLoss()

    def training_step(self, batch, index):
        images, labels = batch
        return self.criterion(self.model(images), labels)

    def configure_optimizers(self):
        return torch.optim.AdamW(self.model.parameters(), lr=3e-3)


class Distillation(lightning.LightningModule):
    """A student that learns from labels, the teacher's logits and the teacher's feature maps.

    A checkpoint of it holds the teacher too; ``self.task.get_checkpoint_state()`` is the plain student alone.
    """

    def __init__(self, student: nn.Module, teacher: nn.Module):
        super().__init__()
        # It freezes the teacher and keeps it in eval mode whatever mode the module is set to.
        self.task = skd.SpectralDistillationTask(student, teacher, [0, 1], [0, 3], alpha=0.5, weight=0.2)
        self.losses = []

    def training_step(self, batch, index):
        result = self.task(*batch)
        self.log_dict({name: result[name] for name in ("ce_loss", "kd_loss", "spectral_loss")})
        self.losses.append(result["loss"].detach())
        return result["loss"]

    def configure_optimizers(self):
        return torch.optim.AdamW(self.task.get_trainable_module().parameters(), lr=3e-3)


def gratings(count: int) -> TensorDataset:
    """Noisy waves whose direction is the class."""
    labels = torch.randint(CLASSES, (count,))
    angle = (labels * math.pi / CLASSES).view(-1, 1, 1)
    frequency, phase = torch.rand(count, 1, 1), torch.rand(count, 1, 1)
    x, y = torch.meshgrid(torch.linspace(0, 1, SIZE), torch.linspace(0, 1, SIZE), indexing="xy")
    waves = torch.sin(2 * math.pi * ((1.5 + 2 * frequency) * (x * angle.cos() + y * angle.sin()) + phase))
    return TensorDataset((waves + 0.5 * torch.randn(waves.shape)).unsqueeze(1), labels)


def vit(width: int, depth: int) -> nn.Module:
    sizes = {"embed_dim": width, "depth": depth, "num_heads": 2, "mlp_ratio": 2}
    images = {"img_size": SIZE, "patch_size": 4, "in_chans": 1, "num_classes": CLASSES}
    return timm.create_model("vit_tiny_patch16_224", **sizes, **images)


def fit(module: lightning.LightningModule, data: TensorDataset, steps: int) -> None:
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = lightning.Trainer(max_steps=steps, devices=1, enable_model_summary=False, **quiet)
    trainer.fit(module, DataLoader(data, batch_size=32, shuffle=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=100, help="of the teacher, and then of the student")
    steps = parser.parse_args().steps
    torch.manual_seed(0)
    data, teacher, student = gratings(1024), vit(64, 4), vit(32, 2)
    fit(Labels(teacher), data, steps)
    module = Distillation(student, teacher)
    fit(module, data, steps)
    first, last = torch.stack(module.losses[:5]).mean().item(), torch.stack(module.losses[-5:]).mean().item()
    print(f"mean loss of five steps: {first:.3f} at first, {last:.3f} at last")


if __name__ == "__main__":
    main()
