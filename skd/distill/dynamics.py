"""Distillation dynamics: the spectra of a student's layers against the teacher's, before and after every epoch."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from timm.utils import unwrap_model
from torch import Tensor, nn

from skd.analysis.profile import SpectralProfile
from skd.distill.config import LayerId
from skd.distill.probe import Layers, find_layers, look, spectra_at, spectral_gap, undisturbed

COLUMNS = (
    "arm",
    "seed",
    "epoch",
    "layer",
    "name",
    "intensity",
    "teacher_layer",
    "teacher_name",
    "teacher_intensity",
    "gap",
)
"""Of dynamics.csv; :meth:`Dynamics.observe` says what they hold."""


@dataclass
class History:
    """One student from before its first epoch, which is epoch 0, to the latest.

    Attributes:
        arm, seed: which student.
        first, latest: all spectra at the first and at the latest of the epochs.
        first_aligned, latest_aligned: per pair the student's spectrum at the pair's common width, [n//2+1] float64.
        epochs: those at which it was looked at, rising.
        intensities: per epoch the mean intensity of every layer, [layers] float64.
        gaps: per epoch the gap of every aligned pair (:func:`skd.distill.probe.spectral_gap`), [pairs] float64.
        rows: per epoch its rows of dynamics.csv.
    """

    arm: str
    seed: int
    first: SpectralProfile
    latest: SpectralProfile
    first_aligned: list[Tensor]
    latest_aligned: list[Tensor]
    epochs: list[int] = field(default_factory=list)
    intensities: list[Tensor] = field(default_factory=list)
    gaps: list[Tensor] = field(default_factory=list)
    rows: list[list[dict]] = field(default_factory=list)

    def forget_from(self, epoch: int) -> None:
        """Drop what was seen at this epoch and later."""
        kept = sum(known < epoch for known in self.epochs)
        for of_epochs in (self.epochs, self.intensities, self.gaps, self.rows):
            del of_epochs[kept:]


class Dynamics:
    """Looks at the students with a few fixed images, and keeps what it saw.

    Kept are the intensity of every layer and the gap of every pair at every epoch, and whole spectra of the first and
    the latest epoch.

    The gap of a pair compares its maps as :class:`skd.SpectralLoss` does, the wider one averaged over channels to the
    narrower width: where that loss is 0, so is the gap. Averaging lowers the intensity, so a narrow student that is
    aligned well has less of it than the teacher's own layer.

    Args:
        images: [N, channels, H, W], normalised for the student (:func:`skd.distill.probe.probe_images`).
        teacher: looked at once, when the first student is; None looks at students alone.
        teacher_images: the same images for the teacher, or what makes them of ``images``; None for ``images``.
        data: what the images are, for pictures.

    Attributes:
        teacher_profile: of all blocks of the teacher and what else is aligned; None before the first student.
        targets: per pair the teacher's spectrum at the pair's common width, [n//2+1] float64.
        pairs: per pair the index of its layer in the students' profiles, and in the teacher's.
        student_blocks, teacher_blocks: how many layers of the profiles are blocks or stages; they come first.
        histories: one per student, in the order in which they came.
        notes: sentences about what could not be seen.
    """

    def __init__(
        self,
        images: Tensor,
        teacher: nn.Module | None = None,
        *,
        teacher_images: Tensor | Callable[[Tensor], Tensor] | None = None,
        data: str = "",
    ):
        self.images, self.data = images, data
        self._teacher = None if teacher is None else unwrap_model(teacher)
        self._teacher_images = images if teacher_images is None else teacher_images
        self._asked: list[list[LayerId]] | None = None
        self._layers: Layers | None = None
        self.teacher_profile: SpectralProfile | None = None
        self.targets: list[Tensor] = []
        self.pairs: list[tuple[int, int]] = []
        self.student_blocks = self.teacher_blocks = 0
        self.histories: list[History] = []
        self.notes: list[str] = []

    def observe(
        self,
        arm: str,
        seed: int,
        epoch: int,
        student_model: nn.Module,
        student_layers: Sequence[LayerId],
        teacher_layers: Sequence[LayerId],
    ) -> list[dict]:
        """Look at a student; its modes, its weights and the global random generators stay as they are.

        What was seen of this student at this epoch or later is forgotten, so a training can go back.

        Args:
            arm, seed: which student.
            epoch: how many epochs it has been trained for; 0 before the first.
            student_model: the student, wrapped or compiled or not.
            student_layers, teacher_layers: the pairs, the same in all calls; may be empty.

        Returns:
            A row of dynamics.csv per layer of the student: ``layer`` (its number: blocks from 0, then what else is
            aligned), its ``name`` and mean ``intensity``; for an aligned layer, once per pair, ``teacher_layer``,
            ``teacher_name``, ``teacher_intensity`` and ``gap``, which are None for the others. No rows, and a sentence
            in ``notes``, where a student's maps are not finite.

        Raises:
            ValueError: lists of different length, or other pairs than before.
        """
        self._check_pairs(student_layers, teacher_layers)
        student = unwrap_model(student_model)
        try:
            if self._layers is None:
                self._layers = find_layers(student, student_layers)
            profile = look(student, self.images, self._layers.names, self.data)
            if self._teacher is not None and self.teacher_profile is None:
                self._look_at_teacher(profile, self._layers, teacher_layers)
            layers, widths = [s for s, _ in self.pairs], self._widths(profile)
            aligned = spectra_at(student, self.images, profile, layers, widths)
        except (ValueError, RuntimeError) as error:  # no reason to end a training of days
            self.notes.append(f'no spectra of "{arm}", seed {seed}, after epoch {epoch}: {error}')
            return []
        self.student_blocks = self._layers.blocks
        gaps = [spectral_gap(a, b) for a, b in zip(aligned, self.targets, strict=True)]
        history = self._history(arm, seed, epoch, profile, aligned)
        history.epochs.append(epoch)
        history.intensities.append(profile.layer_intensity)
        history.gaps.append(torch.tensor(gaps, dtype=torch.float64))
        history.rows.append(self._rows_of(history))
        history.latest, history.latest_aligned = profile, aligned
        return history.rows[-1]

    @property
    def widths(self) -> list[int]:
        """Per pair the channels of its narrower map; empty before the first student."""
        return self._widths(self.histories[0].first) if self.histories else []

    @property
    def target_intensity(self) -> Tensor:
        """Per pair the mean intensity of the teacher at the common width, [pairs] float64."""
        if not self.pairs or not self.histories:
            return torch.zeros(0, dtype=torch.float64)
        teacher = self.teacher_profile
        names = tuple(teacher.layers[t] for _, t in self.pairs)
        # A profile takes the mean over the negative frequencies too.
        pooled = SpectralProfile(names, self.targets, tuple(self.widths), None, teacher.images, teacher.norm, "")
        return pooled.layer_intensity

    @property
    def rows(self) -> list[dict]:
        """The rows of all students and epochs."""
        return [row for history in self.histories for rows in history.rows for row in rows]

    def state_dict(self) -> dict:
        """All that was seen, as tensors, numbers, strings, lists and dicts."""
        return {
            "asked": self._asked,
            "teacher_profile": None if self.teacher_profile is None else _packed(self.teacher_profile),
            "targets": list(self.targets),
            "pairs": [list(pair) for pair in self.pairs],
            "blocks": [self.student_blocks, self.teacher_blocks],
            "notes": list(self.notes),
            "histories": [
                {
                    "arm": history.arm,
                    "seed": history.seed,
                    "first": _packed(history.first),
                    "latest": _packed(history.latest),
                    "first_aligned": list(history.first_aligned),
                    "latest_aligned": list(history.latest_aligned),
                    "epochs": list(history.epochs),
                    "intensities": torch.stack(history.intensities),
                    "gaps": torch.stack(history.gaps),
                }
                for history in self.histories
            ],
        }

    def load_state_dict(self, state: dict) -> None:
        """Go on from there; the teacher is not looked at again."""
        self._asked, teacher = state["asked"], state["teacher_profile"]
        self.teacher_profile = None if teacher is None else _unpacked(teacher)
        self.targets, self.notes = list(state["targets"]), list(state["notes"])
        self.pairs = [(student, teacher) for student, teacher in state["pairs"]]
        self.student_blocks, self.teacher_blocks = state["blocks"]
        self.histories = []
        for saved in state["histories"]:
            spectra = {key: _unpacked(saved[key]) for key in ("first", "latest")}
            history = History(**{**saved, **spectra, "epochs": [], "intensities": [], "gaps": []})
            for epoch, intensities, gaps in zip(saved["epochs"], saved["intensities"], saved["gaps"], strict=True):
                history.epochs.append(epoch)
                history.intensities.append(intensities)
                history.gaps.append(gaps)
                history.rows.append(self._rows_of(history))
            self.histories.append(history)

    def _check_pairs(self, student_layers: Sequence[LayerId], teacher_layers: Sequence[LayerId]) -> None:
        asked = [list(student_layers), list(teacher_layers)]
        if len(asked[0]) != len(asked[1]):
            raise ValueError(f"student layers {asked[0]} and teacher layers {asked[1]} make no pairs")
        if self._asked not in (None, asked):
            raise ValueError(f"the pairs of layers were {self._asked} before and are {asked} now; keep them in a run")
        self._asked = asked

    def _look_at_teacher(self, student: SpectralProfile, layers: Layers, teacher_layers: Sequence[LayerId]) -> None:
        images = self._teacher_images
        try:
            if not isinstance(images, Tensor):
                with undisturbed(self._teacher), torch.no_grad():
                    images = images(self.images.to(next(self._teacher.parameters()).device))
            found = find_layers(self._teacher, teacher_layers)
            teacher = look(self._teacher, images, found.names, self.data)
            pairs = list(zip(layers.asked, found.asked, strict=True))
            widths = [min(student.channels[s], teacher.channels[t]) for s, t in pairs]
            targets = spectra_at(self._teacher, images, teacher, found.asked, widths)
        except (ValueError, RuntimeError) as error:
            raise RuntimeError(f"the teacher cannot be looked at: {error}") from error
        self.teacher_profile, self.teacher_blocks = teacher, found.blocks
        self.pairs, self.targets = pairs, targets

    def _widths(self, student: SpectralProfile) -> list[int]:
        return [min(student.channels[s], self.teacher_profile.channels[t]) for s, t in self.pairs]

    def _history(self, arm: str, seed: int, epoch: int, profile: SpectralProfile, aligned: list[Tensor]) -> History:
        """What is known of a student from before ``epoch``; if nothing, what is seen now is the first."""
        for history in self.histories:
            if (history.arm, history.seed) == (arm, seed):
                history.forget_from(epoch)
                if not history.epochs:
                    history.first, history.first_aligned = profile, aligned
                return history
        self.histories.append(History(arm, seed, profile, profile, aligned, aligned))
        return self.histories[-1]

    def _rows_of(self, history: History) -> list[dict]:
        """The rows of its latest epoch."""
        rows, teacher = [], self.teacher_profile
        intensities, gaps = history.intensities[-1].tolist(), history.gaps[-1].tolist()
        for layer, (name, intensity) in enumerate(zip(history.first.layers, intensities, strict=True)):
            own = (history.arm, history.seed, history.epochs[-1], layer, name, intensity)
            partners = [
                (t, teacher.layers[t], teacher.layer_intensity[t].item(), gap)
                for (s, t), gap in zip(self.pairs, gaps, strict=True)
                if s == layer
            ]
            rows += [dict(zip(COLUMNS, (*own, *theirs), strict=True)) for theirs in partners or [(None,) * 4]]
        return rows


def _packed(profile: SpectralProfile) -> dict:
    return {
        "layers": list(profile.layers),
        "intensity": list(profile.intensity),
        "channels": list(profile.channels),
        "images": profile.images,
        "norm": profile.norm,
        "title": profile.title,
        "data": profile.data,
    }


def _unpacked(state: dict) -> SpectralProfile:
    tuples = {"layers": tuple(state["layers"]), "channels": tuple(state["channels"])}
    return SpectralProfile(**{**state, **tuples, "entropy": None})
