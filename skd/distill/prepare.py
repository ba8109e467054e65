"""From a configuration to data and models that are known to go together, before anything is trained."""

from dataclasses import dataclass, replace

import torch
from timm.data import resolve_data_config
from torch import nn

from skd.distill import digits, image_folder, layer_choice, models
from skd.distill.arms import Arm, make_arms
from skd.distill.config import DistillConfig, fill_defaults
from skd.distill.data import DataSource
from skd.distill.errors import DistillError
from skd.distill.loop import make_optimizer
from skd.distill.models import ModelSpec
from skd.distill.task import SpectralDistillationTask


@dataclass(frozen=True)
class Setup:
    """The data and the models of a run; ``config`` has no None left that stands for a default.

    (But for the layers of ``--layers auto``, which are known when the teacher is ready.)
    """

    config: DistillConfig
    source: DataSource
    teacher: ModelSpec
    student: ModelSpec
    device: torch.device

    @property
    def trains_teacher(self) -> bool:
        chosen = self.config.models
        return chosen.train_teacher or (self.config.task == "digits" and chosen.teacher_checkpoint is None)

    @property
    def has_layers(self) -> bool:
        """False until ``--layers auto`` has looked at the teacher."""
        return self.config.models.student_layers is not None

    def with_layers(self, student_layers, teacher_layers) -> "Setup":
        layers = {"student_layers": tuple(student_layers), "teacher_layers": tuple(teacher_layers)}
        return replace(self, config=self.config.replace(models=layers))

    def build_teacher(self) -> nn.Module:
        """The teacher with its weights, or with random ones if it is trained here from the start."""
        checkpoint = self.config.models.teacher_checkpoint
        if checkpoint is None and not self.trains_teacher:
            teacher = models.build_pretrained(self.teacher)
        else:
            teacher = self.teacher.build()
            if checkpoint is not None:
                models.load_checkpoint(teacher, checkpoint)
        return teacher.to(self.device)

    def build_student(self) -> nn.Module:
        """The student with random weights, from the global random number generator."""
        return self.student.build().to(self.device)

    def make_criterion(self) -> nn.Module:
        return nn.CrossEntropyLoss(label_smoothing=self.config.loss.label_smoothing)

    def make_task(self, student: nn.Module, teacher: nn.Module, arm: Arm) -> SpectralDistillationTask:
        loss, chosen = self.config.loss, self.config.models
        return SpectralDistillationTask(
            student,
            teacher,
            chosen.student_layers,
            chosen.teacher_layers,
            alpha=arm.alpha,
            tau=loss.tau,
            weight=arm.weight,
            match=loss.match,
            kd=loss.kd,
            criterion=self.make_criterion(),
        )


def prepare(config: DistillConfig) -> Setup:
    """Load the data, fill in the defaults, and try the loss on models with random weights.

    Raises:
        DistillError: options out of range, data or models that do not exist or do not go together.
    """
    config = fill_defaults(config)
    device = find_device(config.run.device)
    setup = _prepare_digits(config, device) if config.task == "digits" else _prepare_images(config, device)
    _try_out(setup)
    return setup


def find_device(name: str) -> torch.device:
    """The device called ``name``; "auto" is a CUDA device if there is one.

    Raises:
        DistillError: it does not exist.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise DistillError(
            f"--device {name} cannot be used ({str(error).splitlines()[0]}); give auto, cpu or a CUDA device"
        ) from error
    return device


def _prepare_digits(config: DistillConfig, device: torch.device) -> Setup:
    default = (digits.STUDENT_LAYERS, digits.TEACHER_LAYERS)
    config = _with_layers(config, digits.STUDENT, digits.TEACHER, default)
    source = digits.load_digits(config.data.batch_size, device)
    return Setup(config, source, digits.TEACHER, digits.STUDENT, device)


def _prepare_images(config: DistillConfig, device: torch.device) -> Setup:
    chosen, data = config.models, config.data
    classes = len(image_folder.find_classes(data.data))
    image_size = data.image_size or models.native_image_size(chosen.student)
    teacher, student = (models.timm_spec(name, classes, image_size) for name in (chosen.teacher, chosen.student))
    config = config.replace(data={"image_size": image_size})
    config = _with_layers(config, student, teacher)
    normalisation = resolve_data_config(pretrained_cfg=models.pretrained_cfg(chosen.student).to_dict())
    source = image_folder.load_image_folder(data.data, image_size, data.batch_size, data.workers, normalisation, device)
    return Setup(config, source, teacher, student, device)


def _with_layers(
    config: DistillConfig, student: ModelSpec, teacher: ModelSpec, default: tuple | None = None
) -> DistillConfig:
    """The configuration with its pairs of layers: given, from a file, or default ones; none yet for "auto"."""
    asked = config.models.layers
    if config.models.student_layers is not None or asked == layer_choice.AUTO:
        return config
    if asked is not None:
        choice = layer_choice.layers_from_file(config, student.build(), teacher.build())
        pairs = choice.student_layers, choice.teacher_layers
    else:
        pairs = default or models.default_layer_pairs(student.build(), teacher.build())
    return config.replace(models={"student_layers": pairs[0], "teacher_layers": pairs[1]})


def _try_out(setup: Setup) -> None:
    """One pass over two random images and an optimizer, so that what cannot work is told before hours of training."""
    size = setup.source.image_size
    images = torch.randn(2, setup.source.in_chans, size, size)
    try:
        student, teacher = setup.student.build(), setup.teacher.build()
        if not setup.has_layers:
            # Any of the choices that may come out is as good as another once the maps are of one size.
            layer_choice.check_auto(setup.source, student, teacher)
            setup = setup.with_layers(*models.default_layer_pairs(student, teacher))
        task = setup.make_task(student, teacher, make_arms(setup.config.loss)[-1])
        with torch.no_grad():
            task.eval()(images, torch.zeros(2, dtype=torch.int64))
    except DistillError:
        raise
    except (ValueError, TypeError, RuntimeError, AssertionError) as error:
        raise DistillError(f"teacher and student do not go together: {error}") from error
    make_optimizer(task, setup.config.optim)
