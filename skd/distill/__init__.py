"""The distillation trainer, a thin layer on timm, and ``skd eval`` and ``skd analyze``.

What is asked for:
    config.py, config_checks.py       one tree of dataclasses, and what is refused
    recipe.py, recipe_values.py       recipes: YAML to that tree and back; recipes/ has those that are shipped
    command.py                        skd distill from its arguments

What it works on:
    data.py, order.py, seeds.py       what a data set promises, which images a process sees, and all randomness
    digits.py, gratings.py, memory.py data sets that need no files
    images.py, image_*.py             images in folders, archives and other data sets of timm
    models.py                         timm models by name, checkpoints, which layers to pair
    layer_choice.py                   --layers: pairs from a file, or from the teacher's spectra
    prepare.py                        from a configuration to data and models that go together

A training:
    task.py, task_checks.py           SpectralDistillationTask: the loss, in timm's task contract
    tapped_model.py, teacher_images.py  what it is made of
    engine.py                         one training, resumable at any step
    updates.py, testing.py            from gradients to new weights; accuracy
    distributed.py, interruption.py   the processes of a run; signals

A run:
    arms.py, experiment.py            what is compared; teacher, arms, report
    ledger.py, checkpoint.py, resume.py  what it has so far, and how it goes on
    run_folder.py                     its files, each whole or absent
    dry_run.py, evaluate.py           before the long run, and after it

What it shows:
    costs.py, progress.py, loggers.py seconds per part, the bar, TensorBoard and Weights & Biases
    probe.py, dynamics.py             spectra of the layers after every epoch
    report.py, summary.py             the table, and what the numbers allow to say
    curves.py, dynamics_plots.py, html_report.py  pictures and report.html

analyze*.py is skd analyze: its options, its images, the command.

Importing this package imports neither torch nor timm.
"""

import importlib

_HOME = {
    "DistillConfig": "skd.distill.config",
    "DistillError": "skd.distill.errors",
    "SpectralDistillationTask": "skd.distill.task",
    "run": "skd.distill.experiment",
}

__all__ = list(_HOME)


def __getattr__(name: str):
    if name not in _HOME:
        raise AttributeError(f"module 'skd.distill' has no attribute {name!r}; it has {', '.join(_HOME)}")
    return getattr(importlib.import_module(_HOME[name]), name)
