"""Spectral distillation with the Hugging Face Trainer: one method overridden, hidden states compared.

    pip install transformers accelerate
    python examples/hugging_face_trainer.py --steps 200

Student and teacher are small ViTs made from a configuration, the images are generated, and nothing is downloaded. With
models of your own: ``ViTForImageClassification.from_pretrained(...)``.
"""

import argparse
import math
import os
import tempfile

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # before the import; without it, models come from the hub by name
import torch
import torch.nn.functional as F
from transformers import Trainer, TrainingArguments, ViTConfig, ViTForImageClassification

import skd

CLASSES, SIZE = 8, 16
PAIRS = [(0, 0), (1, 3)]  # blocks of the student and of the teacher


class SpectralTrainer(Trainer):
    """Labels, the teacher's logits and the teacher's hidden states in one loss."""

    def __init__(self, *args, teacher, **kwargs):
        super().__init__(*args, **kwargs)
        self.teacher = teacher.to(self.args.device).eval().requires_grad_(False)
        self.spectral = skd.SpectralLoss(weights=0.2)
        self.model_accepts_loss_kwargs = False  # our loss is a mean over the batch: divide it by accumulated batches

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        with torch.no_grad():
            taught = self.teacher(inputs["pixel_values"], output_hidden_states=True)
        outputs = model(**inputs, output_hidden_states=True)
        maps, teacher_maps = (
            # The first hidden state is the embedding, the first token the class token; no copy is made.
            [skd.tokens_to_map(out.hidden_states[pair[side] + 1], prefix_tokens=1) for pair in PAIRS]
            for side, out in enumerate((outputs, taught))
        )
        log_q, log_p = outputs.logits.log_softmax(1), taught.logits.log_softmax(1)
        soft = F.kl_div(log_q, log_p, reduction="batchmean", log_target=True)
        loss = 0.5 * outputs.loss + 0.5 * soft + self.spectral(maps, teacher_maps)
        return (loss, outputs) if return_outputs else loss


def gratings(count: int) -> list[dict[str, torch.Tensor]]:
    """Noisy waves whose direction is the class."""
    labels = torch.randint(CLASSES, (count,))
    angle = (labels * math.pi / CLASSES).view(-1, 1, 1)
    frequency, phase = torch.rand(count, 1, 1), torch.rand(count, 1, 1)
    x, y = torch.meshgrid(torch.linspace(0, 1, SIZE), torch.linspace(0, 1, SIZE), indexing="xy")
    waves = torch.sin(2 * math.pi * ((1.5 + 2 * frequency) * (x * angle.cos() + y * angle.sin()) + phase))
    images = (waves + 0.5 * torch.randn(waves.shape)).unsqueeze(1)
    return [{"pixel_values": image, "labels": label} for image, label in zip(images, labels, strict=True)]


def vit(width: int, depth: int) -> ViTForImageClassification:
    sizes = {"hidden_size": width, "num_hidden_layers": depth, "num_attention_heads": 2, "intermediate_size": 2 * width}
    images = {"image_size": SIZE, "patch_size": 4, "num_channels": 1, "num_labels": CLASSES}
    return ViTForImageClassification(ViTConfig(**sizes, **images))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=100, help="of the teacher, and then of the student")
    steps = parser.parse_args().steps
    torch.manual_seed(0)
    data, teacher, student = gratings(1024), vit(64, 4), vit(32, 2)
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder,
            max_steps=steps,
            per_device_train_batch_size=32,
            learning_rate=3e-3,
            logging_steps=10,
            save_strategy="no",
            report_to="none",  # no service hears of it
            disable_tqdm=True,
            dataloader_pin_memory=torch.cuda.is_available(),
        )
        Trainer(teacher, arguments, train_dataset=data).train()
        trainer = SpectralTrainer(student, arguments, train_dataset=data, teacher=teacher)
        trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    print(f"mean loss of ten steps: {float(losses[0]):.3f} at first, {float(losses[-1]):.3f} at last")


if __name__ == "__main__":
    main()
