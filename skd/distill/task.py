"""The distillation loss as a timm training task."""

from collections.abc import Callable, Sequence
from contextlib import nullcontext

import torch
import torch.nn.functional as F
from timm.task import TrainingTask
from timm.utils import unwrap_model
from torch import Tensor, nn

from skd.distill.tapped_model import TappedModel
from skd.distill.task_checks import (
    check_classes,
    check_layer_lists,
    check_models,
    check_numbers,
    check_teacher_dtype,
    image_size,
    single_output,
)
from skd.distill.teacher_images import TeacherImages
from skd.losses import SpectralLoss


class SpectralDistillationTask(TrainingTask):
    """Labels, the teacher's logits and the teacher's feature maps in one loss (SpectralKD, arXiv 2412.19055)::

        loss = (1 - alpha) * CE(labels) + alpha * tau^2 * KL(teacher || student) + weight * L
        loss = (1 - alpha) * CE(labels) + alpha * CE(teacher's argmax)           + weight * L     kd="hard"

    KL is taken between softmax(logits / tau). L is :class:`skd.SpectralLoss`, the mean over the pairs of layers.

    A ``timm.task.TrainingTask``: ``trainable_module``, the student with its taps, is all that is optimised, wrapped by
    DistributedDataParallel, averaged and clipped, and ``get_eval_model()`` is the plain student. The teacher is frozen
    here (``requires_grad`` off), stays in eval mode and runs under ``torch.no_grad``; not under ``inference_mode``,
    whose tensors autograd refuses to save where the loss keeps a teacher map.

    16-bit logits, of autocast or of a 16-bit model, are taken to float32 before any loss, and the spectral loss sums in
    float32 whatever the maps are.

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
        kd_reduction: what the summed KL of the soft logits is divided by: "batchmean", the batch, as the temperature
            argument of Hinton et al. (arXiv 1503.02531) needs it; or "numel", batch times classes, as the published
            code (and DeiT's before it) does, which makes the term smaller by the number of classes.
        criterion: loss of (logits, target) for the labels; default ``torch.nn.CrossEntropyLoss()``.
        teacher_size: side, or (height, width), of the images the teacher sees, which are resized for it (bicubic with
            antialiasing) after the normalisation; None for the student's. Paired maps must still be equally large.
        teacher_dtype: the teacher's weights are converted to it (in place: copy a model that is needed as it was) and
            its images are cast to it; autocast does not reach it then. None leaves the weights, and autocast acts.

    Raises:
        TypeError: student or teacher is no module, a size or dtype is none.
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
        kd_reduction: str = "batchmean",
        criterion: Callable[[Tensor, Tensor], Tensor] | None = None,
        teacher_size: int | tuple[int, int] | None = None,
        teacher_dtype: torch.dtype | None = None,
    ):
        check_models(student, teacher)
        check_numbers(alpha, tau, weight, kd, kd_reduction)
        check_layer_lists(student_layers, teacher_layers, weight)
        check_teacher_dtype(teacher_dtype)
        size = image_size(teacher_size)
        if alpha > 0:
            check_classes(student, teacher)
        parameter = next(student.parameters())
        super().__init__(device=parameter.device, dtype=parameter.dtype, verbose=False)
        self.alpha, self.tau, self.weight = float(alpha), float(tau), float(weight)
        self.kd, self.kd_reduction, self.teacher_dtype = kd, kd_reduction, teacher_dtype
        taps = self.weight > 0
        # The weight is given to the loss, whose one pass then makes the gradient in its final size.
        self.spectral_loss = SpectralLoss(match, weights=[self.weight] * len(student_layers)) if taps else None
        self.teacher_images = TeacherImages(student, teacher, size, teacher_dtype)
        self.trainable_module = TappedModel(student, student_layers if taps else ())
        self.teacher = TappedModel(teacher, teacher_layers if taps else ())
        self.teacher.requires_grad_(False).eval()
        if teacher_dtype is not None:
            self.teacher.to(teacher_dtype)
        self.criterion = nn.CrossEntropyLoss() if criterion is None else criterion

    def forward(self, images: Tensor, target: Tensor) -> dict[str, Tensor]:
        """The loss of one batch.

        Args:
            images: [B, channels, H, W], normalised for the student.
            target: class indices [B], probabilities [B, classes], or what the criterion takes.

        Returns:
            "loss" (scalar, to call backward on), "output" (student logits [B, classes]) and the parts, detached and on
            the device: "ce_loss", "kd_loss" (without alpha, with tau^2) and "spectral_loss" (without weight); 0 where
            left out.
        """
        output, student_maps = self.trainable_module(images)
        logits = _at_least_float32(single_output("student", output))
        ce_loss = self.criterion(logits, target)
        loss = (1 - self.alpha) * ce_loss
        kd_loss = spectral_loss = torch.zeros((), device=loss.device)
        if self.alpha > 0 or self.weight > 0:
            teacher_logits, teacher_maps = self._run_teacher(images)
        if self.alpha > 0:
            kd_loss = self._kd_loss(logits, _at_least_float32(single_output("teacher", teacher_logits)))
            loss = loss + self.alpha * kd_loss
        if self.weight > 0:
            weighted = self.spectral_loss(student_maps, teacher_maps)
            loss = loss + weighted
            spectral_loss = weighted.detach() / self.weight
        return {
            "loss": loss,
            "output": output,
            "ce_loss": ce_loss.detach(),
            "kd_loss": kd_loss.detach(),
            "spectral_loss": spectral_loss,
        }

    @torch.no_grad()
    def _run_teacher(self, images: Tensor) -> tuple[Tensor, list[Tensor]]:
        own = nullcontext() if self.teacher_dtype is None else torch.autocast(images.device.type, enabled=False)
        with own:
            return self.teacher(self.teacher_images(images))

    def _kd_loss(self, logits: Tensor, teacher_logits: Tensor) -> Tensor:
        if logits.shape != teacher_logits.shape:
            raise ValueError(
                f"the student returns logits {list(logits.shape)} and the teacher {list(teacher_logits.shape)}; "
                "both must know the same classes"
            )
        if self.kd == "hard":
            return F.cross_entropy(logits, teacher_logits.argmax(dim=-1))
        log_student = F.log_softmax(logits / self.tau, dim=-1)
        log_teacher = F.log_softmax(teacher_logits / self.tau, dim=-1)
        total = F.kl_div(log_student, log_teacher, reduction="sum", log_target=True)
        shares = logits.numel() if self.kd_reduction == "numel" else len(logits)
        return total * (self.tau**2 / max(shares, 1))

    def train(self, mode: bool = True) -> "SpectralDistillationTask":
        """Set the student's mode; the teacher stays in eval mode."""
        super().train(mode)
        self.teacher.eval()
        return self

    def _apply(self, fn, *args, **kwargs) -> "SpectralDistillationTask":
        """What ``.to()``, ``.half()``, ... come down to: the teacher keeps the dtype it was given."""
        super()._apply(fn, *args, **kwargs)
        if self.teacher_dtype is not None:
            self.teacher.to(self.teacher_dtype)
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


def _at_least_float32(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()
