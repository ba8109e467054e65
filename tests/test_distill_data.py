"""Data of the trainer: what each process, epoch and step gets, augmentation and mixing, and images that are damaged."""

import io
import multiprocessing
import os
import pickle
import random
import signal
import tarfile

import numpy as np
import pytest
import torch

timm = pytest.importorskip("timm", reason="the trainer is built on timm (extra 'train')")
pytest.importorskip("sklearn", reason="the digits come with scikit-learn (extra 'train')")

from PIL import Image  # noqa: E402
from timm.data import ImageDataset  # noqa: E402
from timm.data.distributed_sampler import RepeatAugSampler  # noqa: E402
from timm.data.readers.reader import Reader  # noqa: E402
from torchvision.transforms.functional import to_tensor  # noqa: E402

from skd.distill import digits, gratings, image_sources  # noqa: E402
from skd.distill.config import DataConfig  # noqa: E402
from skd.distill.data import BadImages  # noqa: E402
from skd.distill.distributed import World  # noqa: E402
from skd.distill.errors import DistillError  # noqa: E402
from skd.distill.image_loader import ImageTrainLoader  # noqa: E402
from skd.distill.images import load_images, make_transforms  # noqa: E402
from skd.distill.memory import MemoryTestLoader, MemoryTrainLoader  # noqa: E402
from skd.distill.order import epoch_order  # noqa: E402
from skd.distill.seeds import derive  # noqa: E402

NORMALISATION = {"mean": (0.5,) * 3, "std": (0.5,) * 3, "interpolation": "bilinear", "crop_pct": 1.0, "crop_mode": None}
ONE = World()
STRONG = {"auto_augment": "rand-m9-mstd0.5-inc1", "random_erasing": 0.5}


def ranks(size):
    return [World(rank=rank, size=size) for rank in range(size)]


def epoch(loader, seed=0, number=0, start=0):
    return list(loader.epoch(seed, number, start))


def same(batches, others):
    pairs = list(zip(batches, others, strict=True))
    return all(torch.equal(a, b) for pair in pairs for a, b in zip(*pair, strict=True))


def woven(per_rank):
    """The batches of several processes as those of one: their images in turn."""
    for batches in zip(*per_rank, strict=True):
        yield tuple(torch.stack(tensors, 1).flatten(0, 1) for tensors in zip(*batches, strict=True))


# --- In memory ---


def test_digits_split_is_stratified_complete_and_the_same_for_every_seed():
    splits = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        source = digits.load_digits(batch_size=100)
        train, test = source.make_train_loader(ONE), source.make_test_loader(ONE)
        splits.append((train.images, train.target, test.images, test.target))
    assert (source.train_images, source.test_images, source.in_chans, source.image_size) == (1437, 360, 1, 8)
    assert not source.mixes and len(source.bad_images) == 0
    assert all(torch.equal(a, b) for a, b in zip(*splits, strict=True))
    images, target, test_images, test_target = splits[0]
    assert images.min() == -1 and images.max() == 1
    assert all(34 <= count <= 37 for count in test_target.bincount(minlength=10))
    everything = {tuple(image.flatten().tolist()) for image in torch.cat([images, test_images])}
    assert len(everything) == 1797, "every image is in one half only"


def numbered(count):
    return torch.arange(float(count)).view(count, 1, 1, 1), torch.arange(count)


def test_an_epoch_in_memory_has_every_image_once_but_for_a_few():
    loader = MemoryTrainLoader(*numbered(45), 16, ONE)
    seen = []
    for number in range(20):
        batches = epoch(loader, number=number)
        assert [len(target) for _, target in batches] == [16, 16, 8] and len(loader) == 3
        assert all(torch.equal(x.flatten(), target.float()) for x, target in batches)
        seen.append(torch.cat([target for _, target in batches]))
        assert len(seen[-1].unique()) == 40, "a multiple of 8"
    assert len(torch.cat(seen).unique()) == 45, "not always the same ones are left out"


@pytest.mark.parametrize("size", [2, 4, 8])
def test_processes_with_a_share_of_the_batch_have_the_digits_of_one(size):
    single = digits.load_digits(64).make_train_loader(ONE)
    share = digits.load_digits(64 // size)
    loaders = [share.make_train_loader(world) for world in ranks(size)]
    assert {len(loader) for loader in [*loaders, single]} == {23}
    assert same(woven([epoch(loader, 3, 5) for loader in loaders]), epoch(single, 3, 5))
    assert same(woven([epoch(loader, 3, 5, start=20) for loader in loaders]), epoch(single, 3, 5)[20:])


def test_a_number_of_processes_that_does_not_divide_the_images_still_has_equal_batches():
    per_rank = [epoch(MemoryTrainLoader(*numbered(45), 4, world)) for world in ranks(3)]
    assert [[len(target) for _, target in batches] for batches in per_rank] == [[4, 4, 4, 1]] * 3
    assert len(torch.cat([target for batches in per_rank for _, target in batches]).unique()) == 39


def test_orders_differ_between_epochs_and_seeds_and_test_images_are_in_theirs():
    loader = MemoryTrainLoader(*numbered(64), 64, ONE)
    orders = {tuple(epoch(loader, seed, number)[0][1].tolist()) for seed in range(3) for number in range(3)}
    assert len(orders) == 9 and epoch(loader, 1, 2)[0][1].tolist() in map(list, orders)
    loaders = [MemoryTestLoader(*numbered(10), 3, world) for world in ranks(3)]
    found = [torch.cat([target for _, target in loader]).tolist() for loader in loaders]
    assert found == [[0, 3, 6, 9], [1, 4, 7], [2, 5, 8]] and [len(loader) for loader in loaders] == [2, 1, 1]


def test_gratings_have_their_peak_where_their_class_says():
    source = gratings.load_gratings(64)
    assert (source.train_images, source.test_images, len(source.classes)) == (1440, 360, 18)
    train, test = source.make_train_loader(ONE), source.make_test_loader(ONE)
    assert len(set(source.classes)) == 18 and source.classes[1] == "45 degrees, 1.4 cycles"
    for loader in (train, test):
        power = torch.fft.rfft2(loader.images[:, 0]).abs().square()
        for number, grating in enumerate(gratings.CLASSES):
            mean = power[loader.target == number].mean(0)
            assert divmod(mean.argmax().item(), 9) == (grating.ky % 16, grating.kx)
    assert torch.equal(gratings.load_gratings(8).make_test_loader(ONE).images, test.images)
    both = torch.cat([train.images, test.images]).flatten(1)
    assert len(both.unique(dim=0)) == 1800, "no image comes twice"


def test_a_student_learns_gratings_in_a_few_epochs(two_threads):
    torch.set_num_threads(1)
    source = gratings.load_gratings(64)
    torch.manual_seed(0)
    model, train = gratings.STUDENT.build(), source.make_train_loader(ONE)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for number in range(5):
        for images, target in train.epoch(0, number):
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(model(images), target).backward()
            optimizer.step()
    with torch.no_grad():
        correct = sum((model(x).argmax(1) == target).sum().item() for x, target in source.make_test_loader(ONE))
    assert correct / source.test_images > 0.3, "chance is 6%"


# --- Images ---


def write_image(path, value=None, seed=0):
    pixels = np.random.default_rng(seed).integers(0, 256, (36, 40, 3)) if value is None else np.full((36, 40, 3), value)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels.astype(np.uint8)).save(path)


def make_folder(root, train=("cat", "dog"), val=("cat", "dog"), images=(6, 3), plain=False):
    """Images of noise, all different; or plain ones whose brightness tells their class."""
    seed = 0
    for split, classes, count in (("train", train, images[0]), ("val", val, images[1])):
        (root / split).mkdir(parents=True)
        for index, name in enumerate(classes):
            for i in range(count):
                write_image(root / split / name / f"{i}.png", 40 * (index + 1) if plain else None, seed)
                seed += 1
    return root


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """12 images to train on and 6 to test on."""
    return make_folder(tmp_path_factory.mktemp("photos"))


def load(root, batch_size=4, smoothing=0.0, **options):
    options = {"image_size": 16, "color_jitter": 0.0, **options}
    return load_images(DataConfig(data=root, batch_size=batch_size, **options), NORMALISATION, smoothing=smoothing)


@pytest.mark.parametrize("workers", [0, 1])
def test_image_folder_batches(tmp_path, workers):
    source = load(make_folder(tmp_path, images=(3, 3), plain=True), 2, workers=workers)
    assert source.classes == ("cat", "dog") and (source.train_images, source.test_images) == (6, 6)
    assert (source.name, source.image_size, source.in_chans) == (tmp_path.name, 16, 3)
    train, test = source.make_train_loader(ONE), source.make_test_loader(ONE)
    for loader, batches in ((train, epoch(train)), (test, list(test))):
        images, target = torch.cat([x for x, _ in batches]), torch.cat([t for _, t in batches])
        assert images.shape == (6, 3, 16, 16) and images.dtype == torch.float32 and target.dtype == torch.int64
        assert len(batches) == 3 == len(loader) and target.bincount().tolist() == [3, 3]
        # The value of the pixels says which class the folder was.
        expected = (40.0 * (target + 1) / 255 - 0.5) / 0.5
        torch.testing.assert_close(images.mean((1, 2, 3)), expected, rtol=0, atol=1e-5)


def test_images_do_not_depend_on_workers_start_or_processes(photos):
    single = epoch(load(photos, **STRONG).make_train_loader(ONE), 7, 2)
    assert len(single) == 3
    with_workers = load(photos, workers=2, **STRONG).make_train_loader(ONE)
    assert same(epoch(with_workers, 7, 2), single)
    next(with_workers.epoch(7, 3))  # an epoch that is left
    assert same(epoch(with_workers, 7, 2, start=1), single[1:])
    assert same(epoch(load(photos, **STRONG).make_train_loader(ONE), 7, 2, start=2), single[2:])
    loaders = [load(photos, 2, **STRONG).make_train_loader(world) for world in ranks(2)]
    assert [len(loader) for loader in loaders] == [3, 3]
    assert same(woven([epoch(loader, 7, 2) for loader in loaders]), single)


def test_images_differ_between_epochs_and_seeds(photos):
    loader = load(photos, 12, **STRONG).make_train_loader(ONE)
    kinds = [epoch(loader, *place)[0] for place in ((0, 0), (0, 1), (1, 0))]
    assert len({tuple(target.tolist()) for _, target in kinds}) == 3, "orders"
    identity = ImageTrainLoader(loader._images, to_tensor, None, loader._data, ONE, BadImages())
    first, second = ({tuple(x.flatten().tolist()) for x in epoch(identity, 0, e)[0][0]} for e in (0, 1))
    assert first == second, "the images are the same ones without augmentation"
    every = torch.cat([images for images, _ in kinds]).flatten(1)
    assert len(every.unique(dim=0)) == 36


def test_the_callers_generators_stay_as_they_were(photos):
    def states():
        return random.getstate(), pickle.dumps(np.random.get_state()), torch.get_rng_state().tolist()

    source = load(photos, mixup=0.8, **STRONG)
    before = states()
    for workers in (0, 1):
        source = load(photos, mixup=0.8, workers=workers, **STRONG)
        batches = source.make_train_loader(ONE).epoch(0, 0)
        next(batches)
        assert states() == before, "in the middle of an epoch too"
        list(batches), list(source.make_test_loader(ONE))
        assert states() == before


def test_test_images_are_shared_out_without_padding(photos):
    whole = list(load(photos, 6).make_test_loader(ONE))[0]
    parts = [list(load(photos, 2).make_test_loader(world)) for world in ranks(4)]
    assert [[len(target) for _, target in batches] for batches in parts] == [[2], [2], [1], [1]]
    for rank, batches in enumerate(parts):
        assert same(batches, [(whole[0][rank::4], whole[1][rank::4])])


def test_repeats_bring_every_chosen_image_that_often_each_time_another_way(photos):
    source = load(photos, repeats=3, **STRONG)
    loader = source.make_train_loader(ONE)
    assert len(loader) == 3
    plain = ImageTrainLoader(loader._images, to_tensor, None, loader._data, ONE, BadImages())
    images = torch.cat([x for x, _ in epoch(plain)]).flatten(1)
    _, counts = images.unique(dim=0, return_counts=True)
    assert counts.tolist() == [3, 3, 3, 3]
    assert len(torch.cat([x for x, _ in epoch(loader)]).flatten(1).unique(dim=0)) == 12
    halves = [load(photos, 2, repeats=3, **STRONG).make_train_loader(world) for world in ranks(2)]
    assert same(woven([epoch(half) for half in halves]), epoch(loader))


@pytest.mark.parametrize("size", [1, 2, 4])
def test_repeated_augmentation_has_the_order_of_timm(size):
    order = epoch_order(24, 5, 6, repeats=3)
    for world in ranks(size):
        sampler = RepeatAugSampler(range(24), num_replicas=size, rank=world.rank, num_repeats=3)
        sampler.set_epoch(derive("order", 5, 6))
        assert order[world.rank :: size].tolist() == list(sampler)


# --- Augmentation and mixing ---


def test_crop_interpolation_and_augmentation_are_those_asked_for():
    def shown(**options):
        return [repr(t) for t in make_transforms(DataConfig(image_size=32, **options), NORMALISATION)]

    train, test = shown(color_jitter=0.4)
    assert "size=32, interpolation=bilinear" in test and "ColorJitter" in train and "Erasing" not in train
    train, test = shown(crop_pct=0.5, interpolation="bicubic", **STRONG)
    assert "size=64, interpolation=bicubic" in test and "interpolation=bicubic" in train
    assert "RandAugment" in train and "RandomErasing(p=0.5, mode=pixel" in train and "ColorJitter" not in train
    train, test = shown(interpolation="random")
    assert "interpolation=bilinear bicubic" in train and "interpolation=bilinear," in test
    with pytest.raises(DistillError, match="cannot make --auto-augment v9 .*; give one such as rand-m9"):
        shown(auto_augment="v9")


def test_augmentation_survives_its_greatest_magnitude():
    """timm then posterises to 0 bits, for which Pillow 13 has an exception in place of a black image."""
    transform, _ = make_transforms(DataConfig(image_size=8, auto_augment="rand-m10-mstd0.5-inc1"), NORMALISATION)
    random.seed(0), np.random.seed(0), torch.manual_seed(0)
    image = Image.new("RGB", (8, 8), (200, 100, 50))
    assert all(transform(image).shape == (3, 8, 8) for _ in range(300))


def test_random_erasing_puts_noise_into_images(tmp_path):
    root = make_folder(tmp_path, plain=True)
    (without,), (erased,) = (
        epoch(load(root, 12, random_erasing=p).make_train_loader(ONE), start=0) for p in (0.0, 1.0)
    )
    assert all(len(image.unique()) == 1 for image in without[0])
    assert all(len(image.unique()) > 10 for image in erased[0]) and torch.equal(without[1], erased[1])


@pytest.mark.parametrize(("mixup", "cutmix"), [(1.0, 0.0), (0.0, 1.0), (0.8, 1.0)])
def test_mixing_acts_and_its_targets_are_probabilities(photos, mixup, cutmix):
    options = {"mixup": mixup, "cutmix": cutmix}
    source, plain = load(photos, 12, smoothing=0.1, **options), load(photos, 12)
    assert source.mixes and not plain.mixes
    images, target = epoch(source.make_train_loader(ONE))[0]
    single, classes = epoch(plain.make_train_loader(ONE))[0]
    changed = (images != single).flatten(1).any(1)
    assert changed.sum() >= 10, "an image whose partner is itself stays"
    assert target.shape == (12, 2) and target.dtype == torch.float32
    torch.testing.assert_close(target.sum(1), torch.ones(12))
    # One share of each image and the rest of the one at the mirrored place, with smoothing 0.1 over two classes.
    one_hot = torch.nn.functional.one_hot(classes, 2) * 0.9 + 0.05
    differs = classes != classes.flip(0)
    share = ((target - one_hot.flip(0)) / (one_hot - one_hot.flip(0)))[differs]
    assert share.std() < 1e-6 and 0 < share.mean() < 1
    if cutmix == 0:
        torch.testing.assert_close(images, share[0, 0] * single + (1 - share[0, 0]) * single.flip(0))
    if mixup == 0:
        assert ((images == single) | (images == single.flip(0))).all()
    workers = load(photos, 12, smoothing=0.1, workers=1, **options).make_train_loader(ONE)
    assert same(epoch(workers), [(images, target)])
    assert not same(epoch(source.make_train_loader(ONE), number=1), [(images, target)])


def test_without_mixing_of_a_batch_its_targets_are_the_smoothed_classes(photos):
    images, target = epoch(load(photos, 12, 0.2, mixup=1.0, mixup_prob=0.0).make_train_loader(ONE))[0]
    single, classes = epoch(load(photos, 12).make_train_loader(ONE))[0]
    assert torch.equal(images, single)
    torch.testing.assert_close(target, torch.nn.functional.one_hot(classes, 2) * 0.8 + 0.1)


# --- Images that cannot be read ---


@pytest.fixture
def damaged(tmp_path):
    """Plain images, two of which to train on and one to test on are damaged, each in its own way."""
    root = make_folder(tmp_path / "damaged", plain=True)
    whole = (root / "train" / "cat" / "5.png").read_bytes()
    (root / "train" / "cat" / "5.png").write_bytes(whole[: len(whole) // 2])
    (root / "train" / "dog" / "0.png").write_bytes(b"")
    (root / "val" / "dog" / "1.png").write_text("no image")
    return root


@pytest.mark.parametrize("workers", [0, 2])
def test_damaged_images_are_named_once_and_replaced_or_left_out(damaged, workers):
    source = load(damaged, workers=workers)
    said = []
    source.bad_images.tell = said.append
    train, test = source.make_train_loader(ONE), source.make_test_loader(ONE)
    for number in range(2):
        batches = epoch(train, number=number)
        images, target = torch.cat([x for x, _ in batches]), torch.cat([t for _, t in batches])
        # cat/5 and the dog/0 after it give way to dog/1.
        assert target.bincount().tolist() == [5, 7] and len(images) == 12
        torch.testing.assert_close(images.mean((1, 2, 3)), (40.0 * (target + 1) / 255 - 0.5) / 0.5, rtol=0, atol=1e-5)
    for _ in range(2):
        assert torch.cat([target for _, target in test]).tolist() == [0, 0, 0, 1, 1]
    bad = [damaged / "train" / "cat" / "5.png", damaged / "train" / "dog" / "0.png", damaged / "val" / "dog" / "1.png"]
    assert sorted(source.bad_images.found) == list(map(str, bad)) and len(source.bad_images) == 3
    assert len(said) == 3 and sum(f"{bad[2]} cannot be read (Unid" in sentence for sentence in said) == 1
    assert "<" not in "".join(said), "no addresses of objects"


@pytest.mark.parametrize("workers", [0, 2])
def test_too_many_damaged_images_end_the_run_with_a_sentence(damaged, workers):
    source = load(damaged, workers=workers, max_bad_images=1)
    sentence = r"^2 images cannot be read, which is more than --max-bad-images 1: \S*(cat/5|dog/0).png \(.*mend or"
    with pytest.raises(DistillError, match=sentence) as found:
        epoch(source.make_train_loader(ONE))
    assert "\n" not in str(found.value) and "Traceback" not in str(found.value)
    for image in (damaged / "train").rglob("*.png"):
        image.write_text("no image")
    with pytest.raises(DistillError, match="none of the 12 images of .*train can be read"):
        epoch(load(damaged, workers=workers).make_train_loader(ONE))


def test_a_batch_of_damaged_test_images_is_no_batch(damaged):
    for i in range(2):
        (damaged / "val" / "cat" / f"{i}.png").write_text("no image")
    batches = list(load(damaged, 2).make_test_loader(ONE))
    assert [target.tolist() for _, target in batches] == [[0, 1], [1]]


def test_a_loader_process_that_dies_is_told_in_a_sentence(photos, monkeypatch):
    loader = load(photos, workers=1).make_train_loader(ONE)

    def die(image):
        os._exit(1)

    loader._batches._loader.dataset.transform = die
    with pytest.raises(DistillError, match=r"a process that loads images has died .*fewer --workers"):
        epoch(loader)


KEPT = []


def survive_signals(root, pipe):
    """In a process and group of its own: an epoch goes on, and the next is left as it is at the end."""
    os.setsid()
    asked = []
    for signum in (signal.SIGTERM, signal.SIGINT):
        signal.signal(signum, lambda signum, _: asked.append(signum))
    loader = load(root, workers=2).make_train_loader(ONE)
    batches = loader.epoch(0, 0)
    next(batches), next(batches)  # both workers are there
    pipe.send("ready")
    assert pipe.recv() == "sent"
    assert len(list(batches)) == 1 and set(asked) == {signal.SIGTERM, signal.SIGINT}
    KEPT.append(loader.epoch(0, 1))
    next(KEPT[0])


def test_signals_to_the_process_group_leave_the_loaders_alone_and_they_end_with_the_program(photos):
    here, there = multiprocessing.Pipe()
    process = multiprocessing.get_context("fork").Process(target=survive_signals, args=(photos, there))
    process.start()
    there.close()
    try:
        assert here.recv() == "ready"
        for signum in (signal.SIGTERM, signal.SIGINT):
            os.killpg(process.pid, signum)
        here.send("sent")
        process.join(timeout=60)
        assert process.exitcode == 0
    finally:
        process.kill()


# --- Kinds of data sets, and what is refused ---


def pack(tar, folder, names):
    with tarfile.open(tar, "w") as file:
        for path in sorted(folder.rglob("*.png")):
            file.add(path, names(path.relative_to(folder)))


def test_tar_files_have_the_images_of_the_folders_they_were_made_of(photos, tmp_path):
    expected = epoch(load(photos, **STRONG).make_train_loader(ONE))
    expected_test = list(load(photos).make_test_loader(ONE))
    for split in ("train", "val"):
        pack(tmp_path / f"{split}.tar", photos / split, lambda path: f"./top/{path}")
        for name in ("cat", "dog"):
            (tmp_path / "classes" / split).mkdir(parents=True, exist_ok=True)
            pack(tmp_path / "classes" / split / f"{name}.tar", photos / split / name, str)
    for root in (tmp_path, tmp_path / "classes"):
        source = load(root, workers=2, **STRONG)
        assert source.classes == ("cat", "dog") and (source.train_images, source.test_images) == (12, 6)
        # The main process reads from the tar file too, and must not disturb the others.
        assert same(list(load(root).make_test_loader(ONE)), expected_test)
        assert same(epoch(source.make_train_loader(ONE)), expected)
        assert same(list(source.make_test_loader(ONE)), expected_test)


def test_a_damaged_image_in_a_tar_file_is_named(damaged, tmp_path):
    for split in ("train", "val"):
        pack(tmp_path / f"{split}.tar", damaged / split, str)
    source = load(tmp_path)
    list(source.make_test_loader(ONE))
    assert list(source.bad_images.found) == [f"{tmp_path}/val.tar/dog/1.png"]


def test_tar_files_and_folders_number_classes_alike(tmp_path):
    names = ("n10", "n9")  # timm's tar reader would sort them by the number
    root = make_folder(tmp_path / "a", names, names, plain=True)
    pack(root / "packed.tar", root / "val", str)
    for split in ("val", "packed"):
        source = load(root, 6, val_split=split)
        ((images, target),) = source.make_test_loader(ONE)
        assert source.classes == names and target.bincount().tolist() == [3, 3]
        torch.testing.assert_close(images.mean((1, 2, 3)), (40.0 * (target + 1) / 255 - 0.5) / 0.5, rtol=0, atol=1e-5)


def write_mnist(root):
    """Files as torchvision keeps them; the two parts have 20 and 10 images, image i is of class i % 10."""
    raw = root / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for part, count in (("train", 20), ("t10k", 10)):
        pixels = np.repeat(np.arange(count, dtype=np.uint8) * 10, 28 * 28)
        sizes = np.array([count, 28, 28], dtype=">i4").tobytes()
        (raw / f"{part}-images-idx3-ubyte").write_bytes(b"\0\0\x08\x03" + sizes + pixels.tobytes())
        classes = (np.arange(count) % 10).astype(np.uint8).tobytes()
        (raw / f"{part}-labels-idx1-ubyte").write_bytes(b"\0\0\x08\x01" + sizes[:4] + classes)


def test_torchvision_data_sets_by_their_timm_names(tmp_path, photos):
    write_mnist(tmp_path)
    source = load(tmp_path, 5, dataset="torch/mnist")
    assert (source.name, source.train_images, source.test_images) == ("torch/mnist", 20, 10)
    assert source.classes[3] == "3 - three"
    images, target = (torch.cat(parts) for parts in zip(*source.make_test_loader(ONE), strict=True))
    assert target.tolist() == list(range(10)) and images.shape == (10, 3, 16, 16)
    torch.testing.assert_close(images[:, 0, 0, 0], (target * 10 / 255 - 0.5) / 0.5)
    assert len(torch.cat([target for _, target in epoch(source.make_train_loader(ONE))])) == 20
    folder = load(photos, dataset="torch/image_folder", **STRONG)
    assert same(epoch(folder.make_train_loader(ONE)), epoch(load(photos, **STRONG).make_train_loader(ONE)))


class FakeReader(Reader):
    """What timm reads Hugging Face's data sets with, of images in memory."""

    def __init__(self, classes, class_to_idx=None):
        self.classes, self.class_to_idx = classes, class_to_idx or {}

    def __len__(self):
        return len(self.classes)

    def __getitem__(self, index):
        file = io.BytesIO()
        Image.new("L", (20, 20), 40 * (index + 1)).save(file, "png")
        file.seek(0)
        return file, self.classes[index]

    def iter_targets(self):
        return iter(self.classes)


def load_hugging_face(monkeypatch, **readers):
    monkeypatch.setattr(image_sources.importlib.util, "find_spec", lambda name: name)
    monkeypatch.setattr(
        image_sources, "create_dataset", lambda name, root, split: ImageDataset("", reader=readers[split])
    )
    return load(None, 2, dataset="hfds/someone/things")


def test_hugging_face_data_sets(monkeypatch):
    named = {"cat": 0, "dog": 1}
    source = load_hugging_face(
        monkeypatch, train=FakeReader([0, 1], named), val=FakeReader([1, 0, -1], {"dog": 0, "cat": 1})
    )
    assert source.classes == ("cat", "dog") and source.name == "hfds/someone/things"
    assert [target.tolist() for _, target in source.make_test_loader(ONE)] == [[0, 1]], "numbered as in training"
    assert source.bad_images.found == {
        "image 2 of hfds/someone/things val": "ValueError: its class is -1, and there are 0 to 1"
    }
    assert load_hugging_face(monkeypatch, train=FakeReader([0, 2]), val=FakeReader([2, 2])).classes == ("0", "1", "2")
    with pytest.raises(DistillError, match=r"differ: only train has '2'; both need the same"):
        load_hugging_face(monkeypatch, train=FakeReader([0, 2]), val=FakeReader([1]))
    with pytest.raises(DistillError, match=r"things train have no class numbers \(TypeError"):
        load_hugging_face(monkeypatch, train=FakeReader(["a"]), val=FakeReader(["a"]))

    def no_network(name, root, split):
        raise ConnectionError("Couldn't reach 'someone/things' on the Hub\nwith details")

    monkeypatch.setattr(image_sources, "create_dataset", no_network)
    with pytest.raises(DistillError, match=r"part train, cannot .*\(ConnectionError: Couldn't.*; without a network"):
        load(None, 2, dataset="hfds/someone/things")
    monkeypatch.setattr(image_sources.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(DistillError, match="pip install datasets"):
        load(None, 2, dataset="hfds/someone/things")


@pytest.mark.parametrize("name", ["wds/shards", "tfds/cifar10", "hfids/someone/things"])
def test_streams_are_refused_with_the_reason(photos, name):
    with pytest.raises(DistillError, match=f"{name} is a stream, in which a run that is resumed could not .*; give "):
        load(photos, dataset=name)


def folder(tmp_path, name, **kwargs):
    return make_folder(tmp_path / name, images=(1, 1), **kwargs)


def emptied(root):
    (root / "train" / "cat" / "0.png").rename(root / "train" / "cat" / "0.txt")
    return root


def with_tar(root, names=str, damage=lambda content: content):
    pack(root / "packed.tar", root / "train", names)
    (root / "packed.tar").write_bytes(damage((root / "packed.tar").read_bytes()))
    return root


@pytest.mark.parametrize(
    ("build", "options", "sentence"),
    [
        (lambda root: root / "nowhere", {}, "--data .*nowhere is no folder; give one with train/ and val/ in it"),
        (lambda root: folder(root, "a", val=()), {}, r"val has no classes"),
        (lambda root: folder(root, "b", train=(), val=()), {}, r"train has no classes"),
        (lambda root: folder(root, "c", val=("cat", "fox")), {}, "only train/ has 'dog' and only val/ has 'fox'"),
        (lambda root: folder(root, "d", train=("cat", "dog", "emu")), {}, "differ: only train/ has 'emu'; both"),
        (lambda root: (root / "e").mkdir() or root / "e", {}, "no folder train and no folder val; it needs .*tar"),
        (lambda root: emptied(folder(root, "f")), {}, r"train has no images in 'cat'; timm reads .*\.png"),
        (lambda root: folder(root, "g"), {"val_split": "test"}, "has no folder test; it needs train/ and test/"),
        (lambda root: folder(root, "h"), {"dataset": "torch/cifar10"}, r"cannot be opened in .*; nothing is down"),
        (lambda root: folder(root, "i"), {"dataset": "torch/nonesuch"}, "Unknown torchvision dataset nonesuch"),
        (lambda root: folder(root, "j"), {"dataset": "tocrh/cifar10"}, "no --dataset tocrh/cifar10; give torch/NAME"),
        (
            lambda root: with_tar(folder(root, "k", val=("cat",))),
            {"train_split": "packed"},
            "only packed.tar has 'dog'",
        ),
        (
            lambda root: with_tar(folder(root, "l"), lambda path: path.name),
            {"val_split": "packed"},
            r"packed.tar has images that are in no folder of a class; pack them as CLASS/IMAGE",
        ),
        (
            lambda root: with_tar(folder(root, "m"), damage=lambda content: content[:700]),
            {"val_split": "packed"},
            r"packed.tar cannot be read as a tar file \(ReadError: .*pack it again",
        ),
        (
            lambda root: with_tar(folder(root, "n"), lambda path: path.with_suffix(".txt")),
            {"val_split": "packed"},
            r"packed.tar has no images; pack it again",
        ),
    ],
)
def test_what_cannot_be_loaded_gets_a_sentence(tmp_path, build, options, sentence):
    with pytest.raises(DistillError, match=sentence) as found:
        load(build(tmp_path), **{"batch_size": 1, **options})
    assert "\n" not in str(found.value)


def test_a_misspelt_part_is_not_taken_for_the_other(tmp_path):
    write_mnist(tmp_path)
    with pytest.raises(DistillError, match="--train-split trian is not that part of torch/mnist; give train"):
        load(tmp_path, dataset="torch/mnist", train_split="trian")
    with pytest.raises(DistillError, match="--val-split training is not that part of torch/mnist; give val"):
        load(tmp_path, dataset="torch/mnist", val_split="training")


def test_fewer_images_than_processes_need_get_a_sentence(photos):
    with pytest.raises(DistillError, match="12 images, fewer than one batch of 4 in each of 4 processes; .* 3 or less"):
        load(photos).make_train_loader(World(size=4))
