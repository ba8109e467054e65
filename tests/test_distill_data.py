"""The digits' split and the folder of images per class."""

import numpy as np
import pytest
import torch

pytest.importorskip("timm", reason="the trainer is built on timm (extra 'train')")
pytest.importorskip("sklearn", reason="the digits come with scikit-learn (extra 'train')")

from PIL import Image  # noqa: E402

from skd.distill import digits  # noqa: E402
from skd.distill.errors import DistillError  # noqa: E402
from skd.distill.image_folder import find_classes, load_image_folder  # noqa: E402

NORMALISATION = {"mean": (0.5,) * 3, "std": (0.5,) * 3, "interpolation": "bilinear", "crop_pct": 1.0, "crop_mode": None}


def write_image(path, value=128):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((10, 12, 3), value, dtype=np.uint8)).save(path)


def make_folder(root, train=("cat", "dog"), val=("cat", "dog"), images=2):
    for split, classes in (("train", train), ("val", val)):
        (root / split).mkdir(parents=True)
        for index, name in enumerate(classes):
            for i in range(images):
                write_image(root / split / name / f"{i}.png", 40 * (index + 1))
    return root


def test_digits_split_is_stratified_complete_and_the_same_for_every_seed():
    splits = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        source = digits.load_digits(batch_size=100)
        train, test = source.make_train_loader(), source.make_test_loader()
        splits.append((train.images, train.target, test.images, test.target))
    assert (source.train_images, source.test_images, source.in_chans, source.image_size) == (1437, 360, 1, 8)
    assert all(torch.equal(a, b) for a, b in zip(*splits, strict=True))
    images, target, test_images, test_target = splits[0]
    assert images.min() == -1 and images.max() == 1
    assert all(34 <= count <= 37 for count in test_target.bincount(minlength=10))
    everything = {tuple(image.flatten().tolist()) for image in torch.cat([images, test_images])}
    assert len(everything) == 1797, "every image is in one half only"


def test_in_memory_loader_visits_every_image_once_with_its_target():
    images = torch.arange(10.0).view(10, 1, 1, 1)
    loader = digits.InMemoryLoader(images, torch.arange(10), 4, shuffle=True)
    torch.manual_seed(0)
    epochs = [list(loader), list(loader)]
    for batches in epochs:
        assert [len(target) for _, target in batches] == [4, 4, 2] and len(loader) == 3
        assert all(torch.equal(x.flatten(), target.float()) for x, target in batches)
        assert sorted(torch.cat([target for _, target in batches]).tolist()) == list(range(10))
    assert not torch.equal(epochs[0][0][1], epochs[1][0][1])
    ordered = digits.InMemoryLoader(images, torch.arange(10), 4, shuffle=False)
    assert torch.equal(torch.cat([target for _, target in ordered]), torch.arange(10))


@pytest.mark.parametrize("workers", [0, 1])
def test_image_folder_batches(tmp_path, workers):
    source = load_image_folder(make_folder(tmp_path, images=3), 8, 2, workers, NORMALISATION)
    assert source.classes == ("cat", "dog") and (source.train_images, source.test_images) == (6, 6)
    batches = list(source.make_test_loader())
    images, target = torch.cat([x for x, _ in batches]), torch.cat([t for _, t in batches])
    assert images.shape == (6, 3, 8, 8) and images.dtype == torch.float32
    # The value of the pixels says which class the folder was.
    expected = (40.0 * (target + 1) / 255 - 0.5) / 0.5
    torch.testing.assert_close(images.mean((1, 2, 3)), expected, rtol=0, atol=1e-5)
    train = source.make_train_loader()
    assert len(train) == 3 == len(list(train))


def test_a_class_of_val_keeps_its_number_when_another_has_no_image_in_train(tmp_path):
    root = make_folder(tmp_path)
    for image in (root / "train" / "cat").iterdir():
        image.rename(image.with_suffix(".txt"))
    with pytest.raises(DistillError, match=r"train has no images in 'cat'; timm reads .*\.png"):
        find_classes(root)


def folder(tmp_path, name, **kwargs):
    return make_folder(tmp_path / name, **kwargs)


@pytest.mark.parametrize(
    ("build", "sentence"),
    [
        (lambda root: root / "nowhere", "is no folder"),
        (lambda root: folder(root, "a", val=()), r"val has no classes"),
        (lambda root: folder(root, "b", train=(), val=()), r"train has no classes"),
        (lambda root: folder(root, "c", val=("cat", "fox")), r"only train/ has 'dog' and only val/ has 'fox'"),
        (lambda root: folder(root, "d", train=("cat", "dog", "emu")), r"differ: only train/ has 'emu'; both"),
        (lambda root: (root / "e").mkdir() or root / "e", "no folder train and no folder val"),
    ],
)
def test_bad_folders_get_a_sentence(tmp_path, build, sentence):
    with pytest.raises(DistillError, match=sentence):
        find_classes(build(tmp_path))


def test_fewer_images_than_one_batch_get_a_sentence(tmp_path):
    with pytest.raises(DistillError, match="has 4 images, fewer than one batch of 5; give --batch-size 4"):
        load_image_folder(make_folder(tmp_path), 8, 5, 0, NORMALISATION)
