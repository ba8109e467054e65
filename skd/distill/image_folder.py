"""A folder of images per class: DIR/train/<class>/*.jpg and DIR/val/<class>/*.jpg."""

from pathlib import Path

import torch
from timm.data import create_dataset, create_loader
from timm.data.readers.img_extensions import get_img_extensions

from skd.distill.data import DataSource
from skd.distill.errors import DistillError

SPLITS = ("train", "val")
_SHOWN = 5


def find_classes(root: Path) -> tuple[str, ...]:
    """The class names, which are the folders both in ``root/train`` and in ``root/val``, sorted.

    Raises:
        DistillError: a folder that is missing or has no classes, classes that differ, a class without images.
    """
    if not root.is_dir():
        raise DistillError(f"--data {root} is no folder; give one with train/ and val/ in it")
    missing = [split for split in SPLITS if not (root / split).is_dir()]
    if missing:
        raise DistillError(f"{root} has no folder {' and no folder '.join(missing)}; it needs train/ and val/")
    classes = {split: _class_folders(root / split) for split in SPLITS}
    for split in SPLITS:
        if not classes[split]:
            raise DistillError(
                f"{root / split} has no classes; put the images of each class into a folder of its own there"
            )
    only = {split: sorted(set(classes[split]) - set(classes[other])) for split, other in (SPLITS, SPLITS[::-1])}
    if any(only.values()):
        text = " and ".join(f"only {split}/ has {_some(names)}" for split, names in only.items() if names)
        raise DistillError(f"the classes of {root} differ: {text}; both need the same class folders")
    extensions = tuple(get_img_extensions())
    for split in SPLITS:
        empty = [name for name in classes[split] if not _has_image(root / split / name, extensions)]
        if empty:
            raise DistillError(f"{root / split} has no images in {_some(empty)}; timm reads {', '.join(extensions)}")
    return tuple(classes["train"])


def load_image_folder(
    root: Path, image_size: int, batch_size: int, workers: int, normalisation: dict, device: torch.device | str = "cpu"
) -> DataSource:
    """Images of ``root`` through timm's datasets, transforms and loaders.

    Args:
        root: folder with train/ and val/.
        image_size: side of the square crops in pixels.
        batch_size: images per step; the last, smaller batch of a training epoch is left out, as timm does.
        workers: loader processes.
        normalisation: "mean", "std", "interpolation", "crop_pct", "crop_mode", from ``timm.data.resolve_data_config``.
        device: where the batches are needed; a CUDA device gets pinned memory.

    Raises:
        DistillError: as :func:`find_classes`, or fewer training images than one batch.
    """
    classes = find_classes(root)
    class_map = {name: index for index, name in enumerate(classes)}
    sets = {
        split: create_dataset(
            "", root=str(root / split), search_split=False, is_training=split == "train", class_map=class_map
        )
        for split in SPLITS
    }
    if len(sets["train"]) < batch_size:
        raise DistillError(
            f"{root / 'train'} has {len(sets['train'])} images, fewer than one batch of {batch_size}; "
            f"give --batch-size {len(sets['train'])} or less"
        )

    def make_loader(split: str):
        return create_loader(
            sets[split],
            input_size=(3, image_size, image_size),
            batch_size=batch_size,
            is_training=split == "train",
            mean=normalisation["mean"],
            std=normalisation["std"],
            interpolation=normalisation["interpolation"],
            crop_pct=normalisation["crop_pct"],
            crop_mode=normalisation["crop_mode"],
            num_workers=workers,
            persistent_workers=workers > 0,
            pin_memory=torch.device(device).type == "cuda",
            device=torch.device(device),
            use_prefetcher=False,
        )

    return DataSource(
        name=root.name or str(root),
        classes=classes,
        in_chans=3,
        image_size=image_size,
        train_images=len(sets["train"]),
        test_images=len(sets["val"]),
        make_train_loader=lambda: make_loader("train"),
        make_test_loader=lambda: make_loader("val"),
    )


def _class_folders(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith("."))


def _has_image(folder: Path, extensions: tuple[str, ...]) -> bool:
    return any(entry.suffix.lower() in extensions for entry in folder.iterdir())


def _some(names: list[str]) -> str:
    shown = ", ".join(map(repr, names[:_SHOWN]))
    return shown if len(names) <= _SHOWN else f"{shown} and {len(names) - _SHOWN} more"
