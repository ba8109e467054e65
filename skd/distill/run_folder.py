"""The files of a run: each is whole or absent, whenever the run is interrupted."""

import csv
import errno
import json
import os
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path

from skd.distill.errors import DistillError
from skd.files import TEMPORARY, replacing

_RUNS = Path("runs")


class RunFolder:
    """The folder of one run.

    Args:
        path: the folder; None makes ``runs/<task>-<date>-<time>`` and never takes one that exists.
        task: name of the task.
        used: whether the folder may have the files of this run already.

    Raises:
        DistillError: ``path`` is a file, is not empty, or cannot be made.
    """

    def __init__(self, path: Path | None, task: str, *, used: bool = False):
        try:
            self.path = _new_folder(task) if path is None else _claim(path, used)
        except OSError as error:
            raise _cannot_be_made(error) from error
        if not _may_write(self.path):
            raise _no_permission(self.path)
        self._remove_temporary()  # of a run that was killed

    def __truediv__(self, name: str) -> Path:
        return self.path / name

    def write_yaml(self, name: str, content: dict) -> None:
        import yaml

        with replacing(self / name) as file:
            file.write_text(yaml.safe_dump(content, sort_keys=False, allow_unicode=True), encoding="utf-8")

    def write_json(self, name: str, content: dict) -> None:
        text = json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False)
        with replacing(self / name) as file:
            file.write_text(text + "\n", encoding="utf-8")

    def write_csv(self, name: str, columns: Sequence[str], rows: Sequence[dict]) -> None:
        """Write the whole table; it is small, and so it is complete at any moment."""
        with replacing(self / name) as path, path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, columns)
            writer.writeheader()
            writer.writerows(rows)

    def write_safetensors(self, name: str, state: dict) -> None:
        from safetensors.torch import save

        # Copies, because safetensors refuses tensors that share memory, such as tied weights.
        tensors = {key: value.detach().cpu().clone().contiguous() for key, value in state.items()}
        content = save(tensors, metadata={"format": "pt"})
        with replacing(self / name) as file:
            file.write_bytes(content)  # safetensors' own writer has no OSError for a full disk

    def tidy(self) -> None:
        """Remove what an interruption at the worst moment may leave: temporary files, and a folder without results."""
        self._remove_temporary()
        if self.path.is_dir() and not any(self.path.iterdir()):
            self.path.rmdir()

    def _remove_temporary(self) -> None:
        for temporary in self.path.glob(f"{TEMPORARY}*"):
            temporary.unlink(missing_ok=True)


def check_out(path: Path | None) -> None:
    """Refuse a folder that :class:`RunFolder` would refuse for a new run, and make nothing.

    Args:
        path: as there.

    Raises:
        DistillError: as there, in the same sentences.
    """
    try:
        if path is not None:
            _check_free(path, used=False)
        _check_can_be_made(path or _RUNS)
    except OSError as error:
        raise _cannot_be_made(error) from error


def _claim(path: Path, used: bool) -> Path:
    _check_free(path, used)
    path.mkdir(parents=True, exist_ok=True)
    return path


def _check_free(path: Path, used: bool) -> None:
    if not used and path.is_dir() and any(path.iterdir()):
        raise DistillError(
            f"--out {path} is not empty; give a new folder, so that no earlier run is overwritten, or --resume auto "
            "to go on with it"
        )
    if path.exists() and not path.is_dir():
        raise DistillError(f"--out {path} is a file; give a new folder")


def _check_can_be_made(path: Path) -> None:
    """Raise what making the folder and those above it would, and refuse one that is there and cannot be written to."""
    first, above = None, path
    while not above.exists():
        if above.is_symlink():  # to nothing
            raise _error(errno.EEXIST, above)
        first, above = above, above.parent
    if not above.is_dir():
        raise _error(errno.EEXIST if first is None else errno.ENOTDIR, path)
    if not _may_write(above):
        raise _no_permission(path) if first is None else _error(errno.EACCES, first)


def _may_write(folder: Path) -> bool:
    return os.access(folder, os.W_OK | os.X_OK)


def _error(number: int, path: Path) -> OSError:
    return OSError(number, os.strerror(number), str(path))


def _cannot_be_made(error: OSError) -> DistillError:
    return DistillError(f"the output folder cannot be made: {error}")


def _no_permission(path: Path) -> DistillError:
    return DistillError(f"there is no permission to write to {path}; give another --out")


def _new_folder(task: str) -> Path:
    _RUNS.mkdir(exist_ok=True)
    stem = f"{task}-{datetime.now():%Y%m%d-%H%M%S}"
    attempt = 1
    while True:
        path = _RUNS / (stem if attempt == 1 else f"{stem}-{attempt}")
        try:
            path.mkdir()
            return path
        except FileExistsError:  # another run started in the same second
            attempt += 1
