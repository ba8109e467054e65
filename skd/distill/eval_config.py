"""What ``skd eval`` is told. Nothing here imports torch, so ``skd eval --help`` is quick."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from skd.distill.config_checks import flag
from skd.distill.errors import DistillError


@dataclass(frozen=True)
class EvalConfig:
    """Test a model: the top-1 accuracy and cross-entropy over all test images.

    skd eval RUN tests what a run of skd distill saved, on the images and with the crop that run was tested on;
    skd eval --model NAME --checkpoint FILE --data DIR tests any timm model.
    """

    run: tyro.conf.Positional[Annotated[Path | None, tyro.conf.arg(metavar="[RUN]")]] = None
    """Folder of a run."""
    which: Literal["student", "ema", "teacher"] = "student"
    """Which model of RUN: student.safetensors, the moving average of its weights, or the teacher."""
    model: str | None = None
    """timm name of a model, in place of RUN."""
    checkpoint: Path | None = None
    """Weights of --model, .safetensors or .pth. Default: timm's pretrained ones."""
    data: Path | None = None
    """Folder with train/ and val/, of which val/ is tested. Default: RUN's."""
    batch_size: int = 64
    """Images per step; the accuracy does not depend on it."""
    workers: int = 0
    """Processes that load images; 0 does it in the main one."""
    device: str = "auto"
    """Where to compute: auto (a CUDA device if there is one), cpu, cuda, cuda:1, ..."""
    threads: int | None = None
    """CPU threads. Default: as many as PyTorch takes."""


def check_eval(config: EvalConfig) -> None:
    """Refuse options that do not go together and numbers out of range.

    Raises:
        DistillError: the first of them.
    """
    if config.run is None and config.model is None:
        raise DistillError("skd eval needs the folder of a run, or --model NAME with --data DIR")
    if config.run is not None:
        for name in ("model", "checkpoint"):
            if getattr(config, name) is not None:
                raise DistillError(
                    f"--{name} and the run {config.run} say twice what to test; give one (--which names a model of "
                    "the run)"
                )
    elif config.data is None:
        raise DistillError("--model needs --data DIR with val/ in it, the images to test on")
    elif config.which != "student":
        raise DistillError(f"--which {config.which} is about the folder of a run; leave it out with --model")
    for name, low in (("batch_size", 1), ("workers", 0), ("threads", 1)):
        value = getattr(config, name)
        if value is not None and value < low:
            raise DistillError(f"{flag(name)} is {value}, but must be at least {low}")
