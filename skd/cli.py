"""The command ``skd``: distill, eval, analyze, bench, env.

Each subcommand's options come from a dataclass through tyro. What a subcommand needs is imported when it runs, so that
``skd --help`` and ``skd --version`` are immediate and ``skd env`` works in an installation that lacks everything else.
"""

import difflib
import importlib.util
import os
import select
import sys
from collections.abc import Callable, Sequence

import skd
from skd.distill.errors import DistillError

USER_ERROR = 2
INTERRUPTED = 130
"""128 + SIGINT, as shells report it."""
UNREAD = 141
"""128 + SIGPIPE: who read the output has gone, as in ``skd bench --help | head``."""

_TRAIN_MODULES = ("tyro", "rich", "timm", "torchvision", "sklearn", "matplotlib", "yaml", "safetensors")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        argv: arguments without the program's name; default ``sys.argv[1:]``.

    Returns:
        Exit status: 0, 2 for a mistake in what was asked for (one line on standard error), 130 after Ctrl-C, 141 where
        the output is read no more, or what the subcommand returns. Any other exception is a defect and keeps its
        traceback.
    """
    try:
        status = _run(argv)
        sys.stdout.flush()
        return status
    except BrokenPipeError:
        if not _output_is_unread():
            raise
        return UNREAD


def _run(argv: Sequence[str] | None) -> int:
    argv = list(sys.argv[1:] if argv is None else argv)
    if not argv:
        print(_help(), file=sys.stderr)
        return USER_ERROR
    command, arguments = argv[0], argv[1:]
    if command in ("-h", "--help", "help"):
        print(_help())
        return 0
    if command in ("-V", "--version"):
        print(f"skd {skd.__version__}")
        return 0
    if command not in _COMMANDS:
        close = difflib.get_close_matches(command, _COMMANDS, n=1)
        hint = f"did you mean {close[0]}?" if close else f"it has {', '.join(_COMMANDS)}"
        return _fail(f"skd has no subcommand {command!r}; {hint}")
    try:
        return _COMMANDS[command][1](arguments)
    except DistillError as error:
        return _fail(str(error))
    except KeyboardInterrupt:
        print("Interrupted.", file=sys.stderr)
        return INTERRUPTED
    except SystemExit as stop:  # tyro, after --help or a wrong option
        return stop.code if isinstance(stop.code, int) else int(stop.code is not None)


def _distill(arguments: list[str]) -> int:
    _require("distill", _TRAIN_MODULES)
    from skd.distill.command import main as distill_main

    # A flag has a --no- form here, because the recipe may have set it.
    return distill_main(arguments, lambda kind, given, default: _parse(kind, given, "distill", default, pairs=True))


def _eval(arguments: list[str]) -> int:
    _require("eval", _TRAIN_MODULES)
    from skd.distill.eval_config import EvalConfig

    config = _parse(EvalConfig, arguments, "eval")
    from skd.distill.evaluate import run

    return run(config)


def _analyze(arguments: list[str]) -> int:
    _require("analyze", _TRAIN_MODULES)
    from skd.distill.analyze_config import AnalyzeConfig

    config = _parse(AnalyzeConfig, arguments, "analyze")
    from skd.distill.analyze import run

    return run(config)


def _bench(arguments: list[str]) -> int:
    _require("bench", ("tyro",))
    from skd.bench import BenchConfig, run

    return run(_parse(BenchConfig, arguments, "bench"))


def _env(arguments: list[str]) -> int:
    if arguments:
        asked = arguments[0] in ("-h", "--help")
        usage = "usage: skd env    (no options): versions, compilers, and why each backend is or is not available"
        print(usage, file=sys.stdout if asked else sys.stderr)
        return 0 if asked else USER_ERROR
    from skd.env import main as env_main

    return env_main()


_COMMANDS: dict[str, tuple[str, Callable[[list[str]], int]]] = {
    "distill": ("train a student with and without the spectral loss; no options: a demonstration on digits", _distill),
    "eval": ("test the student, its moving average or the teacher of a run, or any timm model", _eval),
    "analyze": ("spectra of a model: pictures, and which layers to align", _analyze),
    "bench": ("time the loss against plain PyTorch on this machine", _bench),
    "env": ("versions, compilers, and why each backend is or is not available", _env),
}


def _parse(config_type, arguments: list[str], command: str, default=None, *, pairs: bool = False):
    """Options from a dataclass; with ``pairs`` every flag has a --no- form, else only the one that changes it."""
    import tyro

    given = {} if default is None else {"default": default}
    markers = (tyro.conf.OmitArgPrefixes,) if pairs else (tyro.conf.OmitArgPrefixes, tyro.conf.FlagCreatePairsOff)
    return tyro.cli(config_type, prog=f"skd {command}", args=arguments, config=markers, **given)


def _require(command: str, modules: Sequence[str]) -> None:
    missing = [name for name in modules if importlib.util.find_spec(name) is None]
    if missing:
        raise DistillError(f'skd {command} needs {", ".join(missing)}: pip install "skd[train]"')


def _help() -> str:
    width = max(map(len, _COMMANDS))
    lines = "\n".join(f"  {name:<{width}}  {summary}" for name, (summary, _) in _COMMANDS.items())
    return (
        "usage: skd [--help] [--version] <subcommand> [options]\n\n"
        "Spectral knowledge distillation for PyTorch vision models.\n\n"
        f"subcommands:\n{lines}\n\n"
        "skd <subcommand> --help lists its options."
    )


def _output_is_unread() -> bool:
    """Whether standard output is the broken pipe; if so, what is still to be written goes nowhere."""
    poll = select.poll()
    poll.register(sys.stdout.fileno(), 0)
    unread = any(events & select.POLLERR for _, events in poll.poll(0))
    if unread:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return unread


def _fail(sentence: str) -> int:
    print(f"skd: {' '.join(sentence.split())}", file=sys.stderr)
    return USER_ERROR
