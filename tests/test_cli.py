"""The command line: what it lists, imports, refuses and returns."""

import os
import subprocess
import sys
import types

import pytest

import skd
from skd import cli
from skd.distill.errors import DistillError


def python(code, *arguments):
    return subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, timeout=120)


def test_help_lists_the_subcommands(capsys):
    assert cli.main(["--help"]) == 0
    listed = capsys.readouterr().out
    assert all(f"\n  {name} " in listed for name in ("distill", "eval", "analyze", "bench", "env"))
    assert cli.main([]) == 2
    assert "usage: skd" in capsys.readouterr().err


def test_version(capsys):
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"skd {skd.__version__}\n"


@pytest.mark.parametrize(
    ("typed", "sentence"),
    [
        ("destill", "did you mean distill?"),
        ("zzz", "it has distill, eval, analyze, bench, env"),
        ("--frob", "no subcommand '--frob'"),
    ],
)
def test_unknown_subcommand(capsys, typed, sentence):
    assert cli.main([typed]) == 2
    error = capsys.readouterr().err
    assert sentence in error and error.count("\n") == 1


@pytest.mark.parametrize(
    "line", ["--help", "--version", "distill --help", "distill --print-config", "eval --help", "analyze --help"]
)
def test_help_and_version_do_not_import_torch(line):
    arguments = line.split()
    if len(arguments) > 1:
        pytest.importorskip("tyro", reason="options are parsed by tyro (extra 'train')")
    code = "import sys; from skd.cli import main; s = main(sys.argv[1:]); sys.exit(s or 'torch' in sys.modules)"
    done = python(code, *arguments)
    assert done.returncode == 0, done.stderr
    assert "skd" in done.stdout


@pytest.mark.parametrize(
    ("command", "option"), [("distill", "--out"), ("eval", "--which"), ("analyze", "--out"), ("bench", "--out")]
)
def test_help_of_a_subcommand(capsys, command, option):
    pytest.importorskip("tyro", reason="options are parsed by tyro (extra 'train')")
    assert cli.main([command, "--help"]) == 0
    shown = capsys.readouterr().out
    assert f"usage: skd {command}" in shown and option in shown


def test_options_reach_the_configuration(monkeypatch):
    pytest.importorskip("tyro", reason="options are parsed by tyro (extra 'train')")
    seen = []
    monkeypatch.setitem(sys.modules, "skd.distill.experiment", types.SimpleNamespace(run=lambda c: seen.append(c) or 7))
    line = (
        "distill --data folder --teacher cait_s24_224 --student deit_tiny_patch16_224 --teacher-checkpoint t.pth "
        "--student-layers 0 -1 blocks.3 --teacher-layers 0 -1 blocks.5 --epochs 3 --batch-size 7 --lr 0.1 --alpha 0.5 "
        "--tau 2 --weight 0.1 --match mse --kd hard --seeds 4 --seed 2 --image-size 96 --workers 2 --quick --out there"
    )
    assert cli.main(line.split()) == 7
    config = seen[0]
    assert str(config.data.data) == "folder" and config.models.student_layers == (0, -1, "blocks.3")
    assert config.models.teacher_layers == (0, -1, "blocks.5") and str(config.models.teacher_checkpoint) == "t.pth"
    assert (config.optim.epochs, config.optim.lr, config.data.batch_size) == (3, 0.1, 7)
    assert (config.loss.alpha, config.loss.tau, config.loss.weight) == (0.5, 2.0, 0.1)
    assert (config.loss.match, config.loss.kd) == ("mse", "hard")
    assert (config.run.seeds, config.run.seed, config.run.quick, str(config.run.out)) == (4, 2, True, "there")
    assert (config.data.image_size, config.data.workers) == (96, 2)


@pytest.mark.parametrize(
    "arguments",
    [
        ["distill", "--epochs", "many"],
        ["distill", "--frob"],
        ["eval", "--which", "x"],
        ["analyze"],
        ["bench", "--match", "x"],
    ],
)
def test_wrong_options_return_2(capsys, arguments):
    pytest.importorskip("tyro", reason="options are parsed by tyro (extra 'train')")
    assert cli.main(arguments) == 2
    assert "Traceback" not in capsys.readouterr().err


def test_options_of_an_evaluation_reach_it(monkeypatch):
    pytest.importorskip("tyro", reason="options are parsed by tyro (extra 'train')")
    seen = []
    monkeypatch.setitem(sys.modules, "skd.distill.evaluate", types.SimpleNamespace(run=lambda c: seen.append(c) or 7))
    first = "eval runs/one --which ema --batch-size 7 --workers 2 --device cpu --threads 3"
    second = "eval --model m --checkpoint c.pth --data folder"
    assert [cli.main(line.split()) for line in (first, second)] == [7, 7]
    run, model = seen
    assert (str(run.run), run.which, run.batch_size, run.workers) == ("runs/one", "ema", 7, 2)
    assert (run.device, run.threads, run.model, run.data) == ("cpu", 3, None, None)
    assert (model.run, model.model, str(model.checkpoint), str(model.data)) == (None, "m", "c.pth", "folder")


def raising(error):
    def run(config):
        raise error

    return types.SimpleNamespace(run=run)


def test_errors_of_the_user_are_one_line_and_defects_keep_their_traceback(monkeypatch, capsys):
    pytest.importorskip("tyro", reason="options are parsed by tyro (extra 'train')")
    monkeypatch.setitem(sys.modules, "skd.distill.experiment", raising(DistillError("a sentence\nover two lines")))
    assert cli.main(["distill"]) == 2
    assert capsys.readouterr().err == "skd: a sentence over two lines\n"
    monkeypatch.setitem(sys.modules, "skd.distill.experiment", raising(KeyboardInterrupt()))
    assert cli.main(["distill"]) == 130
    assert capsys.readouterr().err == "Interrupted.\n"
    monkeypatch.setitem(sys.modules, "skd.distill.experiment", raising(ValueError("a defect")))
    with pytest.raises(ValueError, match="a defect"):
        cli.main(["distill"])


def test_missing_extra_is_named_with_the_command_that_mends_it():
    code = "import sys; sys.modules['timm'] = None; from skd.cli import main; sys.exit(main(['distill', '--quick']))"
    done = python(code)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr == 'skd: skd distill needs timm: pip install "skd[train]"\n'


def test_env_works_without_the_extra():
    blocked = "import sys; sys.modules.update(dict.fromkeys(['tyro', 'rich', 'timm', 'sklearn', 'matplotlib', 'yaml']))"
    done = python(f"{blocked}; from skd.cli import main; sys.exit(main(['env']))")
    assert done.returncode == 0, done.stderr
    assert skd.__version__ in done.stdout and "backends" in done.stdout


def test_env_takes_no_options(capsys):
    assert cli.main(["env", "--help"]) == 0
    assert cli.main(["env", "all"]) == 2
    captured = capsys.readouterr()
    assert "usage: skd env" in captured.out and "usage: skd env" in captured.err


def test_python_m_skd():
    done = subprocess.run([sys.executable, "-m", "skd", "--version"], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (0, f"skd {skd.__version__}\n")


@pytest.mark.parametrize("arguments", [["--help"], ["bench", "--help"]], ids=["in the end", "by tyro"])
def test_output_that_nobody_reads_any_more_is_no_defect(arguments):
    """skd ... | head"""
    read, write = os.pipe()
    os.close(read)
    command = [sys.executable, "-m", "skd", *arguments]
    done = subprocess.run(command, stdout=write, stderr=subprocess.PIPE, text=True)
    os.close(write)
    assert (done.returncode, done.stderr) == (141, "")
