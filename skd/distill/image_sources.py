"""What ``--dataset`` and ``--data`` name, opened: folders, tar files, torchvision's and Hugging Face's data sets."""

import importlib.util
from pathlib import Path

from timm.data import create_dataset
from torch.utils.data import Dataset

from skd.distill.config import DataConfig
from skd.distill.errors import DistillError
from skd.distill.image_folder import open_folder
from skd.distill.image_sets import ImageSet, check_classes, reason_of

STREAMS = {"hfids": "hfds/NAME", "tfds": "hfds/NAME", "wds": "a folder of images or tar files as --data"}
"""timm's data sets that can only be read from their beginning, and what to give in their place."""


def open_images(data: DataConfig) -> tuple[ImageSet, ImageSet]:
    """The images to train on and to test on, with the same classes.

    Raises:
        DistillError: they cannot be opened, or do not go together.
    """
    name, root, splits = data.dataset, data.data, (data.train_split, data.val_split)
    kind = (name or "").lower().partition("/")[0]
    if kind in STREAMS:
        raise DistillError(
            f"--dataset {name} is a stream, in which a run that is resumed could not find its place again; "
            f"give {STREAMS[kind]}"
        )
    if root is not None and not root.is_dir():
        wanted = f"{splits[0]}/ and {splits[1]}/" if name is None else f"the files of {name}"
        raise DistillError(f"--data {root} is no folder; give one with {wanted} in it")
    if name is None:
        return open_folder(root, splits)
    if kind == "torch":
        train, val = (_open_torch(name, root, split, split == splits[0]) for split in splits)
    elif kind == "hfds":
        train, val = (_open_hugging_face(name, root, split) for split in splits)
    else:
        raise DistillError(f"there is no --dataset {name}; give torch/NAME, hfds/NAME, or --data DIR alone")
    titles = [f"{name} {split}" for split in splits]
    own = [_class_names(dataset, title) for dataset, title in zip((train, val), titles, strict=True)]
    check_classes(name, dict(zip(splits, own, strict=True)))
    return ImageSet(train, titles[0], own[0], own[0]), ImageSet(val, titles[1], own[1], own[0])


def _open_torch(name: str, root: Path, split: str, for_training: bool) -> Dataset:
    if name.lower().endswith("folder"):
        root = root / split
    try:
        dataset = create_dataset(name, root=str(root), split=split, search_split=False)
    except Exception as error:  # each of torchvision's data sets has its own way of missing a file
        raise DistillError(
            f"--dataset {name} cannot be opened in {root} ({reason_of(error)}); nothing is downloaded here, so put its "
            "files there first, as torchvision's own class does with download=True"
        ) from error
    # timm takes any name but two for the other part, a misspelt one too.
    if getattr(dataset, "train", for_training) != for_training:
        flag, other = ("--train-split", "train") if for_training else ("--val-split", "val")
        raise DistillError(f"{flag} {split} is not that part of {name}; give {other}")
    return dataset


def _open_hugging_face(name: str, root: Path | None, split: str) -> Dataset:
    if importlib.util.find_spec("datasets") is None:
        raise DistillError(f"--dataset {name} needs Hugging Face's package: pip install datasets")
    try:
        return create_dataset(name, root=root and str(root), split=split)
    except Exception as error:  # of the hub, the network, the file formats
        raise DistillError(
            f"--dataset {name}, part {split}, cannot be opened ({reason_of(error)}); without a network give as --data "
            "DIR the folder it was downloaded to, and name its parts with --train-split and --val-split"
        ) from error


def _class_names(dataset: Dataset, title: str) -> tuple[str, ...]:
    reader = getattr(dataset, "reader", None)
    names = getattr(reader, "class_to_idx", None)
    if names:
        return tuple(sorted(names, key=names.get))
    names = getattr(dataset, "classes", None) or getattr(dataset, "all_categories", None)
    if names:
        # ImageNet has tuples of synonyms.
        return tuple(name if isinstance(name, str) else ", ".join(name) for name in names)
    try:
        return tuple(map(str, range(1 + max(reader.iter_targets()))))
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise DistillError(f"the images of {title} have no class numbers ({reason_of(error)})") from error
