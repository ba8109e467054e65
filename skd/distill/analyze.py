"""``skd analyze``: a model's spectra as files, pictures and a choice of layers."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from timm.data import resolve_data_config
from timm.utils import random_seed
from torch import nn

from skd.analysis.choice import choose_layers
from skd.analysis.layers_file import LAYERS_FILE, write_layers
from skd.analysis.measure import analyze
from skd.analysis.plots import MOST_PROFILES
from skd.analysis.profile import SpectralProfile
from skd.distill import digits, models
from skd.distill.analyze_config import AnalyzeConfig
from skd.distill.analyze_data import image_batches
from skd.distill.errors import DistillError
from skd.distill.models import ModelSpec
from skd.distill.prepare import find_device
from skd.distill.run_folder import RunFolder

DIGITS_MODELS = {digits.TEACHER_NAME: digits.TEACHER, digits.STUDENT_NAME: digits.STUDENT}


def run(config: AnalyzeConfig, console: Console | None = None) -> int:
    """Analyse MODEL, and what it is compared with, and write the files.

    Returns:
        0.

    Raises:
        DistillError: something the user can mend, in one sentence.
    """
    console = console or Console()
    _check(config)
    device = find_device(config.device)
    # Everything that can be refused is refused before the first forward and before there is a folder.
    subjects = [_subject(config, config.model, config.checkpoint, "--checkpoint"), *_others(config)]
    if config.pair is not None and len(_profile_layers(subjects[1])) < config.pair:
        raise DistillError(
            f"--pair {config.pair} needs as many layers of {config.compare[0]}, which has "
            f"{len(_profile_layers(subjects[1]))}"
        )
    folder = RunFolder(config.out, "analyze")
    try:
        profiles = _analyze_all(config, subjects, device, console)
        _write(config, folder, subjects, profiles, console)
    finally:
        folder.tidy()
    return 0


@dataclass(frozen=True)
class _Model:
    """A model to analyse."""

    name: str
    spec: ModelSpec
    model: nn.Module
    checkpoint: Path | None
    random: bool
    layers: tuple | None

    @property
    def image_size(self) -> int:
        return self.spec.kwargs.get("img_size") or models.native_image_size(self.spec.name)


def _check(config: AnalyzeConfig) -> None:
    if len(config.compare) >= MOST_PROFILES:
        raise DistillError(f"--compare takes {MOST_PROFILES - 1} others at most, not {len(config.compare)}")
    named = [other for other in config.compare if not _is_profile(other)]
    if config.compare_checkpoint is not None and len(named) != 1:
        raise DistillError(
            "--compare-checkpoint belongs to one model named by --compare; analyse one of several first, and compare "
            "with its profile.json"
        )
    for flag, value in (("--batches", config.batches), ("--batch-size", config.batch_size)):
        if value < 1:
            raise DistillError(f"{flag} is {value}, but must be at least 1")
    if config.image_size is not None and config.image_size < 3:
        raise DistillError(f"--image-size is {config.image_size}, but must be at least 3")
    if config.pair is not None:
        if config.pair < 1:
            raise DistillError(f"--pair is {config.pair}, but must be at least 1")
        if not config.compare:
            raise DistillError("--pair needs --compare STUDENT, the model whose layers are paired with MODEL's")
        if config.layers is not None:
            raise DistillError("--pair counts all blocks of MODEL; leave out --layers")


def _is_profile(other: str) -> bool:
    return other.endswith(".json")


def _others(config: AnalyzeConfig) -> list[_Model | SpectralProfile]:
    others = []
    for other in config.compare:
        if _is_profile(other):
            profile = _sentence(SpectralProfile.load, other)
            if profile.norm != config.norm:
                raise DistillError(
                    f"{other} was analysed with --norm {profile.norm} and does not compare with --norm {config.norm}"
                )
            others.append(profile)
        else:
            others.append(_subject(config, other, config.compare_checkpoint, "--compare-checkpoint"))
    return others


def _subject(config: AnalyzeConfig, name: str, checkpoint: Path | None, option: str) -> _Model:
    layers = config.layers if option == "--checkpoint" else None
    instead = f"{option} FILE, or look at random weights with --random-init"
    classes = models.classes_in(name, checkpoint) if checkpoint is not None and name not in DIGITS_MODELS else None
    spec = DIGITS_MODELS.get(name)
    if spec is None:
        known = models.pretrained_cfg(name).num_classes
        spec = models.timm_spec(name, known if classes is None else classes, config.image_size)
    elif config.image_size not in (None, spec.kwargs["img_size"]):
        raise DistillError(f"{name} takes images of 8x8 pixels; leave out --image-size")
    random_seed(config.seed)
    if checkpoint is not None:
        model = spec.build()
        models.load_checkpoint(model, checkpoint, "model", option)
    elif config.random_init:
        model = spec.build()
    elif name in DIGITS_MODELS:
        raise DistillError(f"{name} has no pretrained weights; give those of a run of skd distill as {instead}")
    else:
        model = models.build_pretrained(spec, "model", instead)
    if layers is None:
        _sentence(models.count_blocks, model)
    return _Model(name, spec, model, checkpoint, checkpoint is None and config.random_init, layers)


def _analyze_all(config: AnalyzeConfig, subjects, device: torch.device, console: Console) -> list[SpectralProfile]:
    profiles = []
    progress = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("images"),
        TimeElapsedColumn(),
        console=console,
        disable=not console.is_terminal,
    )
    with progress:
        for subject in subjects:
            if isinstance(subject, SpectralProfile):
                profiles.append(subject)
                continue
            bar = progress.add_task(subject.name, total=None)

            def show(images: int, total: int, bar=bar) -> None:
                progress.update(bar, completed=images, total=total)

            profiles.append(_analyze(config, subject, device, show))
    return profiles


def _analyze(
    config: AnalyzeConfig, subject: _Model, device: torch.device, show: Callable[[int, int], None]
) -> SpectralProfile:
    spec = subject.spec
    data, total, batches = image_batches(
        config.data,
        config.image_size or subject.image_size,
        spec.kwargs.get("in_chans", models.pretrained_cfg(spec.name).input_size[0]),
        config.batches,
        config.batch_size,
        resolve_data_config(pretrained_cfg=models.pretrained_cfg(spec.name).to_dict()),
    )
    return _sentence(
        analyze,
        subject.model.to(device),
        batches,
        subject.layers,
        norm=config.norm,
        title=subject.name,
        data=data,
        random_weights=subject.random,
        # The folder says which run it was.
        weights="" if subject.checkpoint is None else "/".join(subject.checkpoint.parts[-2:]),
        progress=lambda images: show(images, total),
    )


def _write(config: AnalyzeConfig, folder: RunFolder, subjects, profiles: list[SpectralProfile], console) -> None:
    first, others = profiles[0], profiles[1:]
    choice, reasons = None, []
    if config.pair is not None:
        choice, reasons = _sentence(choose_layers, first, others[0].title, others[0].layers, config.pair)
        write_layers(folder / LAYERS_FILE, choice, reasons)
    first.save(folder / "profile.json")
    first.to_csv(folder / "profile.csv")
    for number, (subject, profile) in enumerate(zip(subjects[1:], others, strict=True), 1):
        if profile is not subject:  # analysed here
            profile.save(folder / f"compare-{number}.json")
    chosen = () if choice is None else choice.teacher_layers
    for kind in ("depth", "frequency"):
        first.plot(folder / f"intensity-over-{kind}.png", *others, kind=kind, chosen=chosen)
    for i, profile in enumerate(profiles):
        console.print(_table(profile, chosen if i == 0 else ()))
    for line in reasons:
        console.print(line, soft_wrap=True, highlight=False, markup=False)
    if choice is not None:
        _say(console, f"{folder / LAYERS_FILE} is for skd distill --layers")
    _say(console, f"the files are in {folder.path}")


def _table(profile: SpectralProfile, chosen) -> Table:
    table = Table(title=f"{profile.label}; {profile.images} images, {profile.data}", title_justify="left")
    table.add_column("layer", justify="right")
    table.add_column("name")
    for column in ("channels", f"intensity ({profile.norm})", "entropy (bits)"):
        table.add_column(column, justify="right")
    if chosen:
        table.add_column("chosen")
    for i, name in enumerate(profile.layers):
        bits = "" if profile.entropy is None else f"{profile.entropy[i]:.2f}"
        row = [str(i), name, str(profile.channels[i]), f"{profile.layer_intensity[i]:.4g}", bits]
        table.add_row(*row, *([("*" if i in chosen else "")] if chosen else []))
    return table


def _profile_layers(subject: _Model | SpectralProfile) -> list:
    if isinstance(subject, SpectralProfile):
        return list(subject.layers)
    return models.block_names(subject.model)


def _say(console: Console, text: str) -> None:
    console.print(text, soft_wrap=True, highlight=False, markup=False)


def _sentence(call, *args, **kwargs):
    """``call`` with the errors of the analysis, which are sentences, as mistakes of the user."""
    try:
        return call(*args, **kwargs)
    except DistillError:
        raise
    except (ValueError, TypeError, RuntimeError) as error:
        raise DistillError(str(error)) from error
