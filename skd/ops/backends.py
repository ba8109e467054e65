"""Which implementations this installation has, and which one serves a call.

A backend is ``reference`` (plain PyTorch, anywhere), ``cpu`` (the compiled extension ``skd._cpu``), ``triton``
or ``cuda``. Compiled modules are loaded at the first call that could use them, and a failure is remembered
with its reason.
"""

import functools
import importlib
import os
import warnings
from collections.abc import Callable, Mapping

import torch

NAMES = ("cuda", "triton", "cpu", "reference")
"""Every backend, the best first."""


@functools.cache
def load(name: str) -> object:
    """The module behind a compiled backend, or a sentence (str) saying why there is none."""
    if name != "cpu":
        return f"skd {_version()} has no {name} kernels"
    try:
        return importlib.import_module("skd._cpu")
    except ImportError as error:
        if isinstance(error, ModuleNotFoundError) and error.name == "skd._cpu":
            return f"the extension skd._cpu is not in this installation: {_why_not_built('cpu')}"
        return f"skd._cpu could not be loaded: {error}"


def _version() -> str:
    import skd

    return skd.__version__


def _why_not_built(name: str) -> str:
    from skd import build_info

    return build_info.read().get(name, {}).get("reason") or "the build left no record"


def backends() -> dict[str, bool | str]:
    """What this installation can run: backend name -> True, or the reason (str) it is not available."""
    available: dict[str, bool | str] = {}
    for name in NAMES:
        module = True if name == "reference" else load(name)
        available[name] = module if isinstance(module, str) else True
    return available


def requested(backend: str | None) -> str | None:
    """The backend asked for by argument or, failing that, by the variable ``SKD_BACKEND``; None if neither.

    Raises:
        ValueError: the name is no backend.
    """
    source = "backend"
    if backend is None:
        backend, source = os.environ.get("SKD_BACKEND") or None, "SKD_BACKEND"
    if backend is not None and backend not in NAMES:
        raise ValueError(f"{source}={backend!r} is no backend; use one of {', '.join(NAMES)}, or None for the best")
    return backend


def choose(backend: str | None, device: torch.device, implementations: Mapping[str, Callable], operation: str) -> str:
    """The backend that runs a call of ``operation`` on tensors of ``device``.

    Args:
        backend: a name, or None for ``SKD_BACKEND`` and then the best one.
        device: where all tensors of the call are.
        implementations: the backends this operation has, by name.
        operation: its name, for the sentences.

    Raises:
        ValueError: the name is no backend.
        RuntimeError: the backend was asked for and cannot serve the call; the sentence says why.
    """
    name = requested(backend)
    if name is not None:
        reason = _refusal(name, device.type, operation, name in implementations)
        if reason:
            raise RuntimeError(f"backend {name!r} cannot run {operation}: {reason}")
        return name
    return _best(device.type, operation, tuple(implementations))


@functools.cache
def _best(device_type: str, operation: str, implemented: tuple[str, ...]) -> str:
    reasons = []
    for name in NAMES:
        reason = _refusal(name, device_type, operation, name in implemented)
        if reason is None:
            if reasons and name == "reference":
                sentence = f"{operation} on {device_type} falls back to plain PyTorch: {'; '.join(reasons)}"
                warnings.warn(sentence, RuntimeWarning, stacklevel=2)  # once, since the choice is remembered
            return name
        # Only a kernel made for this kind of device is missed when it is absent.
        if name in _MADE_FOR.get(device_type, ()):
            reasons.append(reason)
    raise AssertionError("the reference serves every device")


_MADE_FOR = {"cpu": ("cpu",), "cuda": ("cuda", "triton")}
"""Device types and the kernels for them."""


@functools.cache
def _refusal(name: str, device_type: str, operation: str, implemented: bool) -> str | None:
    """Why a backend cannot serve, or None if it can."""
    if name == "reference":
        return None
    module = load(name)
    if isinstance(module, str):
        return module
    if not implemented:
        return f"{operation} has no {name} kernel"
    if name not in _MADE_FOR.get(device_type, ()):
        return f"it does not serve tensors on {device_type}"
    return None
