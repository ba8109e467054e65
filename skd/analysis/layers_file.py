"""The choice of layers as a YAML file: written with its reasons, edited by hand, read with every mistake named."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from skd.files import read_yaml, replacing

LAYERS_FILE = "layers.yaml"
"""What it is called in a folder of results."""

_LISTS = ("student_layers", "teacher_layers")
_KEYS = ("student", "teacher", *_LISTS)
_HEAD = """\
# Which layers of the student skd aligns with which of the teacher: skd distill --layers FILE.
# The two lists are pairs, first with first; edit them as you like. A layer is the number of a block or stage (from 0,
# negative from the end) or the name of a submodule; paired maps must have equal height and width.
#
"""


@dataclass(frozen=True)
class LayerChoice:
    """Paired layers: block numbers or submodule names, equally many; names of the models, or None for any."""

    student_layers: tuple[int | str, ...]
    teacher_layers: tuple[int | str, ...]
    student: str | None = None
    teacher: str | None = None


def write_layers(path: str | Path, choice: LayerChoice, reasons: Sequence[str] = ()) -> None:
    """Write a layers file.

    Args:
        path: the file; it is whole or absent.
        choice: what to write.
        reasons: lines for the comment at the top, what was chosen and why.
    """
    import yaml

    lines = [f"# {line}".rstrip() for reason in reasons for line in reason.splitlines()]
    names = {key: getattr(choice, key) for key in ("student", "teacher") if getattr(choice, key) is not None}
    text = _HEAD + "\n".join([*lines, ""])
    if names:
        text += yaml.safe_dump(names, sort_keys=False, allow_unicode=True, width=1000)
    for key in _LISTS:
        # In one line each, so that pairs stand below each other.
        text += f"{key}: " + yaml.safe_dump(list(getattr(choice, key)), default_flow_style=True, width=1_000_000)
    with replacing(Path(path)) as file:
        file.write_text(text, encoding="utf-8")


def read_layers(path: str | Path, student_depth: int | None = None, teacher_depth: int | None = None) -> LayerChoice:
    """Read a layers file.

    Args:
        path: the file.
        student_depth, teacher_depth: numbers of blocks, to check block numbers against.

    Raises:
        ValueError: it cannot be read, is no YAML, or says something else than layers of such models.
    """
    content = read_yaml(Path(path), "the layers file")
    if not isinstance(content, dict):
        raise ValueError(f"the layers file {path} holds no keys; it needs {' and '.join(_LISTS)}")
    unknown = [str(key) for key in content if key not in _KEYS]
    if unknown:
        raise ValueError(f"the layers file {path} has unknown keys: {', '.join(unknown)}; it takes {', '.join(_KEYS)}")
    for key in ("student", "teacher"):
        if not isinstance(content.get(key), (str, type(None))):
            raise ValueError(f"{key} in the layers file {path} is the name of a model, not {content[key]!r}")
    depths = dict(zip(_LISTS, (student_depth, teacher_depth), strict=True))
    student, teacher = (_layers(path, key, content.get(key), depths[key]) for key in _LISTS)
    if len(student) != len(teacher):
        raise ValueError(
            f"the layers file {path} pairs {len(student)} student layers with {len(teacher)} teacher layers; "
            "both lists must be equally long"
        )
    return LayerChoice(student, teacher, content.get("student"), content.get("teacher"))


def _layers(path, key: str, value, depth: int | None) -> tuple[int | str, ...]:
    if not isinstance(value, list) or not value:
        found = "is missing" if value is None else f"is {value!r}"
        raise ValueError(f"{key} in the layers file {path} {found}; it must be a list such as [0, 1, -1]")
    for layer in value:
        if isinstance(layer, bool) or not isinstance(layer, (int, str)):
            raise ValueError(f"{layer!r} in {key} of the layers file {path} is no block number and no submodule's name")
        if depth is not None and isinstance(layer, int) and not -depth <= layer < depth:
            raise ValueError(
                f"there is no layer {layer} for {key} of the layers file {path}: that model has {depth}, "
                f"so a number goes from {-depth} to {depth - 1}"
            )
    return tuple(value)
