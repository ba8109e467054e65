"""Checkpoints of a run: written whole or not at all, the previous one kept, damage noticed."""

import os
import zipfile
from pathlib import Path

import torch

from skd.distill.errors import DistillError, first_line
from skd.files import replacing

NAME, PREVIOUS = "checkpoint.pt", "checkpoint-previous.pt"
FORMAT = 2


class Checkpoints:
    """The two last checkpoints of a folder.

    Args:
        folder: of the run.
    """

    def __init__(self, folder: Path):
        self.latest, self.previous = folder / NAME, folder / PREVIOUS

    def exist(self) -> bool:
        return self.latest.exists() or self.previous.exists()

    def save(self, state: dict) -> None:
        """Write a checkpoint; the one before becomes the previous one.

        Args:
            state: tensors, numbers, strings, None, and lists and dicts of them.

        Raises:
            DistillError: it cannot be written; the ones before are still there.
        """
        try:
            with replacing(self.latest) as file:
                with file.open("wb") as stream:
                    torch.save({"format": FORMAT, **state}, stream)
                    stream.flush()
                    # Before the rename, so that a power failure cannot leave a name without its content.
                    os.fsync(stream.fileno())
                if self.latest.exists():
                    os.replace(self.latest, self.previous)
        except (OSError, RuntimeError) as error:  # torch's writer turns a full disk into a RuntimeError
            kept = [path.name for path in (self.latest, self.previous) if path.exists()]
            if kept:
                rest = f"{' and '.join(kept)} of before {'is' if len(kept) == 1 else 'are'} whole"
                then = f"go on with --resume {self.latest.parent}"
            else:
                rest, then = "none is kept", "start again"
            raise DistillError(
                f"the checkpoint {self.latest} could not be written ({first_line(error)}); {rest}: make room or mend "
                f"the permissions, then {then}"
            ) from error

    def load(self) -> tuple[dict, str]:
        """The latest checkpoint that is whole.

        Returns:
            Its state, on the CPU, and a sentence if it is not the latest one (else "").

        Raises:
            DistillError: there is none.
        """
        problems = []
        for path in (self.latest, self.previous):
            if not path.exists():
                continue
            try:
                state = _read(path)
            except Exception as error:  # zip, pickle and torch have no common exception for a bad file
                problems.append(f"{path.name} is damaged ({first_line(error)})")
                continue
            return state, f"{'; '.join(problems)}: going on from {path.name}." if problems else ""
        if problems:
            raise DistillError(f"{' and '.join(problems)}; no run can go on from {self.latest.parent}, start it anew")
        raise DistillError(
            f"{self.latest.parent} has no {NAME} to go on from; give the folder of a run, or no --resume"
        )


def _read(path: Path) -> dict:
    with zipfile.ZipFile(path) as archive:
        # torch reads over flipped bits; the archive's own checksums do not.
        damaged = archive.testzip()
    if damaged is not None:
        raise ValueError(f"the checksum of {damaged} is wrong")
    state = torch.load(path, map_location="cpu", weights_only=True)
    if state.get("format") != FORMAT:
        raise ValueError(f"its format is {state.get('format')!r}, this skd writes and reads {FORMAT}")
    return state
