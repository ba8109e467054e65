"""What a run has so far: finished trainings and the one under way, as its checkpoint keeps them."""

import time
from dataclasses import asdict, dataclass, field

from skd.distill.checkpoint import Checkpoints
from skd.distill.dynamics import Dynamics
from skd.distill.engine import EpochResult, Training


@dataclass
class Entry:
    """One finished training.

    Attributes:
        name, seed: of its arm, or "teacher".
        results: of its epochs.
        seconds: it took.
        costs: seconds per step of each part.
    """

    name: str
    seed: int
    results: list[EpochResult]
    seconds: float
    costs: dict[str, float] = field(default_factory=dict)


class Ledger:
    """The progress of a run, in memory and in its checkpoints.

    Args:
        checkpoints: where it is kept; None in the processes that do not write.
        config: what runs, as plain dicts.
        processes: how many run it.
        minutes: least time between two checkpoints within an epoch.
    """

    def __init__(self, checkpoints: Checkpoints | None, config: dict, processes: int, minutes: float):
        self.checkpoints, self.config, self.processes, self.minutes = checkpoints, config, processes, minutes
        self.entries: dict[tuple[str, int], Entry] = {}
        self.layers: list[list] | None = None  # what --layers auto chose: the student's and the teacher's
        self.dynamics: Dynamics | None = None
        self.before = 0.0  # seconds of the run before it was interrupted
        self.bad_images: dict[str, str] = {}
        self._under_way: dict | None = None
        self._dynamics_state: dict | None = None
        self._began = self._saved = time.perf_counter()

    @property
    def seconds(self) -> float:
        """Of the whole run so far, without its interruptions."""
        return self.before + time.perf_counter() - self._began

    @property
    def rows(self) -> list[dict]:
        """The rows of metrics.csv, those of finished trainings."""
        return [
            {"arm": entry.name, "seed": entry.seed, **asdict(result)}
            for entry in self.entries.values()
            for result in entry.results
        ]

    @property
    def under_way(self) -> tuple[tuple[str, int], float] | None:
        """Which training a checkpoint was made in, and the share of its epochs that was done."""
        if self._under_way is None:
            return None
        saved = self._under_way
        return (saved["name"], saved["seed"]), saved["share"]

    def watch(self, dynamics: Dynamics) -> None:
        """Keep the dynamics too, from where an interrupted run left them."""
        self.dynamics = dynamics
        if self._dynamics_state is not None:
            dynamics.load_state_dict(self._dynamics_state)

    def go_on(self, training: Training, name: str, seed: int) -> None:
        """Put a training where an interrupted run left it, if it did."""
        saved, self._under_way = self._under_way, None
        if saved is not None and (saved["name"], saved["seed"]) == (name, seed):
            training.load_state_dict(saved["training"])

    def finish(self, name: str, seed: int, training: Training) -> Entry:
        """Note a training that has ended, and save."""
        results = training.results
        entry = Entry(name, seed, results, sum(result.seconds for result in results), training.costs.mean())
        self.entries[name, seed] = entry
        self.save()
        return entry

    def save_if_due(self, name: str, seed: int, training: Training) -> None:
        if time.perf_counter() - self._saved > 60 * self.minutes:
            self.save(name, seed, training)

    def save(self, name: str | None = None, seed: int = 0, training: Training | None = None) -> None:
        """Write a checkpoint, with the training under way if there is one.

        Raises:
            DistillError: it cannot be written.
        """
        self._saved = time.perf_counter()
        if self.checkpoints is None:
            return
        under_way = None
        if training is not None:
            share = training.done_steps / training.total_steps
            under_way = {"name": name, "seed": seed, "share": share, "training": training.state_dict()}
        dynamics = self._dynamics_state if self.dynamics is None else self.dynamics.state_dict()
        self.checkpoints.save(
            {
                "config": self.config,
                "processes": self.processes,
                "finished": [asdict(entry) for entry in self.entries.values()],
                "under_way": under_way,
                "layers": self.layers,
                "dynamics": dynamics,
                "bad_images": self.bad_images,
                "seconds": self.seconds,
            }
        )

    def load_state_dict(self, state: dict) -> None:
        """Take up the state of a checkpoint."""
        for saved in state["finished"]:
            entry = Entry(**{**saved, "results": [EpochResult(**result) for result in saved["results"]]})
            self.entries[entry.name, entry.seed] = entry
        self.layers, self._under_way = state["layers"], state["under_way"]
        self._dynamics_state, self.bad_images = state["dynamics"], state["bad_images"]
        self.before = state["seconds"]
