"""skd.analyze and its profile: exact sums, known spectra, files, refusals."""

import copy
import json
import math

import numpy as np
import pytest
import torch
from torch import nn

import skd
from skd.analysis import plots
from skd.analysis.entropy import ChannelEntropy
from skd.analysis.gratings import ORIENTATIONS, channel_grating, grating_batches, gratings
from skd.analysis.measure import analyze
from skd.analysis.profile import SpectralProfile


class Elementwise(nn.Module):
    """Blocks that treat every number alike, so an image's maps are the same bits in any batch."""

    def __init__(self, depth=4):
        super().__init__()
        self.blocks = nn.Sequential(*[nn.AvgPool2d(3, 1, 1) for _ in range(depth)])

    def forward(self, x):
        return self.blocks(x).mean((1, 2, 3))


@pytest.fixture
def images():
    torch.manual_seed(3)
    # Of very different sizes, so that float64 sums of float32 numbers are rounded, in another order differently.
    sizes = 10.0 ** torch.tensor([0.0, -5, 3, 6, -2, 5, -6, 2])
    return torch.randn(8, 10, 6, 6) * sizes.view(-1, 1, 1, 1)


def profile_of(layer_intensity, channels=1, **fields):
    """A profile with these intensities."""
    defaults = {"images": 2, "norm": "forward", "title": "made up", "entropy": None, **fields}
    layers = tuple(f"blocks.{i}" for i in range(len(layer_intensity)))
    spectra = [torch.full((channels // 2 + 1,), float(value), dtype=torch.float64) for value in layer_intensity]
    return SpectralProfile(layers=layers, intensity=spectra, channels=(channels,) * len(layers), **defaults)


# --- Numbers ---


def test_batches_do_not_change_a_bit(images):
    model = Elementwise()
    profiles = [analyze(model, images.split(size)) for size in (1, 3, 8)]
    assert all(profile.images == 8 for profile in profiles)
    for other in profiles[1:]:
        for a, b in zip(profiles[0].intensity, other.intensity, strict=True):
            assert torch.equal(a, b)
        assert torch.equal(profiles[0].entropy, other.entropy)


def test_a_vit_differs_between_batch_sizes_by_its_own_rounding_only():
    timm = pytest.importorskip("timm", reason="the extra 'train'")
    torch.manual_seed(0)
    model = timm.create_model("test_vit", img_size=32)
    images = torch.randn(8, 3, 32, 32)
    one, three = (analyze(model, images.split(size)) for size in (1, 3))
    assert one.layers == tuple(f"blocks.{i}" for i in range(6))
    for a, b in zip(one.intensity, three.intensity, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(one.entropy, three.entropy, rtol=0, atol=1e-3)


@pytest.mark.parametrize("norm", ["forward", "ortho"])
def test_against_the_numpy_form_of_the_authors(images, norm):
    model = Elementwise(depth=3)
    profile = analyze(model, images.split(3), norm=norm)
    with skd.FeatureTap(model, [0, 1, 2]) as tap:
        maps = [x.double().numpy() for x in tap(images)[1]]
    for layer, x in enumerate(maps):
        spectrum = np.abs(np.fft.fft(x, axis=1, norm=norm)).mean((0, 2, 3))
        np.testing.assert_allclose(profile.intensity[layer], spectrum[: x.shape[1] // 2 + 1], rtol=1e-5)
        assert profile.layer_intensity[layer].item() == pytest.approx(spectrum.mean(), rel=1e-6)


@pytest.mark.parametrize("channels", [1, 2, 5, 8])
def test_a_layers_number_is_the_mean_over_all_bins(channels):
    model = nn.Sequential(nn.Identity())
    x = torch.randn(4, channels, 3, 3, dtype=torch.float64)
    profile = analyze(model, [x])
    expected = np.abs(np.fft.fft(x.numpy(), axis=1)).mean() / channels
    assert profile.layer_intensity.item() == pytest.approx(expected, rel=1e-12)


def entropy_of_the_authors(maps):
    """Entropy as in the analysis code of Distillation Dynamics, of one image: maps [1, C, H, W]."""
    span = min(x.min() for x in maps), max(x.max() for x in maps)
    found = []
    for x in maps:
        bits = []
        for vector in np.moveaxis(x[0], 0, -1).reshape(-1, x.shape[1]):
            p = np.histogram(vector, bins=100, range=span)[0] / len(vector)
            bits.append(-(p[p > 0] * np.log2(p[p > 0])).sum())
        found.append(np.mean(bits))
    return found


@pytest.mark.parametrize("tokens", [False, True], ids=["NCHW", "tokens"])
def test_entropy_of_an_image_is_that_of_the_authors(tokens):
    torch.manual_seed(1)
    # The lowest number is in the second map and the highest in the third.
    maps = [0.1 * torch.randn(1, 64, 5, 5), torch.randn(1, 64, 5, 5), 5 + torch.rand(1, 20, 2, 3)]
    expected = entropy_of_the_authors([x.numpy() for x in maps])
    if tokens:
        maps = [x.contiguous(memory_format=torch.channels_last) for x in maps]
    counter = ChannelEntropy([64, 64, 20])
    counter.add(maps)
    np.testing.assert_allclose(counter.bits(), expected, atol=2e-3)
    assert expected[0] < expected[1] - 1, "numbers of a tenth of the range fall into fewer bins"


def test_entropy_is_a_mean_over_images_each_with_its_own_range():
    torch.manual_seed(2)
    x = torch.randn(3, 50, 4, 4) * torch.tensor([1.0, 100.0, 1e-3]).view(-1, 1, 1, 1)
    expected = np.mean([entropy_of_the_authors([x[i : i + 1].numpy()])[0] for i in range(3)])
    assert analyze(nn.Sequential(nn.Identity()), x).entropy.item() == pytest.approx(expected, abs=2e-3)


@pytest.mark.parametrize("value", [0.0, 3.0, -1e30])
def test_a_constant_map_has_no_entropy(value):
    profile = analyze(nn.Sequential(nn.Identity()), torch.full((2, 6, 4, 4), value))
    assert profile.entropy.tolist() == [0.0]


def test_evenly_spread_channels_have_all_the_bits():
    x = torch.arange(64.0).view(1, 64, 1, 1).expand(2, 64, 3, 3)
    assert analyze(nn.Sequential(nn.Identity()), x).entropy.item() == pytest.approx(6, abs=1e-9)


# --- Gratings: spectra that are known ---


def test_gratings_peak_where_they_should():
    for grating in gratings(16):
        spectrum = skd.spectral_intensity(grating.image(16)[None], axis="space")
        peak = divmod(int(spectrum.argmax()), spectrum.shape[1])
        assert peak == (grating.ky % 16, grating.kx), grating
        assert spectrum.max().item() == pytest.approx(0.5, rel=1e-5)
        # A frequency with kx = 0 is in the half spectrum twice, at ky and -ky.
        bins = 2 if grating.kx == 0 else 1
        assert (spectrum > 1e-5).sum() == bins


def test_gratings_are_all_different_and_the_same_every_time():
    found = gratings(64)
    assert len({(g.ky, g.kx) for g in found}) == len(found) > 3 * ORIENTATIONS
    assert all(math.hypot(g.ky, g.kx) < 32 and (g.kx > 0 or g.ky > 0) for g in found)
    one, four = (torch.cat(list(grating_batches(16, 1, *shape))) for shape in ((30, 1), (6, 5)))
    assert torch.equal(one, four) and one.shape == (30, 1, 16, 16)
    assert torch.equal(one[0], one[len(gratings(16))])
    with pytest.raises(ValueError, match="holds no grating"):
        gratings(2)


@pytest.mark.parametrize(("channels", "cycles", "height"), [(16, 3, 0.5), (15, 7, 0.5), (16, 0, 1.0), (16, 8, 1.0)])
def test_a_channel_grating_is_one_bin(channels, cycles, height):
    profile = analyze(nn.Sequential(nn.Identity()), channel_grating(channels, cycles))
    expected = torch.zeros(channels // 2 + 1, dtype=torch.float64)
    expected[cycles] = height
    torch.testing.assert_close(profile.intensity[0], expected, rtol=1e-5, atol=1e-6)


def test_the_order_of_channels_matters_and_the_width_too():
    torch.manual_seed(0)
    x = channel_grating(32, 5)
    shuffled = x[:, torch.randperm(32)]
    model = nn.Sequential(nn.Identity())
    assert analyze(model, shuffled).intensity[0].max() < 0.35
    narrow, wide = (torch.randn(4, c, 8, 8) for c in (32, 512))
    forward = [analyze(model, x).layer_intensity.item() for x in (narrow, wide)]
    ortho = [analyze(model, x, norm="ortho").layer_intensity.item() for x in (narrow, wide)]
    assert forward[0] / forward[1] == pytest.approx(4, rel=0.05)
    assert ortho == pytest.approx([0.886, 0.886], rel=0.03)


# --- The model and its batches ---


class Counting(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList([nn.Conv2d(3, 3, 1), nn.Dropout(0.5)])
        self.calls = []

    def forward(self, x):
        self.calls.append((len(x), self.training, torch.is_grad_enabled()))
        for block in self.blocks:
            x = block(x)
        return x


def test_one_forward_per_batch_in_evaluation_mode_restored_afterwards():
    model = Counting().train()
    model.blocks[0].eval()
    seen = []
    profile = analyze(model, torch.randn(5, 3, 4, 4).split(2), progress=seen.append)
    assert model.calls == [(2, False, False), (2, False, False), (1, False, False)] and seen == [2, 4, 5]
    assert [m.training for m in (model, model.blocks[0], model.blocks[1])] == [True, False, True]
    assert profile.title == "Counting" and not model.blocks[0]._forward_hooks
    with pytest.raises(RuntimeError):
        analyze(model, [torch.randn(1, 99, 4, 4)])
    assert model.training and not model.blocks[0]._forward_hooks


@pytest.mark.parametrize(
    "wrap",
    [lambda x: x, lambda x: [(x, torch.zeros(2))], lambda x: [[x, 0]], lambda x: [{"image": x, "label": 3}]],
    ids=["a tensor", "tuple", "list", "dict"],
)
def test_kinds_of_batches(wrap):
    x = torch.randn(2, 3, 4, 4)
    model = nn.Sequential(nn.Identity())
    assert torch.equal(analyze(model, wrap(x)).intensity[0], analyze(model, [x]).intensity[0])


def test_layers_by_name_and_number():
    profile = skd.analyze(Elementwise(), torch.randn(2, 4, 4, 4), [-1, "blocks.0"], entropy=False, title="mine")
    assert profile.layers == ("blocks.3", "blocks.0") and profile.title == "mine" and profile.entropy is None


def test_memory_does_not_grow_with_the_images():
    """A generator of images that keeps count of those still alive."""
    import weakref

    alive = weakref.WeakSet()

    class Batch(torch.Tensor):
        pass

    def batches():
        for _ in range(6):
            assert len(alive) <= 1
            x = torch.randn(2, 3, 4, 4).as_subclass(Batch)
            alive.add(x)
            yield x
            del x

    analyze(nn.Sequential(nn.Identity()), batches())


class Poison(nn.Module):
    def __init__(self, value):
        super().__init__()
        self.value = value

    def forward(self, x):
        x = x.clone()
        x[x.shape[0] - 1, 0, 1, 1] = self.value
        return x


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_nan_and_infinity_name_the_layer_and_the_image(value):
    model = nn.Sequential(nn.Identity(), nn.Identity(), Poison(value), nn.Identity())
    with pytest.raises(ValueError, match=r"layer '2' has NaN or infinity for image 2 \(counted from 0\)"):
        analyze(model, torch.randn(6, 4, 3, 3).split(3))


@pytest.mark.parametrize(
    ("model", "batches", "error", "sentence"),
    [
        (Elementwise(), [], ValueError, "no images to analyse"),
        (Elementwise(), iter([torch.zeros(0, 3, 4, 4)]), ValueError, "no images to analyse"),
        (nn.Linear(2, 2), [torch.zeros(1, 3, 4, 4)], ValueError, "Linear has no list of blocks or stages"),
        (Elementwise(), [("cat.png", 3)], TypeError, "got a tuple whose first entry is str"),
        (Elementwise(), ["cat.png"], TypeError, "got a str"),
        (Elementwise(), [{}], TypeError, "got a dict whose first entry is NoneType"),
        (Elementwise(), torch.zeros(3, 4, 4), ValueError, r"images \[B, channels, H, W\]; got .* \[3, 4, 4\]"),
        (nn.Sequential(nn.Identity()), [torch.zeros(1, c, 4, 4) for c in (3, 4)], ValueError, "has 4 channels here"),
    ],
)
def test_refusals(model, batches, error, sentence):
    with pytest.raises(error, match=sentence):
        analyze(model, batches)


def test_an_unknown_norm_is_refused_before_the_model_runs():
    with pytest.raises(ValueError, match="norm='2pi' is not known"):
        analyze(Counting(), None, norm="2pi")


# --- The profile ---


def test_hottest_layers_come_in_order_of_depth():
    profile = profile_of([5.0, 1.0, 4.0, 4.0, 9.0])
    assert [profile.hottest(k) for k in (1, 2, 3, 5)] == [[4], [0, 4], [0, 2, 4], [0, 1, 2, 3, 4]]
    for k in (0, 6, True, 1.0):
        with pytest.raises(ValueError, match=f"k={k} layers cannot be chosen: made up has 5"):
            profile.hottest(k)


def test_a_saved_profile_comes_back_bit_for_bit(tmp_path, images):
    profile = analyze(Elementwise(), images, title="ähnlich", data="noise", random_weights=True, weights="w")
    profile.save(tmp_path / "profile.json")
    again = SpectralProfile.load(tmp_path / "profile.json")
    assert [p.name for p in tmp_path.iterdir()] == ["profile.json"]
    for name in ("layers", "channels", "images", "norm", "title", "data", "random_weights", "weights"):
        assert getattr(again, name) == getattr(profile, name), name
    for a, b in zip(again.intensity, profile.intensity, strict=True):
        assert torch.equal(a, b)
    assert torch.equal(again.entropy, profile.entropy) and torch.equal(again.layer_intensity, profile.layer_intensity)
    bare = analyze(Elementwise(), images, entropy=False)
    bare.to_json(tmp_path / "bare.json")
    assert SpectralProfile.load(tmp_path / "bare.json").entropy is None


def test_csv_has_a_row_per_layer_and_frequency(tmp_path):
    import csv

    profile = analyze(Elementwise(2), torch.randn(2, 5, 4, 4))
    profile.to_csv(tmp_path / "profile.csv")
    with (tmp_path / "profile.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["name"], row["k"]) for row in rows] == [(f"blocks.{i}", str(k)) for i in (0, 1) for k in (0, 1, 2)]
    assert float(rows[4]["intensity"]) == profile.intensity[1][1].item() and float(rows[4]["frequency"]) == 0.2
    assert float(rows[4]["layer_intensity"]) == profile.layer_intensity[1].item()
    assert float(rows[4]["entropy_bits"]) == profile.entropy[1].item()


def test_files_that_are_no_profile(tmp_path):
    path = tmp_path / "p.json"
    with pytest.raises(ValueError, match="p.json cannot be read"):
        SpectralProfile.load(path)
    path.write_text("{")
    with pytest.raises(ValueError, match="is no JSON"):
        SpectralProfile.load(path)
    path.write_text("[]")
    with pytest.raises(ValueError, match="is no profile of skd analyze"):
        SpectralProfile.load(path)
    profile_of([1, 2], channels=4).save(path)
    whole = json.loads(path.read_text())
    for key, value in (("channels", [4, 8]), ("layers", ["a"]), ("entropy", [1.0]), ("intensity", "none")):
        path.write_text(json.dumps({**copy.deepcopy(whole), key: value}))
        with pytest.raises(ValueError, match="is a damaged profile"):
            SpectralProfile.load(path)
    del whole["norm"]
    path.write_text(json.dumps(whole))
    with pytest.raises(ValueError, match="damaged profile .KeyError: 'norm'"):
        SpectralProfile.load(path)


# --- Pictures ---


def figure_of(monkeypatch, tmp_path, profiles, **options):
    """The figure that is drawn, to be asked what it shows."""
    pytest.importorskip("matplotlib", reason="pictures need it (extra 'train')")
    from matplotlib.figure import Figure

    drawn = []
    save = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *a, **k: drawn.append(self) or save(self, *a, **k))
    path = tmp_path / "picture.png"
    profiles[0].plot(path, *profiles[1:], **options)
    assert path.read_bytes().startswith(b"\x89PNG") and [p.name for p in tmp_path.iterdir()] == ["picture.png"]
    return drawn[0]


@pytest.mark.parametrize(
    ("depths", "kind"),
    [((24,), "both"), ((12, 24), "depth"), ((12, 24), "frequency"), ((4, 4, 12), "both"), ((4,), "frequency")],
)
def test_pictures_show_every_layer_and_cut_nothing_off(monkeypatch, tmp_path, depths, kind):
    torch.manual_seed(0)
    profiles = [
        profile_of(
            1 + torch.rand(depth),
            channels=24,
            title=f"a model of {depth} layers with a long name",
            entropy=torch.rand(depth),
            random_weights=index == 0,
        )
        for index, depth in enumerate(depths)
    ]
    figure = figure_of(monkeypatch, tmp_path, profiles, kind=kind, chosen=[0, depths[0] - 1])
    panels = [axes for axes in figure.axes if axes.get_label() != "<colorbar>"]
    rows = {"depth": 2, "frequency": 1, "both": 3}[kind]
    assert len(panels) == rows * len(depths)
    assert all(axes.get_xlabel() and axes.get_ylabel() for axes in panels)
    assert "RANDOM WEIGHTS" in panels[0].get_title(loc="left").replace("\u00a0", " ")
    for row in range(rows):
        for axes, depth in zip(panels[row * len(depths) :], depths, strict=False):
            assert len(axes.lines) + len(axes.patches) == depth
    box = figure.bbox
    renderer = figure.canvas.get_renderer()
    for axes in figure.axes:
        tight = axes.get_tightbbox(renderer)
        assert tight.x0 >= box.x0 - 1 and tight.y0 >= box.y0 - 1 and tight.x1 <= box.x1 + 1 and tight.y1 <= box.y1 + 1
    for i, axes in enumerate(panels):  # panels with titles and labels do not overlap
        for other in panels[i + 1 :]:
            a, b = axes.get_tightbbox(renderer), other.get_tightbbox(renderer)
            assert a.x1 <= b.x0 + 1 or b.x1 <= a.x0 + 1 or a.y1 <= b.y0 + 1 or b.y1 <= a.y0 + 1


def test_panels_share_an_axis_only_where_it_suits_all(monkeypatch, tmp_path):
    profiles = [profile_of([1.0, top]) for top in (2.0, 3.0, 300.0)]
    tops = [axes.get_ylim()[1] for axes in figure_of(monkeypatch, tmp_path, profiles, kind="depth").axes]
    assert tops[0] == tops[1] and 3 < tops[0] < 4 and 300 < tops[2] < 400


def test_a_picture_of_zeros_can_be_drawn(monkeypatch, tmp_path):
    figure_of(monkeypatch, tmp_path, [profile_of([0.0, 0.0], channels=4)])


def test_pictures_that_would_mislead_are_refused(tmp_path):
    one, ortho = profile_of([1.0]), profile_of([1.0], norm="ortho")
    with pytest.raises(ValueError, match="different norm do not compare"):
        one.plot(tmp_path / "a.png", ortho)
    with pytest.raises(ValueError, match="draw 3 at most"):
        one.plot(tmp_path / "a.png", one, one, one)
    with pytest.raises(ValueError, match="kind='pie'"):
        plots.draw(tmp_path / "a.png", [one], kind="pie")
    assert not list(tmp_path.iterdir())
