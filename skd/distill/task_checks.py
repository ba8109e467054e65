"""What the distillation task refuses, each with its own sentence."""

import math
from collections.abc import Sequence

import torch
from timm.utils import unwrap_model
from torch import Tensor, nn

from skd.ops.maps import FLOATING

KD_KINDS = ("soft", "hard")
KD_REDUCTIONS = ("batchmean", "numel")


def single_output(role: str, logits) -> Tensor:
    """The logits of a model, which must be one tensor."""
    if not isinstance(logits, Tensor):
        raise ValueError(
            f"the {role} returns a {type(logits).__name__}; the task needs one tensor of logits [B, classes]: "
            "turn extra heads off (set_distilled_training(False) in timm)"
        )
    return logits


def check_models(student, teacher) -> None:
    """Two modules, the student trainable and nothing of it in the teacher."""
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


def check_numbers(alpha, tau, weight, kd, kd_reduction) -> None:
    """Share, temperature, weight and the names of the logits' term."""
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha={alpha} is no share; give a number from 0 (labels only) to 1 (teacher's logits only)")
    if not (tau > 0 and math.isfinite(tau)):
        raise ValueError(f"tau={tau} is no temperature; give a number above 0")
    if not (weight >= 0 and math.isfinite(weight)):
        raise ValueError(f"weight={weight} cannot weigh the spectral loss; give 0 or a positive number")
    for name, value, known in (("kd", kd, KD_KINDS), ("kd_reduction", kd_reduction, KD_REDUCTIONS)):
        if value not in known:
            raise ValueError(f"{name}={value!r} is not known; use one of {', '.join(map(repr, known))}")


def check_layer_lists(student_layers, teacher_layers, weight) -> None:
    """Equally long lists, and some layers where there is a weight."""
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


def check_classes(student: nn.Module, teacher: nn.Module) -> None:
    """As many classes on both sides, where the models say how many."""
    counts = [getattr(unwrap_model(model), "num_classes", None) for model in (student, teacher)]
    if all(isinstance(count, int) for count in counts) and counts[0] != counts[1]:
        raise ValueError(
            f"the student has {counts[0]} classes and the teacher {counts[1]}; logits can only be compared over the "
            "same classes (alpha=0 leaves the logits out)"
        )


def image_size(teacher_size) -> tuple[int, int] | None:
    """(height, width) of what a caller gives as a side or as a pair."""
    if teacher_size is None:
        return None
    sides = (teacher_size, teacher_size) if isinstance(teacher_size, int) else teacher_size
    whole = isinstance(sides, (tuple, list)) and all(isinstance(n, int) and not isinstance(n, bool) for n in sides)
    if not whole or len(sides) != 2:
        raise TypeError(f"teacher_size is {teacher_size!r}; give the side of the teacher's images, or (height, width)")
    if min(sides) < 1:
        raise ValueError(f"teacher_size={teacher_size!r} is no size of an image; give at least 1 pixel each way")
    return tuple(sides)


def check_teacher_dtype(dtype) -> None:
    """None or a floating dtype that the losses know."""
    if dtype is None:
        return
    if not isinstance(dtype, torch.dtype):
        raise TypeError(f"teacher_dtype is {dtype!r}; give a torch.dtype such as torch.bfloat16, or None")
    if dtype not in FLOATING:
        raise ValueError(f"teacher_dtype={dtype} cannot hold a model; use one of {', '.join(map(str, FLOATING))}")
