"""The files of a run: each is whole or absent, whenever the run is interrupted."""

import csv
import json
import os
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path

from skd.distill.errors import DistillError
from skd.files import TEMPORARY, replacing


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
            raise DistillError(f"the output folder cannot be made: {error}") from error
        if not os.access(self.path, os.W_OK | os.X_OK):
            raise DistillError(f"there is no permission to write to {self.path}; give another --out")
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
        from safetensors.torch import save_file

        # Copies, because safetensors refuses tensors that share memory, such as tied weights.
        tensors = {key: value.detach().cpu().clone().contiguous() for key, value in state.items()}
        with replacing(self / name) as file:
            save_file(tensors, file, metadata={"format": "pt"})

    def tidy(self) -> None:
        """Remove what an interruption at the worst moment may leave: temporary files, and a folder without results."""
        self._remove_temporary()
        if self.path.is_dir() and not any(self.path.iterdir()):
            self.path.rmdir()

    def _remove_temporary(self) -> None:
        for temporary in self.path.glob(f"{TEMPORARY}*"):
            temporary.unlink(missing_ok=True)


def _claim(path: Path, used: bool) -> Path:
    if not used and path.is_dir() and any(path.iterdir()):
        raise DistillError(
            f"--out {path} is not empty; give a new folder, so that no earlier run is overwritten, or --resume auto "
            "to go on with it"
        )
    if path.exists() and not path.is_dir():
        raise DistillError(f"--out {path} is a file; give a new folder")
    path.mkdir(parents=True, exist_ok=True)
    return path


def _new_folder(task: str) -> Path:
    runs = Path("runs")
    runs.mkdir(exist_ok=True)
    stem = f"{task}-{datetime.now():%Y%m%d-%H%M%S}"
    attempt = 1
    while True:
        path = runs / (stem if attempt == 1 else f"{stem}-{attempt}")
        try:
            path.mkdir()
            return path
        except FileExistsError:  # another run started in the same second
            attempt += 1
