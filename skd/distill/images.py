"""Images in files as a data set of the trainer: what is done to them, with timm's transforms and mixup."""

import itertools
from collections.abc import Callable

import torch
from PIL import Image
from timm.data import Mixup, create_transform
from timm.data.auto_augment import posterize
from torchvision.transforms import Compose

from skd.distill.config import DataConfig
from skd.distill.data import BadImages, DataSource
from skd.distill.errors import DistillError
from skd.distill.image_loader import ImageTestLoader, ImageTrainLoader
from skd.distill.image_sets import reason_of
from skd.distill.image_sources import open_images

_RANDOM = "random"
"""An interpolation that is drawn for each training image, between bilinear and bicubic."""


def load_images(
    data: DataConfig, normalisation: dict, device: torch.device | str = "cpu", *, smoothing: float = 0.0
) -> DataSource:
    """Images of a folder, of tar files or of a data set that timm opens.

    Loader processes do everything to an image, on every device: they decode, augment, normalise, erase and mix, and
    what leaves them is float32.

    Args:
        data: with its ``image_size`` filled in.
        normalisation: of the student: "mean", "std", "interpolation", "crop_pct", "crop_mode", from
            ``timm.data.resolve_data_config``; ``data`` has priority for those it gives.
        device: where batches are needed; a CUDA device gets them in pinned memory.
        smoothing: of the soft targets of mixup and cutmix; without them targets are class numbers.

    Raises:
        DistillError: images that cannot be opened or whose parts do not go together, or settings that timm does not
            know.
    """
    train, test = open_images(data)
    train_transform, test_transform = make_transforms(data, normalisation)
    mixup = make_mixup(data, len(train.classes), smoothing)
    bad_images = BadImages(limit=data.max_bad_images)
    pinned = torch.device(device).type == "cuda"
    return DataSource(
        name=data.dataset or data.data.name or str(data.data),
        classes=train.classes,
        in_chans=3,
        image_size=data.image_size,
        train_images=len(train),
        test_images=len(test),
        make_train_loader=lambda world: ImageTrainLoader(
            train, train_transform, mixup, data, world, bad_images, pinned=pinned
        ),
        make_test_loader=lambda world: ImageTestLoader(test, test_transform, data, world, bad_images, pinned=pinned),
        bad_images=bad_images,
        mixes=mixup is not None,
    )


def make_transforms(data: DataConfig, normalisation: dict) -> tuple[Callable, Callable]:
    """timm's transforms for training and for testing, from an image to a normalised tensor.

    Raises:
        DistillError: timm does not know the augmentation.
    """
    own = normalisation["interpolation"]
    interpolation = data.interpolation or own
    common = {"input_size": (3, data.image_size, data.image_size), **{k: normalisation[k] for k in ("mean", "std")}}
    test = create_transform(
        **common,
        interpolation=own if interpolation == _RANDOM else interpolation,
        crop_pct=data.crop_pct or normalisation["crop_pct"],
        crop_mode=normalisation["crop_mode"],
    )
    try:
        train = create_transform(
            **common,
            is_training=True,
            interpolation=interpolation,
            auto_augment=data.auto_augment,
            color_jitter=data.color_jitter or None,
            re_prob=data.random_erasing,
            re_mode="pixel",
        )
    except (AssertionError, KeyError, ValueError) as error:
        raise DistillError(
            f"timm cannot make --auto-augment {data.auto_augment} ({reason_of(error)}); "
            "give one such as rand-m9-mstd0.5-inc1"
        ) from error
    _allow_zero_bits(train)
    return train, test


def make_mixup(data: DataConfig, classes: int, smoothing: float) -> Mixup | None:
    """timm's mixup and cutmix, for batches of even size, or None where neither is asked for."""
    if data.mixup == 0 and data.cutmix == 0:
        return None
    return Mixup(
        mixup_alpha=data.mixup,
        cutmix_alpha=data.cutmix,
        prob=data.mixup_prob,
        switch_prob=data.mixup_switch_prob,
        label_smoothing=smoothing,
        num_classes=classes,
    )


def _allow_zero_bits(transform: Compose) -> None:
    """At its greatest magnitude timm's posterisation keeps no bit, which Pillow refuses from version 13 on."""
    for step in transform.transforms:
        policies = [getattr(step, "ops", []), *getattr(step, "policy", [])]
        for operation in itertools.chain(*policies):
            if operation.aug_fn is posterize:
                operation.aug_fn = _posterize


def _posterize(image: Image.Image, bits_to_keep: int, **options) -> Image.Image:
    if bits_to_keep > 0:
        return posterize(image, bits_to_keep, **options)
    return Image.new(image.mode, image.size)  # black, as it always was
