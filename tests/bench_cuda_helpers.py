"""What the tests of the benchmark on CUDA share: a CPU in the place of the GPU, small configurations."""

import csv
import time

import torch

from skd import bench, reference
from skd.bench import memory
from skd.bench.cuda import losses, workloads
from skd.bench.cuda.losses import Variant
from skd.bench.maps import Shape

SMALL = "12<-20 6x5 B3"


class CpuDevice:
    """The CPU in the place of a GPU: calls are finished when they return, and a graph calls its step again."""

    torch_device = torch.device("cpu")
    l2_bytes = 2**12

    def __init__(self):
        self.poisoned, self.broken, self.captured = 0, False, 0

    def synchronize(self):
        if self.broken:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")

    def seconds(self):
        return time.perf_counter()

    def mark(self):
        return time.perf_counter()

    def passed(self, mark):
        return False

    def milliseconds(self, start, end):
        return (end - start) * 1e3

    def hold(self, milliseconds):
        pass

    def flush_cache(self):
        pass

    def poison(self, amount):
        self.poisoned += amount

    def peak_extra_bytes(self, step):
        return memory.peak_tensor_bytes(step)

    def kernels(self, step):
        step()
        return ["some_kernel", "some_kernel"]

    def capture(self, step):
        self.captured += 1
        outputs = step()

        def replay():
            again = step()
            with torch.no_grad():
                for (loss, gradients), (new_loss, new_gradients) in zip(outputs, again, strict=True):
                    for old, new in zip((loss, *gradients), (new_loss, *new_gradients), strict=True):
                        old.copy_(new)

        return replay, outputs

    def release(self):
        pass

    def conditions(self):
        return {"device": "no GPU at all", "driver": "1.2", "cuda": "13.0", "triton": None, "l2_bytes": self.l2_bytes}

    def state(self):
        return "345 MHz"


def config(tmp_path, **options):
    given = {"device": "cuda", "shapes": (SMALL,), "layouts": ("tokens<-nchw",), "dtypes": ("float32",), "rounds": 2}
    return bench.BenchConfig(**(given | {"compile": False, "out": tmp_path / "out"} | options))


def read_rows(tmp_path):
    with open(tmp_path / "out" / "rows.csv", newline="") as file:
        return list(csv.DictReader(file))


def default(**options):
    return bench.BenchConfig(device="cuda", **options).with_defaults()


def case_of(*layers, orders=("tokens", "nchw"), dtype="float32", **options):
    return workloads.Case("made up B3", tuple(Shape(*layer, 3) for layer in layers), *orders, dtype, **options)


TWO = ((12, 20, 6, 5), (16, 8, 4, 7))


def on_the_cpu():
    """The variants that can run here."""
    return [v for v in losses.VARIANTS if not v.compiled and v.backend not in ("cuda", "triton")]


def spoilt(name, when=lambda: True, **options):
    """The published form, with one per cent too much gradient when asked."""

    def build(match):
        def loss(students, teachers):
            right = sum(
                reference.spectral_align_published(s, t, match) for s, t in zip(students, teachers, strict=True)
            )
            right = right / len(students)
            return right.detach() + (1.01 if when() else 1.0) * (right - right.detach())

        return loss

    return Variant(name, build, **options)


def with_variants(monkeypatch, *more, replace=()):
    kept = [v for v in on_the_cpu() if v.name not in replace]
    monkeypatch.setattr(losses, "VARIANTS", (*more, *kept))
