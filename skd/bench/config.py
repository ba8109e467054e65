"""What ``skd bench`` can be told. Importing this costs nothing: neither torch nor the kernels are loaded."""

import dataclasses
from pathlib import Path
from typing import Literal

DTypeName = Literal["float32", "bfloat16", "float16"]
Layout = Literal["nchw", "tokens", "tokens<-nchw", "nchw<-tokens"]

DEFAULTS: dict[str, dict[str, tuple[str, ...]]] = {
    "cpu": {"layouts": ("nchw", "tokens"), "dtypes": ("float32",)},
    "cuda": {"layouts": ("tokens", "nchw", "tokens<-nchw", "nchw<-tokens"), "dtypes": ("float32", "bfloat16")},
}
"""What is measured on a device unless something else is asked for."""


@dataclasses.dataclass
class BenchConfig:
    """Measure the spectral alignment loss against plain PyTorch: forward, backward and both, in one process.

    Every implementation is compared with float64 before it is timed; one that is wrong gets no time and no ratio.
    """

    shapes: tuple[str, ...] = ()
    """Only the shapes whose name contains one of these texts ("14x14"), or shapes of your own written like
    "192<-384 14x14 B64": student channels, teacher channels, height, width, batch. All default shapes if empty. On
    CUDA there are recipes too, all layers in one call: "deit-tiny", "deit-small", "swin-tiny"."""

    batches: tuple[int, ...] = (64, 128, 256)
    """Batches of the default shapes and recipes on CUDA. On the CPU each shape has its own."""

    layouts: tuple[Layout, ...] | None = None
    """Memory order of the maps. nchw: contiguous. tokens: contiguous channels, the student's rows behind a class
    token, as ViT and DeiT hand them out. tokens<-nchw: a student of one kind, a teacher of the other. nchw and tokens
    if not given, on CUDA all four; a recipe has its own."""

    dtypes: tuple[DTypeName, ...] | None = None
    """Dtype of both maps; float32 if not given, on CUDA float32 and bfloat16."""

    match: Literal["complex", "mse"] = "complex"
    """What is compared: the 2-D Fourier coefficients, or the maps themselves."""

    threads: tuple[int, ...] = ()
    """Numbers of threads; one and all usable cores if empty."""

    variants: tuple[str, ...] = ()
    """Only these implementations, by name; all if empty. The baseline of the ratios (published-nchw) and the copy are
    always kept."""

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
    """Exit with status 1 unless skd's forward + backward is at least this many times as fast as the published form in
    every configuration."""

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
        for name in ("layouts", "dtypes", "batches"):
            if getattr(self, name) == ():
                raise ValueError(f"{name} is empty; leave it out for the default, or name at least one")
        if any(batch < 1 for batch in self.batches):
            raise ValueError(f"batches={self.batches} contains a number below 1; use positive batches")
        if self.add and (self.device == "cpu" or self.out is None):
            raise ValueError("add goes on with a measurement on CUDA in a folder; use it with device 'cuda' and out")
        if self.device == "cuda" and (self.threads or self.cache != "mixed" or self.allocator != "recycle"):
            raise ValueError("threads, cache and allocator say how to measure on the CPU; leave them out for 'cuda'")

    def with_defaults(self) -> "BenchConfig":
        """The same with the layouts and dtypes of the device where none are given."""
        given = {name: getattr(self, name) or value for name, value in DEFAULTS[self.device].items()}
        return dataclasses.replace(self, **given)
