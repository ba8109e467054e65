"""The distillation trainer, a thin layer on timm, and ``skd analyze``.

    config.py         what a run is told: one tree of dataclasses
    data.py           what the trainer needs to know of a data set
    digits.py         scikit-learn's digits, and their small models
    image_folder.py   a folder of images per class
    models.py         timm models by name, checkpoints, which layers to pair
    task.py           SpectralDistillationTask: the loss, in timm's task contract
    loop.py           epochs of one task: train, evaluate
    arms.py           what is compared
    prepare.py        from a configuration to data and models that go together
    experiment.py     the run: teacher, arms, report
    run_folder.py     the files of a run, each whole or absent
    report.py         the table, and what the numbers allow to say
    curves.py         the picture of the learning curves
    layer_choice.py   --layers: pairs from a file, or from the teacher's spectra
    analyze*.py       skd analyze: its options, its images, the command

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
