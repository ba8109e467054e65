"""What a distillation run is told: one tree of dataclasses behind the command line's flags and config.yaml.

A None means "the default of this task"; :func:`fill_defaults` puts the number in its place, so that config.yaml holds
what really ran. Nothing here imports torch, so ``skd distill --help`` is quick.
"""

import dataclasses
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from skd.distill.errors import DistillError

LayerId = int | str


@dataclass(frozen=True)
class DataConfig:
    data: Path | None = None
    """Folder with train/ and val/, each with one folder of images per class. Without it: scikit-learn's digits."""
    image_size: int | None = None
    """Side of the square images in pixels. Default: the student's own size."""
    batch_size: int = 64
    """Images per step."""
    workers: int = 0
    """Processes that load and augment images; 0 does it in the main one. The digits are in memory and need none."""


@dataclass(frozen=True)
class ModelConfig:
    teacher: str | None = None
    """timm name of the teacher (with --data)."""
    student: str | None = None
    """timm name of the student (with --data)."""
    teacher_checkpoint: Path | None = None
    """Weights of the teacher, .safetensors or .pth. Default: timm's pretrained ones; the digits teacher is trained."""
    train_teacher: bool = False
    """With --data: train the teacher on the same images first, from its checkpoint if one is given."""
    student_layers: tuple[LayerId, ...] | None = None
    """Layers to align: block numbers (negative from the end) or submodule names. Default: first two and last six."""
    teacher_layers: tuple[LayerId, ...] | None = None
    """The teacher's layer for each of them."""
    layers: str | None = None
    """A layers.yaml of skd analyze --pair (or your own) in place of the two lists, or auto: look at the spectra of the
    ready teacher, take its layers of greatest intensity, and write them to the run's layers.yaml."""


@dataclass(frozen=True)
class LossConfig:
    alpha: float = 0.9
    """Share of the teacher's logits against the labels, 0 to 1."""
    tau: float = 1.0
    """Temperature of the soft logits."""
    weight: float = 0.2
    """Factor of the spectral loss."""
    match: Literal["complex", "mse"] = "complex"
    """What the spectral loss compares: complex spectra (SpectralKD), or maps in space as a baseline."""
    kd: Literal["soft", "hard"] = "soft"
    """Divergence from the teacher's probabilities, or cross-entropy with its top class."""
    label_smoothing: float | None = None
    """Smoothing of the labels, 0 to below 1. Default: 0 for the digits, 0.1 with --data."""


@dataclass(frozen=True)
class OptimConfig:
    epochs: int | None = None
    """Epochs of each student. Default: 30 for the digits, 100 with --data."""
    teacher_epochs: int | None = None
    """Epochs of a teacher trained here. Default: as many as the students'."""
    lr: float | None = None
    """Peak learning rate. Default: 0.005 for the digits, 0.0005 * batch size / 512 with --data."""
    weight_decay: float = 0.05
    """Weight decay."""
    warmup_epochs: int | None = None
    """Epochs of linear warm-up before the cosine decay. Default: a tenth of the epochs, 5 at most."""
    opt: str = "adamw"
    """timm name of the optimizer."""


@dataclass(frozen=True)
class RunConfig:
    out: Path | None = None
    """New or empty folder for the results. Default: runs/<task>-<date>-<time>."""
    seeds: int = 1
    """Students per arm, with seeds --seed, --seed + 1, ...; the table gives mean and deviation."""
    seed: int = 0
    """First seed, and the seed of a teacher trained here. The same seed gives the same numbers on the same CPU."""
    quick: bool = False
    """Two epochs only, to see that everything works; its accuracies mean nothing."""
    device: str = "auto"
    """Where to compute: auto (a CUDA device if there is one), cpu, cuda, cuda:1, ..."""
    threads: int | None = None
    """CPU threads. Default: 1 for the digits, whose models are too small to share out and whose numbers then do not
    depend on how many cores there are; with --data as many as PyTorch takes."""


@dataclass(frozen=True)
class DistillConfig:
    """Compare, on the same images: labels only, + a teacher's logits, + the spectral loss on its feature maps.

    Without options it trains a small vision transformer on scikit-learn's handwritten digits as the teacher, then three
    small students, in a few minutes on two CPU cores and without a download. With --data, --teacher and --student it
    does the same with your images and any timm models.
    """

    data: DataConfig = field(default_factory=DataConfig)
    models: ModelConfig = field(default_factory=ModelConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    run: RunConfig = field(default_factory=RunConfig)

    @property
    def task(self) -> str:
        """ "digits" or "images"."""
        return "digits" if self.data.data is None else "images"

    def replace(self, **sections: dict) -> "DistillConfig":
        """A copy with some fields of some sections changed: ``config.replace(optim={"epochs": 3})``."""
        changed = {name: dataclasses.replace(getattr(self, name), **fields) for name, fields in sections.items()}
        return dataclasses.replace(self, **changed)

    def to_dict(self) -> dict:
        """The tree as plain dicts, lists, strings and numbers, for YAML and JSON."""
        return _plain(dataclasses.asdict(self))


QUICK_EPOCHS = 2
_EPOCHS = {"digits": 30, "images": 100}


def fill_defaults(config: DistillConfig) -> DistillConfig:
    """Check the numbers and put the task's defaults where None stands; image size and layers follow with the models.

    Raises:
        DistillError: a value out of range, or options that do not go together.
    """
    _check_combinations(config)
    optim, digits = config.optim, config.task == "digits"
    epochs = optim.epochs
    if epochs is None:
        epochs = QUICK_EPOCHS if config.run.quick else _EPOCHS[config.task]
    lr = optim.lr
    if lr is None:
        lr = 5e-3 if digits else 5e-4 * config.data.batch_size / 512
    smoothing = config.loss.label_smoothing
    if smoothing is None:
        smoothing = 0.0 if digits else 0.1
    threads = config.run.threads
    if threads is None and digits:
        threads = 1
    filled = config.replace(
        optim={
            "epochs": epochs,
            "teacher_epochs": epochs if optim.teacher_epochs is None else optim.teacher_epochs,
            "lr": lr,
            "warmup_epochs": min(5, epochs // 10) if optim.warmup_epochs is None else optim.warmup_epochs,
        },
        loss={"label_smoothing": smoothing},
        run={"threads": threads},
    )
    _check_ranges(filled)
    return filled


def _check_combinations(config: DistillConfig) -> None:
    data, models = config.data, config.models
    if config.task == "digits":
        for name in ("teacher", "student", "train_teacher"):
            if getattr(models, name):
                raise DistillError(
                    f"--{name.replace('_', '-')} needs --data DIR; the digits bring their own small models"
                )
        if data.image_size is not None or data.workers:
            raise DistillError("--image-size and --workers need --data DIR; the digits are 8x8 pixels and in memory")
    else:
        for name in ("teacher", "student"):
            if not getattr(models, name):
                raise DistillError(f"--data needs --{name} NAME, a timm model such as deit_tiny_patch16_224")
    if (models.student_layers is None) != (models.teacher_layers is None):
        raise DistillError("--student-layers and --teacher-layers go together, as pairs; give both or neither")
    if models.layers is not None and models.student_layers is not None:
        raise DistillError("--layers and --student-layers with --teacher-layers say the same thing twice; give one")
    if config.loss.alpha == 0 and config.loss.weight == 0:
        raise DistillError("--alpha 0 with --weight 0 leaves nothing to distil; give one of them a positive value")


def _check_ranges(config: DistillConfig) -> None:
    data, loss, optim, run = config.data, config.loss, config.optim, config.run
    _require(data.image_size is None or data.image_size >= 1, "--image-size", data.image_size, "at least 1")
    _require(data.batch_size >= 1, "--batch-size", data.batch_size, "at least 1")
    _require(data.workers >= 0, "--workers", data.workers, "at least 0")
    _require(0 <= loss.alpha <= 1, "--alpha", loss.alpha, "from 0 to 1")
    _require(0 < loss.tau < math.inf, "--tau", loss.tau, "above 0")
    _require(0 <= loss.weight < math.inf, "--weight", loss.weight, "at least 0")
    _require(0 <= loss.label_smoothing < 1, "--label-smoothing", loss.label_smoothing, "at least 0 and below 1")
    _require(optim.epochs >= 1, "--epochs", optim.epochs, "at least 1")
    _require(optim.teacher_epochs >= 1, "--teacher-epochs", optim.teacher_epochs, "at least 1")
    _require(0 < optim.lr < math.inf, "--lr", optim.lr, "above 0")
    _require(0 <= optim.weight_decay < math.inf, "--weight-decay", optim.weight_decay, "at least 0")
    _require(
        0 <= optim.warmup_epochs < optim.epochs, "--warmup-epochs", optim.warmup_epochs, f"from 0 to {optim.epochs - 1}"
    )
    _require(run.threads is None or run.threads >= 1, "--threads", run.threads, "at least 1")
    _require(run.seeds >= 1, "--seeds", run.seeds, "at least 1")
    _require(0 <= run.seed <= 100_000, "--seed", run.seed, "from 0 to 100000")


def _require(condition: bool, flag: str, value, allowed: str) -> None:
    if not condition:
        raise DistillError(f"{flag} is {value}, but must be {allowed}")


def _plain(value):
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value
