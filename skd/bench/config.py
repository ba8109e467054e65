"""What ``skd bench`` can be told. Importing this costs nothing: neither torch nor the kernels are loaded."""

import dataclasses
from pathlib import Path
from typing import Literal

DTypeName = Literal["float32", "bfloat16", "float16"]
Layout = Literal["nchw", "tokens", "tokens<-nchw", "nchw<-tokens"]
What = Literal["align", "magnitude", "intensity", "analyze", "trainer", "all"]
Match = Literal["complex", "mse", "magnitude", "log_magnitude", "complex+bands", "complex+focal"]

MATCHES: dict[str, tuple[str, ...]] = {
    "align": ("complex", "mse"),
    "magnitude": ("magnitude", "log_magnitude", "complex+bands", "complex+focal"),
}
"""What can be compared, by what is measured: without a transform, and with one."""

ON_CUDA = (*MATCHES, "intensity")
"""What can be measured there."""

DEFAULTS: dict[str, dict[str, tuple[str, ...]]] = {
    "cpu": {"layouts": ("nchw", "tokens"), "dtypes": ("float32",)},
    "cuda": {"layouts": ("tokens", "nchw", "tokens<-nchw", "nchw<-tokens"), "dtypes": ("float32", "bfloat16")},
}
"""What is measured on a device unless something else is asked for."""


@dataclasses.dataclass
class BenchConfig:
    """Measure skd against plain PyTorch, everything in one process and in turns.

    Every implementation is compared with float64 before it is timed; one that is wrong gets no time and no ratio.
    """

    what: tuple[What, ...] = ("align",)
    """align: the spectral alignment loss. magnitude: the losses on magnitudes, and with weights of the bins, which take
    a transform. intensity: spectra of maps, over channels and over space. analyze: skd.analyze on 24 layers of
    CaiT-S24 with random weights, against the model's own forward. trainer: the loop of skd distill beside a bare one,
    and the share of the spectral loss in a step of training (both need timm). all: everything. On two cores align
    takes about 4 minutes, magnitude 9, intensity 4, analyze 2, trainer 3. On CUDA there are align, magnitude and
    intensity."""

    shapes: tuple[str, ...] = ()
    """Only the shapes whose name contains one of these texts ("14x14"), or shapes of your own written like
    "192<-384 14x14 B64": student channels, teacher channels, height, width, batch; for intensity "384 14x14 B32". All
    default shapes if empty. On CUDA there are recipes too, all layers in one call: "deit-tiny", "deit-small",
    "swin-tiny"."""

    batches: tuple[int, ...] = (64, 128, 256)
    """Batches of the default shapes and recipes on CUDA. On the CPU each shape has its own."""

    layouts: tuple[Layout, ...] | None = None
    """Memory order of the maps. nchw: contiguous. tokens: contiguous channels, the student's rows behind a class
    token, as ViT and DeiT hand them out. tokens<-nchw: a student of one kind, a teacher of the other. nchw and tokens
    if not given, on CUDA all four; a recipe has its own."""

    dtypes: tuple[DTypeName, ...] | None = None
    """Dtype of both maps; float32 if not given, on CUDA float32 and bfloat16."""

    match: Match | None = None
    """What a loss compares: complex, the 2-D Fourier coefficients; mse, the maps themselves (align; complex if not
    given). magnitude, log_magnitude; complex+bands, with a weight for every bin; complex+focal, with focal weights
    (magnitude; all four if not given)."""

    threads: tuple[int, ...] = ()
    """Numbers of threads; one and all usable cores if empty."""

    variants: tuple[str, ...] = ()
    """Only these implementations, by name; all if empty. The baseline of the ratios (published-nchw, eager-nchw or
    forward) and the floor (copy or read) are always kept."""

    rounds: int = 15
    """Rounds per configuration; in each, every implementation runs once, in random order."""

    seconds: float = 10.0
    """No further round of a configuration begins after this many seconds, once five are done."""

    total_seconds: float = 170.0
    """On CUDA: no further configuration begins after this many seconds; the most valuable come first. 0: no limit."""

    cache: Literal["mixed", "cold"] = "mixed"
    """On the CPU. mixed: caches as the implementation that ran before left them. cold: flushed before every run. On
    CUDA every implementation is measured with a cold and with a warm L2."""

    allocator: Literal["recycle", "default"] = "recycle"
    """On the CPU. recycle: freed memory is used again (glibc only), so that no implementation pays page faults for its
    buffers at every call. default: malloc as it is."""

    upstream: float = 1.0
    """Gradient that arrives at the loss in backward. 1 is a plain ``loss.backward()``, or a weight given to
    ``SpectralLoss(weights=...)``; 0.2, the recipes' weight as a factor of the loss, costs skd one more pass over the
    gradient. For float16 it is multiplied by 65536, as a gradient scaler does."""

    compile: bool = True
    """Measure torch.compile of the plain forms too (needs a C++ compiler, on CUDA Triton)."""

    quick: bool = False
    """A look in some seconds: only the first shape unless shapes are named, an eighth of the batch, three rounds, no
    torch.compile. Its figures are not those of the full sizes."""

    device: str = "cpu"
    """Where to measure: cpu or cuda."""

    expect_ratio: float | None = None
    """Exit with status 1 unless skd is at least this many times as fast as the baseline in every configuration
    (forward + backward; analyze and trainer have no such ratio)."""

    out: Path | None = None
    """Folder for rows.csv and rows.json, on CUDA also table.md; a new runs/bench-<date> if not given. Nothing is
    overwritten."""

    add: bool = False
    """On CUDA: go on with the measurement that ``out`` holds. What it has is kept and not measured again."""

    seed: int = 0
    """Seed of the maps and of the order of the implementations."""

    def check(self) -> None:
        """Raises ValueError, in one sentence, for a value that cannot be meant."""
        if self.device not in DEFAULTS:
            raise ValueError(f"device={self.device!r} is not known; use {' or '.join(map(repr, DEFAULTS))}")
        for name, least in (("rounds", 1), ("seconds", 0), ("total_seconds", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name}={getattr(self, name)} is too small; use at least {least}")
        if any(count < 1 for count in self.threads):
            raise ValueError(f"threads={self.threads} contains a number below 1; use positive numbers of threads")
        if self.upstream == 0:
            raise ValueError("upstream=0 makes every gradient zero, which any backward gets right; use another number")
        for name in ("what", "layouts", "dtypes", "batches"):
            if getattr(self, name) == ():
                raise ValueError(f"{name} is empty; leave it out for the default, or name at least one")
        if any(batch < 1 for batch in self.batches):
            raise ValueError(f"batches={self.batches} contains a number below 1; use positive batches")
        losses = [name for name in MATCHES if name in self.measured()]
        if self.match is not None and not any(self.match in MATCHES[name] for name in losses):
            kind = next(name for name, matches in MATCHES.items() if self.match in matches)
            raise ValueError(f"match={self.match!r} belongs to what='{kind}', which is not measured here; add it")
        if self.device == "cuda" and (unknown := [name for name in self.measured() if name not in ON_CUDA]):
            raise ValueError(f"what={unknown[0]!r} is measured on the CPU only; on 'cuda' use {', '.join(ON_CUDA)}")
        if self.add and (self.device == "cpu" or self.out is None):
            raise ValueError("add goes on with a measurement on CUDA in a folder; use it with device 'cuda' and out")
        if self.device == "cuda" and (self.threads or self.cache != "mixed" or self.allocator != "recycle"):
            raise ValueError("threads, cache and allocator say how to measure on the CPU; leave them out for 'cuda'")

    def measured(self) -> tuple[str, ...]:
        """The kinds of :data:`What` that are asked for, in the order they are measured in."""
        kinds = ("align", "magnitude", "intensity", "analyze", "trainer")
        if "all" in self.what:  # on CUDA: all there is
            return ON_CUDA if self.device == "cuda" else kinds
        return tuple(kind for kind in kinds if kind in self.what)

    def matches(self, kind: str) -> tuple[str, ...]:
        """What the losses of a kind compare."""
        if self.match is None:
            return {"align": ("complex",), "magnitude": MATCHES["magnitude"]}[kind]
        return (self.match,) if self.match in MATCHES[kind] else ()

    def with_defaults(self) -> "BenchConfig":
        """The same with the layouts and dtypes of the device where none are given."""
        given = {name: getattr(self, name) or value for name, value in DEFAULTS[self.device].items()}
        return dataclasses.replace(self, **given)
