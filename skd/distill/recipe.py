"""Recipes: configurations as YAML files, shipped in recipes/ or the user's own.

A recipe holds sections and fields of :class:`skd.distill.config.DistillConfig`; what it leaves out keeps its default.
``extends: NAME or PATH`` takes another recipe as the base. The config.yaml of a run is a recipe, too.
"""

import dataclasses
import difflib
import os
import typing
from collections.abc import Set
from pathlib import Path

import yaml

from skd.distill.config import DistillConfig, fill_defaults
from skd.distill.errors import DistillError
from skd.distill.recipe_values import convert, describe, fits, literals
from skd.files import read_yaml

RECIPES = Path(__file__).parent / "recipes"
CONFIG_FILE = "config.yaml"
EXTENDS = "extends"

_SECTIONS = {field.name: field.type for field in dataclasses.fields(DistillConfig)}
_TYPES = {name: typing.get_type_hints(section) for name, section in _SECTIONS.items()}

# Two ways to say one thing: of a recipe and what goes on top of it, the later one counts.
_ALTERNATIVES = {
    ("models", "layers"): ("student_layers", "teacher_layers"),
    ("models", "student_layers"): ("layers",),
    ("models", "teacher_layers"): ("layers",),
    ("optim", "base_lr"): ("lr",),
}

# What follows from the images per update.
_FOLLOWING = {("optim", "lr"), ("optim", "warmup_lr"), ("optim", "min_lr")}

_Fields = dict[tuple[str, str], typing.Any]
"""Values by section and field."""


def list_recipes() -> dict[str, str]:
    """The shipped recipes and what each is, from its first line."""
    files = sorted(RECIPES.glob("*.yaml"), key=lambda file: file.stem)
    return {file.stem: file.read_text(encoding="utf-8").partition("\n")[0].lstrip("# ") for file in files}


def load_recipe(recipe: str | Path) -> DistillConfig:
    """A recipe as a configuration, its defaults not filled in yet.

    Args:
        recipe: the name of a shipped one, or the path of a YAML file. Paths in the file, but for that of ``extends``,
            are relative to the current directory.

    Raises:
        DistillError: there is no such recipe, or it holds something else than fields of a configuration and values of
            their types.
    """
    return _build(_load(_find(str(recipe), Path()), ()))


def config_of_run(folder: str | Path) -> DistillConfig:
    """The configuration that a run was started with, to go on with it, wherever its folder has been moved.

    Raises:
        DistillError: it is no folder of a run, or its config.yaml cannot be read.
    """
    folder = Path(folder)
    file = folder / CONFIG_FILE
    if not file.is_file():
        reason = f"has no {CONFIG_FILE}" if folder.is_dir() else "is no folder"
        raise DistillError(f"{folder} {reason}; give the folder of a run of skd distill")
    config = load_recipe(file)
    # The lists that stand beside --layers are what it came to, and not what was asked for.
    lists = {} if config.models.layers is None else {"student_layers": None, "teacher_layers": None}
    return config.replace(models=lists, run={"out": folder, "resume": str(folder), "dry_run": False})


def override(base: DistillConfig, config: DistillConfig) -> DistillConfig:
    """``config``, made from ``base`` by changing fields, without what the changes stand in the place of.

    Layers given as a file replace lists of layers, and the other way round; a base_lr replaces an lr.
    """
    before, after = _fields(base), _fields(config)
    return _build(_without_replaced(after, {key for key in after if after[key] != before[key]}))


def to_yaml(config: DistillConfig, processes: int = 1) -> str:
    """A recipe that says all of ``config``, with the task's defaults filled in.

    But for the learning rate: it follows from the images per update, which a user of the recipe may change.

    Raises:
        DistillError: as :func:`skd.distill.config.fill_defaults`.
    """
    filled = fill_defaults(config, processes, needs_images=False)
    lines = ["# For skd distill --recipe FILE. An option on the command line wins over its line here."]
    for section, values in filled.to_dict().items():
        lines += ["", f"{section}:"]
        for name, value in values.items():
            note = ""
            if (section, name) in _FOLLOWING and filled.task == "images" and getattr(config.optim, name) is None:
                note = f"  # {value:.6g} with these options and {processes} process{'es' if processes > 1 else ''}"
                value = None
            # Lists in one line, so that pairs of layers stand below each other.
            text = yaml.safe_dump(value, default_flow_style=True, allow_unicode=True, width=1_000_000)
            lines.append(f"  {name}: {text.removesuffix('...' + chr(10)).rstrip()}{note}")
    return "\n".join(lines) + "\n"


def _find(recipe: str, folder: Path) -> Path:
    """The file of a name or of a path relative to ``folder``."""
    names = list(list_recipes())
    if recipe in names:
        return RECIPES / f"{recipe}.yaml"
    path = folder / os.path.expanduser(recipe)
    if path.is_file():
        return path
    if path.is_dir():
        raise DistillError(f"the recipe {path} is a folder; give a YAML file, such as the {CONFIG_FILE} of a run")
    close = difflib.get_close_matches(recipe, names, n=1)
    hint = f"did you mean {close[0]}?" if close else f"there are {', '.join(names)}, or give the path of a YAML file"
    raise DistillError(f"there is no recipe {recipe!r}; {hint}")


def _load(path: Path, below: tuple[Path, ...]) -> _Fields:
    """The fields of a recipe over those of the ones it extends; ``below`` are the recipes that extend this one."""
    file = path.resolve()
    if file in below:
        chain = ", which extends ".join(each.name for each in [*below[below.index(file) :], file])
        raise DistillError(f"the recipes extend each other in a circle: {chain}; remove one of the lines")
    content = _read(path)
    where = f"the recipe {path}"
    base: _Fields = {}
    extended = content.pop(EXTENDS, None)
    if extended is not None:
        if not isinstance(extended, str):
            raise DistillError(f"{EXTENDS} in {where} is {extended!r}, but must be the name or path of one recipe")
        base = _load(_find(extended, path.parent), (*below, file))
    own: _Fields = {}
    for section, fields in content.items():
        own.update(_section(where, section, fields))
    return _without_replaced(base | own, set(own))


def _read(path: Path) -> dict:
    try:
        content = read_yaml(path, "the recipe", _Loader)
    except ValueError as error:
        raise DistillError(str(error)) from error
    if content is None:  # comments only
        return {}
    if not isinstance(content, dict):
        raise DistillError(f"the recipe {path} holds no sections; it needs some of {', '.join(_SECTIONS)}")
    return content


class _Loader(yaml.SafeLoader):
    """YAML that refuses a key given twice, of which it would silently take the second."""

    def construct_mapping(self, node, deep=False):
        seen = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.tag != "tag:yaml.org,2002:merge":
                if key.value in seen:
                    raise yaml.constructor.ConstructorError(None, None, f"{key.value} is there twice", key.start_mark)
                seen.add(key.value)
        return super().construct_mapping(node, deep)


def _section(where: str, section, fields) -> _Fields:
    if section not in _SECTIONS:
        raise DistillError(f"{where} has no section {str(section)!r}; {_nearest(str(section), [*_SECTIONS, EXTENDS])}")
    if fields is None:  # all its lines are comments
        return {}
    if not isinstance(fields, dict):
        raise DistillError(f"{section} in {where} is {fields!r}, but is a section and must hold lines of field: value")
    return {(section, name): _value(where, section, name, value) for name, value in fields.items()}


def _value(where: str, section: str, name, value):
    known = _TYPES[section]
    if name not in known:
        raise DistillError(f"{where} has no field {str(name)!r} in {section}; {_nearest(str(name), known)}")
    try:
        return convert(value, known[name])
    except ValueError as error:
        shown, wanted = "empty" if value is None else repr(value), describe(known[name])
        raise DistillError(
            f"{section}.{name} in {where} is {shown}, but must be {wanted}{_hint(value, known[name])}"
        ) from error


def _hint(value, kind) -> str:
    if isinstance(value, bool):
        return " (YAML takes yes, no, on and off for true and false; put quotes around a text)"
    if value is None:
        return ""
    if fits([value], kind):
        return f"; write [{value}]"
    allowed = literals(kind)
    wrong = [str(item) for item in (value if isinstance(value, list) else [value]) if item not in allowed]
    close = difflib.get_close_matches(wrong[0], allowed, n=1) if wrong else []
    return f"; did you mean {close[0]}?" if close else ""


def _nearest(name: str, known) -> str:
    """What a misspelt section or field may have been."""
    homes = [other for other, fields in _TYPES.items() if name in fields]
    if homes:
        return f"{name} belongs into the section {homes[0]}"
    close = difflib.get_close_matches(name, known, n=1)
    if close:
        return f"did you mean {close[0]}?"
    elsewhere = {field: other for other, fields in _TYPES.items() for field in fields}
    close = difflib.get_close_matches(name, elsewhere, n=1)
    if close:
        return f"did you mean {close[0]} in the section {elsewhere[close[0]]}?"
    return f"it may have {', '.join(known)}"


def _fields(config: DistillConfig) -> _Fields:
    return {(section, name): getattr(getattr(config, section), name) for section in _TYPES for name in _TYPES[section]}


def _without_replaced(fields: _Fields, later: Set[tuple[str, str]]) -> _Fields:
    """``fields`` without those that one of the fields given ``later`` replaces."""
    kept = dict(fields)
    for (section, name), others in _ALTERNATIVES.items():
        if (section, name) in later and fields[section, name] is not None:
            for other in others:
                if (section, other) not in later and (section, other) in kept:
                    kept[section, other] = None
    return kept


def _build(fields: _Fields) -> DistillConfig:
    sections: dict[str, dict] = {name: {} for name in _SECTIONS}
    for (section, name), value in fields.items():
        sections[section][name] = value
    return DistillConfig().replace(**sections)
