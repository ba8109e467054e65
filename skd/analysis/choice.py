"""From a teacher's profile to pairs of layers and the sentences that say why."""

from collections.abc import Sequence

from skd.analysis.layers_file import LayerChoice
from skd.analysis.pairs import pair_layers
from skd.analysis.profile import SpectralProfile


def choose_layers(
    teacher: SpectralProfile, student: str, student_layers: Sequence[str], k: int
) -> tuple[LayerChoice, list[str]]:
    """The teacher's k hottest layers, each with its student layer (:func:`skd.pair_layers`).

    Args:
        teacher: profile of all its blocks or stages.
        student: name of the student.
        student_layers: names of all its blocks or stages.
        k: number of pairs.

    Returns:
        The choice, and lines that say what was chosen and why.
    """
    student_ids, teacher_ids = pair_layers(len(student_layers), teacher, k)
    ranked = teacher.ranked()
    images = f"{teacher.images} images{f' ({teacher.data})' if teacher.data else ''}"
    reasons = [
        f"Of the {len(teacher)} layers of teacher {teacher.title} these {k} have the greatest mean spectral intensity",
        f"over {images}, norm={teacher.norm!r}.",
        f"Each is paired with the layer of the student {student} at the same distance from the nearer end.",
    ]
    if teacher.random_weights:
        reasons.append("The teacher's weights were random: this choice means nothing.")
    if teacher.norm == "forward" and len(set(teacher.channels)) > 1:
        reasons.append("Its layers differ in width, and norm='forward' favours the narrow ones; 'ortho' does not.")
    names = [(student_layers[s], teacher.layers[t]) for s, t in zip(student_ids, teacher_ids, strict=True)]
    wide = [max(len(pair[side]) for pair in names) for side in (0, 1)]
    for (s_name, t_name), t in zip(names, teacher_ids, strict=True):
        reasons.append(
            f"  student {s_name:<{wide[0]}}  teacher {t_name:<{wide[1]}}  "
            f"intensity {teacher.layer_intensity[t]:.4g}, rank {ranked.index(t) + 1} of {len(teacher)}"
        )
    return LayerChoice(tuple(student_ids), tuple(teacher_ids), student, teacher.title), reasons
