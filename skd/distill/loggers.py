"""The rows of metrics.csv for TensorBoard and Weights & Biases as well."""

import secrets
import warnings
from pathlib import Path
from types import ModuleType
from typing import Protocol

from skd.distill.config import DistillConfig
from skd.distill.errors import DistillError

TENSORBOARD_FOLDER = "tensorboard"
WANDB_FILE = "wandb.txt"
"""Keeps the part of the names on Weights & Biases that tells this run from others."""

_PLACE = ("arm", "seed", "epoch")
_GROUPS = ("train", "test", "ema")


class _Logger(Protocol):
    name: str
    remedy: str

    def open(self, arm: str, seed: int, epoch: int) -> None:
        """What follows belongs to this training and begins with this epoch."""

    def log(self, epoch: int, numbers: dict[str, float]) -> None: ...

    def close(self) -> None: ...


class MetricLoggers:
    """TensorBoard if it is installed, Weights & Biases if asked for; each arm and seed is a run of its own there.

    They are an extra: one that fails once it has worked is given up with a warning, because metrics.csv has everything.

    Args:
        folder: of the run.
        config: its ``run.tensorboard`` and ``run.wandb`` decide; the whole is told to Weights & Biases.
        resume: whether the run goes on; rows that come again then replace the earlier ones.

    Raises:
        DistillError: what is asked for is not installed.
    """

    def __init__(self, folder: Path, config: DistillConfig, resume: bool = False):
        self._loggers: list[_Logger] = []
        self._proven: set[str] = set()
        self._training: tuple[str, int] | None = None
        if config.run.tensorboard is not False:
            writer = _summary_writer(required=config.run.tensorboard is True)
            if writer is not None:
                self._loggers.append(_TensorBoard(folder / TENSORBOARD_FOLDER, writer, resume))
        if config.run.wandb is not None:
            self._loggers.append(_Wandb(folder, config, resume))

    def open(self, arm: str, seed: int, epoch: int) -> None:
        """A training begins or goes on, and its next row is that of ``epoch``; the first row does this as well.

        Raises:
            DistillError: a logger cannot start.
        """
        if self._training != (arm, seed):
            self._training = (arm, seed)
            self._each(lambda logger: logger.open(arm, seed, epoch))

    def log(self, row: dict) -> None:
        """Pass on a row of metrics.csv: arm, seed, epoch, and numbers, of which some may be missing (None or "")."""
        self.open(row["arm"], row["seed"], row["epoch"])
        given = {name: value for name, value in row.items() if name not in _PLACE and value not in (None, "")}
        numbers = {_tag(name): float(value) for name, value in given.items()}
        self._each(lambda logger: logger.log(row["epoch"], numbers))

    def close(self) -> None:
        """Write what is still under way, and end."""
        self._each(lambda logger: logger.close())
        self._loggers.clear()

    def _each(self, call) -> None:
        for logger in list(self._loggers):
            try:
                call(logger)
            except Exception as error:  # whatever file systems, networks and their clients raise
                reason = _first_line(error)
                if logger.name not in self._proven:
                    raise DistillError(f"{logger.name} cannot start ({reason}); {logger.remedy}") from error
                warnings.warn(f"{logger.name} failed and is given up: {reason}", RuntimeWarning, stacklevel=3)
                self._loggers.remove(logger)
            else:
                self._proven.add(logger.name)


def check_loggers(config: DistillConfig) -> None:
    """Refuse loggers that :class:`MetricLoggers` would refuse, and open nothing.

    Args:
        config: of the run.

    Raises:
        DistillError: as there.
    """
    if config.run.tensorboard is not False:
        _summary_writer(required=config.run.tensorboard is True)
    if config.run.wandb is not None:
        _wandb_client(config.run.wandb)


class _TensorBoard:
    """Events under ``folder/<arm>-seed<seed>``."""

    name = "TensorBoard"
    remedy = "mend it, or give --tensorboard False"

    def __init__(self, folder: Path, writer_type: type, resume: bool):
        self._folder, self._writer_type, self._resume = folder, writer_type, resume
        self._writer = None

    def open(self, arm: str, seed: int, epoch: int) -> None:
        self.close()
        folder = self._folder / f"{arm}-seed{seed}"
        # Earlier events of this epoch and of those after it are then not shown.
        self._writer = self._writer_type(str(folder), purge_step=epoch if self._resume else None)

    def log(self, epoch: int, numbers: dict[str, float]) -> None:
        for tag, value in numbers.items():
            self._writer.add_scalar(tag, value, epoch)
        self._writer.flush()

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()
            self._writer = None


class _Wandb:
    """Runs of one group; WANDB_MODE, WANDB_ENTITY and the other variables of the client are its own affair."""

    name = "Weights & Biases"
    remedy = "run wandb login, set WANDB_MODE=offline, or leave --wandb out"

    def __init__(self, folder: Path, config: DistillConfig, resume: bool):
        self._wandb, self._folder, self._config = _wandb_client(config.run.wandb), folder, config
        self._token = _token(folder / WANDB_FILE, resume)
        self._run = None

    def open(self, arm: str, seed: int, epoch: int) -> None:
        self.close()
        self._run = self._wandb.init(
            project=self._config.run.wandb,
            group=f"{self._folder.name}-{self._token}",
            name=f"{arm}-seed{seed}",
            id=f"{self._token}-{arm}-{seed}",
            resume="allow",
            dir=str(self._folder),
            config={**self._config.to_dict(), "arm": arm, "seed": seed},
        )

    def log(self, epoch: int, numbers: dict[str, float]) -> None:
        # An epoch that was logged before the run was interrupted is ignored there: its step is no later than the last.
        self._run.log(numbers, step=epoch)

    def close(self) -> None:
        if self._run is not None:
            self._run.finish()
            self._run = None


def _summary_writer(required: bool) -> type | None:
    """torch's writer of events; None without TensorBoard."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        if required:
            raise DistillError(
                "--tensorboard True needs TensorBoard, which is not installed: pip install tensorboard"
            ) from error
        return None
    except Exception as error:  # an installation whose parts do not go together
        raise DistillError(
            f"TensorBoard is installed but broken ({_first_line(error)}); {_TensorBoard.remedy}"
        ) from error
    return SummaryWriter


def _wandb_client(project: str) -> ModuleType:
    """The module of Weights & Biases."""
    try:
        import wandb
    except ImportError as error:
        raise DistillError(
            f"--wandb {project} needs Weights & Biases, which is not installed: pip install wandb"
        ) from error
    return wandb


def _token(file: Path, resume: bool) -> str:
    """Eight letters that name this run, the same ones after a resumption."""
    if resume and file.is_file():
        return file.read_text(encoding="utf-8").strip()
    token = secrets.token_hex(4)
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(token + "\n", encoding="utf-8")
    return token


def _tag(column: str) -> str:
    """ "train_loss" is shown as "train/loss"; what belongs to no group keeps its name."""
    group, _, rest = column.partition("_")
    return f"{group}/{rest}" if group in _GROUPS and rest else column


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
