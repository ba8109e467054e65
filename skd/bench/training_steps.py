"""One step of training at a time: by hand, and by the loop of skd distill."""

import copy
import dataclasses
import itertools
import signal
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import skd
from skd.features import FeatureTap

ALPHA, WEIGHT, RATE, DECAY = 0.9, 0.2, 1e-4, 0.05
"""Share of the teacher's logits, factor of the spectral loss, learning rate, weight decay."""


@dataclasses.dataclass(frozen=True)
class Inputs:
    """Models, a batch, and what the models make of it.

    Attributes:
        student, teacher: the student with its first weights, which a loop copies, and the frozen teacher.
        layers: that are aligned, the student's and the teacher's.
        images, target: [B, 3, H, W] and classes [B].
        student_logits, teacher_logits: [B, classes].
        student_maps, teacher_maps: of the aligned layers, in the models' memory order; the student's require grad.
    """

    student: nn.Module
    teacher: nn.Module
    layers: tuple[tuple[int, ...], tuple[int, ...]]
    images: Tensor
    target: Tensor
    student_logits: Tensor
    teacher_logits: Tensor
    student_maps: list[Tensor]
    teacher_maps: list[Tensor]


def logits_loss(logits: Tensor, teacher_logits: Tensor, target: Tensor) -> Tensor:
    """The loss of labels and of the teacher's logits."""
    log_student, log_teacher = F.log_softmax(logits, -1), F.log_softmax(teacher_logits, -1)
    kd = F.kl_div(log_student, log_teacher, reduction="batchmean", log_target=True)
    return (1 - ALPHA) * F.cross_entropy(logits, target) + ALPHA * kd


def bare_loop(inputs: Inputs) -> Callable[[], Tensor]:
    """A step as one writes it by hand, with nothing around it; returns its loss."""
    from timm.optim import create_optimizer_v2

    learner = copy.deepcopy(inputs.student)
    student, teacher = (FeatureTap(m, ids) for m, ids in zip((learner, inputs.teacher), inputs.layers, strict=True))
    align = skd.SpectralLoss(weights=[WEIGHT] * len(inputs.layers[0]))
    optimizer = create_optimizer_v2(learner, opt="adamw", lr=RATE, weight_decay=DECAY, fused=True)

    def step() -> Tensor:
        logits, maps = student(inputs.images)
        with torch.no_grad():
            teacher_logits, teacher_maps = teacher(inputs.images)
        loss = logits_loss(logits, teacher_logits, inputs.target) + align(maps, teacher_maps)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    return step


def engine_loop(inputs: Inputs) -> Callable[[], Tensor]:
    """A step by the trainer, which is stopped after it and goes on in the next call; returns its loss."""
    from skd.distill.config import DistillConfig
    from skd.distill.distributed import World
    from skd.distill.engine import Training
    from skd.distill.interruption import Stopped
    from skd.distill.task import SpectralDistillationTask

    rates = {"lr": RATE, "warmup_lr": RATE, "min_lr": RATE, "warmup_epochs": 0, "weight_decay": DECAY}
    config = DistillConfig().replace(optim={"epochs": 1, **rates})
    learner = copy.deepcopy(inputs.student)
    task = SpectralDistillationTask(learner, inputs.teacher, *inputs.layers, alpha=ALPHA, weight=WEIGHT)
    # A run sets the mode once per epoch; here it would be in every step, because every step is a call of the engine.
    task.train().train = lambda mode=True: task
    losses: list[Tensor] = []
    task.register_forward_hook(lambda _task, _inputs, result: losses.append(result["loss"].detach()))
    source = _one_batch(inputs.images, inputs.target)
    training = Training(task, source, config, World(), epochs=1, seed=0, label="the measurement")
    watcher = _StopAfterEveryStep()

    def step() -> Tensor:
        losses.clear()
        try:
            training.run(watcher)
        except Stopped:
            return losses[0]
        raise RuntimeError("the training ended instead of stopping after a step")

    return step


class _StopAfterEveryStep:
    """Asks a training to stop, always; it does so at the end of a step (see :class:`skd.distill.engine.Watcher`)."""

    def __init__(self):
        from skd.distill.interruption import StopRequest

        self.stop = StopRequest()
        self.stop.signum = signal.SIGTERM

    def stepped(self) -> None: ...

    def read(self, losses: dict[str, float], images_per_second: float) -> None: ...

    def epoch_ended(self, result) -> None: ...

    def save_if_due(self) -> None: ...

    def save(self) -> None: ...


class _SameBatch:
    """An epoch of one batch that does not end; see :class:`skd.distill.data.TrainLoader`."""

    def __init__(self, images: Tensor, target: Tensor):
        self._batch = images, target

    def __len__(self) -> int:
        return 10**9

    def epoch(self, seed: int, epoch: int, start: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        return itertools.repeat(self._batch, len(self) - start)


def _one_batch(images: Tensor, target: Tensor):
    from skd.distill.data import DataSource

    return DataSource(
        name="one batch",
        classes=("any",),
        in_chans=images.shape[1],
        image_size=images.shape[2],
        train_images=len(images),
        test_images=0,
        make_train_loader=lambda world: _SameBatch(images, target),
        make_test_loader=lambda world: [],
    )
