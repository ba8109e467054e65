"""Every path of a GPU backend once, on maps of a few kilobytes, for compute-sanitizer.

    compute-sanitizer --tool memcheck --error-exitcode 86 python benchmarks/sanitizer_cases.py cuda triton

Maps are made and results compared on the CPU, so that few kernels but skd's run. Every tensor has an allocation of its
own (PYTORCH_NO_CUDA_MEMORY_CACHING), without which an access beyond one lands in another and is not seen.
"""

import argparse
import itertools
import os
import random
import sys
import time
from collections.abc import Iterator, Sequence

os.environ.setdefault("PYTORCH_NO_CUDA_MEMORY_CACHING", "1")  # read when torch first allocates

import torch  # noqa: E402
from torch import Tensor  # noqa: E402

import skd  # noqa: E402
from skd import reference  # noqa: E402

TOLERANCES = {torch.float32: 1e-5, torch.bfloat16: 2**-7, torch.float16: 2**-9}


def nchw(b: int, c: int, h: int, w: int) -> Tensor:
    return torch.randn(b, c, h, w)


def tokens(b: int, c: int, h: int, w: int) -> Tensor:
    return torch.randn(b, h * w + 1, c)[:, 1:].unflatten(1, (h, w)).permute(0, 3, 1, 2)


def sliced(b: int, c: int, h: int, w: int) -> Tensor:
    return torch.randn(b, c + 2, h + 1, 2 * w)[:, 1:-1, :h, ::2]


ORDERS = {order.__name__: order for order in (nchw, tokens, sliced)}

# Batch, student channels, teacher channels, height, width: equal widths, whole and broken ratios of pooling in both
# directions; the widths of real models, odd ones, rows of one and of more than a tile; ends inside every vector.
SHAPES = [
    (2, 16, 32, 14, 14),
    (2, 48, 48, 7, 7),
    (1, 24, 96, 7, 7),
    (1, 16, 16, 28, 28),
    (1, 8, 8, 56, 56),
    (2, 20, 37, 5, 9),
    (2, 37, 20, 5, 6),
    (2, 32, 16, 14, 14),
    (3, 5, 5, 1, 1),
    (1, 5, 10, 2, 301),
    (1, 33, 33, 3, 2),
]


def cases() -> Iterator[tuple]:
    """Shape, memory orders and dtypes: all layouts in float32, all dtypes in the layouts of real models."""
    for shape in SHAPES:
        for student, teacher in itertools.product(("nchw", "tokens"), repeat=2):
            yield shape, student, teacher, torch.float32, torch.float32
        yield shape, "sliced", "tokens", torch.float32, torch.float32
    for shape, order in itertools.product(SHAPES[:3], ("nchw", "tokens")):
        for student, teacher in itertools.product(TOLERANCES, repeat=2):
            if (student, teacher) != (torch.float32, torch.float32):
                yield shape, order, order, student, teacher


def to_device(x: Tensor, device: torch.device, dtype: torch.dtype) -> Tensor:
    """The same strides on the device, in memory that ends with the last element of the map."""
    base = x.untyped_storage().nbytes() // x.element_size()
    used = 1 + sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True))
    flat = torch.empty(0).set_(x.untyped_storage(), 0, (base,), (1,))
    flat = flat[x.storage_offset() : x.storage_offset() + used].to(dtype)
    # The offset of a class token stays, so that addresses are aligned as they are in a model.
    before = x.storage_offset()
    storage = torch.cat([flat.new_zeros(before), flat]).to(device)
    return storage.as_strided(x.shape, x.stride(), before)


def check(case: tuple, backend: str, match: str, upstream: float, device: torch.device) -> str:
    """Forward and backward of one case; what is wrong, or an empty string."""
    shape, student_order, teacher_order, student_dtype, teacher_dtype = case
    batch, student_channels, teacher_channels, height, width = shape
    student = ORDERS[student_order](batch, student_channels, height, width)
    teacher = ORDERS[teacher_order](batch, teacher_channels, height, width)
    s = to_device(student, device, student_dtype).requires_grad_()
    t = to_device(teacher, device, teacher_dtype)
    # Two layers in one call, the mean of which is the loss of one.
    loss = skd.spectral_loss([s, s], [t, t], match, backend=backend)
    (gradient,) = torch.autograd.grad(loss, s, torch.tensor(upstream, dtype=loss.dtype).to(device))
    s64 = s.detach().cpu().double().requires_grad_()
    published = reference.fourier_align_published if match == "magnitude" else reference.spectral_align_published
    loss64 = published(s64, t.cpu().double(), match)
    (gradient64,) = torch.autograd.grad(loss64, s64)
    gradient64 = gradient64 * upstream
    loss_error = abs(loss.item() - loss64.item()) / loss64.item()
    gradient_error = ((gradient.cpu().double() - gradient64).norm() / gradient64.norm()).item()
    if loss_error <= 1e-5 and gradient_error <= 2 * TOLERANCES[student_dtype]:  # two gradients are added up
        return ""
    return f"{backend} {case}, {match}: loss off by {loss_error:.1e}, gradient by {gradient_error:.1e} (relative)"


def main(backends: Sequence[str], seconds: float = 0.0, device: str = "cuda") -> int:
    """Runs the cases on these backends; 1 if a result is wrong, 2 if a backend is not there.

    Args:
        backends: their names.
        seconds: no further case of a backend begins after that time, for tools make kernels slow; 0: no limit.
        device: where the maps are.
    """
    torch.manual_seed(0)
    for backend in backends:
        there = skd.backends().get(backend, "no such backend")
        if there is not True:
            print(f"sanitizer_cases: {backend} is not available: {there}", file=sys.stderr)
            return 2
    wrong, counts = [], dict.fromkeys(backends, 0)
    shuffled = list(enumerate(cases()))
    random.Random(0).shuffle(shuffled)  # so that those for which there is time are of every kind
    for backend in backends:
        began = time.monotonic()
        for index, case in shuffled:
            if seconds and time.monotonic() - began > seconds:
                break
            counts[backend] += 1
            # float16 gradients need a gradient scaler's factor; for the others 1 and another number take turns.
            upstream = 65536.0 if case[3] == torch.float16 else (1.0, 0.5)[index % 2]
            others = (["mse"] if index % 5 == 0 else []) + (["magnitude"] if index % 3 == 0 else [])
            for match in ["complex", *others]:
                if sentence := check(case, backend, match, upstream, torch.device(device)):
                    wrong.append(sentence)
    for sentence in wrong:
        print(f"WRONG: {sentence}")
    done = ", ".join(f"{backend} {count} of {len(shuffled)} cases" for backend, count in counts.items())
    print(f"sanitizer_cases: {done}, {len(wrong)} wrong")
    return 1 if wrong else 0


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("backends", nargs="*", default=["cuda", "triton"])
    parser.add_argument("--seconds", type=float, default=0.0)
    given = parser.parse_args()
    sys.exit(main(given.backends, given.seconds))
