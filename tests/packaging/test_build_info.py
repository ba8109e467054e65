"""The record of the build, as later reports read it."""

import json
from importlib.machinery import EXTENSION_SUFFIXES

import pytest

from skd import build_info

BUILT = {"built": True, "reason": "", "compiler": "g++ 12.2.0", "instruction_sets": ["baseline", "avx2"]}
LEFT_OUT = {"built": False, "reason": "nvcc was not found", "compiler": ""}


def install(folder, record=None, extensions=()):
    """A folder that looks like an installed package."""
    if record is not None:
        (folder / "_build.json").write_text(record if isinstance(record, str) else json.dumps(record))
    for name in extensions:
        (folder / f"_{name}{EXTENSION_SUFFIXES[0]}").touch()
    return folder


def test_as_the_build_wrote_it(tmp_path):
    install(tmp_path, {"cpu": BUILT, "cuda": LEFT_OUT}, ["cpu"])
    assert build_info.read(tmp_path) == {"cpu": BUILT, "cuda": LEFT_OUT}


def test_never_installed(tmp_path):
    for entry in build_info.read(tmp_path).values():
        assert entry == {
            "built": False,
            "reason": "this source tree was never installed; run pip install in it",
            "compiler": "",
        }


def test_compiled_without_a_record(tmp_path):
    record = build_info.read(install(tmp_path, extensions=["cpu"]))
    assert record["cpu"] == {"built": True, "reason": "", "compiler": ""}
    assert not record["cuda"]["built"]


@pytest.mark.parametrize("text", ["", "{", "[1, 2]", "null", "\x00"])
def test_damaged_record(tmp_path, text):
    for entry in build_info.read(install(tmp_path, text)).values():
        assert not entry["built"]
        assert entry["reason"].endswith("install skd again")


@pytest.mark.parametrize("record", [{"cpu": BUILT}, {"cpu": BUILT, "cuda": None}, {"cpu": BUILT, "cuda": [1]}])
def test_incomplete_record(tmp_path, record):
    read = build_info.read(install(tmp_path, record, ["cpu"]))
    assert read["cpu"] == BUILT
    assert read["cuda"] == {"built": False, "reason": "the build left no record of it", "compiler": ""}


def test_built_for_another_python(tmp_path):
    install(tmp_path, {"cpu": BUILT, "cuda": LEFT_OUT})
    (tmp_path / "_cpu.cpython-27-x86_64-linux-gnu.so").touch()
    entry = build_info.read(tmp_path)["cpu"]
    assert not entry["built"]
    assert entry["reason"] == "skd._cpu was built, but not for this Python; install skd again with it"


def test_an_extension_of_an_earlier_build_does_not_count(tmp_path):
    install(tmp_path, {"cpu": LEFT_OUT, "cuda": LEFT_OUT}, ["cpu"])
    assert build_info.read(tmp_path)["cpu"] == LEFT_OUT


def test_this_installation():
    for name, entry in build_info.read().items():
        assert name in build_info.NAMES
        assert entry["built"] == (entry["reason"] == "")
