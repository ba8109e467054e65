"""What the build of this installation compiled, and why it left something out."""

import json
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

NAMES = ("cpu", "cuda")
"""The compiled extensions, skd._cpu and skd._cuda."""

_HERE = Path(__file__).parent


def read(folder: Path = _HERE) -> dict[str, dict]:
    """The record of the build, without importing any extension.

    Args:
        folder: the installed package.

    Returns:
        For each of ``cpu`` and ``cuda`` a dictionary with ``built`` (bool: this Python finds the extension),
        ``reason`` (str: one sentence why not, empty if built), ``compiler`` (str, possibly empty), and what the build
        noted besides: ``instruction_sets`` (list of str) for cpu, ``architectures`` (list of str) for cuda.
    """
    record, trouble = _load(folder / "_build.json")
    return {name: _checked(name, record.get(name), trouble, folder) for name in NAMES}


def _load(path: Path) -> tuple[dict, str]:
    """The record as it was written, and what is the matter with it if it cannot be read."""
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}, "this source tree was never installed; run pip install in it"
    except (OSError, ValueError) as error:
        return {}, f"the record of the build, {path}, cannot be read ({error}); install skd again"
    return (record, "") if isinstance(record, dict) else ({}, f"{path} is no record of a build; install skd again")


def _checked(name: str, entry: object, trouble: str, folder: Path) -> dict:
    known = dict(entry) if isinstance(entry, dict) else {}
    entry = {"built": False, "reason": trouble or "the build left no record of it", "compiler": ""} | known
    present = any((folder / f"_{name}{suffix}").is_file() for suffix in EXTENSION_SUFFIXES)
    if entry["built"] and not present:
        # An editable install made by one version of Python and used by another.
        entry["reason"] = f"skd._{name} was built, but not for this Python; install skd again with it"
    entry["built"] = bool(entry["built"] or not known) and present
    if entry["built"]:
        entry["reason"] = ""
    return entry
