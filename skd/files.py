"""Files written whole or not at all, whenever the program is interrupted, and YAML read with clear errors."""

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

TEMPORARY = ".part-"
"""How the name of a file begins that is not finished."""


def read_yaml(path: Path, what: str, loader: type | None = None):
    """The content of a YAML file.

    Args:
        path: of the file.
        what: what to call it in an error.
        loader: a safe loader of PyYAML; default its own.

    Raises:
        ValueError: it cannot be read or is no YAML, in one sentence.
    """
    import yaml

    try:
        return yaml.load(path.read_text(encoding="utf-8"), Loader=loader or yaml.SafeLoader)
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ValueError(f"{what} {path} cannot be read: {reason}") from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        at = f" (line {mark.line + 1}: {error.problem})" if mark else ""
        raise ValueError(f"{what} {path} is no YAML{at}") from error


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary file beside ``path``: takes its place when the block ends well, and is removed when it does not."""
    handle, name = tempfile.mkstemp(prefix=TEMPORARY, suffix=path.suffix, dir=path.parent)
    temporary = Path(name)
    try:
        os.close(handle)
        yield temporary
        # mkstemp makes files that only their owner can read; results are ordinary files.
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o666 & ~umask)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
