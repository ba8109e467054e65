"""Images of any kind as one thing: by number, decoded, with the number of their class."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from PIL import Image
from timm.data import ImageDataset
from timm.data.readers.reader_image_folder import ReaderImageFolder
from timm.data.readers.reader_image_in_tar import ReaderImageInTar
from torch.utils.data import Dataset

from skd.distill.errors import DistillError

_SHOWN = 5


class ImageSet:
    """The images of one part of a data set.

    Args:
        dataset: timm's ``ImageDataset``, or a torchvision data set that has no transform.
        title: for people.
        own_classes: names of the class numbers 0, 1, ... that ``dataset`` gives.
        classes: the same names in the order of the numbers that this set gives.
    """

    def __init__(self, dataset: Dataset, title: str, own_classes: Sequence[str], classes: Sequence[str]):
        self.dataset, self.title, self.classes = dataset, title, tuple(classes)
        numbers = {name: number for number, name in enumerate(classes)}
        self._numbers = [numbers[name] for name in own_classes]

    def __len__(self) -> int:
        return len(self.dataset)

    def load(self, index: int) -> tuple[Image.Image, int]:
        """The image in RGB and the number of its class.

        Raises:
            Exception: of any type, if it cannot be read or decoded; PIL's readers have none in common.
        """
        if isinstance(self.dataset, ImageDataset):
            # Its own __getitem__ would replace what cannot be read without saying which it was.
            file, own = self.dataset.reader[index]
            with file:
                image = Image.open(file).convert("RGB")
        else:
            image, own = self.dataset[index]
            image = image.convert("RGB")
        if own is None or not 0 <= own < len(self._numbers):
            raise ValueError(f"its class is {own}, and there are 0 to {len(self._numbers) - 1}")
        return image, self._numbers[own]

    def name(self, index: int) -> str:
        """The path of an image, within a tar file too; without one its number."""
        reader = getattr(self.dataset, "reader", None)
        if isinstance(reader, ReaderImageFolder):
            return reader.filename(index, absolute=True)
        if isinstance(reader, ReaderImageInTar):
            return path_in_tar(reader, index)
        return f"image {index} of {self.title}"


def path_in_tar(reader: ReaderImageInTar, index: int) -> str:
    """The path of a tar file, with that of an image in it behind."""
    inside, tar, tar_inside = reader.samples[index]
    return "/".join(filter(None, (reader.root, tar, tar_inside and tar_inside.name, inside.name)))


def check_classes(title: str | Path, classes: Mapping[str, Sequence[str]]) -> None:
    """Whether the two parts, by what to call them, have the same class names in any order.

    Raises:
        DistillError: they have not.
    """
    (first, first_names), (second, second_names) = classes.items()
    only = {first: sorted({*first_names} - {*second_names}), second: sorted({*second_names} - {*first_names})}
    if any(only.values()):
        text = " and ".join(f"only {part} has {some(names)}" for part, names in only.items() if names)
        raise DistillError(f"the classes of {title} differ: {text}; both need the same classes")


def some(names: Sequence[str]) -> str:
    """The first few names, and how many more there are."""
    shown = ", ".join(map(repr, names[:_SHOWN]))
    return shown if len(names) <= _SHOWN else f"{shown} and {len(names) - _SHOWN} more"


def reason_of(error: Exception) -> str:
    """An exception as the half of a sentence that goes between brackets."""
    lines = str(error).strip().splitlines()
    # PIL shows the file object, whose name is said anyway.
    text = lines[0].partition(" <_io.")[0].rstrip(".") if lines else ""
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
