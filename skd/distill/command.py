"""``skd distill`` from its arguments: the recipe, the options on top of it, and what to do with them."""

import argparse
import dataclasses
import os
from collections.abc import Callable
from dataclasses import dataclass

from tyro.conf import FlagCreatePairsOff

from skd.distill.config import DistillConfig, fill_defaults
from skd.distill.recipe import config_of_run, list_recipes, load_recipe, override, to_yaml


@dataclass(frozen=True)
class DistillCommand(DistillConfig):
    __doc__ = DistillConfig.__doc__

    recipe: str | None = None
    """Name of a recipe (see --list-recipes) or path of a YAML file. Default: digits, or with --data the defaults."""
    print_config: FlagCreatePairsOff[bool] = False
    """Print the recipe with all options as YAML, which --recipe takes again, and train nothing."""
    list_recipes: FlagCreatePairsOff[bool] = False
    """Print the names of the recipes and what each is."""


def main(arguments: list[str], parse: Callable[[type, list[str], DistillCommand], DistillCommand]) -> int:
    """Run ``skd distill``.

    Args:
        arguments: of the command line, after the subcommand.
        parse: makes a command of its type, the arguments and what holds without them.

    Returns:
        Exit status.

    Raises:
        DistillError: something the user can mend, in one sentence.
    """
    base = _base(arguments)
    command = parse(DistillCommand, arguments, DistillCommand(**_sections(base)))
    if command.list_recipes:
        recipes = list_recipes()
        width = max(map(len, recipes))
        print("\n".join(f"{name:<{width}}  {summary}" for name, summary in recipes.items()))
        return 0
    config = override(base, DistillConfig(**_sections(command)))
    launched = int(os.environ.get("WORLD_SIZE", "1"))  # by torchrun; its number counts
    processes = launched if launched > 1 else config.engine.nproc or 1
    if command.print_config:
        print(to_yaml(config, processes), end="")
        return 0
    # What is wrong by itself is refused at once, and not by every process.
    fill_defaults(config, processes)
    if config.engine.nproc is not None and config.engine.nproc > 1:
        from skd.distill.distributed import is_launched, launch

        if not is_launched():
            # With --nproc, which they do not heed: config.yaml keeps it, and so --resume starts as many.
            return launch(config.engine.nproc, arguments)
    if config.run.dry_run:
        from skd.distill.dry_run import run
    else:
        from skd.distill.experiment import run
    return run(config)


def _base(arguments: list[str]) -> DistillConfig:
    """What the other options change: the recipe, else the run to go on with, else the defaults."""
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for name in ("--recipe", "--resume"):
        first.add_argument(name, nargs="?")  # without a value the real parser complains
    named, _ = first.parse_known_args(arguments)
    if named.recipe not in (None, "None"):
        return load_recipe(named.recipe)
    if named.resume not in (None, "None", "", "auto"):
        return config_of_run(named.resume)
    return DistillConfig()


def _sections(config: DistillConfig) -> dict:
    return {field.name: getattr(config, field.name) for field in dataclasses.fields(DistillConfig)}
