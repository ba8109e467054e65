"""Block outputs of any model as [B, C, H, W] views that share memory with what the model computed.

timm's ``forward_intermediates`` gives the same values but copies token and channels-last maps to NCHW. Forward hooks
on the blocks do not; what a block returned is only looked at through other strides.
"""

import difflib
from collections.abc import Sequence
from numbers import Integral
from typing import NamedTuple

import torch
from torch import Tensor, nn

__all__ = ["FeatureTap", "tokens_to_map"]

# Where models keep their main list of blocks or stages, in the order in which they are looked for.
_BLOCK_LISTS = ("blocks", "stages", "layers", "levels", "transformers")
_NUMBERED_BLOCKS = ("layer", "stage", "s", "block")  # layer1 .. layer4 of ResNet, s1 .. s4 of RegNet


def tokens_to_map(x: Tensor, grid: tuple[int, int] | None = None, prefix_tokens: int = 0) -> Tensor:
    """See tokens as a map: [B, N, C] -> [B, C, H, W], a view without a copy, for any strides of ``x``.

    Args:
        x: tokens [B, N, C], any dtype, patch tokens in raster order behind ``prefix_tokens`` others.
        grid: (H, W) in patches with ``H * W == N - prefix_tokens``; None means a square grid.
        prefix_tokens: number of leading tokens that are no patches (class, distillation, register tokens).

    Returns:
        [B, C, H, W], sharing the memory of ``x``; gradients flow.

    Raises:
        TypeError: ``x`` is no tensor, ``grid`` no pair of ints, ``prefix_tokens`` no int.
        ValueError: ``x`` is not 3-D, or its tokens do not make the grid.
    """
    if not isinstance(x, Tensor):
        raise TypeError(f"tokens_to_map takes a tensor [B, N, C], not {type(x).__name__}")
    if x.dim() != 3:
        raise ValueError(f"tokens_to_map takes tokens [B, N, C]; got a tensor of shape {list(x.shape)}")
    if not isinstance(prefix_tokens, int) or isinstance(prefix_tokens, bool):
        raise TypeError(f"prefix_tokens is a number of tokens, not {prefix_tokens!r}")
    if not 0 <= prefix_tokens < x.shape[1]:
        raise ValueError(
            f"prefix_tokens={prefix_tokens} leaves no patch token of the {x.shape[1]} in {list(x.shape)}; "
            "it must be at least 0 and smaller than N"
        )
    patches = x.shape[1] - prefix_tokens
    if grid is None:
        grid = _infer_grid(patches, None)
        if grid is None:
            raise ValueError(
                f"{patches} patch tokens ({list(x.shape)} without {prefix_tokens} prefix tokens) make no square grid; "
                "pass grid=(H, W), or the right prefix_tokens if class or register tokens come first"
            )
    elif not _is_int_pair(grid):
        raise TypeError(f"grid is a pair of ints (H, W), not {grid!r}")
    height, width = grid
    if height < 1 or width < 1 or height * width != patches:
        raise ValueError(
            f"a grid of {height} x {width} does not hold the {patches} patch tokens of {list(x.shape)} "
            f"without {prefix_tokens} prefix tokens; H * W must equal N - prefix_tokens"
        )
    return _view_tokens(x, height, width, prefix_tokens)


def _view_tokens(x: Tensor, height: int, width: int, prefix: int) -> Tensor:
    if prefix:
        x = x[:, prefix:]
    return x.unflatten(1, (height, width)).permute(0, 3, 1, 2)


class FeatureTap(nn.Module):
    """A model that also returns the outputs of some of its layers: ``images -> (logits, [maps])``.

    ``logits`` is exactly what ``model(images)`` returns. The maps come in the order of ``layers`` (repetitions
    allowed) as [B, C, H, W] views of what the layers returned, in the layers' dtype, with or without gradient as the
    call is; no kernel runs between layer and map. The tap holds the model as ``tap.model`` and is a module itself, so
    DistributedDataParallel, ``torch.compile`` and averaging of weights can wrap it; wrap the tap, not the model in it.

    Args:
        model: any module whose first argument is a batch of images [B, channels, height, width].
        layers: list of ints and of dotted submodule names, mixed as you like. Ints count the model's blocks or stages
            from 0, negative ones from the end: the entries of ``blocks`` (ViT, DeiT, CaiT, ...), ``stages``
            (ConvNeXt, ...), ``layers`` (Swin), ``levels`` or ``transformers``, else the children ``layer1``,
            ``layer2``, ... (ResNet), else the entries of a plain Sequential, else the modules of timm's
            ``feature_info``. Stems are not counted, so that 0 is ``layer1`` of a ResNet (timm's
            ``forward_intermediates`` counts its stem as 0). ``tap.layer_names`` says what was found.
        prefix_tokens: leading tokens that are no patches; default ``model.num_prefix_tokens``, or 0 without it.
        output_fmt: "NCHW" or "NHWC", how to read 4-D outputs. By default timm's channel counts
            (``model.feature_info``) and ``model.output_fmt`` decide, else NCHW, and a reading that cannot be a map of
            the images (another aspect ratio) is an error.

    A layer that runs several times in one call gives its last output. A layer that returns a tuple gives the first
    tensor in it. Hooks of others that replace a layer's output are seen if they were registered before the tap. A map
    shares its memory with the model's own tensor, so do not write into it; a model that overwrites a layer's output in
    place is an error, except in inference mode and compiled graphs, which do not track it.

    The tap leaves one forward hook on each layer, which does nothing outside a call of the tap; ``close()``, or leaving
    ``with FeatureTap(...) as tap``, removes them. Nothing computed outlives a call inside the tap. Any number of taps
    can share a model and calls can nest, but two threads must not run one model with taps at the same time: give each
    thread its own copy.

    Raises:
        TypeError: ``model`` is no module, or ``layers`` no list of ints and names.
        ValueError: no or unknown layers, and from a call: an output that is no map (not a tensor, tokens that make no
            grid, another batch size than the images).
        RuntimeError: from a call: a layer did not run or its output was overwritten in place, or the tap is closed.

    The maps are those of SpectralKD (arXiv 2412.19055): behind the block, without the final norm, patch tokens only.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: Sequence[int | str],
        *,
        prefix_tokens: int | None = None,
        output_fmt: str | None = None,
    ):
        super().__init__()
        if not isinstance(model, nn.Module):
            raise TypeError(f"FeatureTap takes a torch.nn.Module, not {type(model).__name__}")
        if prefix_tokens is not None:
            if not isinstance(prefix_tokens, int) or isinstance(prefix_tokens, bool):
                raise TypeError(f"prefix_tokens is a number of tokens, not {prefix_tokens!r}")
            if prefix_tokens < 0:
                raise ValueError(f"prefix_tokens must be at least 0, not {prefix_tokens}")
        if output_fmt not in (None, "NCHW", "NHWC"):
            raise ValueError(f"output_fmt is 'NCHW', 'NHWC' or None, not {output_fmt!r}")
        self.layer_names = _resolve_layers(model, layers)
        self.prefix_tokens = prefix_tokens
        self.output_fmt = output_fmt
        self.model = model
        self.training = model.training
        self._channels = _declared_channels(model)
        self._closed = False
        # One dict per call in progress, the innermost last. The hooks share this list and know no more of the tap, so a
        # deep copy of the tap has its own and a deep copy of the model alone has hooks that never record.
        self._calls: list[dict[str, tuple]] = []
        self._handles = [
            model.get_submodule(name).register_forward_hook(_Recorder(name, self._calls))
            for name in dict.fromkeys(self.layer_names)
        ]

    def forward(self, images: Tensor, *args, **kwargs) -> tuple[Tensor, list[Tensor]]:
        """Run ``model(images, *args, **kwargs)``; returns its output and the maps [B, C, H, W] of the layers."""
        if self._closed:
            raise RuntimeError("this FeatureTap is closed; make a new one, or call .close() after the last use")
        outputs: dict[str, tuple] = {}
        self._calls.append(outputs)
        try:
            logits = self.model(images, *args, **kwargs)
        finally:
            self._calls.pop()
        facts = self._facts(images)
        maps = {name: self._as_map(name, outputs.get(name), facts) for name in dict.fromkeys(self.layer_names)}
        return logits, [maps[name] for name in self.layer_names]

    def close(self) -> None:
        """Remove the hooks from the model; calling it again does nothing."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._closed = True

    def __enter__(self) -> "FeatureTap":
        return self

    def __exit__(self, *exc_info) -> None:
        self.close()

    def extra_repr(self) -> str:
        return f"layers={self.layer_names}" + (", closed" if self._closed else "")

    def _facts(self, images) -> "_Facts":
        batch = image_size = None
        if isinstance(images, Tensor) and images.dim() > 0:
            batch = images.shape[0]
            if images.dim() == 4:
                image_size = (images.shape[2], images.shape[3])
        if self.prefix_tokens is not None:
            prefixes = (self.prefix_tokens,)
        else:
            declared = getattr(self.model, "num_prefix_tokens", 0)
            # Class tokens that join behind the blocks (CaiT) or half-way (ConViT) are declared, but not there yet.
            prefixes = (declared, 0) if isinstance(declared, int) and declared else (0,)
        return _Facts(batch, image_size, _patch_grid(self.model, image_size), prefixes)

    def _as_map(self, name: str, record: tuple | None, facts: "_Facts") -> Tensor:
        if record is None:
            raise RuntimeError(_did_not_run(name, self.model.get_submodule(name)))
        x, version, kind = record
        if x is None:
            raise ValueError(
                f"layer {name!r} returns {kind}, not a tensor; name the submodule that makes the tensor you want"
            )
        if version is not None and version != x._version:
            raise RuntimeError(
                f"the output of layer {name!r} was overwritten in place by what runs after it (an inplace activation, "
                "say); name that later module instead, or make it work out of place"
            )
        if facts.batch is not None and (x.dim() == 0 or x.shape[0] != facts.batch):
            raise ValueError(
                f"layer {name!r} returns {list(x.shape)} for a batch of {facts.batch} images; a map has one "
                "entry per image: name a submodule whose output has"
            )
        if x.dim() == 4:
            return self._map_of_4d(name, x, facts.image_size)
        if x.dim() == 3:
            return self._map_of_tokens(name, x, facts)
        raise ValueError(
            f"layer {name!r} returns {list(x.shape)}; only [B, N, C] tokens and 4-D maps can be seen as [B, C, H, W]: "
            "name a submodule that returns one of these"
        )

    def _map_of_4d(self, name: str, x: Tensor, image_size: tuple[int, int] | None) -> Tensor:
        fmt = self.output_fmt
        channels = self._channels.get(name)
        if fmt is None and channels is not None and (x.shape[1] == channels) != (x.shape[3] == channels):
            fmt = "NCHW" if x.shape[1] == channels else "NHWC"
        if fmt is None:
            fmt = "NHWC" if getattr(self.model, "output_fmt", None) == "NHWC" else "NCHW"
            height, width = (x.shape[1], x.shape[2]) if fmt == "NHWC" else (x.shape[2], x.shape[3])
            if image_size is not None and not _same_aspect(height, width, image_size):
                raise ValueError(
                    f"layer {name!r} returns {list(x.shape)}, which read as {fmt} is no map of a {image_size[0]} x "
                    f"{image_size[1]} image; pass output_fmt='NCHW' or output_fmt='NHWC' to say how to read it"
                )
        return x.permute(0, 3, 1, 2) if fmt == "NHWC" else x

    def _map_of_tokens(self, name: str, x: Tensor, facts: "_Facts") -> Tensor:
        if hasattr(self.model, "reroll"):
            raise ValueError(
                f"layer {name!r} returns tokens in the order of mask units, not of image rows, because "
                f"{type(self.model).__name__} unrolls them; no view makes a map of them"
            )
        tokens = x.shape[1]
        patch_grid = facts.patch_grid
        for prefix in facts.prefixes:
            grid = patch_grid or _infer_grid(tokens - prefix, facts.image_size)
            if grid is not None and grid[0] * grid[1] == tokens - prefix:
                return _view_tokens(x, *grid, prefix)
        expected = (
            "a grid of the image's aspect ratio" if patch_grid is None else "the {} x {} patch grid".format(*patch_grid)
        )
        raise ValueError(
            f"layer {name!r} returns {tokens} tokens ({list(x.shape)}), which do not fill {expected} with "
            f"{' or '.join(map(str, facts.prefixes))} prefix tokens; pass prefix_tokens= if class or register tokens "
            "come first, and turn patch dropout off"
        )


class _Facts(NamedTuple):
    """What one call knows of its images and of the model's tokens, for reading the layers' outputs."""

    batch: int | None
    image_size: tuple[int, int] | None
    patch_grid: tuple[int, int] | None
    prefixes: tuple[int, ...]  # numbers of leading tokens that may be no patches, the likelier first


class _Recorder:
    """Forward hook that notes a layer's output for the innermost call in progress."""

    def __init__(self, name: str, calls: list[dict[str, tuple]]):
        self.name = name
        self.calls = calls

    def __call__(self, module: nn.Module, args, output) -> None:
        if self.calls:
            x = output
            if isinstance(output, tuple):
                x = next((item for item in output if isinstance(item, Tensor)), None)
            if not isinstance(x, Tensor):
                self.calls[-1][self.name] = (None, None, f"a {type(output).__name__}")
                return
            # A later change in place shows in the version counter, which inference mode and compiled graphs lack.
            untracked = torch.compiler.is_compiling() or x.is_inference()
            self.calls[-1][self.name] = (x, None if untracked else x._version, "")


def _resolve_layers(model: nn.Module, layers: Sequence[int | str]) -> list[str]:
    if isinstance(layers, (str, Integral)) or not isinstance(layers, Sequence):
        raise TypeError(f"layers is a list of block indices and submodule names, not {layers!r}")
    if not layers:
        raise ValueError("layers is empty; name at least one block index or submodule")
    blocks = None
    names = []
    for layer in layers:
        if isinstance(layer, Integral) and not isinstance(layer, bool):
            if blocks is None:
                blocks = block_names(model)
            if not -len(blocks) <= layer < len(blocks):
                raise ValueError(
                    f"there is no layer {layer}: {type(model).__name__} has {len(blocks)} ({blocks[0]} to "
                    f"{blocks[-1]}), so an index goes from {-len(blocks)} to {len(blocks) - 1}"
                )
            names.append(blocks[layer])
        elif isinstance(layer, str):
            names.append(_check_name(model, layer))
        else:
            raise TypeError(f"a layer is an int (block index) or a str (submodule name), not {layer!r}")
    return names


def block_names(model: nn.Module) -> list[str]:
    """The blocks or stages that an integer layer of :class:`FeatureTap` counts, by name.

    Raises:
        ValueError: the model has no list of them.
    """
    for attribute in _BLOCK_LISTS:
        blocks = getattr(model, attribute, None)
        if isinstance(blocks, (nn.ModuleList, nn.Sequential)) and len(blocks):
            # Not named_children(), which leaves out a block that is there twice.
            return [_last_entry(f"{attribute}.{key}", block) for key, block in blocks._modules.items()]
    for prefix in _NUMBERED_BLOCKS:
        names = []
        while isinstance(getattr(model, f"{prefix}{len(names) + 1}", None), nn.Module):
            names.append(f"{prefix}{len(names) + 1}")
        if len(names) > 1:
            return names
    if isinstance(model, nn.Sequential) and len(model):
        return list(model._modules)
    names = [entry["module"] for entry in _feature_info(model)]
    if names and all(name and _runs(_find(model, name)) for name in names):
        return names
    raise ValueError(
        f"{type(model).__name__} has no list of blocks or stages that an index could count ("
        f"{', '.join(_BLOCK_LISTS)}, layer1 .. layerN); name submodules instead, such as {_some_names(model)}"
    )


def _last_entry(name: str, module: nn.Module) -> str:
    """A stage that is a bare ModuleList (Twins) never runs itself: its output is that of its last entry."""
    while isinstance(module, nn.ModuleList) and len(module):
        key, module = list(module._modules.items())[-1]
        name = f"{name}.{key}"
    return name


def _check_name(model: nn.Module, name: str) -> str:
    module = _find(model, name) if name else None
    if module is None:
        names = [known for known, _ in model.named_modules() if known]
        close = ", ".join(map(repr, difflib.get_close_matches(name, names, n=4, cutoff=0.5))) or _some_names(model)
        raise ValueError(
            f"{type(model).__name__} has no submodule {name!r} among its {len(names)}; there are {close}, for example"
        )
    if not _runs(module):
        entries = ", ".join(repr(f"{name}.{key}") for key in list(module._modules)[:4])
        raise ValueError(
            f"layer {name!r} is an {type(module).__name__}, which only holds modules and never runs; name one of its "
            f"entries: {entries or 'there is none'}"
        )
    return name


def _find(model: nn.Module, name: str) -> nn.Module | None:
    try:
        return model.get_submodule(name)
    except AttributeError:
        return None


def _runs(module: nn.Module | None) -> bool:
    """Whether a module can be called; a ModuleList, say, only holds others."""
    return module is not None and getattr(module.forward, "__func__", None) is not nn.Module.forward


def _some_names(model: nn.Module, count: int = 6) -> str:
    """Names of submodules, the shallow ones first; containers that never run are left out."""
    names = [name for name, module in model.named_modules() if name and _runs(module)]
    names.sort(key=lambda name: name.count("."))
    return ", ".join(map(repr, names[:count])) or "nothing: it has no submodules"


def _did_not_run(name: str, module: nn.Module) -> str:
    text = f"layer {name!r} did not run in this call; name a layer that the model calls"
    if isinstance(module, nn.Sequential) and len(module):
        last = list(module._modules)[-1]
        text += f" (where the model runs the entries of {name!r} one by one, as under checkpointing: '{name}.{last}')"
    return text + ", and if the model is compiled, compile the tap instead"


def _feature_info(model: nn.Module) -> list[dict]:
    """timm's description of feature layers: dicts with ``module`` and ``num_chs``; empty for other models."""
    info = getattr(model, "feature_info", None)
    info = getattr(info, "info", info)
    if not isinstance(info, (list, tuple)):
        return []
    return [entry for entry in info if isinstance(entry, dict) and isinstance(entry.get("module"), str)]


def _declared_channels(model: nn.Module) -> dict[str, int]:
    return {
        entry["module"]: entry["num_chs"] for entry in _feature_info(model) if isinstance(entry.get("num_chs"), int)
    }


def _patch_grid(model: nn.Module, image_size: tuple[int, int] | None) -> tuple[int, int] | None:
    """The patch grid of a timm ``patch_embed`` for this image size, or None where the model does not say."""
    embed = getattr(model, "patch_embed", None)
    dynamic = getattr(embed, "dynamic_feat_size", None)
    grid = dynamic(image_size) if callable(dynamic) and image_size is not None else getattr(embed, "grid_size", None)
    return tuple(grid) if _is_int_pair(grid) else None


def _infer_grid(tokens: int, image_size: tuple[int, int] | None) -> tuple[int, int] | None:
    """The (H, W) with H * W tokens nearest to the image's aspect ratio (square without an image), or None."""
    height, width = image_size or (1, 1)
    best = None
    side = 1  # counted up, not from math.isqrt: the compiler can follow it when sizes are symbolic
    while side * side <= tokens:
        if tokens % side == 0:
            for h, w in ((side, tokens // side), (tokens // side, side)):
                error = abs(h * width - w * height)
                if _same_aspect(h, w, (height, width)) and (best is None or error < best[0]):
                    best = (error, (h, w))
        side += 1
    return None if best is None else best[1]


def _same_aspect(height: int, width: int, image_size: tuple[int, int]) -> bool:
    """Whether a map of this size can come from such an image: exactly for squares, else up to two rows or columns."""
    if image_size[0] == image_size[1]:
        return height == width
    return abs(height * image_size[1] - width * image_size[0]) <= 2 * max(image_size)


def _is_int_pair(value) -> bool:
    return (
        isinstance(value, (tuple, list))
        and len(value) == 2
        and all(isinstance(item, (int, torch.SymInt)) and not isinstance(item, bool) for item in value)
    )
