"""Which layer of the student goes with which of the teacher."""

from collections.abc import Sequence

from skd.analysis.profile import SpectralProfile


def pair_layers(
    student_depth: int, teacher_profile_or_depth: SpectralProfile | int, k: int
) -> tuple[list[int], list[int]]:
    """Choose k layers of the teacher and pair each with a layer of the student (after SpectralKD, arXiv 2412.19055).

    Of a profile the k layers of greatest intensity are taken (:meth:`skd.SpectralProfile.hottest`); of a depth the two
    arms of the U that the paper finds in CaiT, the first k//4 layers and the last ones: 0 1 18 .. 23 for 8 of 24.

    A teacher layer is paired with the student layer at the same distance from the nearer end (the middle one counts
    from the back): with 12 student blocks that is 0 1 6 .. 11, and models of equal depth pair one to one. Where a
    shallower student has two teacher layers for one of its own, the later one keeps its place and the earlier moves
    towards the front, so that both lists always rise strictly.

    Args:
        student_depth: number of the student's blocks or stages.
        teacher_profile_or_depth: a profile of all the teacher's blocks or stages, or their number.
        k: number of pairs.

    Returns:
        ``(student_ids, teacher_ids)``, both of length k, counted from 0 and strictly rising.

    Raises:
        TypeError: an argument of another type.
        ValueError: a depth below 1, or k not from 1 to the smaller depth.
    """
    profile = teacher_profile_or_depth if isinstance(teacher_profile_or_depth, SpectralProfile) else None
    teacher_depth = teacher_profile_or_depth if profile is None else len(profile)
    for name, number in (("student_depth", student_depth), ("the teacher's depth", teacher_depth), ("k", k)):
        if isinstance(number, bool) or not isinstance(number, int):
            also = " or a SpectralProfile" if number is teacher_depth else ""
            raise TypeError(f"{name} is a whole number{also}, not {number!r}")
        if number < 1:
            raise ValueError(f"{name} is {number}; it must be at least 1")
    for role, depth in (("student", student_depth), ("teacher", teacher_depth)):
        if k > depth:
            raise ValueError(f"k={k} pairs need {k} layers of the {role}, which has {depth}; give k={depth} or less")
    if profile is None:
        first = k // 4
        teacher_ids = [*range(first), *range(teacher_depth - (k - first), teacher_depth)]
    else:
        teacher_ids = profile.hottest(k)
    return _partners(student_depth, teacher_depth, teacher_ids), teacher_ids


def _partners(student_depth: int, teacher_depth: int, teacher_ids: Sequence[int]) -> list[int]:
    """The student layer for each of the strictly rising ``teacher_ids``."""
    partners = []
    for layer in teacher_ids:
        from_back = teacher_depth - 1 - layer
        wanted = layer if layer < from_back else student_depth - 1 - from_back
        partners.append(min(max(wanted, 0), student_depth - 1))
    for i in reversed(range(len(partners) - 1)):
        partners[i] = min(partners[i], partners[i + 1] - 1)
    # At the front there may be too little room now. With entry i raised to i, entry i+1 is at i+1 or above.
    return [max(partner, i) for i, partner in enumerate(partners)]
