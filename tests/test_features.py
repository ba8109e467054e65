"""Block outputs as maps: the values are those of the layers, the memory too, and nothing stays behind."""

import copy
import gc
import io
import math
import weakref
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import skd
from skd.features import FeatureTap, tokens_to_map


class OpLog(TorchDispatchMode):
    """Counts every operator that runs, views included."""

    def __init__(self):
        super().__init__()
        self.ops = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.ops[func] += 1
        return func(*args, **(kwargs or {}))


def only_views(op) -> bool:
    """By its schema: everything the operator returns aliases an input, and nothing is written."""
    returns = op._schema.returns
    return bool(returns) and all(r.alias_info is not None and not r.alias_info.is_write for r in returns)


def ops_of(call):
    with OpLog() as log:
        result = call()
    return result, log.ops


def same_memory(a, b) -> bool:
    return a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr()


class Block(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.mlp = nn.Linear(dim, dim)

    def forward(self, x):
        return x + torch.tanh(self.mlp(self.norm(x)))


class TinyVit(nn.Module):
    """Patches of 4 x 4, one class token, three blocks; ``finish`` runs between the blocks and the head."""

    def __init__(self, dim=6, depth=3, finish=None):
        super().__init__()
        self.num_prefix_tokens = 1
        self.embed = nn.Conv2d(3, dim, 4, 4)
        self.cls_token = nn.Parameter(torch.randn(1, 1, dim))
        self.blocks = nn.ModuleList(Block(dim) for _ in range(depth))
        self.head = nn.Linear(dim, 5)
        self.finish = finish
        self.seen = []

    def forward(self, images):
        x = self.embed(images).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls_token.expand(x.shape[0], -1, -1), x], 1)
        for block in self.blocks:
            x = block(x)
        if self.finish is not None:
            x = self.finish(x)
        return self.head(x[:, 0])

    def block_outputs(self, images):
        """What the blocks return, computed without the model's own forward and without hooks."""
        x = self.embed(images).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls_token.expand(x.shape[0], -1, -1), x], 1)
        outputs = []
        for block in self.blocks:
            x = x + torch.tanh(block.mlp(block.norm(x)))
            outputs.append(x)
        return outputs


class Returns(nn.Module):
    """A model whose one layer returns what ``make`` makes of the images."""

    class Layer(nn.Module):
        def __init__(self, make):
            super().__init__()
            self.make = make

        def forward(self, x):
            return self.make(x)

    def __init__(self, make, **attributes):
        super().__init__()
        self.layer = self.Layer(make)
        for name, value in attributes.items():
            setattr(self, name, value)

    def forward(self, images):
        self.layer(images)
        return images.mean((1, 2, 3))


def hooks_on(model):
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture
def images():
    return torch.randn(2, 3, 8, 8)


# tokens_to_map


@given(
    st.integers(0, 3),
    st.integers(1, 5),
    st.integers(1, 5),
    st.integers(1, 4),
    st.integers(0, 3),
    st.sampled_from(["contiguous", "channels first", "sliced", "expanded"]),
)
def test_every_token_lands_at_its_row_and_column(b, h, w, c, prefix, memory):
    n = prefix + h * w
    if memory == "contiguous":
        x = torch.randn(b, n, c)
    elif memory == "channels first":
        x = torch.randn(b, c, n).transpose(1, 2)
    elif memory == "sliced":
        x = torch.randn(b, 2 * n + 1, c + 3)[:, 1::2, 2 : 2 + c]
    else:
        x = torch.randn(1, n, c).expand(b, n, c)
    y = tokens_to_map(x, (h, w), prefix)
    assert y.shape == (b, c, h, w)
    assert same_memory(x, y)
    # Built value by value, from the definition of raster order.
    expected = np.array(
        [
            [[[x[i, prefix + r * w + q, k].item() for q in range(w)] for r in range(h)] for k in range(c)]
            for i in range(b)
        ]
    ).reshape(b, c, h, w)
    np.testing.assert_array_equal(y.numpy(), expected.astype(np.float32))


def test_tokens_to_map_is_square_by_default_and_keeps_the_dtype():
    x = torch.randn(2, 50, 3, dtype=torch.bfloat16)
    y = tokens_to_map(x, prefix_tokens=1)
    assert y.shape == (2, 3, 7, 7) and y.dtype == torch.bfloat16
    assert torch.equal(y[1, 2], x[1, 1:, 2].view(7, 7))


def test_tokens_to_map_runs_only_view_operators_and_gradients_flow():
    x = torch.randn(2, 13, 4, requires_grad=True)
    y, ops = ops_of(lambda: tokens_to_map(x, (3, 4), 1))
    assert ops and all(only_views(op) for op in ops), ops
    assert y.data_ptr() == x[:, 1:].data_ptr()
    weight = torch.randn_like(y)
    (y * weight).sum().backward()
    assert torch.equal(x.grad[:, 0], torch.zeros(2, 4))
    assert torch.equal(x.grad[:, 1:], weight.flatten(2).transpose(1, 2))


def test_tokens_to_map_compiles_without_breaks():
    compiled = torch.compile(lambda x: tokens_to_map(x, prefix_tokens=1), fullgraph=True, backend="aot_eager")
    for size in (5, 10, 17):
        x = torch.randn(2, size, 3)
        assert torch.equal(compiled(x), tokens_to_map(x, prefix_tokens=1))


@pytest.mark.parametrize(
    ("args", "error", "words"),
    [
        ((np.zeros((2, 4, 3)),), TypeError, "takes a tensor"),
        ((torch.ones(2, 3, 4, 4),), ValueError, r"\[2, 3, 4, 4\]"),
        ((torch.ones(2, 5, 3),), ValueError, "5 patch tokens .* no square grid"),
        ((torch.ones(2, 5, 3), None, 2), ValueError, "3 patch tokens .* no square grid"),
        ((torch.ones(2, 12, 3), (3, 5)), ValueError, "3 x 5 does not hold the 12"),
        ((torch.ones(2, 12, 3), (-3, -4)), ValueError, "-3 x -4"),
        ((torch.ones(2, 12, 3), 12), TypeError, "pair of ints"),
        ((torch.ones(2, 12, 3), (3, 4.0)), TypeError, "pair of ints"),
        ((torch.ones(2, 12, 3), (12,)), TypeError, "pair of ints"),
        ((torch.ones(2, 4, 3), None, -1), ValueError, "prefix_tokens=-1"),
        ((torch.ones(2, 4, 3), None, 4), ValueError, "leaves no patch token"),
        ((torch.ones(2, 0, 3),), ValueError, "leaves no patch token"),
        ((torch.ones(2, 4, 3), None, 1.0), TypeError, "number of tokens"),
        ((torch.ones(2, 4, 3), None, True), TypeError, "number of tokens"),
    ],
)
def test_tokens_to_map_says_what_is_wrong(args, error, words):
    with pytest.raises(error, match=words):
        tokens_to_map(*args)


# FeatureTap: which layers, which values


def test_public_names():
    assert skd.FeatureTap is FeatureTap and skd.tokens_to_map is tokens_to_map


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("grad", [True, False])
def test_maps_come_in_the_order_asked_and_logits_are_those_of_a_plain_call(images, mode, grad):
    model = getattr(TinyVit(), mode)()
    tap = FeatureTap(model, [2, "blocks.0", -2, 0, 2])
    assert tap.layer_names == ["blocks.2", "blocks.0", "blocks.1", "blocks.0", "blocks.2"]
    assert tap.training == model.training == (mode == "train")
    with torch.set_grad_enabled(grad):
        logits, maps = tap(images)
        plain = model(images)
        blocks = [tokens_to_map(x, (2, 2), 1) for x in model.block_outputs(images)]
    assert torch.equal(logits, plain)
    assert [tuple(m.shape) for m in maps] == [(2, 6, 2, 2)] * 5
    for got, index in zip(maps, [2, 0, 1, 0, 2], strict=True):
        assert torch.equal(got, blocks[index])
        assert got.requires_grad == grad
    assert not torch.equal(blocks[0], blocks[1])  # or the order above would prove nothing


def test_numpy_indices_and_ranges_are_layers(images):
    model = TinyVit()
    assert FeatureTap(model, [np.int64(-1)]).layer_names == ["blocks.2"]
    assert FeatureTap(model, range(3)).layer_names == ["blocks.0", "blocks.1", "blocks.2"]


def test_gradients_through_the_maps_are_those_of_the_blocks(images):
    model = TinyVit()
    _, (first, last) = FeatureTap(model, [0, -1])(images)
    weights = torch.randn_like(first), torch.randn_like(last)
    loss = (first * weights[0]).sum() + (last * weights[1]).sum()
    got = torch.autograd.grad(loss, [model.embed.weight, model.blocks[2].mlp.weight])
    outputs = model.block_outputs(images)
    tokens = [w.flatten(2).transpose(1, 2) for w in weights]
    loss = (outputs[0][:, 1:] * tokens[0]).sum() + (outputs[2][:, 1:] * tokens[1]).sum()
    expected = torch.autograd.grad(loss, [model.embed.weight, model.blocks[2].mlp.weight])
    for a, b in zip(got, expected, strict=True):
        assert b.norm() > 0
        torch.testing.assert_close(a, b)


def test_only_views_lie_between_layer_and_map(images):
    model = TinyVit()
    raw = []
    model.blocks[1].register_forward_hook(lambda module, args, output: raw.append(output))
    _, plain = ops_of(lambda: model(images))
    tap = FeatureTap(model, [1, 1])
    (_, maps), tapped = ops_of(lambda: tap(images))
    assert not plain - tapped
    extra = tapped - plain
    assert extra and all(only_views(op) for op in extra), extra
    assert all(same_memory(m, raw[-1]) and m.data_ptr() == raw[-1][:, 1:].data_ptr() for m in maps)


def test_stages_numbered_children_sequentials_and_feature_info_are_found(images):
    class Net(nn.Module):
        def __init__(self, names, feature_info=None):
            super().__init__()
            self.names = names
            for name in names:
                self.add_module(name, nn.Conv2d(3, 3, 1))
            if feature_info:
                self.feature_info = [{"module": name, "num_chs": 3} for name in feature_info]

        def forward(self, x):
            for name in self.names:
                x = self.get_submodule(name)(x)
            return x.mean((2, 3))

    assert FeatureTap(Net(["conv1", "layer1", "layer2", "layer3"]), [0, -1]).layer_names == ["layer1", "layer3"]
    assert FeatureTap(Net(["stem", "s1", "s2"]), [1]).layer_names == ["s2"]
    assert FeatureTap(Net(["a", "b", "c"], feature_info=["a", "c"]), [0, 1]).layer_names == ["a", "c"]
    net = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 5, 1))
    tap = FeatureTap(net, [1, 0])
    logits, maps = tap(images)
    assert torch.equal(maps[0], logits) and torch.equal(maps[1], net[0](images))
    with pytest.raises(ValueError, match="Net has no list of blocks .* such as 'a', 'b'"):
        FeatureTap(Net(["a", "b"], feature_info=["a", "gone"]), [0])


def test_a_stage_that_is_a_module_list_gives_its_last_block(images):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks = nn.ModuleList(nn.ModuleList(nn.Conv2d(3, 3, 1) for _ in range(2)) for _ in range(2))

        def forward(self, x):
            for stage in self.blocks:
                for block in stage:
                    x = block(x)
            return x

    model = Net()
    tap = FeatureTap(model, [0, 1])
    assert tap.layer_names == ["blocks.0.1", "blocks.1.1"]
    logits, maps = tap(images)
    assert torch.equal(maps[1], logits) and torch.equal(maps[0], model.blocks[0][1](model.blocks[0][0](images)))


def test_a_block_that_runs_twice_gives_its_last_output(images):
    model = TinyVit(depth=1)
    model.blocks.append(model.blocks[0])
    tap = FeatureTap(model, [0, 1])
    assert tap.layer_names == ["blocks.0", "blocks.1"]
    _, maps = tap(images)
    last = tokens_to_map(model.block_outputs(images)[1], (2, 2), 1)
    assert torch.equal(maps[0], last) and torch.equal(maps[1], last)


def test_arguments_beyond_the_images_are_handed_on(images):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList([nn.Conv2d(3, 3, 1)])

        def forward(self, x, scale, *, shift):
            return self.layers[0](x) * scale + shift

    model = Net()
    logits, (first,) = FeatureTap(model, [0])(images, 2.0, shift=1.0)
    assert torch.equal(logits, first * 2 + 1)


# FeatureTap: reading what a layer returned


def test_the_first_tensor_of_a_tuple_is_the_output(images):
    model = Returns(lambda x: ((8, 8), x * 2, x * 3))
    _, (got,) = FeatureTap(model, ["layer"])(images)
    assert torch.equal(got, images * 2)


def test_channels_last_outputs_are_permuted_where_the_model_says_so():
    x = torch.randn(2, 3, 8, 6)
    plain = Returns(lambda x: x.permute(0, 2, 3, 1).contiguous())
    declared = Returns(lambda x: x.permute(0, 2, 3, 1).contiguous(), output_fmt="NHWC")
    described = Returns(lambda x: x.permute(0, 2, 3, 1).contiguous(), feature_info=[{"module": "layer", "num_chs": 3}])
    for tap in (
        FeatureTap(declared, ["layer"]),
        FeatureTap(described, ["layer"]),
        FeatureTap(plain, ["layer"], output_fmt="NHWC"),
    ):
        assert torch.equal(tap(x)[1][0], x)
    x = torch.randn(2, 3, 64, 64)
    with pytest.raises(ValueError, match=r"\[2, 64, 64, 3\], which read as NCHW is no map of a 64 x 64 image"):
        FeatureTap(plain, ["layer"])(x)
    assert FeatureTap(plain, ["layer"], output_fmt="NCHW")(x)[1][0].shape == (2, 64, 64, 3)
    # A channels-first layer inside a channels-last model is not transposed either.
    with pytest.raises(ValueError, match=r"\[2, 3, 64, 64\], which read as NHWC"):
        FeatureTap(Returns(lambda x: x, output_fmt="NHWC"), ["layer"])(x)


@pytest.mark.parametrize("prefix", [0, 1, 5])
@pytest.mark.parametrize("size", [(8, 8), (12, 8), (8, 20), (32, 4)])
def test_the_grid_follows_the_image_and_the_prefix_tokens_are_dropped(prefix, size):
    def tokens(x):
        patches = x[:, :, ::4, ::4].flatten(2).transpose(1, 2)
        return torch.cat([torch.full((x.shape[0], prefix, 3), math.nan), patches], 1)

    x = torch.randn(2, 3, *size)
    for tap in (
        FeatureTap(Returns(tokens, num_prefix_tokens=prefix), ["layer"]),
        FeatureTap(Returns(tokens), ["layer"], prefix_tokens=prefix),
    ):
        assert torch.equal(tap(x)[1][0], x[:, :, ::4, ::4])


def test_declared_prefix_tokens_need_not_be_there_yet():
    x = torch.randn(2, 3, 8, 8)
    model = Returns(lambda x: x.flatten(2).transpose(1, 2), num_prefix_tokens=1)  # as CaiT: they join later
    assert torch.equal(FeatureTap(model, ["layer"])(x)[1][0], x)


@given(st.integers(16, 150), st.integers(16, 150), st.sampled_from([4, 7, 14, 16]), st.booleans())
def test_the_grid_is_found_for_images_that_are_no_multiple_of_the_patch(height, width, patch, pad):
    def count(size):
        return math.ceil(size / patch) if pad else size // patch

    grid = (count(height), count(width))
    model = Returns(lambda x: torch.arange(grid[0] * grid[1]).float().view(1, -1, 1))
    _, (got,) = FeatureTap(model, ["layer"])(torch.zeros(1, 3, height, width))
    assert tuple(got.shape[2:]) == grid
    assert torch.equal(got.flatten(), torch.arange(grid[0] * grid[1]).float())


def test_the_patch_grid_decides_where_the_model_has_one():
    embed = nn.Identity()
    embed.grid_size = (2, 8)
    x = torch.randn(2, 3, 4, 4)
    model = Returns(lambda x: x.flatten(2).transpose(1, 2), patch_embed=embed)
    assert torch.equal(FeatureTap(model, ["layer"])(x)[1][0], x.view(2, 3, 2, 8))
    embed.dynamic_feat_size = lambda size: (size[0], size[1] - 1)
    with pytest.raises(ValueError, match="16 tokens .* do not fill the 4 x 3 patch grid with 0 prefix tokens"):
        FeatureTap(model, ["layer"])(x)


@pytest.mark.parametrize(
    ("make", "attributes", "error", "words"),
    [
        (lambda x: [x, x], {}, ValueError, "'layer' returns a list, not a tensor"),
        (lambda x: {"x": x}, {}, ValueError, "returns a dict, not a tensor"),
        (lambda x: (None, 3), {}, ValueError, "returns a tuple, not a tensor"),
        (lambda x: None, {}, ValueError, "returns a NoneType, not a tensor"),
        (lambda x: x.mean((2, 3)), {}, ValueError, r"returns \[2, 3\]; only"),
        (lambda x: x.sum(), {}, ValueError, r"returns \[\] for a batch of 2"),
        (lambda x: x.unsqueeze(2), {}, ValueError, r"returns \[2, 3, 1, 8, 8\]; only"),
        (lambda x: torch.cat([x, x]), {}, ValueError, r"returns \[4, 3, 8, 8\] for a batch of 2 images"),
        (
            lambda x: torch.ones(2, 17, 3),
            {},
            ValueError,
            "17 tokens .* aspect ratio with 0 prefix .* pass prefix_token",
        ),
        (lambda x: torch.ones(2, 20, 3), {"num_prefix_tokens": 1}, ValueError, "20 tokens .* with 1 or 0 prefix"),
        (lambda x: torch.ones(2, 16, 3), {"reroll": None}, ValueError, "order of mask units"),
    ],
)
def test_outputs_that_are_no_map_are_refused(images, make, attributes, error, words):
    tap = FeatureTap(Returns(make, **attributes), ["layer"])
    with pytest.raises(error, match=words):
        tap(images)


def test_a_layer_that_did_not_run_is_an_error_that_names_the_way_out(images):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.used = nn.Sequential(nn.Conv2d(3, 3, 1), nn.ReLU())
            self.idle = nn.Identity()

        def forward(self, x):
            for entry in self.used:
                x = entry(x)
            return x

    with pytest.raises(RuntimeError, match="'idle' did not run"):
        FeatureTap(Net(), ["idle"])(images)
    with pytest.raises(RuntimeError, match=r"'used' did not run .* one by one.*'used.1'"):
        FeatureTap(Net(), ["used"])(images)


def test_an_output_overwritten_in_place_is_an_error(images):
    model = TinyVit(finish=torch.relu_)
    with torch.no_grad():
        with pytest.raises(RuntimeError, match="'blocks.2' was overwritten in place"):
            FeatureTap(model, [2])(images)
        FeatureTap(model, [1])(images)
    with torch.inference_mode():  # keeps no version of its tensors, but the tap works
        _, (got,) = FeatureTap(model, [1])(images)
    assert torch.equal(got, tokens_to_map(model.block_outputs(images)[1], (2, 2), 1))


@pytest.mark.parametrize(
    ("layers", "error", "words"),
    [
        ([], ValueError, "layers is empty"),
        (0, TypeError, "layers is a list"),
        ("blocks.0", TypeError, "layers is a list"),
        (None, TypeError, "layers is a list"),
        ({0, 1}, TypeError, "layers is a list"),
        ([True], TypeError, "not True"),
        ([1.0], TypeError, "not 1.0"),
        ([None], TypeError, "not None"),
        ([0, 3], ValueError, r"no layer 3: TinyVit has 3 \(blocks.0 to blocks.2\), so an index goes from -3 to 2"),
        ([-4], ValueError, "no layer -4"),
        (["blocks.7"], ValueError, "no submodule 'blocks.7' among its 12; there are 'blocks.[012]'"),
        (["bloks.1"], ValueError, "'blocks.1'"),
        (["zzz"], ValueError, "there are 'embed'"),
        ([""], ValueError, "no submodule ''"),
        (["cls_token"], ValueError, "no submodule 'cls_token'"),
        (["blocks"], ValueError, "'blocks' is an ModuleList, which only holds modules .* 'blocks.0', 'blocks.1'"),
    ],
)
def test_layers_that_do_not_exist_are_refused(layers, error, words):
    model = TinyVit()
    with pytest.raises(error, match=words):
        FeatureTap(model, layers)
    assert hooks_on(model) == 0


@pytest.mark.parametrize(
    ("kwargs", "error"),
    [
        ({"prefix_tokens": -1}, ValueError),
        ({"prefix_tokens": 1.0}, TypeError),
        ({"prefix_tokens": True}, TypeError),
        ({"output_fmt": "NLC"}, ValueError),
    ],
)
def test_options_are_checked(kwargs, error):
    with pytest.raises(error, match=f"{next(iter(kwargs))} "):
        FeatureTap(TinyVit(), [0], **kwargs)


def test_a_model_that_is_no_module_is_refused():
    with pytest.raises(TypeError, match="takes a torch.nn.Module, not function"):
        FeatureTap(lambda x: x, [0])


# FeatureTap: nothing stays behind


def test_close_removes_every_hook_and_the_state_dict_is_never_touched(images):
    model = TinyVit()
    before = list(model.state_dict())
    with FeatureTap(model, [0, 1, 1]) as tap:
        assert hooks_on(model) == 2
        tap(images)
        assert list(model.state_dict()) == before
        assert list(tap.state_dict()) == [f"model.{key}" for key in before]
    assert hooks_on(model) == 0
    tap.close()
    with pytest.raises(RuntimeError, match="closed"):
        tap(images)
    assert "closed" in repr(tap)
    model(images)


def test_an_exception_in_the_model_leaves_no_stale_maps(images):
    class Fails(nn.Module):
        fail = True

        def forward(self, x):
            if self.fail:
                raise KeyError("inside the model")
            return x

    finish = Fails()
    model = TinyVit(finish=finish)
    tap = FeatureTap(model, [0])
    kept = []
    model.blocks[0].register_forward_hook(lambda module, args, output: kept.append(weakref.ref(output)))
    with pytest.raises(KeyError):
        tap(images)
    assert tap._calls == []
    gc.collect()  # the traceback of the exception
    assert kept[0]() is None
    finish.fail = False
    _, (got,) = tap(images + 1)
    assert torch.equal(got, tokens_to_map(model.block_outputs(images + 1)[0], (2, 2), 1))


def test_outputs_are_freed_with_the_maps_without_the_garbage_collector(images):
    model = TinyVit()
    tap = FeatureTap(model, [0, -1])
    kept = []
    model.blocks[0].register_forward_hook(lambda module, args, output: kept.append(weakref.ref(output)))
    gc.collect()
    gc.disable()
    try:
        with torch.no_grad():
            result = tap(images)
            del result
            model(images)  # hooks outside a call of the tap keep nothing either
        assert [ref() for ref in kept] == [None, None]
    finally:
        gc.enable()


def test_taps_share_a_model_and_nest(images):
    model = TinyVit()
    one, two = FeatureTap(model, [0]), FeatureTap(model, [0, 2])
    outer = FeatureTap(two, ["model.blocks.1"], prefix_tokens=1)
    blocks = [tokens_to_map(x, (2, 2), 1) for x in model.block_outputs(images)]
    (logits, inner), (middle,) = outer(images)
    assert torch.equal(logits, model(images))
    assert torch.equal(inner[0], blocks[0]) and torch.equal(inner[1], blocks[2]) and torch.equal(middle, blocks[1])
    assert torch.equal(one(images)[1][0], blocks[0])
    one.close()
    assert torch.equal(two(images)[1][0], blocks[0])


def test_a_call_inside_a_call_keeps_both_apart(images):
    class Twice(nn.Module):
        """Inside its forward, the tap on it is called again with other images."""

        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList([nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1)])
            self.again = None
            self.inner = None

        def forward(self, x):
            x = self.layers[0](x)
            if self.again is not None:
                again, self.again = self.again, None
                self.inner = again(torch.ones_like(x))
            return self.layers[1](x)

    model = Twice()
    tap = FeatureTap(model, [0, 1])
    ones = model.layers[0](torch.ones_like(images))
    first = model.layers[0](images)
    object.__setattr__(model, "again", tap)  # past nn.Module, which would make the tap a child of its own model
    logits, maps = tap(images)
    assert torch.equal(maps[0], first) and torch.equal(maps[1], logits)
    assert torch.equal(model.inner[1][0], ones) and torch.equal(model.inner[1][1], model.inner[0])


def test_a_copy_of_the_tap_is_a_tap_of_its_own(images):
    model = TinyVit()
    tap = FeatureTap(model, [0, 2])
    clone = copy.deepcopy(tap)
    with torch.no_grad():
        for parameter in clone.parameters():
            parameter.mul_(0.5)
        for t in (tap, clone):
            logits, maps = t(images)
            assert torch.equal(logits, t.model(images))
            blocks = t.model.block_outputs(images)
            assert torch.equal(maps[0], tokens_to_map(blocks[0], (2, 2), 1))
            assert torch.equal(maps[1], tokens_to_map(blocks[2], (2, 2), 1))
    assert not torch.equal(tap(images)[1][0], clone(images)[1][0])
    clone.close()
    assert hooks_on(clone.model) == 0 and hooks_on(model) == 2
    tap(images)


def test_a_copy_of_the_model_alone_records_nothing(images):
    tap = FeatureTap(TinyVit(), [0])
    clone = copy.deepcopy(tap.model)
    kept = []
    clone.blocks[0].register_forward_hook(lambda module, args, output: kept.append(weakref.ref(output)))
    with torch.no_grad():
        clone(images)
    gc.collect()
    assert kept[0]() is None
    assert torch.equal(tap(images)[1][0], tokens_to_map(tap.model.block_outputs(images)[0], (2, 2), 1))


def test_a_tap_survives_saving(images):
    tap = FeatureTap(TinyVit(), [1])
    buffer = io.BytesIO()
    torch.save(tap, buffer)
    buffer.seek(0)
    loaded = torch.load(buffer, weights_only=False)
    assert torch.equal(loaded(images)[1][0], tap(images)[1][0])
    loaded.close()
    assert hooks_on(loaded.model) == 0


# FeatureTap: what wraps it


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_a_tap_compiles_without_breaks(images, backend):
    torch._dynamo.reset()
    model = TinyVit()
    tap = FeatureTap(model, [2, 0, 2])
    compiled = torch.compile(tap, fullgraph=True, backend=backend)
    logits, maps = compiled(images)
    expected_logits, expected = tap(images)
    assert torch.equal(logits, expected_logits)
    for a, b in zip(maps, expected, strict=True):
        assert torch.equal(a, b)
    assert tap._calls == []
    got = torch.autograd.grad(sum(m.square().sum() for m in maps), model.embed.weight)[0]
    want = torch.autograd.grad(sum(m.square().sum() for m in expected), model.embed.weight)[0]
    assert want.norm() > 0
    torch.testing.assert_close(got, want)


def test_a_compiled_tap_takes_any_batch_size_without_compiling_again():
    torch._dynamo.reset()
    tap = FeatureTap(TinyVit(), [0, 2])
    graphs = []

    def count(graph, inputs):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(tap, fullgraph=True, dynamic=True, backend=count)
    for batch in (2, 3, 7):
        x = torch.randn(batch, 3, 8, 8)
        assert torch.equal(compiled(x)[1][1], tap(x)[1][1])
    assert len(graphs) == 1


def test_a_tap_on_a_compiled_model_works(images):
    torch._dynamo.reset()
    model = TinyVit()
    tap = FeatureTap(torch.compile(model, backend="eager"), [0])
    assert tap.layer_names == ["blocks.0"]
    assert torch.equal(tap(images)[1][0], tokens_to_map(model.block_outputs(images)[0], (2, 2), 1))


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradients_flow_through_maps_under_checkpointing(images, reentrant):
    class Checkpointed(TinyVit):
        def forward(self, images):
            x = self.embed(images).flatten(2).transpose(1, 2)
            x = torch.cat([self.cls_token.expand(x.shape[0], -1, -1), x], 1)
            for block in self.blocks:
                x = torch.utils.checkpoint.checkpoint(block, x, use_reentrant=reentrant)
            return self.head(x[:, 0])

    model = Checkpointed()
    tap = FeatureTap(model, [0, 1])
    _, maps = tap(images)
    sum(m.square().sum() for m in maps).backward()
    got = model.blocks[0].mlp.weight.grad.clone()
    model.zero_grad()
    sum(x[:, 1:].square().sum() for x in model.block_outputs(images)[:2]).backward()
    assert got.norm() > 0
    torch.testing.assert_close(got, model.blocks[0].mlp.weight.grad)


def test_distributed_data_parallel_wraps_a_tap(images, tmp_path):
    if not (torch.distributed.is_available() and torch.distributed.is_gloo_available()):
        pytest.skip("this build of PyTorch has no gloo backend")
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        model = TinyVit()
        tap = FeatureTap(model, [0, 2])
        logits, maps = nn.parallel.DistributedDataParallel(tap)(images)
        assert torch.equal(logits, model(images))
        (logits.sum() + sum(m.square().sum() for m in maps)).backward()
        assert all(p.grad is not None for p in model.parameters())
    finally:
        torch.distributed.destroy_process_group()


# timm


@pytest.fixture(scope="module")
def timm():
    return pytest.importorskip("timm", reason="these tests compare with timm's own intermediate features")


SMALL_VIT = {"depth": 4, "embed_dim": 48, "num_heads": 3}
# name, arguments that make it small, image size, index of timm's first intermediate that is no stem
TIMM_MODELS = [
    ("deit_tiny_patch16_224", dict(SMALL_VIT, img_size=64), (64, 64), 0),
    ("deit_tiny_distilled_patch16_224", dict(SMALL_VIT, img_size=64), (64, 64), 0),
    ("deit_tiny_patch16_224", dict(SMALL_VIT, dynamic_img_size=True), (96, 64), 0),
    ("vit_small_patch14_reg4_dinov2", dict(SMALL_VIT, img_size=70), (70, 70), 0),
    ("cait_xxs24_224", dict(SMALL_VIT, img_size=64), (64, 64), 0),
    ("xcit_nano_12_p8_224", {"img_size": 64}, (64, 64), 0),
    ("beit_base_patch16_224", dict(SMALL_VIT, img_size=64), (64, 64), 0),
    ("eva02_tiny_patch14_224", {"img_size": 56, "depth": 3}, (56, 56), 0),
    ("convit_tiny", {"depth": 4, "local_up_to_layer": 2, "img_size": 64}, (64, 64), 0),
    ("mixer_s16_224", {"img_size": 64}, (64, 64), 0),
    ("swin_tiny_patch4_window7_224", {"embed_dim": 24, "img_size": 64, "window_size": 4}, (64, 64), 0),
    ("swin_tiny_patch4_window7_224", {"embed_dim": 24, "img_size": (96, 64), "window_size": 4}, (96, 64), 0),
    ("swinv2_tiny_window8_256", {"embed_dim": 24, "img_size": 64, "window_size": 4}, (64, 64), 0),
    ("swinv2_cr_tiny_224", {"embed_dim": 24, "img_size": 64, "window_size": 2}, (64, 64), 0),
    ("convnext_atto", {"dims": (8, 16, 24, 32)}, (64, 64), 0),
    ("resnet18", {}, (64, 96), 1),
    ("regnetx_002", {}, (64, 64), 1),
    ("pvt_v2_b0", {}, (64, 64), 0),
    ("levit_128s", {}, (224, 224), 0),
    ("pit_ti_224", {}, (224, 224), 0),
    ("nest_tiny", {"img_size": 64}, (64, 64), 0),
    ("mvitv2_tiny", {"img_size": 64}, (64, 64), 0),
    ("efficientformer_l1", {"img_size": 64}, (224, 224), 0),
    ("coatnet_nano_rw_224", {"img_size": 64}, (64, 64), 1),
    ("volo_d1_224", {"img_size": 64}, (64, 64), 0),
    ("twins_svt_small", {"img_size": 64}, (64, 64), 0),
    ("densenet121", {}, (64, 64), 0),
]


@pytest.mark.parametrize(("name", "kwargs", "size", "first"), TIMM_MODELS, ids=[model[0] for model in TIMM_MODELS])
def test_maps_equal_timms_intermediates_without_a_copy(timm, name, kwargs, size, first):
    model = timm.create_model(name, **kwargs).eval()
    x = torch.randn(2, 3, *size)
    with torch.no_grad():
        _, expected = model.forward_intermediates(x, norm=False, output_fmt="NCHW")
        expected = expected[first:]
        order = [-1, *range(len(expected))]
        logits, plain = ops_of(lambda: model(x))
        with FeatureTap(model, order) as tap:
            raw = {}
            for layer in tap.layer_names:
                module = model.get_submodule(layer)
                module.register_forward_hook(lambda _, args, output, layer=layer: raw.__setitem__(layer, output))
            (tapped_logits, maps), tapped = ops_of(lambda: tap(x))
    assert torch.equal(logits, tapped_logits)
    assert len(maps) == len(order)
    for got, want in zip(maps, [expected[-1], *expected], strict=True):
        assert got.shape == want.shape and torch.equal(got, want)
    assert all(m.std() > 0 for m in maps)
    assert not plain - tapped
    assert all(only_views(op) for op in tapped - plain), tapped - plain
    for layer, got in zip(tap.layer_names, maps, strict=True):
        output = raw[layer]
        assert same_memory(got, output[0] if isinstance(output, tuple) else output)


@pytest.mark.parametrize(
    ("name", "kwargs"),
    [
        ("deit_tiny_patch16_224", dict(SMALL_VIT, img_size=64)),
        ("swin_tiny_patch4_window7_224", {"embed_dim": 24, "img_size": 64, "window_size": 4, "drop_path_rate": 0.0}),
        ("convnext_atto", {"dims": (8, 16, 24, 32)}),
        ("resnet18", {}),
    ],
)
def test_timm_models_in_training_give_the_same_logits_and_gradients(timm, name, kwargs):
    model = timm.create_model(name, **kwargs).train()
    x = torch.randn(2, 3, 64, 64)
    parameters = list(model.parameters())
    logits = model(x)
    plain = torch.autograd.grad(logits.square().sum(), parameters)
    tap = FeatureTap(model, [0, -1])
    tapped, maps = tap(x)
    assert torch.equal(logits, tapped)
    both = torch.autograd.grad(tapped.square().sum() + 0.0 * sum(m.sum() for m in maps), parameters, retain_graph=True)
    for a, b in zip(plain, both, strict=True):
        torch.testing.assert_close(a, b)
    stem = next(p for p in parameters if p.dim() == 4)
    for got in maps:
        assert torch.autograd.grad(got.square().sum(), stem, retain_graph=True)[0].norm() > 0


def test_a_timm_vit_compiles_without_breaks(timm):
    torch._dynamo.reset()
    model = timm.create_model("deit_tiny_patch16_224", img_size=64, **SMALL_VIT)
    x = torch.randn(2, 3, 64, 64)
    tap = FeatureTap(model, [0, -1])
    logits, maps = torch.compile(tap, fullgraph=True, backend="aot_eager")(x)
    expected_logits, expected = tap(x)
    torch.testing.assert_close(logits, expected_logits)
    for a, b in zip(maps, expected, strict=True):
        torch.testing.assert_close(a, b)


def test_timms_averaged_model_can_copy_a_tap(timm):
    from timm.utils import ModelEmaV3

    tap = FeatureTap(timm.create_model("deit_tiny_patch16_224", img_size=64, **SMALL_VIT), [0, -1])
    ema = ModelEmaV3(tap, decay=0.5)
    with torch.no_grad():
        for parameter in tap.parameters():
            parameter.add_(torch.randn_like(parameter))
    ema.update(tap)
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        _, maps = ema(x)
        _, expected = ema.module.model.forward_intermediates(x, norm=False)
        _, live = tap.model.forward_intermediates(x, norm=False)
    assert torch.equal(maps[0], expected[0]) and torch.equal(maps[1], expected[-1])
    assert not torch.equal(maps[0], live[0])


def test_timms_checkpointing_keeps_the_gradients_or_says_which_layer_to_name(timm):
    x = torch.randn(2, 3, 64, 64)
    model = timm.create_model("deit_tiny_patch16_224", img_size=64, **SMALL_VIT)
    tap = FeatureTap(model, [1])
    want = torch.autograd.grad(tap(x)[1][0].square().sum(), model.blocks[0].mlp.fc1.weight)[0]
    model.set_grad_checkpointing(True)
    tap(x)[1][0].square().sum().backward()
    assert want.norm() > 0
    torch.testing.assert_close(model.blocks[0].mlp.fc1.weight.grad, want)
    model = timm.create_model("resnet18")
    model.set_grad_checkpointing(True)  # runs the blocks of a stage, not the stage
    with pytest.raises(RuntimeError, match="'layer2.1'"):
        FeatureTap(model, [1])(x)
    assert FeatureTap(model, ["layer2.1"])(x)[1][0].shape == (2, 128, 8, 8)


def test_patch_dropout_is_not_mistaken_for_a_smaller_grid(timm):
    model = timm.create_model("deit_tiny_patch16_224", img_size=64, patch_drop_rate=0.75, **SMALL_VIT)
    x = torch.randn(2, 3, 64, 64)
    with pytest.raises(ValueError, match="5 tokens .* do not fill the 4 x 4 patch grid .* turn patch dropout off"):
        FeatureTap(model.train(), [0])(x)
    assert FeatureTap(model.eval(), [0])(x)[1][0].shape == (2, 48, 4, 4)


@pytest.mark.parametrize(
    ("name", "error", "words"),
    [
        ("crossvit_tiny_240", ValueError, "'blocks.0' returns a list, not a tensor; name the submodule"),
        ("hiera_tiny_224", ValueError, "order of mask units"),
        ("tnt_s_legacy_patch16_224", ValueError, r"'blocks.0' returns \[196, 16, 24\] for a batch of 1 images"),
        ("coat_tiny", ValueError, "CoaT has no list of blocks .* name submodules instead, such as 'patch_embed1'"),
    ],
)
def test_timm_models_whose_blocks_return_no_map_are_refused(timm, name, error, words):
    model = timm.create_model(name).eval()
    size = model.pretrained_cfg["input_size"]
    with torch.no_grad(), pytest.raises(error, match=words):
        FeatureTap(model, [0])(torch.randn(1, *size))


def test_torchvision_models_work_by_name():
    models = pytest.importorskip("torchvision", reason="compares with torchvision's own modules").models
    x = torch.randn(2, 3, 64, 64)
    vit = models.VisionTransformer(64, 16, num_layers=2, num_heads=2, hidden_dim=16, mlp_dim=32).eval()
    name = "encoder.layers.encoder_layer_0"
    with pytest.raises(ValueError, match="17 tokens .* pass prefix_tokens="):
        FeatureTap(vit, [name])(x)
    kept = []
    vit.get_submodule(name).register_forward_hook(lambda module, args, output: kept.append(output))
    _, (got,) = FeatureTap(vit, [name], prefix_tokens=1)(x)
    assert torch.equal(got, kept[-1][:, 1:].reshape(2, 4, 4, 16).permute(0, 3, 1, 2)) and got.std() > 0
    resnet = models.resnet18().eval()
    _, (got,) = FeatureTap(resnet, [-1])(x)
    assert torch.equal(resnet.fc(got.mean((2, 3))), resnet(x))
