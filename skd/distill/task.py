"""The distillation loss as a timm training task."""

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from timm.models import group_parameters
from timm.task import TrainingTask
from timm.utils import unwrap_model
from torch import Tensor, nn

from skd.features import FeatureTap
from skd.losses import SpectralLoss

KD_KINDS = ("soft", "hard")


class SpectralDistillationTask(TrainingTask):
    """Labels, the teacher's logits and the teacher's feature maps in one loss (SpectralKD, arXiv 2412.19055)::

        loss = (1 - alpha) * CE(labels) + alpha * tau^2 * KL(teacher || student) + weight * L
        loss = (1 - alpha) * CE(labels) + alpha * CE(teacher's argmax)           + weight * L     kd="hard"

    KL is taken between softmax(logits / tau) and averaged over the batch, as the temperature argument of Hinton et al.
    (arXiv 1503.02531) needs it. (The published DeiT code divides by batch times classes instead, which makes its soft
    term smaller by the number of classes.) L is :class:`skd.SpectralLoss`, the mean over the pairs of layers.

    A ``timm.task.TrainingTask``: ``trainable_module``, the student with its taps, is all that is optimised, wrapped by
    DistributedDataParallel, averaged and clipped, and ``get_eval_model()`` is the plain student. The teacher is frozen
    here (``requires_grad`` off), stays in eval mode and runs under ``torch.no_grad``; not under ``inference_mode``,
    whose tensors autograd refuses to save where the loss keeps a teacher map.

    Args:
        student: model to train, images [B, channels, H, W] -> logits [B, classes].
        teacher: model to learn from, of the same classes. Where the two models' ``pretrained_cfg`` name different
            mean and std, the images (normalised for the student) are normalised anew for the teacher.
        student_layers: layers to align, block indices or submodule names as :class:`skd.FeatureTap` takes them.
        teacher_layers: the teacher's layer for each of them; may be empty, like the other list, for weight 0.
        alpha: share of the teacher's logits against the labels, 0 to 1; 0 leaves the logits term out.
        tau: temperature of the soft logits, > 0.
        weight: factor of L, >= 0; 0 leaves it out, and no feature map is kept.
        match: what L compares, see :class:`skd.SpectralLoss`.
        kd: "soft" or "hard".
        criterion: loss of (logits, target) for the labels; default ``torch.nn.CrossEntropyLoss()``.

    Raises:
        TypeError: student or teacher is no module.
        ValueError: layer lists of different length, layers that do not exist, another number of classes, numbers out of
            range, student and teacher that share parameters; from a call: maps or logits that do not go together.
    """

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module,
        student_layers: Sequence[int | str],
        teacher_layers: Sequence[int | str],
        *,
        alpha: float = 0.9,
        tau: float = 1.0,
        weight: float = 0.2,
        match: str = "complex",
        kd: str = "soft",
        criterion: Callable[[Tensor, Tensor], Tensor] | None = None,
    ):
        _check_models(student, teacher)
        _check_numbers(alpha, tau, weight, kd)
        _check_layer_lists(student_layers, teacher_layers, weight)
        if alpha > 0:
            _check_classes(student, teacher)
        parameter = next(student.parameters())
        super().__init__(device=parameter.device, dtype=parameter.dtype, verbose=False)
        self.alpha, self.tau, self.weight, self.kd = float(alpha), float(tau), float(weight), kd
        taps = self.weight > 0
        self.trainable_module = TappedModel(student, student_layers if taps else ())
        self.teacher = TappedModel(teacher, teacher_layers if taps else ())
        self.teacher.requires_grad_(False).eval()
        self.criterion = nn.CrossEntropyLoss() if criterion is None else criterion
        # The weight is given to the loss, whose one pass then makes the gradient in its final size.
        self.spectral_loss = SpectralLoss(match, weights=[self.weight] * len(student_layers)) if taps else None
        # Decided here once: comparing mean and std in every step would make the host wait for the device.
        renormalisation = _renormalisation(student, teacher)
        self.renormalises = renormalisation is not None
        scale, shift = renormalisation or (None, None)
        self.register_buffer("teacher_scale", None if scale is None else scale.to(parameter), persistent=False)
        self.register_buffer("teacher_shift", None if shift is None else shift.to(parameter), persistent=False)

    def forward(self, images: Tensor, target: Tensor) -> dict[str, Tensor]:
        """The loss of one batch.

        Args:
            images: [B, channels, H, W], normalised for the student.
            target: class indices [B], or what the criterion takes.

        Returns:
            "loss" (scalar, to call backward on), "output" (student logits [B, classes]) and the parts, detached:
            "ce_loss", "kd_loss" (without alpha, with tau^2) and "spectral_loss" (without weight); 0 where left out.
        """
        logits, student_maps = self.trainable_module(images)
        logits = _single_output("student", logits)
        ce_loss = self.criterion(logits, target)
        loss = (1 - self.alpha) * ce_loss
        kd_loss = spectral_loss = torch.zeros((), device=loss.device)
        if self.alpha > 0 or self.weight > 0:
            with torch.no_grad():
                teacher_logits, teacher_maps = self.teacher(self._teacher_images(images))
        if self.alpha > 0:
            kd_loss = self._kd_loss(logits, _single_output("teacher", teacher_logits))
            loss = loss + self.alpha * kd_loss
        if self.weight > 0:
            weighted = self.spectral_loss(student_maps, teacher_maps)
            loss = loss + weighted
            spectral_loss = weighted.detach() / self.weight
        return {
            "loss": loss,
            "output": logits,
            "ce_loss": ce_loss.detach(),
            "kd_loss": kd_loss.detach(),
            "spectral_loss": spectral_loss,
        }

    def _teacher_images(self, images: Tensor) -> Tensor:
        if not self.renormalises:
            return images
        return images * self.teacher_scale + self.teacher_shift

    def _kd_loss(self, logits: Tensor, teacher_logits: Tensor) -> Tensor:
        if logits.shape != teacher_logits.shape:
            raise ValueError(
                f"the student returns logits {list(logits.shape)} and the teacher {list(teacher_logits.shape)}; "
                "both must know the same classes"
            )
        # 16-bit logits lose the small probabilities that soft targets are made of.
        logits, teacher_logits = _at_least_float32(logits), _at_least_float32(teacher_logits)
        if self.kd == "hard":
            return F.cross_entropy(logits, teacher_logits.argmax(dim=-1))
        log_student = F.log_softmax(logits / self.tau, dim=-1)
        log_teacher = F.log_softmax(teacher_logits / self.tau, dim=-1)
        return F.kl_div(log_student, log_teacher, reduction="batchmean", log_target=True) * self.tau**2

    def train(self, mode: bool = True) -> "SpectralDistillationTask":
        """Set the student's mode; the teacher stays in eval mode."""
        super().train(mode)
        self.teacher.eval()
        return self

    def compile(self, backend: str = "inductor", mode: str | None = None, **compile_kwargs) -> nn.Module:
        """Compile student and teacher, before ``prepare_distributed``; returns the compiled student for evaluation."""
        options = {"backend": backend, "mode": mode, **compile_kwargs}
        self.eval_model = torch.compile(self.trainable_module.model, **options)
        self.trainable_module = torch.compile(self.trainable_module, **options)
        self.teacher = torch.compile(self.teacher, **options)
        return self.eval_model

    def prepare_distributed(self, device_ids: list | None = None, **ddp_kwargs) -> "SpectralDistillationTask":
        """Wrap the student in DistributedDataParallel; ``device_ids`` must be None on the CPU."""
        from torch.nn.parallel import DistributedDataParallel

        self.trainable_module = DistributedDataParallel(self.trainable_module, device_ids=device_ids, **ddp_kwargs)
        return self

    def get_eval_model(self, module: nn.Module | None = None, ema: bool = False) -> nn.Module | None:
        """The plain student (``ema=True``: its average, None before ``setup_ema``), whose state has plain keys."""
        resolved = super().get_eval_model(module=module, ema=ema)
        if resolved is None:
            return None
        unwrapped = unwrap_model(resolved)
        return unwrapped.model if isinstance(unwrapped, TappedModel) else resolved

    def get_clip_parameters(self, exclude_head: bool = False) -> list[nn.Parameter]:
        """The student's parameters, without its last two (the classifier) if ``exclude_head``."""
        parameters = list(unwrap_model(self.trainable_module).model.parameters())
        return parameters[:-2] if exclude_head else parameters

    def close(self) -> None:
        """Take the feature hooks off student and teacher, which another task may use next."""
        unwrap_model(self.trainable_module).close()
        unwrap_model(self.teacher).close()


class TappedModel(nn.Module):
    """A model that returns ``(logits, maps)``, with no maps and no hooks where no layers are asked for.

    It passes on what timm's optimizer factory asks a model: which parameters take no weight decay, and how parameters
    group into layers.
    """

    def __init__(self, model: nn.Module, layers: Sequence[int | str]):
        super().__init__()
        self.body = FeatureTap(model, list(layers)) if layers else model
        self.tapped = bool(layers)
        self.training = model.training

    @property
    def model(self) -> nn.Module:
        return self.body.model if self.tapped else self.body

    def forward(self, images: Tensor) -> tuple[Tensor, list[Tensor]]:
        return self.body(images) if self.tapped else (self.body(images), [])

    def close(self) -> None:
        if self.tapped:
            self.body.close()

    @property
    def _prefix(self) -> str:
        return "body.model." if self.tapped else "body."

    def no_weight_decay(self) -> set[str]:
        names = getattr(self.model, "no_weight_decay", set)()
        return {self._prefix + name for name in names}

    def group_matcher(self, coarse: bool = False):
        matcher = getattr(self.model, "group_matcher", None)
        if matcher is None:
            return {}
        layer_of = group_parameters(self.model, matcher(coarse=coarse), reverse=True)
        last = max(layer_of.values(), default=0)
        prefix = self._prefix
        return lambda name: layer_of.get(name.removeprefix(prefix), last)


def _at_least_float32(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _single_output(role: str, logits) -> Tensor:
    if not isinstance(logits, Tensor):
        raise ValueError(
            f"the {role} returns a {type(logits).__name__}; the task needs one tensor of logits [B, classes]: "
            "turn extra heads off (set_distilled_training(False) in timm)"
        )
    return logits


def _check_models(student, teacher) -> None:
    for role, model in (("student", student), ("teacher", teacher)):
        if not isinstance(model, nn.Module):
            raise TypeError(
                f"the {role} is a {type(model).__name__}; give a torch.nn.Module (timm.create_model makes one)"
            )
    own = {id(p) for p in student.parameters()}
    if not own:
        raise ValueError("the student has no parameters; there is nothing to train")
    if any(id(p) in own for p in teacher.parameters()):
        raise ValueError("student and teacher share parameters, which freezing the teacher would freeze too; copy one")


def _check_numbers(alpha, tau, weight, kd) -> None:
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha={alpha} is no share; give a number from 0 (labels only) to 1 (teacher's logits only)")
    if not (tau > 0 and math.isfinite(tau)):
        raise ValueError(f"tau={tau} is no temperature; give a number above 0")
    if not (weight >= 0 and math.isfinite(weight)):
        raise ValueError(f"weight={weight} cannot weigh the spectral loss; give 0 or a positive number")
    if kd not in KD_KINDS:
        raise ValueError(f"kd={kd!r} is not known; use one of {', '.join(map(repr, KD_KINDS))}")


def _check_layer_lists(student_layers, teacher_layers, weight) -> None:
    for role, layers in (("student", student_layers), ("teacher", teacher_layers)):
        if isinstance(layers, str) or not isinstance(layers, Sequence):
            raise TypeError(f"{role}_layers is {layers!r}; give a list of block indices or submodule names")
    if len(student_layers) != len(teacher_layers):
        raise ValueError(
            f"{len(student_layers)} student layers {list(student_layers)} but {len(teacher_layers)} teacher layers "
            f"{list(teacher_layers)}; they are aligned in pairs, so give equally many"
        )
    if weight > 0 and not student_layers:
        raise ValueError(f"weight={weight} but no layers to align; name some layers, or set weight=0 for logits only")


def _check_classes(student: nn.Module, teacher: nn.Module) -> None:
    counts = [getattr(unwrap_model(model), "num_classes", None) for model in (student, teacher)]
    if all(isinstance(count, int) for count in counts) and counts[0] != counts[1]:
        raise ValueError(
            f"the student has {counts[0]} classes and the teacher {counts[1]}; logits can only be compared over the "
            "same classes (alpha=0 leaves the logits out)"
        )


def _renormalisation(student: nn.Module, teacher: nn.Module) -> tuple[Tensor, Tensor] | None:
    """Scale and shift [1, channels, 1, 1] from the student's normalisation to the teacher's; None if they agree.

    A model that does not name its normalisation takes the images as they are.
    """
    named = [getattr(unwrap_model(model), "pretrained_cfg", None) or {} for model in (student, teacher)]
    values = [cfg.get(key) for cfg in named for key in ("mean", "std")]
    if any(value is None for value in values):
        return None
    mean_s, std_s, mean_t, std_t = (torch.tensor(value, dtype=torch.float64).flatten() for value in values)
    if torch.equal(mean_s, mean_t) and torch.equal(std_s, std_t):
        return None
    scale, shift = std_s / std_t, (mean_s - mean_t) / std_t
    if (scale == scale[0]).all() and (shift == shift[0]).all():
        scale, shift = scale[:1], shift[:1]
    channels = getattr(unwrap_model(student), "in_chans", None)
    if isinstance(channels, int) and len(scale) not in (1, channels):
        raise ValueError(
            f"student and teacher name different normalisations of {len(scale)} channels, but the student takes "
            f"{channels}; give both models the same pretrained_cfg mean and std"
        )
    return scale.view(1, -1, 1, 1), shift.view(1, -1, 1, 1)
