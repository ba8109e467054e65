"""The folder of a run: a new one, or one to go on in."""

import dataclasses
from pathlib import Path

from skd.distill.checkpoint import Checkpoints
from skd.distill.config import DistillConfig
from skd.distill.errors import DistillError
from skd.distill.run_folder import RunFolder

AUTO = "auto"
_CONFIG = "config.yaml"
# What may differ when a run goes on: it changes neither weights nor results.
_FREE = {
    "run": {"out", "resume", "checkpoint_minutes", "dry_run", "tensorboard", "wandb", "device", "threads"},
    "engine": {"nproc", "log_interval", "max_bad_steps"},
    # The images of all processes count; their folder may have been moved.
    "data": {"data", "workers", "max_bad_images", "batch_size"},
}


@dataclasses.dataclass(frozen=True)
class OpenedRun:
    """A folder to write to.

    Attributes:
        folder: of the run.
        state: the checkpoint to go on from, or None.
        note: what the user should know of it, or "".
    """

    folder: RunFolder
    state: dict | None
    note: str


def open_run(config: DistillConfig, processes: int = 1) -> OpenedRun:
    """The folder of ``--out`` or ``--resume``.

    A run may go on in another number of processes, if together they take as many images per step as before.

    Raises:
        DistillError: it cannot be made or written to, has no checkpoint, or is of another configuration, whose
            differences are named.
    """
    asked = config.run.resume
    if asked is None:
        return OpenedRun(RunFolder(config.run.out, config.task), None, "")
    path = config.run.out if asked == AUTO else Path(asked)
    if path is None:
        raise DistillError("--resume auto needs --out DIR, the folder to look for a checkpoint in")
    checkpoints = Checkpoints(path)
    if asked == AUTO and not checkpoints.exist():
        # A run that ended before its first checkpoint leaves a folder with nothing in it to lose.
        started = (path / _CONFIG).exists()
        return OpenedRun(RunFolder(path, config.task, used=started), None, "")
    if not path.is_dir():
        raise DistillError(f"--resume {path} is no folder; give the folder of a run, or auto with --out")
    state, note = checkpoints.load()
    differences = describe_differences(state["config"], config.to_dict())
    before, now = _images(state["config"], state["processes"]), _images(config.to_dict(), processes)
    if before != now:
        differences.append(
            f"a step took {before} images in {state['processes']} processes and takes {now} in {processes}"
        )
    if differences:
        raise DistillError(
            f"the run in {path} has another configuration: {'; '.join(differences)}; go on with the same one, or "
            "start a new run in another folder"
        )
    return OpenedRun(RunFolder(path, config.task, used=True), state, note)


def _images(config: dict, processes: int) -> int:
    return config["data"]["batch_size"] * processes


def describe_differences(before: dict, now: dict) -> list[str]:
    """What differs between two configurations and would change the results, one clause each."""
    return [
        f"{section}.{name} was {before.get(section, {}).get(name)!r} and is {value!r}"
        for section, values in now.items()
        for name, value in values.items()
        if name not in _FREE.get(section, ()) and before.get(section, {}).get(name) != value
    ]
