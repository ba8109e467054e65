"""What ``skd bench`` can be told. Importing this costs nothing: neither torch nor the kernels are loaded."""

import dataclasses
from pathlib import Path
from typing import Literal

DTypeName = Literal["float32", "bfloat16", "float16"]
Layout = Literal["nchw", "tokens"]


@dataclasses.dataclass
class BenchConfig:
    """Measure the spectral alignment loss against plain PyTorch: forward, backward and both, in one process.

    Every implementation is compared with float64 before it is timed; one that is wrong gets no time and no ratio.
    """

    shapes: tuple[str, ...] = ()
    """Only the shapes whose name contains one of these texts ("14x14"), or shapes of your own written like
    "192<-384 14x14 B64": student channels, teacher channels, height, width, batch. All default shapes if empty."""

    layouts: tuple[Layout, ...] = ("nchw", "tokens")
    """Memory order of the maps. nchw: contiguous. tokens: contiguous channels, the student's rows behind a class
    token, as ViT and DeiT hand them out."""

    dtypes: tuple[DTypeName, ...] = ("float32",)
    """Dtype of both maps."""

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

    cache: Literal["mixed", "cold"] = "mixed"
    """mixed: caches as the implementation that ran before left them. cold: flushed before every run."""

    allocator: Literal["recycle", "default"] = "recycle"
    """recycle: freed memory is used again (glibc only), so that no implementation pays page faults for its buffers at
    every call. default: malloc as it is."""

    upstream: float = 1.0
    """Gradient that arrives at the loss in backward. 1 is a plain ``loss.backward()``, or a weight given to
    ``SpectralLoss(weights=...)``; 0.2, the recipes' weight as a factor of the loss, costs skd one more pass over the
    gradient. For float16 it is multiplied by 65536, as a gradient scaler does."""

    compile: bool = True
    """Measure torch.compile of the plain forms too (needs a C++ compiler)."""

    quick: bool = False
    """A look in some seconds: only the first shape unless shapes are named, an eighth of the batch, three rounds, no
    torch.compile. Its figures are not those of the full sizes."""

    device: str = "cpu"
    """Where to measure."""

    expect_ratio: float | None = None
    """Exit with status 1 unless skd's forward + backward is at least this many times as fast as the published form in
    every configuration."""

    out: Path | None = None
    """Folder for rows.csv and rows.json; a new runs/bench-<date> if not given. Nothing is overwritten."""

    seed: int = 0
    """Seed of the maps and of the order of the implementations."""

    def check(self) -> None:
        """Raises ValueError, in one sentence, for a value that cannot be meant."""
        if self.device != "cpu":
            raise ValueError(f"device={self.device!r}: this version measures on the CPU only; use device 'cpu'")
        for name, least in (("rounds", 1), ("seconds", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name}={getattr(self, name)} is too small; use at least {least}")
        if any(count < 1 for count in self.threads):
            raise ValueError(f"threads={self.threads} contains a number below 1; use positive numbers of threads")
        if self.upstream == 0:
            raise ValueError("upstream=0 makes every gradient zero, which any backward gets right; use another number")
        for name in ("layouts", "dtypes"):
            if not getattr(self, name):
                raise ValueError(f"{name} is empty; leave it out for the default, or name at least one")
