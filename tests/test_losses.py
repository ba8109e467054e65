"""SpectralLoss and spectral_loss: what is refused, and with which sentence; which backend is chosen."""

import warnings

import pytest
import torch

import skd
from skd.ops import backends

MAP = torch.randn(2, 8, 7, 7)


@pytest.mark.parametrize(
    "student, teacher, error, words",
    [
        (MAP, torch.randn(2, 8, 14, 14), ValueError, ["spatial", "(2, 8, 7, 7)", "(2, 8, 14, 14)", "interpolate"]),
        (MAP, torch.randn(3, 8, 7, 7), ValueError, ["batch", "(3, 8, 7, 7)"]),
        ([MAP, MAP], [MAP], ValueError, ["2 student maps", "1 teacher map"]),
        ([], [], ValueError, ["empty", "at least one"]),
        (MAP.int(), MAP, TypeError, ["student map 0", "torch.int32", "float32"]),
        (MAP, MAP.to(torch.complex64), TypeError, ["teacher map 0", "complex64"]),
        (torch.randn(2, 49, 8), MAP, ValueError, ["(2, 49, 8)", "tokens_to_map"]),
        (torch.randn(2, 8), MAP, ValueError, ["(2, 8)", "[B, C, H, W]"]),
        (torch.randn(2, 0, 7, 7), MAP, ValueError, ["(2, 0, 7, 7)", "batch may be empty"]),
        (MAP, MAP.clone().requires_grad_(), ValueError, ["layer 0", "detach"]),
        (MAP, "map", TypeError, ["teacher", "str"]),
        ([MAP, None], [MAP, MAP], TypeError, ["student map 1", "NoneType"]),
        (MAP, MAP.to("meta"), ValueError, ["meta", "cpu", "one device"]),
    ],
)
def test_maps_that_do_not_go_together(student, teacher, error, words):
    with pytest.raises(error) as caught:
        skd.spectral_loss(student, teacher)
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize(
    "options, words",
    [
        ({"match": "phase"}, ["'phase'", "'complex'", "'mse'", "'magnitude'", "'log_magnitude'"]),
        ({"reduction": "max"}, ["'max'", "'mean'", "'sum'", "'none'"]),
        ({"backend": "tpu"}, ["'tpu'", "cuda, triton, cpu, reference"]),
        ({"match": "mse", "bands": torch.ones(7, 4)}, ["bands", "match='mse'", "'complex'"]),
        ({"match": "mse", "focal": 1.0}, ["focal", "match='mse'", "'complex'"]),
        ({"focal": 0.0}, ["focal=0.0", "greater than 0"]),
        ({"focal": float("inf")}, ["focal=inf", "greater than 0"]),
        ({"focal": "1"}, ["focal", "'1'"]),
        ({"bands": torch.ones(4)}, ["(4,)", "[H, W//2+1]"]),
        ({"bands": [torch.ones(7, 4), 3]}, ["bands", "int"]),
        ({"bands": torch.ones(7, 4, dtype=torch.int32)}, ["bands", "torch.int32"]),
        ({"bands": torch.ones(7, 4, requires_grad=True)}, ["bands", "detach"]),
    ],
)
def test_options_that_are_not_known_or_not_together(options, words):
    for call in (lambda: skd.SpectralLoss(**options), lambda: skd.spectral_loss(MAP, MAP, **options)):
        with pytest.raises((ValueError, TypeError)) as caught:
            call()
        for word in words:
            assert word in str(caught.value)


@pytest.mark.parametrize(
    "bands, words",
    [
        (torch.ones(7, 7), ["layer 0", "(7, 7)", "7 x 4 bins"]),
        ([torch.ones(7, 4), torch.ones(4, 7)], ["layer 1", "(4, 7)"]),
        ([torch.ones(7, 4)], ["1 tensors for 2 layers"]),
        (torch.ones(7, 4, device="meta"), ["meta", "cpu", "move"]),
    ],
)
def test_bands_that_do_not_fit_the_maps(bands, words):
    for call in (skd.SpectralLoss(bands=bands), lambda s, t: skd.spectral_loss(s, t, bands=bands)):
        with pytest.raises(ValueError) as caught:
            call([MAP, MAP], [MAP, MAP])
        for word in words:
            assert word in str(caught.value)


def test_bands_are_buffers_that_a_checkpoint_does_not_hold():
    one, several = skd.SpectralLoss(bands=torch.ones(7, 4)), skd.SpectralLoss(bands=[torch.ones(7, 4)] * 2)
    for loss, count in ((one, 1), (several, 2)):
        assert len(list(loss.buffers())) == count and not loss.state_dict() and not list(loss.parameters())
    assert one.to("meta").bands.device.type == "meta" and several.double().bands[1].dtype == torch.float64
    assert "one for all layers" in repr(one) and "2 layers" in repr(several)


def test_one_weight_per_layer():
    with pytest.raises(ValueError, match="1 numbers for 2 layers"):
        skd.SpectralLoss(weights=[1.0])([MAP, MAP], [MAP, MAP])


@pytest.mark.parametrize("weights", ["3", torch.tensor([0.5], requires_grad=True), torch.tensor(0.5), [None], {1: 2}])
def test_weights_are_numbers(weights):
    with pytest.raises(TypeError, match="numbers"):
        skd.SpectralLoss(weights=weights)


def test_weights_may_be_numpy_numbers():
    numpy = pytest.importorskip("numpy")
    halves = skd.spectral_loss(MAP, MAP + 1, weights=numpy.float32(0.5)), skd.spectral_loss(MAP, MAP + 1, weights=[0.5])
    assert halves[0] == halves[1]


def test_the_module_shows_its_options_and_has_no_parameters():
    loss = skd.SpectralLoss("mse", weights=[1, 2], reduction="sum")
    assert repr(loss) == "SpectralLoss(match='mse', reduction='sum', weights=[1, 2])"
    assert not list(loss.parameters()) and not loss.state_dict()


# --- The choice of backend ---


@pytest.fixture
def without_extension(monkeypatch):
    monkeypatch.setattr(backends, "load", lambda name: f"skd._{name} was left out for this test")
    remembered = (backends._best, backends._refusal)
    for choice in remembered:
        choice.cache_clear()
    yield
    for choice in remembered:
        choice.cache_clear()


def test_a_name_that_cannot_serve_raises_and_says_why(without_extension, monkeypatch):
    with pytest.raises(RuntimeError, match="'cpu' cannot run spectral_align: skd._cpu was left out"):
        skd.spectral_loss(MAP, MAP, backend="cpu")
    monkeypatch.setenv("SKD_BACKEND", "cuda")
    with pytest.raises(RuntimeError, match="'cuda' cannot run spectral_align"):
        skd.spectral_loss(MAP, MAP)


def test_falling_back_is_said_once(without_extension):
    with pytest.warns(RuntimeWarning, match="falls back to plain PyTorch: skd._cpu was left out"):
        skd.spectral_loss(MAP, MAP)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        skd.spectral_loss(MAP, MAP)


def test_the_environment_chooses(monkeypatch):
    used = []
    from skd.ops import spectral_align

    spied = {
        name: lambda *args, name=name, run=run: used.append(name) or run(*args)
        for name, run in spectral_align.IMPLEMENTATIONS.items()
    }
    monkeypatch.setattr(spectral_align, "IMPLEMENTATIONS", spied)
    monkeypatch.setenv("SKD_BACKEND", "reference")
    skd.spectral_loss(MAP, MAP)
    monkeypatch.delenv("SKD_BACKEND")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        skd.spectral_loss(MAP, MAP)
    assert used == ["reference", "cpu" if backends.backends()["cpu"] is True else "reference"]
    monkeypatch.setenv("SKD_BACKEND", "gpu")
    with pytest.raises(ValueError, match="SKD_BACKEND='gpu'"):
        skd.spectral_loss(MAP, MAP)


def test_backends_names_each_with_its_reason():
    listed = skd.backends()
    assert list(listed) == ["cuda", "triton", "cpu", "reference"] and listed["reference"] is True
    for reason in listed.values():
        assert reason is True or (isinstance(reason, str) and len(reason) > 10)
