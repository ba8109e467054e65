"""Which implementations this installation has, and which one serves a call.

A backend is ``reference`` (plain PyTorch, anywhere), ``cpu`` (the compiled extension ``skd._cpu``), ``triton``
or ``cuda``. Compiled modules are loaded at the first call that could use them, and a failure is remembered
with its reason.
"""

import functools
import importlib
import os
import sys
import warnings
from collections.abc import Callable, Mapping

import torch

NAMES = ("cuda", "triton", "cpu", "reference")
"""Every backend, the best first."""


@functools.cache
def load(name: str) -> object:
    """The module behind a compiled backend, or a sentence (str) saying why there is none."""
    if name == "triton":
        try:
            importlib.import_module("triton")
        except ImportError as error:
            return f"Triton cannot be imported: {error}"
        return importlib.import_module("skd.kernels")
    module = f"skd._{name}"
    try:
        return importlib.import_module(module)
    except ImportError as error:
        if isinstance(error, ModuleNotFoundError) and error.name == module:
            return f"the extension {module} is not in this installation: {_why_not_built(name)}"
        return f"{module} could not be loaded: {error}"


def _why_not_built(name: str) -> str:
    from skd import build_info

    return build_info.read().get(name, {}).get("reason") or "the build left no record"


def backends() -> dict[str, bool | str]:
    """What can run here: backend name -> True, or the reason (str) it is not available.

    A GPU's compute capability is looked at once PyTorch has begun to use it; before, having one is enough.
    """
    available: dict[str, bool | str] = {}
    for name in NAMES:
        module = True if name == "reference" else load(name)
        reason = module if isinstance(module, str) else _missing_device(name)
        available[name] = True if reason is None else reason
    return available


def _missing_device(name: str) -> str | None:
    """Why no device here is one of a backend's, or None. No CUDA context is made: the driver's library is asked."""
    types = device_types(name)
    if "cpu" in types:
        return None
    if torch.cuda.device_count() > 0:
        reason = _wrong_platform(name)
        if reason is None and name == "cuda" and torch.cuda.is_initialized():
            reason = load(name).obstacle(torch.cuda.current_device()) or None
        return reason
    if "xpu" in types and hasattr(torch, "xpu") and torch.xpu.is_available():
        return None
    return "PyTorch sees no GPU"


def _wrong_platform(name: str) -> str | None:
    if name == "cuda" and torch.version.hip is not None:
        return "this PyTorch is built for ROCm; use backend 'triton'"
    return None


def requested(backend: str | None) -> str | None:
    """The backend asked for by argument or, failing that, by the variable ``SKD_BACKEND``; None if neither.

    Raises:
        ValueError: the name is no backend.
    """
    source = "backend"
    if backend is None:
        backend, source = _environment_variable() or None, "SKD_BACKEND"
    if backend is not None and backend not in NAMES:
        raise ValueError(f"{source}={backend!r} is no backend; use one of {', '.join(NAMES)}, or None for the best")
    return backend


def _environment_variable() -> str | None:
    """``os.environ.get("SKD_BACKEND")``, which takes 30 microseconds in a step of training, without its conversions."""
    encoded = getattr(os.environ, "_data", None)  # the dictionary behind it; no documented part
    return os.environ.get("SKD_BACKEND") if encoded is None or _KEY in encoded else None


_KEY = getattr(os.environ, "encodekey", str)("SKD_BACKEND")


def choose(
    backend: str | None,
    device: torch.device,
    implementations: Mapping[str, Callable],
    operation: str,
    in_double: bool = False,
) -> str:
    """The backend that runs a call of ``operation`` on tensors of ``device``.

    Args:
        backend: a name, or None for ``SKD_BACKEND`` and then the best one.
        device: where all tensors of the call are.
        implementations: the backends this operation has, by name.
        operation: its name, for the sentences.
        in_double: whether a tensor of the call is float64.

    Raises:
        ValueError: the name is no backend.
        RuntimeError: the backend was asked for and cannot serve the call; the sentence says why.
    """
    name = requested(backend)
    if name is not None:
        reason = _refusal(name, device, operation, name in implementations, in_double)
        if reason:
            raise RuntimeError(f"backend {name!r} cannot run {operation}: {reason}")
        return name
    return _best(device, operation, tuple(implementations), in_double)


@functools.cache
def _best(device: torch.device, operation: str, implemented: tuple[str, ...], in_double: bool) -> str:
    reasons = []
    for name in NAMES:
        reason = _refusal(name, device, operation, name in implemented, in_double)
        if reason is None:
            if reasons and name == "reference":
                sentence = f"{operation} on {device.type} falls back to plain PyTorch: {'; '.join(reasons)}"
                warnings.warn(sentence, RuntimeWarning, stacklevel=2)  # once, since the choice is remembered
            return name
        # Only a kernel made for this kind of device is missed when it is absent.
        if device.type in device_types(name):
            reasons.append(reason)
    raise AssertionError("the reference serves every device")


def device_types(name: str) -> tuple[str, ...]:
    """The kinds of device a backend is made for."""
    if name == "cuda":  # the tests have a build of the same kernels that runs on the CPU
        return (getattr(sys.modules.get("skd._cuda"), "device_type", "cuda"),)
    if name == "triton":
        return ("cuda", "xpu", "cpu") if os.environ.get("TRITON_INTERPRET") == "1" else ("cuda", "xpu")
    return ("cpu",)


@functools.cache
def _refusal(name: str, device: torch.device, operation: str, implemented: bool, in_double: bool) -> str | None:
    """Why a backend cannot serve, or None if it can."""
    if name == "reference":
        return None
    if device.type not in device_types(name):
        return f"it does not serve tensors on {device.type}"
    module = load(name)
    if isinstance(module, str):
        return module
    if not implemented:
        return f"{operation} has no {name} kernel"
    if in_double and name in ("cuda", "triton"):
        return "it does not compute in float64; convert the maps to float32, or use backend 'reference'"
    if name == "cuda" and device.type == "cuda":
        with torch.cuda.device(device):
            return _wrong_platform(name) or module.obstacle(device.index) or None
    return None
