"""The folder of a run: what is refused before and when it is made, and weights and checkpoints on a full disk."""

import errno
import os
from pathlib import Path

import pytest
import torch

timm = pytest.importorskip("timm", reason="the trainer is built on timm (extra 'train')")
safetensors = pytest.importorskip("safetensors", reason="weights are kept in it (extra 'train')")

from skd.distill.checkpoint import Checkpoints  # noqa: E402
from skd.distill.errors import DistillError  # noqa: E402
from skd.distill.run_folder import RunFolder, check_out  # noqa: E402


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def everything(folder):
    return sorted(folder.rglob("*"))


def test_a_folder_that_can_be_made_is_not_made(here):
    (here / "empty").mkdir()
    (here / "link").symlink_to("empty")
    before = everything(here)
    for path in (None, Path("new"), Path("a/b/c"), here / "empty", Path("empty/run"), Path("link")):
        check_out(path)
    assert everything(here) == before
    Path("runs").mkdir()
    check_out(None)
    assert not list(Path("runs").iterdir())


def make_used(here):
    Path("used").mkdir()
    Path("used/kept.txt").write_text("an earlier run")
    Path("file").write_text("")
    Path("to-nothing").symlink_to("nowhere")


@pytest.mark.parametrize(
    ("out", "sentence"),
    [
        ("used", "--out used is not empty; give a new folder"),
        ("file", "--out file is a file; give a new folder"),
        ("file/run", "the output folder cannot be made: .*Not a directory: 'file/run'"),
        ("file/a/run", "the output folder cannot be made: .*Not a directory: 'file/a/run'"),
        ("to-nothing", "the output folder cannot be made: .*File exists: 'to-nothing'"),
        ("to-nothing/run", "the output folder cannot be made: .*File exists: 'to-nothing'"),
        (None, "the output folder cannot be made: .*File exists: 'runs'"),
    ],
)
def test_what_the_run_would_refuse_is_refused_before_in_the_same_sentence(here, out, sentence):
    make_used(here)
    Path("runs").write_text("a file")
    before = everything(here)
    path = None if out is None else Path(out)
    with pytest.raises(DistillError, match=sentence) as early:
        check_out(path)
    with pytest.raises(DistillError) as late:
        RunFolder(path, "digits")
    assert str(early.value) == str(late.value)
    assert everything(here) == before


@pytest.mark.parametrize(
    ("out", "sentence"),
    [
        ("locked", "there is no permission to write to locked; give another --out"),
        ("locked/a/run", "the output folder cannot be made: .*Permission denied: 'locked/a'"),
        (None, "the output folder cannot be made: .*Permission denied: 'runs'"),
    ],
)
def test_a_folder_without_permission_is_refused(here, monkeypatch, out, sentence):
    """Root may write everywhere, so the system is not asked."""
    Path("locked").mkdir()
    asked, access = [], os.access

    def denied(path, mode, **options):
        if Path(path) not in (Path("locked"), Path(".")):
            return access(path, mode, **options)
        asked.append(mode)
        return False

    monkeypatch.setattr(os, "access", denied)
    with pytest.raises(DistillError, match=sentence):
        check_out(None if out is None else Path(out))
    assert asked == [os.W_OK | os.X_OK]
    assert [path.name for path in everything(here)] == ["locked"]


@pytest.mark.skipif(os.name == "nt" or os.geteuid() == 0, reason="root may write everywhere")
@pytest.mark.parametrize("out", ["locked", "locked/run", "locked/a/run"])
def test_permission_is_refused_in_the_sentence_of_the_run(out):
    Path("locked").mkdir(mode=0o500)
    sentences = set()
    for refuse in (check_out, lambda path: RunFolder(path, "digits")):
        with pytest.raises(DistillError) as caught:
            refuse(Path(out))
        sentences.add(str(caught.value))
    assert len(sentences) == 1


# --- weights


def tied_model():
    torch.manual_seed(3)
    model = timm.create_model("test_vit", num_classes=3, img_size=32)
    model.blocks[1].mlp.fc1.weight = model.blocks[0].mlp.fc1.weight  # share memory
    return model


def test_weights_are_what_safetensors_and_timm_read(here):
    model = tied_model()
    state = model.state_dict()
    state["head.weight"] = state["head.weight"].t().contiguous().t()  # in another order in memory
    RunFolder(Path("out"), "digits").write_safetensors("w.safetensors", state)
    with safetensors.safe_open("out/w.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}
        assert set(file.keys()) == set(state)
        assert all(torch.equal(file.get_tensor(key), value) for key, value in state.items())
    again = timm.create_model("test_vit", num_classes=3, img_size=32, checkpoint_path="out/w.safetensors")
    assert all(torch.equal(value, state[key]) for key, value in again.state_dict().items())


def test_weights_on_a_disk_that_takes_no_more_are_an_error_of_the_system(here, monkeypatch):
    """The system's own refusal, of files above a size; a full disk differs in the number alone."""
    resource = pytest.importorskip("resource", reason="the limit is one of POSIX")
    folder, name = RunFolder(Path("out"), "digits"), "w.safetensors"
    folder.write_safetensors(name, {"x": torch.ones(3)})
    before = (folder / name).read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        with pytest.raises(OSError) as caught:
            folder.write_safetensors(name, {"x": torch.ones(100_000)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert caught.value.errno == errno.EFBIG

    def full(self, content):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OSError) as caught:
        folder.write_safetensors(name, {"x": torch.ones(3)})
    assert caught.value.errno == errno.ENOSPC
    assert [path.name for path in folder.path.iterdir()] == [name], "no part of it is left"
    assert (folder / name).read_bytes() == before


# --- checkpoints


def test_only_a_run_with_a_checkpoint_is_told_to_go_on(here, monkeypatch):
    original = torch.save

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    def refusal():
        monkeypatch.setattr(torch, "save", full)
        with pytest.raises(DistillError) as caught:
            checkpoints.save({"x": 1})
        monkeypatch.setattr(torch, "save", original)
        return str(caught.value)

    checkpoints = Checkpoints(here)
    first = refusal()
    assert "none is kept: make room or mend the permissions, then start again" in first and "--resume" not in first
    with pytest.raises(DistillError, match="to go on from"):
        checkpoints.load()
    checkpoints.save({"x": 0})
    assert "checkpoint.pt of before is whole: make room" in (second := refusal())
    assert second.endswith(f"then go on with --resume {here}") and checkpoints.load()[0]["x"] == 0
