import sys
from types import ModuleType

import pytest
from build_helpers import load


@pytest.fixture(scope="session")
def support() -> ModuleType:
    """build_support.py, the decisions behind setup.py."""
    return load("build_support")


@pytest.fixture
def setup_module(monkeypatch) -> ModuleType:
    """setup.py as a module: under any name but __main__ it builds nothing."""
    monkeypatch.setattr(sys, "path", list(sys.path))  # it adds its folder
    return load("setup")


@pytest.fixture
def program(tmp_path):
    """Makes a program that prints a text and exits; returns its folder, which may serve as a whole PATH."""

    def make(name: str, prints: str, status: int = 0, folder: str = "bin") -> str:
        path = tmp_path / folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"#!/bin/sh\necho '{prints}'\nexit {status}\n")
        path.chmod(0o755)
        return str(path.parent)

    return make
