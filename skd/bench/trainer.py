"""What is measured of skd distill: its loop beside a bare one, and the share of the spectral loss in a step.

What is to be expected, per image of 224 x 224 and in float32. DeiT-Tiny does 2.5 GFLOP forward and 7.5 with its
backward, CaiT-S24 19 forward; two cores with AVX2 do some 80 GFLOP/s.

- The loop. DeiT-Tiny learning from DeiT-Tiny, 4 images: 40 GFLOP, half a second. Our loop reads the gradient once more
  than a bare one, to see whether it is finite: 5.7 million parameters, 23 MB, 2 to 3 ms; it seeds three generators and
  makes some 40 calls of PyTorch on single numbers, 1 ms. Together below 1%.
- The spectral loss. CaiT-S24 to DeiT-Tiny, eight pairs of layers: 26 GFLOP, 330 ms. A pair has 0.15 MB of the student's
  and 0.30 MB of the teacher's map; loss and gradient read both and write one gradient: 4.8 MB, 0.5 ms at 10 GB/s,
  0.15% of the step. The published form makes some ten times as many passes and four transforms: 2 to 4%. Neither share
  depends on the batch.
"""

import dataclasses
import functools
import importlib.util
from collections.abc import Callable, Sequence
from typing import ClassVar

import torch
from torch import Tensor

from skd.bench import correctness
from skd.bench.case import COPY, Share, Variant
from skd.bench.config import BenchConfig
from skd.bench.objectives import plain_loss, published, skd_loss
from skd.bench.training_steps import WEIGHT, Inputs, bare_loop, engine_loop, logits_loss
from skd.features import FeatureTap

BARE_LOOP = "bare-loop"
ALWAYS = (BARE_LOOP, COPY)
MOST = 2.0
"""Percent that our loop may cost, and percent of a step that the spectral loss may take: the project's goals."""

TOLERANCE = 1e-4
"""Relative error of the first step's loss above which a loop is wrong."""


# --- What runs ---


@dataclasses.dataclass(frozen=True)
class StepRun:
    """A loop that goes on by one step whenever it is asked to; see :class:`skd.bench.case.Run`."""

    variant: Variant
    step: Callable[[], Tensor]

    def forward(self) -> Tensor:
        """A whole step; returns its loss."""
        return self.step()

    def backward(self, forward: Tensor) -> None:
        return None


@dataclasses.dataclass(frozen=True)
class MapsRun:
    """The spectral loss of maps that lie ready, and its gradient."""

    variant: Variant
    loss: Callable[[list[Tensor], list[Tensor]], Tensor]
    inputs: Inputs

    def forward(self) -> Tensor:
        return self.loss(self.inputs.student_maps, self.inputs.teacher_maps)

    def backward(self, forward: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(forward, self.inputs.student_maps)


def _loop(make: Callable[[Inputs], Callable[[], Tensor]]) -> Callable:
    """As a variant's ``build``: kind -> (variant, inputs) -> what runs."""
    return lambda kind: lambda variant, inputs: StepRun(variant, make(inputs))


def _spectral(loss: Callable[[str], Callable]) -> Callable:
    return lambda kind: lambda variant, inputs: MapsRun(variant, loss("complex"), inputs)


OVER, OF = Share(BARE_LOOP, beyond=True, most=MOST), Share(BARE_LOOP, beyond=False, most=MOST)

VARIANTS = (
    Variant(BARE_LOOP, _loop(bare_loop)),
    Variant("skd-loop", _loop(engine_loop), only=("loop",), share=OVER),
    Variant("skd-spectral", _spectral(skd_loss("cpu")), backend="cpu", only=("share",), share=OF),
    Variant(
        "published-spectral",
        _spectral(plain_loss(published)),
        only=("share",),
        share=dataclasses.replace(OF, most=None),
    ),
    Variant(COPY, None),
)
"""Everything that is measured.

``bare-loop``: a step of training by hand, with :class:`skd.SpectralLoss`. ``skd-loop``: the same step by the trainer.
``skd-spectral``: the spectral loss and its gradient alone, of the maps of that step; ``published-spectral``: its
published form, with Fourier transforms. ``copy``: a copy of the bytes that must be moved at least.
"""


# --- The cases ---


@dataclasses.dataclass(frozen=True)
class StepCase:
    """One pair of models and batch; see :class:`skd.bench.case.Case`."""

    kind: str
    teacher: str
    student_layers: tuple[int, ...]
    teacher_layers: tuple[int, ...]
    student: str = "deit_tiny_patch16_224"
    size: int = 224
    batch: int = 4

    operation: ClassVar = "trainer"
    layout: ClassVar = "as the models have it"
    dtype: ClassVar = "float32"
    phases: ClassVar = ("both",)
    baseline: ClassVar = BARE_LOOP
    floor: ClassVar = COPY
    yardsticks: ClassVar = ()

    @property
    def name(self) -> str:
        return f"{self.kind}, {self.student} <- {self.teacher} {self.size}x{self.size} B{self.batch}"

    def columns(self) -> dict[str, object]:
        models = f"{self.student} <- {self.teacher}"
        return {"match": "complex", "model": models, "height": self.size, "width": self.size, "batch": self.batch}

    def floor_bytes(self, phase: str) -> int:
        """What the optimizer moves (weight, gradient and two moments read, three written), or the spectral loss."""
        return self._bytes[self.kind]

    @functools.cached_property
    def _bytes(self) -> dict[str, int]:
        with torch.device("meta"):
            inputs = self._make(torch.empty(self.batch, 3, self.size, self.size))
        student, teacher = (sum(x.numel() for x in maps) for maps in (inputs.student_maps, inputs.teacher_maps))
        parameters = sum(p.numel() for p in inputs.student.parameters())
        return {"loop": 4 * 7 * parameters, "share": 4 * (2 * student + teacher)}

    def make_inputs(self, seed: int = 0) -> Inputs:
        with torch.random.fork_rng([]):
            torch.manual_seed(seed)
            return self._make(torch.randn(self.batch, 3, self.size, self.size))

    def _make(self, images: Tensor) -> Inputs:
        import timm

        student, teacher = timm.create_model(self.student).train(), timm.create_model(self.teacher).eval()
        teacher.requires_grad_(False)
        target = torch.arange(self.batch, device=images.device)
        with torch.no_grad():
            with FeatureTap(student, self.student_layers) as tap:
                student_logits, student_maps = tap(images)
            with FeatureTap(teacher, self.teacher_layers) as tap:
                teacher_logits, teacher_maps = tap(images)
        student_maps = [x.detach().requires_grad_() for x in student_maps]
        layers = self.student_layers, self.teacher_layers
        logits = student_logits, teacher_logits
        return Inputs(student, teacher, layers, images, target, *logits, student_maps, teacher_maps)

    def truth(self, inputs: Inputs) -> tuple[float, tuple[float, list[Tensor]]]:
        """The first step's loss, and the spectral loss and its gradients; in float64 from the models' float32."""
        upstream = torch.ones((), dtype=torch.float64)
        spectral = correctness.truth_of_layers(inputs.student_maps, inputs.teacher_maps, "complex", upstream)
        logits = inputs.student_logits.double(), inputs.teacher_logits.double()
        return logits_loss(*logits, inputs.target).item() + WEIGHT * spectral[0], spectral

    def run(self, variant: Variant, inputs: Inputs) -> StepRun | MapsRun:
        if variant.build is not None:
            return variant.build(self.kind)(variant, inputs)
        # Half of the bytes are read and half are written.
        return StepRun(variant, torch.zeros(self.floor_bytes("both") // 2, dtype=torch.uint8).clone)

    def errors(self, expected, variant: Variant, forward: Tensor, backward) -> "LossError | correctness.Errors | None":
        """Of a loop's first step, or of the spectral loss."""
        if variant.name == COPY:
            return None
        if backward is not None:
            return correctness.compare_layers(expected[1], forward, backward)
        return LossError(abs(forward.item() - expected[0]) / abs(expected[0]))

    def quick(self) -> "StepCase":
        return dataclasses.replace(self, batch=1)


@dataclasses.dataclass(frozen=True)
class LossError:
    """Relative deviation of a step's loss from float64."""

    shown: float

    def verdict(self, dtype: str) -> str:
        """Why the step is wrong, in one sentence; empty if it is right."""
        if self.shown <= TOLERANCE:
            return ""
        return f"the loss of the first step deviates from float64 by {self.shown:.1e} (relative)"

    def columns(self) -> dict[str, float | None]:
        return {"loss_relative_error": self.shown if self.shown == self.shown else None}


def all_cases() -> list[StepCase]:
    """The two there are: a small teacher, beside which the loop shows; and SpectralKD's pair, with its layers."""
    ends, all_layers = (0, 1, 6, 7, 8, 9, 10, 11), (0, 1, 18, 19, 20, 21, 22, 23)
    return [
        StepCase("loop", "deit_tiny_patch16_224", ends, ends),
        StepCase("share", "cait_s24_224", ends, all_layers),
    ]


def known_shapes() -> Sequence[str]:
    return [case.name for case in all_cases()]


def cases(config: BenchConfig, texts: Sequence[str]) -> list[StepCase]:
    """The cases whose names contain one of the texts.

    Raises:
        ValueError: timm is not installed, or a text is part of no name.
    """
    if importlib.util.find_spec("timm") is None:
        raise ValueError("what='trainer' needs timm, which is not installed: pip install \"skd[train]\"")
    known = all_cases()
    for text in texts:
        if not any(text in case.name for case in known):
            raise ValueError(f"shape {text!r} is no part of {' or '.join(repr(case.name) for case in known)}")
    return [case for case in known if not texts or any(text in case.name for text in texts)]
