"""Folders of images, DIR/train/<class>/*.jpg and DIR/val/<class>/*.jpg, and tar files in place of them.

A tar file may stand for a class, DIR/train/<class>.tar, or for a part, DIR/train.tar, with a folder or a tar file in it
for each class.
"""

import os
import tarfile
from collections.abc import Sequence
from pathlib import Path

from timm.data import ImageDataset, create_dataset
from timm.data.readers.img_extensions import get_img_extensions
from timm.data.readers.reader_image_in_tar import ReaderImageInTar
from timm.utils.misc import natural_key

from skd.distill.errors import DistillError
from skd.distill.image_sets import ImageSet, check_classes, path_in_tar, reason_of, some


def open_folder(root: Path, splits: Sequence[str]) -> tuple[ImageSet, ImageSet]:
    """The images of two folders or tar files in ``root``; classes are numbered in the order of their names.

    Args:
        root: an existing folder.
        splits: names of the part to train on and of the part to test on.

    Raises:
        DistillError: a part that is missing, has no classes or cannot be read, classes that differ or have no images.
    """
    parts = [_find(root, split) for split in splits]
    missing = [split for split, part in zip(splits, parts, strict=True) if part is None]
    if missing:
        raise DistillError(
            f"{root} has no folder {' and no folder '.join(missing)}; it needs {splits[0]}/ and {splits[1]}/, "
            f"or {splits[0]}.tar and {splits[1]}.tar"
        )
    tars = {part: _open_tars(part) for part in parts if _has_tars(part)}
    classes = {part: tars[part].reader.class_name_to_idx if part in tars else _class_folders(part) for part in parts}
    for part, names in classes.items():
        if not names:
            raise DistillError(f"{part} has no classes; put the images of each class into a folder of its own there")
    check_classes(root, {part.name if part.is_file() else f"{part.name}/": names for part, names in classes.items()})
    names = sorted(classes[parts[0]])
    sets = []
    for part in parts:
        dataset, own = tars.get(part), names
        if dataset is None:
            dataset = _open_class_folders(part, names)
        else:
            own = sorted(classes[part], key=classes[part].get)
        sets.append(ImageSet(dataset, str(part), own, names))
    return tuple(sets)


def _find(root: Path, split: str) -> Path | None:
    folder, tar = root / split, root / f"{split}.tar"
    return folder if folder.is_dir() else tar if tar.is_file() else None


def _has_tars(part: Path) -> bool:
    return part.is_file() or (not _class_folders(part) and any(part.glob("*.tar")))


def _class_folders(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith("."))


def _open_class_folders(part: Path, names: Sequence[str]) -> ImageDataset:
    extensions = tuple(get_img_extensions())
    empty = [name for name in names if not _has_image(part / name, extensions)]
    if empty:
        raise DistillError(f"{part} has no images in {some(empty)}; timm reads {', '.join(extensions)}")
    class_map = {name: number for number, name in enumerate(names)}
    return create_dataset("", root=str(part), search_split=False, class_map=class_map)


def _has_image(folder: Path, extensions: tuple[str, ...]) -> bool:
    return any(entry.suffix.lower() in extensions for entry in folder.iterdir())


def _open_tars(part: Path) -> ImageDataset:
    # timm keeps a list of what is in large tar files beside them.
    keeps_list = os.access(part.parent if part.is_file() else part, os.W_OK)
    try:
        # Loader processes would share the place of an open file with this one, so every image opens it anew.
        reader = ReaderImageInTar(str(part), cache_tarfiles=False, cache_tarinfo=None if keeps_list else False)
    except (OSError, tarfile.TarError, EOFError) as error:
        raise DistillError(f"{part} cannot be read as a tar file ({reason_of(error)}); pack it again") from error
    except ValueError as error:  # timm unpacks a list of images that is empty
        raise DistillError(f"{part} has no images; pack it again with a folder of images for each class") from error
    if {"", "."} & set(reader.class_name_to_idx):
        raise DistillError(
            f"{part} has images that are in no folder of a class; pack them as CLASS/IMAGE, and of tar files for "
            "each class without a leading ./"
        )
    # Of several tar files timm has the images in an order that depends on how the folder lists them.
    order = sorted(range(len(reader)), key=lambda index: natural_key(path_in_tar(reader, index)))
    reader.samples, reader.targets = reader.samples[order], reader.targets[order]
    return ImageDataset(str(part), reader=reader)
