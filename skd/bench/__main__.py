"""``python -m skd.bench``: the options of ``skd bench`` where the packages of its command line are not installed."""

import argparse
import dataclasses
import inspect
import sys
import types
import typing
from collections.abc import Sequence
from pathlib import Path

from skd.bench import BenchConfig, run


def parser() -> argparse.ArgumentParser:
    """The options of :class:`skd.bench.BenchConfig`, each named like its field."""
    made = argparse.ArgumentParser(prog="python -m skd.bench", description=inspect.getdoc(BenchConfig))
    for name, kind in typing.get_type_hints(BenchConfig).items():
        made.add_argument(f"--{name.replace('_', '-')}", default=argparse.SUPPRESS, **_options(kind))
    return made


def _options(kind) -> dict:
    """How argparse reads a value of a type: a tuple, a choice, a flag, or one value; any of them or None."""
    if isinstance(kind, types.UnionType) or typing.get_origin(kind) is typing.Union:
        (kind,) = (option for option in typing.get_args(kind) if option is not types.NoneType)
    if typing.get_origin(kind) is tuple:
        return {"nargs": "*", **_options(typing.get_args(kind)[0])}
    if typing.get_origin(kind) is typing.Literal:
        return {"choices": typing.get_args(kind)}
    if kind is bool:
        return {"action": argparse.BooleanOptionalAction}
    if kind not in (str, int, float, Path):
        raise TypeError(f"{kind} is no type that an option can have")
    return {"type": kind}


def main(arguments: Sequence[str] | None = None) -> int:
    """Measures what the arguments ask for; returns the exit status of :func:`skd.bench.run`."""
    given = vars(parser().parse_args(arguments))
    lists = {name: tuple(value) for name, value in given.items() if isinstance(value, list)}
    return run(dataclasses.replace(BenchConfig(), **given | lists))


if __name__ == "__main__":
    sys.exit(main())
