"""What a distillation run is told: one tree of dataclasses behind recipes, the command line's flags and config.yaml.

A None means "the default of this task" or "off"; :func:`fill_defaults` puts the number in the place of the former, so
that config.yaml holds what really ran. Nothing here imports torch, so ``skd distill --help`` is quick.
"""

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, get_args

from skd.distill.config_checks import check_combinations, check_ranges

LayerId = int | str


@dataclass(frozen=True)
class DataConfig:
    data: Path | None = None
    """Folder with train/ and val/, each with one folder (or .tar) of images per class; for other --dataset the folder
    where its files are. Without it: scikit-learn's digits."""
    dataset: str | None = None
    """digits, gratings (generated), or what timm's create_dataset takes: torch/cifar10, hfds/NAME, ...; with --data
    alone a folder of images."""
    train_split: str = "train"
    """Name of the training part of a --dataset of timm, or of the folder or tar file in --data."""
    val_split: str = "val"
    """Name of the part to test on."""
    image_size: int | None = None
    """Side of the square images in pixels. Default: the student's own size."""
    teacher_image_size: int | None = None
    """Side of the images the teacher sees, resized from the student's. Default: the same images."""
    batch_size: int = 64
    """Images per step and process."""
    workers: int = 0
    """Processes that load and augment images; 0 does it in the main one. The digits are in memory and need none."""
    crop_pct: float | None = None
    """Share of the resized test image that its centre crop keeps (256/224 is 0.875). Default: the student's own."""
    interpolation: str | None = None
    """bicubic, bilinear, random, ... Default: the student's own."""
    auto_augment: str | None = None
    """timm's RandAugment and its kin, such as rand-m9-mstd0.5-inc1; None is off."""
    color_jitter: float = 0.4
    """Strength of colour jitter; not used with --auto-augment, as in timm."""
    random_erasing: float = 0.0
    """Probability that a box of noise covers a part of a training image."""
    repeats: int = 1
    """Repeated augmentation: how often each drawn image comes, differently augmented, in one epoch of equal length."""
    mixup: float = 0.0
    """Alpha of mixup; 0 is off."""
    cutmix: float = 0.0
    """Alpha of cutmix; 0 is off."""
    mixup_prob: float = 1.0
    """Probability that a batch is mixed."""
    mixup_switch_prob: float = 0.5
    """Probability of cutmix where both are on."""
    max_bad_images: int = 100
    """Images that cannot be read are named, counted and replaced by others; the run ends at more than this many."""


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
    drop_path: float = 0.0
    """Stochastic depth of the student, 0 to below 1."""
    teacher_dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """What the teacher computes in; its weights are kept in it."""


@dataclass(frozen=True)
class LossConfig:
    alpha: float = 0.9
    """Share of the teacher's logits against the labels, 0 to 1."""
    tau: float = 1.0
    """Temperature of the soft logits."""
    weight: float = 0.2
    """Factor of the spectral loss."""
    match: Literal["complex", "mse", "magnitude", "log_magnitude"] = "complex"
    """What the spectral loss compares: complex spectra (SpectralKD), magnitudes, or maps in space as a baseline."""
    kd: Literal["soft", "hard"] = "soft"
    """Divergence from the teacher's probabilities, or cross-entropy with its top class."""
    kd_reduction: Literal["batchmean", "numel"] = "batchmean"
    """Soft logits: divide by the batch, or by batch times classes as the published code does."""
    label_smoothing: float | None = None
    """Smoothing of the labels, 0 to below 1. Default: 0 for digits and gratings, 0.1 with --data."""


@dataclass(frozen=True)
class OptimConfig:
    epochs: int | None = None
    """Epochs of each student. Default: 30 for digits and gratings, 100 with --data."""
    teacher_epochs: int | None = None
    """Epochs of a teacher trained here. Default: as many as the students'."""
    lr: float | None = None
    """Peak learning rate. Default: 0.005 for digits and gratings, else --base-lr * images per update of all processes
    / 512."""
    base_lr: float = 5e-4
    """Peak learning rate per 512 images of an update."""
    warmup_lr: float | None = None
    """Learning rate at the start of the warm-up. Default: a hundredth of the peak."""
    min_lr: float | None = None
    """Learning rate at the end. Default: a hundredth of the peak."""
    weight_decay: float = 0.05
    """Weight decay."""
    warmup_epochs: int | None = None
    """Epochs of linear warm-up before the cosine decay. Default: a tenth of the epochs, 5 at most."""
    schedule: Literal["step", "epoch", "epoch-late"] = "step"
    """When the learning rate moves: every update; every epoch; or every epoch but one late, as the published code's
    does (its second epoch runs at the first one's rate)."""
    opt: str = "adamw"
    """timm name of the optimizer."""
    accumulate: int = 1
    """Batches per update."""
    clip_grad: float | None = None
    """Largest norm of the gradient; larger ones are scaled down."""
    ema: float | None = None
    """Decay of an exponential moving average of the student, which is tested and saved too, such as 0.99996."""


@dataclass(frozen=True)
class EngineConfig:
    amp: Literal["none", "bf16", "fp16"] = "none"
    """Autocast; fp16 scales the loss so that small gradients survive."""
    compile: bool = False
    """torch.compile student and teacher."""
    channels_last: bool = False
    """NHWC memory order for images and models, which convolutions on GPUs like."""
    nproc: int | None = None
    """Start that many processes here with torchrun, one per GPU or, without GPUs, on the CPU. For several machines
    start skd distill with torchrun yourself."""
    max_bad_steps: int = 10
    """Updates whose loss or gradient is infinite or NaN are skipped and counted; the run ends at this many in a row."""
    log_interval: int = 50
    """Steps between readings of losses from the device, which is the only time the host waits for it."""


ArmName = Literal["labels", "logits", "spectral"]


@dataclass(frozen=True)
class RunConfig:
    out: Path | None = None
    """New or empty folder for the results. Default: runs/<task>-<date>-<time>."""
    arms: tuple[ArmName, ...] | None = None
    """What to train and compare: labels only; with the teacher's logits; with logits and the spectral loss. Default:
    all three, less those whose term has --alpha 0 or --weight 0."""
    seeds: int = 1
    """Students per arm, with seeds --seed, --seed + 1, ...; the table gives mean and deviation."""
    seed: int = 0
    """First seed, and the seed of a teacher trained here. The same seed gives the same numbers on the same CPU."""
    resume: str | None = None
    """auto: go on in --out if a checkpoint is there, else start; or the folder of a run to go on with."""
    checkpoint_minutes: float = 10.0
    """Minutes between checkpoints within an epoch; every epoch ends with one."""
    dry_run: bool = False
    """Check everything, measure twenty steps, say how long the run will take, and train nothing."""
    tensorboard: bool | None = None
    """Write TensorBoard events. Default: if it is installed."""
    wandb: str | None = None
    """Send the metrics to this project of Weights & Biases."""
    quick: bool = False
    """Two epochs at most, whatever --epochs and the recipe say, to see that everything works; the accuracies mean
    nothing."""
    device: str = "auto"
    """Where to compute: auto (a CUDA device if there is one), cpu, cuda, cuda:1, ..."""
    threads: int | None = None
    """CPU threads. Default: 1 for digits and gratings, whose models are too small to share out and whose numbers then
    do not depend on how many cores there are; with --data as many as PyTorch takes."""


@dataclass(frozen=True)
class DistillConfig:
    """Compare, on the same images: labels only, + a teacher's logits, + the spectral loss on its feature maps.

    Without options it trains a small vision transformer on scikit-learn's handwritten digits as the teacher, then three
    small students, in a few minutes on two CPU cores and without a download. With --data, --teacher and --student it
    does the same with your images and any timm models; --recipe deit-tiny and others bring published hyperparameters.
    An option given here wins over the recipe, which wins over the defaults; None takes a recipe's value back.
    """

    data: DataConfig = field(default_factory=DataConfig)
    models: ModelConfig = field(default_factory=ModelConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    run: RunConfig = field(default_factory=RunConfig)

    @property
    def task(self) -> str:
        """ "digits", "gratings" or "images"; naming a timm model asks for images, too."""
        if self.data.dataset in SMALL_TASKS:
            return self.data.dataset
        wants_images = self.data.data or self.data.dataset or self.models.teacher or self.models.student
        return "images" if wants_images else "digits"

    def replace(self, **sections: dict) -> "DistillConfig":
        """A copy with some fields of some sections changed: ``config.replace(optim={"epochs": 3})``."""
        changed = {name: dataclasses.replace(getattr(self, name), **fields) for name, fields in sections.items()}
        return dataclasses.replace(self, **changed)

    def to_dict(self) -> dict:
        """The tree as plain dicts, lists, strings and numbers, for YAML and JSON."""
        return _plain(dataclasses.asdict(self))


SMALL_TASKS = ("digits", "gratings")
"""Tasks that need no files and bring their own small models."""

QUICK_EPOCHS = 2


def fill_defaults(config: DistillConfig, processes: int = 1, *, needs_images: bool = True) -> DistillConfig:
    """Check the numbers and put the task's defaults where None stands; image size and layers follow with the models.

    What is filled in already stays, so a filled configuration comes back as it is.

    Args:
        config: what was asked for.
        processes: how many train together, each with ``batch_size`` images per step; the default of ``lr`` grows with
            them.
        needs_images: False lets timm models go without images, to print a recipe before there are any.

    Raises:
        DistillError: a value out of range, or options that do not go together.
    """
    check_combinations(config, processes, needs_images=needs_images)
    filled = config.replace(
        data=_data_defaults(config),
        loss={"label_smoothing": _first(config.loss.label_smoothing, _per_task(config, 0.0, 0.1))},
        optim=_optim_defaults(config, processes),
        run={
            "arms": _first(config.run.arms, _arms(config)),
            "threads": _first(config.run.threads, _per_task(config, 1, None)),
        },
    )
    check_ranges(filled)
    return filled


def _data_defaults(config: DistillConfig) -> dict:
    return {"dataset": config.task} if config.task in SMALL_TASKS else {}


def _optim_defaults(config: DistillConfig, processes: int) -> dict:
    optim, most = config.optim, QUICK_EPOCHS if config.run.quick else None
    epochs = _at_most(_first(optim.epochs, _per_task(config, 30, 100)), most)
    warmup = _at_most(_first(optim.warmup_epochs, min(5, epochs // 10)), most and epochs - 1)
    images = config.data.batch_size * processes * optim.accumulate
    lr = _first(optim.lr, _per_task(config, 5e-3, optim.base_lr * images / 512))
    return {
        "epochs": epochs,
        "teacher_epochs": _at_most(_first(optim.teacher_epochs, epochs), most),
        "warmup_epochs": warmup,
        "lr": lr,
        "warmup_lr": _first(optim.warmup_lr, lr / 100),
        "min_lr": _first(optim.min_lr, lr / 100),
    }


def _arms(config: DistillConfig) -> tuple[ArmName, ...]:
    factor = {"labels": 1, "logits": config.loss.alpha, "spectral": config.loss.weight}
    return tuple(arm for arm in get_args(ArmName) if factor[arm] != 0)


def _per_task(config: DistillConfig, small, images):
    return small if config.task in SMALL_TASKS else images


def _first(value, default):
    return default if value is None else value


def _at_most(value, most):
    return value if most is None else min(value, most)


def _plain(value):
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value
