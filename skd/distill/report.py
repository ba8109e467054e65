"""What a run found: the summary, the table on the screen, and what the numbers allow to say."""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

STANDARD_ERRORS = 2


@dataclass(frozen=True)
class ArmResult:
    """One arm over its seeds, each tested after its last epoch.

    Attributes:
        name, label: of the arm, for files and for people.
        correct: test images recognised, per seed.
        test_images: how many could be read and were tested, per seed.
        parameters: of the trained model.
        seconds: training and testing, per seed.
        ema_top1: percent of those images that the averaged weights recognise, per seed; empty without an average.
    """

    name: str
    label: str
    correct: tuple[int, ...]
    test_images: tuple[int, ...]
    parameters: int
    seconds: tuple[float, ...]
    ema_top1: tuple[float, ...] = ()

    @property
    def top1(self) -> list[float]:
        """Percent of the images that were tested, per seed."""
        return [100 * correct / max(n, 1) for correct, n in zip(self.correct, self.test_images, strict=True)]

    @property
    def mean(self) -> float:
        return statistics.fmean(self.top1)

    @property
    def deviation(self) -> float | None:
        """Sample standard deviation over the seeds in points; None for one seed."""
        return statistics.stdev(self.top1) if len(self.correct) > 1 else None

    def to_dict(self) -> dict:
        return {
            "label": self.label,
            "test_top1_mean": self.mean,
            "test_top1_deviation": self.deviation,
            "test_top1": self.top1,
            "test_correct": list(self.correct),
            "test_images": list(self.test_images),
            "parameters": self.parameters,
            "seconds": list(self.seconds),
            "ema_top1": list(self.ema_top1),
        }


def noise(a: ArmResult, b: ArmResult) -> float:
    """Two standard errors of the difference of two arms' mean top-1, in points.

    Two sources add up: the test images are a sample (binomial, p (1 - p) / images for each arm; not smaller for more
    seeds, as all are tested on the same images; if not all of them could be read every time, the fewest count), and
    the seeds are a sample (variance / seeds). That both arms see the same images makes the true error smaller; the
    figure is on the careful side. One seed cannot tell its own part.
    """
    variance = 0.0
    for arm in (a, b):
        images = _fewest(arm)
        # Half an image either way keeps a perfect score from having no error at all.
        p = min(max(arm.mean / 100, 0.5 / images), 1 - 0.5 / images)
        variance += 100**2 * p * (1 - p) / images
        if arm.deviation is not None:
            variance += arm.deviation**2 / len(arm.correct)
    return STANDARD_ERRORS * math.sqrt(variance)


def conclusions(teacher: ArmResult, students: Sequence[ArmResult], *, task: str, quick: bool) -> list[str]:
    """Sentences that say what the numbers show, and no more; each arm is compared with the one before it.

    Args:
        teacher: tested once.
        students: the arms that were trained, one or more; a single one is compared with nothing.
        task: "digits" and "gratings" are called demonstrations.
        quick: whether the run was too short to compare anything.
    """
    counts = [n for arm in (teacher, *students) for n in arm.test_images]
    images = min(counts)
    one = 100 / max(images, 1)
    sentences = []
    if quick:
        sentences.append(
            "A quick run: it shows that everything works; its accuracies mean nothing and are not compared."
        )
    if task == "digits":
        sentences.append(
            f"This is a demonstration on {images} test images of 8x8 pixels, where one image is {one:.2f} points; "
            "it cannot tell which loss is better on real photographs."
        )
    elif task == "gratings":
        sentences.append(
            f"This is a demonstration on {images} generated images of gratings, where one image is {one:.2f} points; "
            "it cannot tell which loss is better on real photographs."
        )
    else:
        sentences.append(f"The models were tested on {images} images; one image is {one:.2g} points.")
    if min(counts) != max(counts):
        sentences.append(
            f"Some test images could be read at one time and not at another: a test was on {min(counts)} to "
            f"{max(counts)} of them, which alone can make a difference."
        )
    if quick:
        return sentences
    pairs = [(arm, base) for base, arm in zip(students, students[1:], strict=False)]
    if len(students) > 2:
        pairs.append((students[-1], students[0]))
    sentences += [_comparison(arm, base) for arm, base in pairs]
    alone = next((arm for arm in students if arm.name == "labels"), None)
    if alone is not None and teacher.mean <= alone.mean:
        sentences.append(
            f"The teacher ({teacher.mean:.2f}%) is not better than the student trained on labels only "
            f"({alone.mean:.2f}%), so there is little to learn from it."
        )
    if len(students[0].correct) == 1:
        sentences.append("One seed cannot show how much a run varies by chance; --seeds 5 would.")
    return sentences


def _comparison(arm: ArmResult, base: ArmResult) -> str:
    difference = arm.mean - base.mean
    limit = noise(arm, base)
    text = f'"{arm.label}" against "{base.label}": {_points(difference)} ({_images(difference * _fewest(arm) / 100)})'
    if abs(difference) <= limit:
        return f"{text}, within the noise of {limit:.2f} points (two standard errors): no difference is shown."
    seeds = len(arm.correct)
    over = "one seed" if seeds == 1 else f"{seeds} seeds"
    return f"{text}, more than the noise of {limit:.2f} points (two standard errors), for these images and {over}."


def _fewest(arm: ArmResult) -> int:
    """Images any seed was tested on; 1 if none could be read, so that nothing is divided by 0."""
    return max(min(arm.test_images), 1)


def _points(difference: float) -> str:
    return f"{difference:+.2f} points"


def _images(count: float) -> str:
    rounded = round(count, 1)
    whole = f"{rounded:+.0f}" if rounded == int(rounded) else f"{rounded:+.1f}"
    return f"{whole} image{'' if abs(rounded) == 1 else 's'}"


def print_table(console, results: Sequence[ArmResult], title: str) -> None:
    """The final table, to a rich console."""
    from rich.table import Table

    table = Table(title=title, title_justify="left")
    table.add_column("model and training")
    seeds = max(len(result.correct) for result in results)
    if seeds > 1:
        table.caption = f"mean ± standard deviation over {seeds} seeds; seconds of all seeds"
        table.caption_justify = "left"
    averaged = any(result.ema_top1 for result in results)
    for column in ("test top-1 (%)", *(["averaged (%)"] if averaged else []), "images", "parameters", "seconds"):
        table.add_column(column, justify="right")
    for result in results:
        table.add_row(
            result.label,
            spread(result.top1),
            *([spread(result.ema_top1)] if averaged else []),
            recognised(result.correct, result.test_images),
            f"{result.parameters:,}",
            f"{sum(result.seconds):.1f}",
        )
    console.print(table)


def recognised(correct: Sequence[int], images: Sequence[int]) -> str:
    """How many of how many test images, means over the seeds."""
    return " of ".join(f"{statistics.fmean(counts):.1f}".removesuffix(".0") for counts in (correct, images))


def spread(values: Sequence[float]) -> str:
    """Mean and, of several, sample standard deviation; empty for no values."""
    if not values:
        return ""
    deviation = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.2f}{deviation}"
