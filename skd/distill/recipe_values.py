"""From what YAML reads to the typed values of a configuration."""

import os
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin


def convert(value: Any, kind: Any) -> Any:
    """A value of YAML as a field's type: lists become tuples, strings paths, and numbers may be written as 1e-6.

    Args:
        value: None, bool, int, float, str, or a list of them.
        kind: bool, int, float, str, Path, None, a Literal, ``tuple[kind, ...]``, or a union of such.

    Raises:
        ValueError: it is none of that type; :func:`describe` says what is wanted.
    """
    origin = get_origin(kind)
    if origin in (Union, types.UnionType):
        return _convert_union(value, get_args(kind))
    if origin is Literal:
        return _check(value, isinstance(value, str) and value in get_args(kind))
    if origin is tuple:
        _check(value, isinstance(value, list))
        return tuple(convert(item, get_args(kind)[0]) for item in value)
    return _PLAIN[kind](value)


def describe(kind: Any) -> str:
    """What is wanted for a type, to be read after "must be"."""
    origin = get_origin(kind)
    if origin in (Union, types.UnionType):
        # null first, where it does not read as a part of the list after it.
        members = sorted(get_args(kind), key=lambda member: member is not type(None))
        return " or ".join(describe(member) for member in members)
    if origin is Literal:
        return f"one of {', '.join(get_args(kind))}"
    if origin is tuple:
        return f"a list, each of it {describe(get_args(kind)[0])}"
    return _NAMES[kind]


def fits(value: Any, kind: Any) -> bool:
    """Whether :func:`convert` takes a value for a type."""
    try:
        convert(value, kind)
    except ValueError:
        return False
    return True


def literals(kind: Any) -> tuple[str, ...]:
    """The strings a type allows, if it is a Literal or a union with one."""
    if get_origin(kind) is Literal:
        return get_args(kind)
    return tuple(text for member in get_args(kind) for text in literals(member))


def _convert_union(value: Any, members: tuple) -> Any:
    for member in members:
        if fits(value, member):
            return convert(value, member)
    raise ValueError(value)


def _check(value: Any, right: bool) -> Any:
    if not right:
        raise ValueError(value)
    return value


def _whole_number(value: Any) -> int:
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return int(_check(value, number and float(value).is_integer()))


def _number(value: Any) -> float:
    # YAML 1.1 takes 1e-6 for text, because it has no point.
    return float(_check(value, isinstance(value, (int, float, str)) and not isinstance(value, bool)))


_PLAIN: dict[Any, Callable[[Any], Any]] = {
    type(None): lambda value: _check(value, value is None),
    bool: lambda value: _check(value, isinstance(value, bool)),
    int: _whole_number,
    float: _number,
    str: lambda value: _check(value, isinstance(value, str)),
    Path: lambda value: Path(os.path.expanduser(_check(value, isinstance(value, str)))),
}
_NAMES = {
    type(None): "null",
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "text",
    Path: "a path",
}
