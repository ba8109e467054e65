"""From a configuration to data and models that are known to go together, before anything is trained."""

import io
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import torch
from rich.console import Console
from timm.data import resolve_data_config
from timm.loss import SoftTargetCrossEntropy
from timm.task import ClassificationTask, TrainingTask
from torch import Tensor, nn

from skd.distill import digits, gratings, images, layer_choice, models
from skd.distill.arms import Arm, make_arms
from skd.distill.config import DistillConfig, fill_defaults
from skd.distill.data import DataSource
from skd.distill.distributed import World, join, leave
from skd.distill.errors import DistillError, first_line
from skd.distill.loggers import check_loggers
from skd.distill.models import ModelSpec
from skd.distill.task import SpectralDistillationTask
from skd.distill.teacher_images import TeacherImages
from skd.distill.updates import make_optimizer

_GENERATED = {"digits": (digits, digits.load_digits), "gratings": (gratings, gratings.load_gratings)}
"""Data sets that need no files, with models of their own."""


@dataclass(frozen=True)
class Setup:
    """The data, the models and the processes of a run; ``config`` has no None left that stands for a default.

    (But for the layers of ``--layers auto``, which are known when the teacher is ready.)

    Attributes:
        unused: parameters of the student that get no gradient from the loss of some arm.
        teacher_unused: whether a teacher that is trained here has such parameters.
    """

    config: DistillConfig
    source: DataSource
    teacher: ModelSpec
    student: ModelSpec
    world: World
    unused: tuple[str, ...] = field(default=())
    teacher_unused: bool = False

    @property
    def device(self) -> torch.device:
        return self.world.device

    @property
    def trains_teacher(self) -> bool:
        chosen = self.config.models
        return chosen.train_teacher or (self.config.task != "images" and chosen.teacher_checkpoint is None)

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
        return self._student().build().to(self.device)

    def _student(self) -> ModelSpec:
        rate = self.config.models.drop_path
        return replace(self.student, kwargs={**self.student.kwargs, "drop_path_rate": rate}) if rate else self.student

    def teacher_images(self, teacher: nn.Module) -> TeacherImages:
        """What turns images for the student into images for the teacher."""
        return TeacherImages(self.student.build(), teacher, self._teacher_size).to(self.device)

    @property
    def _teacher_size(self) -> tuple[int, int] | None:
        side = self.config.data.teacher_image_size
        return None if side is None else (side, side)

    def make_criterion(self) -> nn.Module:
        if self.source.mixes:  # label smoothing is in the mixed targets
            return SoftTargetCrossEntropy()
        return nn.CrossEntropyLoss(label_smoothing=self.config.loss.label_smoothing)

    def make_task(self, student: nn.Module, teacher: nn.Module, arm: Arm) -> SpectralDistillationTask:
        loss, chosen = self.config.loss, self.config.models
        dtype = getattr(torch, chosen.teacher_dtype)
        return SpectralDistillationTask(
            student,
            teacher,
            chosen.student_layers if arm.weight > 0 else (),
            chosen.teacher_layers if arm.weight > 0 else (),
            alpha=arm.alpha,
            tau=loss.tau,
            weight=arm.weight,
            match=loss.match,
            kd=loss.kd,
            kd_reduction=loss.kd_reduction,
            criterion=self.make_criterion(),
            teacher_size=self._teacher_size,
            teacher_dtype=None if dtype == torch.float32 else dtype,
        )


def prepare(config: DistillConfig, world: World | None = None, *, for_training: bool = True) -> Setup:
    """Load the data, fill in the defaults, and try the loss on models with random weights.

    Args:
        config: what was asked for.
        world: the processes; default this one, on the device of the configuration.
        for_training: False leaves out the pairs of layers, the trial, and whether the training images fill a batch.

    Raises:
        DistillError: options out of range, data or models that do not exist or do not go together.
    """
    world = world or World(device=find_device(config.run.device))
    config = fill_defaults(config, world.size)
    setup = _prepare_images(config, world) if config.task == "images" else _prepare_generated(config, world)
    if not for_training:
        return setup
    setup.source.make_train_loader(world)  # refuses fewer images than one batch
    setup = replace(setup, config=_with_layers(setup))
    unused, teacher_unused = _try_out(setup)
    return replace(setup, unused=unused, teacher_unused=teacher_unused)


@contextmanager
def prepared(config: DistillConfig, console: Console | None = None) -> Iterator[tuple[Setup, Console]]:
    """Within it the processes of the run have met, with its data and models ready and as many threads as it wants.

    Args:
        config: what was asked for.
        console: of the main process; default standard output. The others get one that shows nothing.

    Raises:
        DistillError: as :func:`prepare`, and for a device that does not exist.
    """
    world = join(find_device(config.run.device))
    threads = torch.get_num_threads()
    try:
        setup = _prepare_together(config, world)
        torch.set_num_threads(setup.config.run.threads or threads)
        yield setup, (console or Console()) if world.is_main else Console(file=io.StringIO())
    finally:
        torch.set_num_threads(threads)
        leave(world)


def _prepare_together(config: DistillConfig, world: World) -> Setup:
    """What is wrong in any process ends all of them, and one says it."""
    setup, problem = None, None
    try:
        if world.is_main:  # the process that writes
            check_loggers(config)
        setup = prepare(config, world)
    except DistillError as error:
        problem = str(error)
    problems = [found for found in world.gathered(problem) if found is not None]
    if problems and not world.is_main:
        raise SystemExit(2)
    if problems:
        raise DistillError(problems[0])
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
            f"--device {name} cannot be used ({first_line(error)}); give auto, cpu or a CUDA device"
        ) from error
    return device


def _prepare_generated(config: DistillConfig, world: World) -> Setup:
    task, load = _GENERATED[config.task]
    source = load(config.data.batch_size, world.device)
    return Setup(config, source, task.TEACHER, task.STUDENT, world)


def _prepare_images(config: DistillConfig, world: World) -> Setup:
    chosen, data = config.models, config.data
    student_cfg = models.pretrained_cfg(chosen.student)
    image_size = data.image_size or models.native_image_size(chosen.student)
    config = config.replace(data={"image_size": image_size})
    normalisation = resolve_data_config(pretrained_cfg=student_cfg.to_dict())
    source = images.load_images(config.data, normalisation, world.device, smoothing=config.loss.label_smoothing)
    classes = len(source.classes)
    student = models.timm_spec(chosen.student, classes, image_size)
    teacher = models.timm_spec(chosen.teacher, classes, data.teacher_image_size or image_size)
    return Setup(config, source, teacher, student, world)


def _with_layers(setup: Setup) -> DistillConfig:
    """The configuration with its pairs of layers: given, from a file, or default ones; none yet for "auto"."""
    config = setup.config
    asked = config.models.layers
    if config.models.student_layers is not None or asked == layer_choice.AUTO:
        return config
    student, teacher = setup.student.build(), setup.teacher.build()
    if asked is not None:
        choice = layer_choice.layers_from_file(config, student, teacher)
        pairs = choice.student_layers, choice.teacher_layers
    elif config.task in _GENERATED:
        task, _ = _GENERATED[config.task]
        pairs = task.STUDENT_LAYERS, task.TEACHER_LAYERS
    else:
        pairs = models.default_layer_pairs(student, teacher)
    return config.replace(models={"student_layers": pairs[0], "teacher_layers": pairs[1]})


def _try_out(setup: Setup) -> tuple[tuple[str, ...], bool]:
    """A step of every training over two random images, so that what cannot work is told before hours of training.

    Returns:
        The names of the student's parameters that get no gradient in some arm, and whether the teacher has such.
    """
    size = setup.source.image_size
    inputs = torch.randn(2, setup.source.in_chans, size, size)
    target = torch.zeros(2, dtype=torch.int64)
    if setup.source.mixes:
        target = nn.functional.one_hot(target, len(setup.source.classes)).float()
    setup = replace(setup, world=World())
    try:
        student, teacher = setup.student.build(), setup.teacher.build()
        if not setup.has_layers:
            # Any of the choices that may come out is as good as another once the maps are of one size.
            layer_choice.check_auto(setup.source, student, teacher)
            setup = setup.with_layers(*models.default_layer_pairs(student, teacher))
        seen = nn.Sequential(setup.teacher_images(teacher), teacher)
        teacher_unused = ()
        if setup.trains_teacher:
            task = ClassificationTask(seen, setup.make_criterion(), verbose=False)
            teacher_unused = _unused_by(task, teacher, setup, inputs, target)
        else:  # it is tested, whether an arm uses it or not
            with torch.no_grad():
                seen(inputs)
        unused = {}
        for arm in make_arms(setup.config):
            task = setup.make_task(student, teacher, arm)
            unused.update(dict.fromkeys(_unused_by(task, student, setup, inputs, target)))
            task.close()
    except DistillError:
        raise
    except (ValueError, TypeError, RuntimeError, AssertionError) as error:
        raise DistillError(f"teacher and student do not go together: {error}") from error
    return tuple(unused), bool(teacher_unused)


def _unused_by(task: TrainingTask, model: nn.Module, setup: Setup, images: Tensor, target: Tensor) -> list[str]:
    """The parameters of the model that get no gradient in a task."""
    make_optimizer(task, setup.config.optim)
    task.eval()(images, target)["loss"].backward()
    unused = [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]
    model.zero_grad()
    return unused
