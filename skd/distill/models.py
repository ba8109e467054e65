"""timm models by name, their checkpoints, and which layers of two models to pair by default."""

import difflib
import sys
from dataclasses import dataclass, field
from pathlib import Path

import timm
import torch
from timm.models import PretrainedCfg, load_state_dict
from torch import nn

from skd.analysis.pairs import pair_layers
from skd.distill.errors import DistillError
from skd.features import block_names

PAIRED_LAYERS = 8
_SHOWN_KEYS = 5


@dataclass(frozen=True)
class ModelSpec:
    """A timm model as its name and the arguments that change it, all that is needed to build it again."""

    name: str
    kwargs: dict = field(default_factory=dict)

    def build(self) -> nn.Module:
        """The model with random weights, from the global random number generator."""
        return timm.create_model(self.name, **self.kwargs)

    @property
    def title(self) -> str:
        """The name, and what changes the architecture beyond the numbers of classes, pixels and channels."""
        plain = ("num_classes", "img_size", "in_chans", "weight_init")
        changed = ", ".join(f"{key}={value}" for key, value in self.kwargs.items() if key not in plain)
        return f"{self.name} ({changed})" if changed else self.name

    def loading_code(self, file: str) -> str:
        """The line of Python that builds the model with the weights of ``file``."""
        arguments = "".join(f", {key}={value!r}" for key, value in self.kwargs.items())
        return f"timm.create_model({self.name!r}{arguments}, checkpoint_path={file!r})"


def pretrained_cfg(name: str) -> PretrainedCfg:
    """What timm knows of the model ``name``: input size, normalisation, weights.

    Raises:
        DistillError: timm has no such model, with the names that come close.
    """
    if not timm.is_model(name):
        close = difflib.get_close_matches(name, timm.list_models() + timm.list_pretrained(), n=3, cutoff=0.4)
        hint = f"did you mean {' or '.join(close)}?" if close else "timm.list_models() names them all"
        raise DistillError(f"timm has no model {name!r}; {hint}")
    return timm.get_pretrained_cfg(name)


def timm_spec(name: str, num_classes: int, image_size: int | None = None) -> ModelSpec:
    """The timm model ``name`` for a number of classes, and for an image size where its layout depends on one.

    Raises:
        DistillError: timm has no such model, with the names that come close.
    """
    cfg = pretrained_cfg(name)
    kwargs = {"num_classes": num_classes}
    if image_size is not None and cfg.fixed_input_size and image_size != cfg.input_size[-1]:
        kwargs["img_size"] = image_size
    return ModelSpec(name, kwargs)


def native_image_size(name: str) -> int:
    """Side of the images timm's model ``name`` was made for, in pixels."""
    return pretrained_cfg(name).input_size[-1]


def build_pretrained(spec: ModelSpec, role: str = "teacher", instead: str | None = None) -> nn.Module:
    """The model with timm's pretrained weights.

    Args:
        spec: a timm model with its number of classes.
        role: how to call the model in an error.
        instead: what to give in place of weights that cannot be had, for the error.

    Raises:
        DistillError: there are none, they cannot be fetched, or they know other classes.
    """
    cfg = pretrained_cfg(spec.name)
    wanted = spec.kwargs["num_classes"]
    instead = instead or f"--{role}-checkpoint FILE, or --train-{role} to train it on the data"
    if not cfg.has_weights:
        raise DistillError(f"timm has no weights for {role} {spec.name}; give {instead}")
    if cfg.num_classes != wanted:
        raise DistillError(
            f"timm's weights for {role} {spec.name} know {cfg.num_classes} classes, the data has {wanted}; "
            f"give weights for {wanted} classes as {instead}"
        )
    try:
        return timm.create_model(spec.name, pretrained=True, **spec.kwargs)
    except Exception as error:  # whatever the download library of the day raises without a network
        reason = str(error).strip().splitlines()
        raise DistillError(
            f"the pretrained weights of {role} {spec.name} could not be fetched "
            f"({type(error).__name__}: {reason[0] if reason else 'no reason given'}); "
            f"give them as {instead}"
        ) from error


def load_checkpoint(model: nn.Module, path: Path, role: str = "teacher", option: str | None = None) -> None:
    """Load weights into a timm model; every key must fit.

    Files in the original layout of a model family are converted by the model's own timm filter.

    Args:
        model: a timm model.
        path: .safetensors, or a .pth / .pt / .bin file, which is read with ``weights_only``; of a training checkpoint
            the averaged weights are taken if there are any.
        role: how to call the model in an error.
        option: the command line's name for the file; default ``--<role>-checkpoint``.

    Raises:
        DistillError: no such file, no weights in it, or keys that do not fit, which are named.
    """
    option = option or f"--{role}-checkpoint"
    if not path.is_file():
        raise DistillError(f"{option} {path} is no file")
    try:
        state = load_state_dict(str(path))
    except Exception as error:  # safetensors, zip, pickle and torch have no common exception for a bad file
        reason = str(error).strip().splitlines()
        raise DistillError(
            f"{option} {path} cannot be read as weights ({type(error).__name__}: "
            f"{reason[0] if reason else 'no reason given'}); give a .safetensors file or a .pth file of tensors only"
        ) from error
    if not isinstance(state, dict) or not any(isinstance(value, torch.Tensor) for value in state.values()):
        raise DistillError(f"{option} {path} holds no state_dict; give a file of named tensors")
    problem = _misfit(model, state)
    if problem:
        converted = _converted(model, state)
        if converted is None or _misfit(model, converted):
            raise DistillError(f"{option} {path} does not fit {role} {_name(model)}: {problem}")
        state = converted
    model.load_state_dict(state)


def classes_in(name: str, path: Path) -> int | None:
    """How many classes the checkpoint ``path`` of timm's model ``name`` knows, or None if it does not show.

    Nothing is refused here: :func:`load_checkpoint` says what is wrong with a file.
    """
    classifier = pretrained_cfg(name).classifier or ()
    if not path.is_file():
        return None
    try:
        state = load_state_dict(str(path))
    except Exception:  # as there
        return None
    for layer in [classifier] if isinstance(classifier, str) else classifier:
        weight = state.get(f"{layer}.weight") if isinstance(state, dict) else None
        if isinstance(weight, torch.Tensor) and weight.dim() > 0:
            return weight.shape[0]
    return None


def default_layer_pairs(student: nn.Module, teacher: nn.Module) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Eight pairs as SpectralKD has them, or as many as the shallower model has blocks (:func:`skd.pair_layers`).

    Returns:
        Block numbers of the student and of the teacher, equally many.
    """
    depths = count_blocks(student), count_blocks(teacher)
    student_ids, teacher_ids = pair_layers(*depths, min(PAIRED_LAYERS, *depths))
    return tuple(student_ids), tuple(teacher_ids)


def count_blocks(model: nn.Module) -> int:
    """How many blocks or stages :class:`skd.FeatureTap` can count in a model."""
    return len(block_names(model))


def _name(model: nn.Module) -> str:
    return (getattr(model, "pretrained_cfg", None) or {}).get("architecture") or type(model).__name__


def _converted(model: nn.Module, state: dict) -> dict | None:
    """The state through the conversion timm keeps beside the model's class, or None if that fails."""
    convert = getattr(sys.modules[type(model).__module__], "checkpoint_filter_fn", None)
    if convert is None:
        return None
    try:
        return convert(state, model)
    except Exception:  # written for one family's files; anything else may break it anywhere
        return None


def _misfit(model: nn.Module, state: dict) -> str:
    """What keeps ``state`` out of the model, as half a sentence; empty if it fits."""
    own = model.state_dict()
    classes = _class_misfit(model, own, state)
    if classes:
        return classes
    missing = [key for key in own if key not in state]
    unexpected = [key for key in state if key not in own]
    reshaped = [
        f"{key} ({list(state[key].shape)} in the file, {list(own[key].shape)} in the model)"
        for key in own
        if key in state and state[key].shape != own[key].shape
    ]
    parts = [
        f"{len(keys)} keys {what}: {', '.join(keys[:_SHOWN_KEYS])}{', ...' if len(keys) > _SHOWN_KEYS else ''}"
        for what, keys in (
            ("are missing in the file", missing),
            ("are unknown to the model", unexpected),
            ("have another shape", reshaped),
        )
        if keys
    ]
    return "; ".join(parts)


def _class_misfit(model: nn.Module, own: dict, state: dict) -> str:
    classifier = (getattr(model, "pretrained_cfg", None) or {}).get("classifier") or ()
    for name in [classifier] if isinstance(classifier, str) else classifier:
        key = f"{name}.weight"
        if key in own and key in state and state[key].shape[1:] == own[key].shape[1:]:
            found, wanted = state[key].shape[0], own[key].shape[0]
            if found != wanted:
                return f"its classifier {key} knows {found} classes and the data has {wanted}"
    return ""
