"""What is said at the end of a measurement on the CPU: ratios and shares over all configurations, and the goals."""

import math
from collections.abc import Iterable, Sequence

from skd.bench.report import WRONG, Group


def closing(groups: Sequence[Group], judge: bool = True) -> str:
    """The ratios of skd per operation, the shares, the goals that were missed (if asked), and what is wrong."""
    lines = []
    for operation in dict.fromkeys(group.case.operation for group in groups):
        mine = [group for group in groups if group.case.operation == operation]
        lines += [*_ratios(operation, mine), *_shares(operation, mine)]
    lines += _goals(groups) if judge else []
    for group in groups:
        wrong = [result.variant.name for result in group.results if result.status == WRONG]
        lines += [f"WRONG: {name} on {group.case.name}, {group.threads} threads" for name in wrong]
    return "\n".join(lines)


def _ratios(operation: str, groups: Sequence[Group]) -> list[str]:
    pairs = dict.fromkeys((y.ours, y.theirs, group.case.kind) for group in groups for y in group.case.yardsticks)
    lines = []
    for ours, theirs, kind in pairs:
        mine = [group for group in groups if group.case.kind == kind]
        ratios = [ratio for group in mine if (ratio := group.ratio(ours, group.headline, theirs)) is not None]
        floors = [factor for group in mine if (factor := group.times_floor(ours)) is not None]
        if not ratios:
            continue
        mean = math.exp(sum(map(math.log, ratios)) / len(ratios))
        line = f"{operation} {kind}, {ours} over {len(ratios)} configurations: {min(ratios):.2f} to "
        line += f"{max(ratios):.2f} times as fast as {theirs}, geometric mean {mean:.2f}"
        if floors and theirs == groups[0].case.baseline:
            line += f"; {min(floors):.2f} to {max(floors):.2f} times the {groups[0].case.floor}"
        lines.append(line)
    return lines


def _shares(operation: str, groups: Sequence[Group]) -> list[str]:
    shared = dict.fromkeys(r.variant for group in groups for r in group.results if r.variant.share is not None)
    lines = []
    for variant in shared:
        percent = [p for group in groups if (p := group.share(variant)) is not None]
        if percent:
            line = f"{operation}, {variant.name} over {len(percent)} configurations: {min(percent):.1f}% to "
            lines.append(line + f"{max(percent):.1f}% {variant.share.sentence}")
    return lines


def _goals(groups: Iterable[Group]) -> list[str]:
    """How many goals were reached, then each that was not."""
    reached, missed = 0, []
    for group in groups:
        subject = f"{group.case.name}, {group.threads} thread{'s' * (group.threads != 1)}"
        for y in group.case.yardsticks:
            ratio = group.ratio(y.ours, group.headline, y.theirs)
            if y.least is None or ratio is None:
                continue
            reached += ratio >= y.least
            if ratio < y.least:
                missed.append(f"NOT REACHED: {subject}: {y.ours} {ratio:.2f} times {y.theirs} (goal {y.least:g})")
        for result in group.results:
            share = result.variant.share
            percent = group.share(result.variant)
            if share is None or share.most is None or percent is None:
                continue
            reached += percent <= share.most
            if percent > share.most:
                text = f"{result.variant.name} {percent:.1f}% {share.sentence} (goal {share.most:g}%)"
                missed.append(f"NOT REACHED: {subject}: {text}")
    if not reached and not missed:
        return []
    return [f"goals: {reached} reached, {len(missed)} not reached", *missed]
