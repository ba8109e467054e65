"""``skd eval``: the accuracy of a trained model, from its file."""

from pathlib import Path

import torch
from rich.console import Console
from timm.data import resolve_data_config
from torch import nn

from skd.distill import images, models
from skd.distill.config import DataConfig, DistillConfig
from skd.distill.data import DataSource
from skd.distill.distributed import World
from skd.distill.errors import DistillError
from skd.distill.eval_config import EvalConfig, check_eval
from skd.distill.prepare import find_device, prepare
from skd.distill.recipe import config_of_run
from skd.distill.summary import AVERAGE_FILE, STUDENT_FILE, TEACHER_FILE
from skd.distill.testing import TestResult, evaluate
from skd.distill.updates import autocast

_FILES = {"student": STUDENT_FILE, "ema": AVERAGE_FILE, "teacher": TEACHER_FILE}


def run(config: EvalConfig, console: Console | None = None) -> int:
    """Test a model and print its accuracy.

    Args:
        config: which model on which images.
        console: where to print; default standard output.

    Returns:
        0.

    Raises:
        DistillError: something the user can mend, in one sentence.
    """
    check_eval(config)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(config.threads or threads)
        world = World(device=find_device(config.device))
        title, source, result = _of_run(config, world) if config.run else _of_model(config, world)
    finally:
        torch.set_num_threads(threads)
    console = console or Console()
    console.print(
        f"{title}: {result.correct} of {result.images} test images of {source.name} ({result.top1:.2f}%), "
        f"cross-entropy {result.ce:.4f}",
        soft_wrap=True,
        highlight=False,
        markup=False,
    )
    if source.bad_images:
        count, shown = len(source.bad_images), ", ".join(list(source.bad_images.found)[:5])
        said = "1 image cannot be read and was" if count == 1 else f"{count} images cannot be read and were"
        console.print(f"{said} left out: {shown}", soft_wrap=True, highlight=False, markup=False)
    return 0


def _of_run(config: EvalConfig, world: World) -> tuple[str, DataSource, TestResult]:
    asked = config_of_run(config.run)
    setup = prepare(_tested(asked, config), world, for_training=False)
    amp, source = asked.engine.amp, setup.source
    if config.which != "teacher":
        student = setup.build_student()
        file = _load_from_run(student, config, role="student")
        return str(file), source, _test(student, source, amp, world)
    if setup.trains_teacher:
        teacher = setup.teacher.build().to(world.device)
        title = str(_load_from_run(teacher, config, role="teacher"))
    else:
        teacher = setup.build_teacher()
        title = str(setup.config.models.teacher_checkpoint or f"{setup.teacher.title}, timm's weights")
    with setup.teacher_images(teacher).before(teacher):
        return title, source, _test(teacher, source, amp, world)


def _load_from_run(model: nn.Module, config: EvalConfig, role: str) -> Path:
    file = config.run / _FILES[config.which]
    if not file.is_file():
        reason = "the run has no --ema" if config.which == "ema" else "is it finished?"
        raise DistillError(f"{config.run} has no {file.name}; {reason}")
    models.load_checkpoint(model, file, role=role, option="the file")
    return file


def _tested(asked: DistillConfig, config: EvalConfig) -> DistillConfig:
    """The run's configuration with the images and the speed of this test."""
    # Mixup wants even batches; nothing is mixed here.
    data = {"batch_size": config.batch_size, "mixup": 0.0, "cutmix": 0.0}
    if config.data is not None:
        if asked.task != "images":
            raise DistillError(f"the run {config.run} is on {asked.task}, which need no --data; leave it out")
        data["data"] = config.data
    if asked.task == "images":
        data["workers"] = config.workers
    return asked.replace(data=data, run={"resume": None})


def _of_model(config: EvalConfig, world: World) -> tuple[str, DataSource, TestResult]:
    cfg = models.pretrained_cfg(config.model)
    size = models.native_image_size(config.model)
    data = DataConfig(data=config.data, image_size=size, batch_size=config.batch_size, workers=config.workers)
    source = images.load_images(data, resolve_data_config(pretrained_cfg=cfg.to_dict()), world.device)
    spec = models.timm_spec(config.model, len(source.classes), size)
    if config.checkpoint is None:
        model = models.build_pretrained(spec, role="model", instead="--checkpoint FILE")
    else:
        model = spec.build()
        models.load_checkpoint(model, config.checkpoint, role="model", option="--checkpoint")
    return spec.title, source, _test(model.to(world.device), source, "none", world)


def _test(model: nn.Module, source: DataSource, amp: str, world: World) -> TestResult:
    return evaluate(model, source.make_test_loader(world), world, autocast(amp, world.device))
