"""``skd distill --layers``: pairs of layers from a file, or from the spectra of the teacher."""

from itertools import islice

import torch
from torch import nn

from skd.analysis.choice import choose_layers
from skd.analysis.layers_file import LayerChoice, read_layers
from skd.analysis.measure import analyze
from skd.distill.config import DistillConfig
from skd.distill.data import DataSource
from skd.distill.distributed import World
from skd.distill.errors import DistillError
from skd.distill.models import PAIRED_LAYERS, count_blocks
from skd.features import FeatureTap, block_names

AUTO = "auto"
IMAGES = 128
"""Training images that the teacher is looked at with."""


def model_names(config: DistillConfig) -> tuple[str, str]:
    """What a layers file calls student and teacher."""
    if config.task == "images":
        return config.models.student, config.models.teacher
    return f"{config.task}-student", f"{config.task}-teacher"


def layers_from_file(config: DistillConfig, student: nn.Module, teacher: nn.Module) -> LayerChoice:
    """The choice in the file ``config.models.layers``.

    Raises:
        DistillError: it cannot be read, or belongs to other models.
    """
    path = config.models.layers
    try:
        choice = read_layers(path, count_blocks(student), count_blocks(teacher))
    except ValueError as error:
        raise DistillError(f"--layers: {error}") from error
    student_here, teacher_here = model_names(config)
    for role, named, here in (("student", choice.student, student_here), ("teacher", choice.teacher, teacher_here)):
        # A timm name may end with the tag of its weights.
        if named is not None and named.split(".")[0] != here.split(".")[0]:
            raise DistillError(
                f"--layers {path} is for the {role} {named}, and this run has {here}; "
                f'if its layers suit both, remove the line "{role}: {named}" from the file'
            )
    return choice


def check_auto(source: DataSource, student: nn.Module, teacher: nn.Module) -> None:
    """Whether layers can be paired by depth alone, before a teacher is trained in order to choose them.

    Raises:
        DistillError: the maps of a pair could differ in height or width.
    """
    sizes = [_map_sizes(model, source) for model in (student, teacher)]
    if sizes[0] != sizes[1] and len({*sizes[0], *sizes[1]}) > 1:
        shown = " and ".join(
            f"{role} {' '.join(f'{h}x{w}' for h, w in dict.fromkeys(of))}"
            for role, of in zip(("student", "teacher"), sizes, strict=True)
        )
        raise DistillError(
            "--layers auto pairs layers by their depth, but maps of these models differ in size from layer to layer "
            f"({shown}); give --layers FILE, or --student-layers and --teacher-layers"
        )


def choose(config: DistillConfig, source: DataSource, student: nn.Module, teacher: nn.Module):
    """Look at the teacher's spectra over training images and choose (:func:`skd.analysis.choice.choose_layers`).

    The same seed, images and weights give the same choice.

    Returns:
        The choice, and lines that say what was chosen and why.

    Raises:
        DistillError: the teacher's maps have NaN or infinity, or no image comes.
    """
    student_name, teacher_name = model_names(config)
    batches = islice(source.make_train_loader(World()).epoch(config.run.seed, 0), -(-IMAGES // config.data.batch_size))
    try:
        # "ortho", so that stages of different width compare; where all have one width the order is that of "forward".
        profile = analyze(
            teacher, batches, norm="ortho", entropy=False, title=teacher_name, data=f"training images of {source.name}"
        )
        names = block_names(student)
        return choose_layers(profile, student_name, names, min(PAIRED_LAYERS, len(names), len(profile)))
    except (ValueError, RuntimeError) as error:
        raise DistillError(f"--layers auto: {error}") from error


def _map_sizes(model: nn.Module, source: DataSource) -> list[tuple[int, int]]:
    with torch.no_grad(), FeatureTap(model.eval(), block_names(model)) as tap:
        _, maps = tap(torch.zeros(1, source.in_chans, source.image_size, source.image_size))
    return [tuple(x.shape[2:]) for x in maps]
