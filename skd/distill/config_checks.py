"""Which configurations of a run are refused, each with a sentence that names the flags.

Only what the configuration alone tells; files, devices and models are looked at later.
"""

import dataclasses
import difflib
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from skd.distill.errors import DistillError

if TYPE_CHECKING:  # config.py imports this file
    from skd.distill.config import DistillConfig

# What names of timm's create_dataset begin with, before a slash. Those that are streams, of which a run could not go
# on, are refused with the reason where images are opened.
_DATASETS, _STREAMS = ("torch", "hfds"), ("hfids", "tfds", "wds")

_INTERPOLATIONS = ("bicubic", "bilinear", "box", "hamming", "lanczos", "nearest", "random")
_AUGMENTATIONS = ("rand", "augmix", "original", "originalr", "v0", "v0r", "3a")
_BRINGS = {"digits": "the digits are 8x8 pixels, in memory", "gratings": "the gratings are made in memory"}
# What images from files have and the small tasks do not.
_IMAGE_OPTIONS = (
    "train_split",
    "val_split",
    "image_size",
    "teacher_image_size",
    "workers",
    "crop_pct",
    "interpolation",
    "auto_augment",
    "color_jitter",
    "random_erasing",
    "repeats",
    "mixup",
    "cutmix",
)


def check_combinations(config: "DistillConfig", processes: int = 1, *, needs_images: bool = True) -> None:
    """Refuse options that do not go together.

    Args:
        config: not filled in yet.
        processes: how many train together.
        needs_images: whether timm models without images are refused.

    Raises:
        DistillError: the first such options.
    """
    _check_dataset(config)
    if config.task == "images":
        _check_images(config, needs_images)
    else:
        _check_small_task(config)
    _check_layers(config)
    _check_arms(config)
    _check_run(config, processes)


def _check_dataset(config: "DistillConfig") -> None:
    data = config.data
    if data.dataset is None:
        return
    if data.dataset in _BRINGS:
        if data.data is not None:
            raise DistillError(
                f"--dataset {data.dataset} needs no --data {data.data}; leave out one of them (--dataset None takes "
                "a recipe's back)"
            )
        return
    prefix, slash, name = data.dataset.partition("/")
    if not slash or not name or prefix.lower() not in _DATASETS + _STREAMS:
        close = difflib.get_close_matches(data.dataset, _BRINGS, n=1)
        hint = f"did you mean {close[0]}?" if close else "for a folder of images leave --dataset out and give --data"
        names = ", ".join([*_BRINGS, *(f"{known}/NAME" for known in _DATASETS)])
        raise DistillError(f"--dataset {data.dataset} is none of {names}; {hint}")
    if prefix.lower() == "torch" and data.data is None:
        raise DistillError(f"--dataset {data.dataset} needs --data DIR, the folder where its files are")


def _check_images(config: "DistillConfig", needs_images: bool) -> None:
    data, models = config.data, config.models
    has_images = data.data is not None or data.dataset is not None
    if needs_images and not has_images:
        named = "--teacher" if models.teacher else "--student"
        raise DistillError(
            f"{named} needs --data DIR with train/ and val/ in it, or --dataset NAME; without images there are only "
            "the digits and gratings, which bring their own small models"
        )
    for name, other in (("teacher", "student"), ("student", "teacher")):
        if not getattr(models, name):
            asking = f"--{other}" if not has_images else "--dataset" if data.data is None else "--data"
            raise DistillError(f"{asking} needs --{name} NAME, a timm model such as deit_tiny_patch16_224")
    if data.train_split == data.val_split:
        raise DistillError(
            f"--train-split and --val-split are both {data.train_split!r}; the test needs images that were not "
            "trained on"
        )
    if (data.mixup > 0 or data.cutmix > 0) and data.batch_size % 2:
        raise DistillError(
            f"--mixup and --cutmix mix pairs of images and need an even --batch-size, not {data.batch_size}"
        )
    if data.interpolation is not None and data.interpolation not in _INTERPOLATIONS:
        raise DistillError(f"--interpolation is {data.interpolation}, but must be one of {', '.join(_INTERPOLATIONS)}")
    if data.auto_augment is not None and data.auto_augment.split("-")[0] not in _AUGMENTATIONS:
        raise DistillError(
            f"--auto-augment is {data.auto_augment!r}, but must begin with one of {', '.join(_AUGMENTATIONS)}, such as "
            "rand-m9-mstd0.5-inc1, or be None"
        )


def _check_small_task(config: "DistillConfig") -> None:
    data, models, task = config.data, config.models, config.task
    for name in ("teacher", "student", "train_teacher"):
        if getattr(models, name):
            raise DistillError(f"{flag(name)} needs --data DIR; the {task} bring their own small models")
    defaults = {field.name: field.default for field in dataclasses.fields(data)}
    given = [flag(name) for name in _IMAGE_OPTIONS if getattr(data, name) != defaults[name]]
    if given:
        raise DistillError(
            f"options such as {' and '.join(given)} need --data DIR or another --dataset; {_BRINGS[task]} and not "
            "augmented"
        )
    if config.optim.base_lr != type(config.optim)().base_lr:
        raise DistillError(f"--base-lr needs --data DIR; the learning rate for the {task} is --lr")


def _check_layers(config: "DistillConfig") -> None:
    models = config.models
    if (models.student_layers is None) != (models.teacher_layers is None):
        raise DistillError("--student-layers and --teacher-layers go together, as pairs; give both or neither")
    if models.student_layers is None:
        return
    if models.layers is not None:
        raise DistillError("--layers and --student-layers with --teacher-layers say the same thing twice; give one")
    counts = len(models.student_layers), len(models.teacher_layers)
    if counts[0] != counts[1] or not counts[0]:
        raise DistillError(
            f"--student-layers has {counts[0]} layers and --teacher-layers {counts[1]}; they are pairs, so both need "
            "equally many and at least one"
        )


def _check_arms(config: "DistillConfig") -> None:
    arms, loss = config.run.arms, config.loss
    if arms is None:
        if loss.alpha == 0 and loss.weight == 0:
            raise DistillError("--alpha 0 with --weight 0 leaves nothing to distil; give one of them a positive value")
        return
    if not arms:
        raise DistillError("--arms is empty; give one or more of labels, logits and spectral")
    twice = sorted({arm for arm in arms if arms.count(arm) > 1})
    if twice:
        raise DistillError(f"--arms names {' and '.join(twice)} more than once; every arm is trained once per seed")
    for arm, factor in (("logits", "alpha"), ("spectral", "weight")):
        if arm in arms and getattr(loss, factor) == 0:
            raise DistillError(
                f"--arms has {arm}, which --{factor} 0 leaves without its term; give --{factor} a positive value or "
                f"leave {arm} out"
            )


def _check_run(config: "DistillConfig", processes: int) -> None:
    run = config.run
    if run.resume is not None:
        if not run.resume:
            raise DistillError("--resume is empty; give auto, or the folder of a run")
        if run.dry_run:
            raise DistillError("--dry-run trains nothing, so it cannot --resume; leave out one of them")
        if run.resume == "auto" and run.out is None:
            raise DistillError("--resume auto needs --out DIR, the folder in which it looks for a checkpoint")
        if run.resume != "auto" and run.out is not None and Path(run.resume).resolve() != run.out.resolve():
            raise DistillError(
                f"--resume {run.resume} goes on in that folder and --out {run.out} is another; leave --out out"
            )
    for name in ("wandb", "device"):
        if getattr(run, name) == "":
            raise DistillError(f"--{name} is empty; give a name or leave it out")
    if processes > 1 and run.device.startswith("cuda:"):
        raise DistillError(
            f"--device {run.device} is one device and {processes} processes need one each; give --device cuda"
        )


@dataclass(frozen=True)
class _Range:
    text: str
    holds: Callable[[float], bool]


# None of them holds for NaN or infinity.
def _at_least(low: float) -> _Range:
    return _Range(f"at least {low}", lambda x: low <= x < math.inf)


def _above(low: float) -> _Range:
    return _Range(f"above {low}", lambda x: low < x < math.inf)


def _from_to(low: float, high: float) -> _Range:
    return _Range(f"from {low} to {high}", lambda x: low <= x <= high)


def _from_to_below(low: float, high: float) -> _Range:
    return _Range(f"from {low} to below {high}", lambda x: low <= x < high)


_ABOVE_0_TO_1 = _Range("above 0 and at most 1", lambda x: 0 < x <= 1)

_RANGES = {
    "data": {
        "image_size": _at_least(1),
        "teacher_image_size": _at_least(1),
        "batch_size": _at_least(1),
        "workers": _at_least(0),
        "crop_pct": _ABOVE_0_TO_1,
        "color_jitter": _at_least(0),
        "random_erasing": _from_to(0, 1),
        "repeats": _at_least(1),
        "mixup": _at_least(0),
        "cutmix": _at_least(0),
        "mixup_prob": _from_to(0, 1),
        "mixup_switch_prob": _from_to(0, 1),
        "max_bad_images": _at_least(0),
    },
    "models": {"drop_path": _from_to_below(0, 1)},
    "loss": {
        "alpha": _from_to(0, 1),
        "tau": _above(0),
        "weight": _at_least(0),
        "label_smoothing": _from_to_below(0, 1),
    },
    "optim": {
        "epochs": _at_least(1),
        "teacher_epochs": _at_least(1),
        "accumulate": _at_least(1),
        "base_lr": _above(0),
        "lr": _above(0),
        "weight_decay": _at_least(0),
        "clip_grad": _above(0),
        "ema": _from_to_below(0, 1),
    },
    "engine": {"nproc": _at_least(1), "max_bad_steps": _at_least(1), "log_interval": _at_least(1)},
    "run": {
        "seeds": _at_least(1),
        "seed": _from_to(0, 100_000),
        "checkpoint_minutes": _above(0),
        "threads": _at_least(1),
    },
}


def check_ranges(config: "DistillConfig") -> None:
    """Refuse numbers out of their range.

    Args:
        config: filled in.

    Raises:
        DistillError: the first such number.
    """
    for section, ranges in _RANGES.items():
        for name, allowed in ranges.items():
            _require(allowed, name, getattr(getattr(config, section), name))
    optim = config.optim
    # A recipe may have set it for more epochs than were asked for.
    shorter = _from_to(0, optim.epochs - 1)
    shorter = dataclasses.replace(shorter, text=f"{shorter.text}, fewer than --epochs {optim.epochs}")
    _require(shorter, "warmup_epochs", optim.warmup_epochs)
    for name in ("warmup_lr", "min_lr"):
        rate = getattr(optim, name)
        if not 0 <= rate <= optim.lr:
            raise DistillError(
                f"{flag(name)} is {rate:g}, but must be from 0 to the peak learning rate {optim.lr:g}, which --lr sets "
                "or else --base-lr and the images per update"
            )


def _require(allowed: _Range, name: str, value: float | None) -> None:
    if value is not None and not allowed.holds(value):
        raise DistillError(f"{flag(name)} is {value}, but must be {allowed.text}")


def flag(name: str) -> str:
    """The command line's name of a field."""
    return f"--{name.replace('_', '-')}"
