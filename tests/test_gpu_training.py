"""Training on a GPU: the loss under DistributedDataParallel, torch.compile, autocast and fork, and its curves."""

import copy
import datetime
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from cases import Case
from gpu_helpers import DEVICE, gpu_backend, needs_gpu, pairs
from torch import nn
from torch._dynamo.utils import counters

import skd

pytestmark = [pytest.mark.gpu, needs_gpu]
backend = gpu_backend


class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.mlp = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width)
        )

    def forward(self, x):
        return x + self.mlp(x)


class TokenModel(nn.Module):
    """Images [B, 3, 56, 56] -> logits, by blocks that hand out tokens [B, 14 * 14, width]."""

    def __init__(self, width, seed):
        super().__init__()
        torch.manual_seed(seed)
        self.embed = nn.Linear(48, width)
        self.blocks = nn.Sequential(*[Block(width) for _ in range(3)])
        self.head = nn.Linear(width, 10)

    def forward(self, images):
        x = self.embed(F.pixel_unshuffle(images, 4).flatten(2).transpose(1, 2))
        return self.head(self.blocks(x).mean(1))


def taps():
    """A student, and a frozen wider teacher, both with the maps of two blocks."""
    student, teacher = TokenModel(48, 0).to(DEVICE), TokenModel(96, 1).to(DEVICE).requires_grad_(False)
    return skd.FeatureTap(student, [0, -1]), skd.FeatureTap(teacher, [0, -1])


def batch(seed, size=16):
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(size, 3, 56, 56, generator=generator)
    return images.to(DEVICE), torch.randint(10, (size,), generator=generator).to(DEVICE)


def loss_of(student, teacher, images, labels, backend):
    with torch.no_grad():
        _, wanted = teacher(images)
    logits, maps = student(images)
    return F.cross_entropy(logits, labels) + 0.2 * skd.spectral_loss(maps, wanted, backend=backend)


def gradients(module):
    return {name.removeprefix("module."): p.grad.clone() for name, p in module.named_parameters()}


# --- Training curves, autocast ---


def train(backend, steps=40, dtype=None, teacher_in_float32=False):
    """The losses of some training steps, and the loss scale after them."""
    student, teacher = taps()
    optimizer = torch.optim.AdamW(student.parameters(), lr=2e-3)
    scaler = torch.amp.GradScaler(DEVICE.type, enabled=dtype == torch.float16)
    curve = []
    for index in range(steps):
        images, _ = batch(index)
        with torch.autocast(DEVICE.type, dtype, enabled=dtype is not None):
            with torch.no_grad(), torch.autocast(DEVICE.type, dtype, enabled=not (dtype is None or teacher_in_float32)):
                _, wanted = teacher(images)
            _, maps = student(images)
            loss = skd.spectral_loss(maps, wanted, backend=backend)
        assert loss.dtype == torch.float32
        optimizer.zero_grad()
        scaler.scale(0.2 * loss).backward()
        scaler.step(optimizer)
        scaler.update()
        curve.append(loss.detach())
    assert all(torch.isfinite(p).all() for p in student.parameters())
    return torch.stack(curve).cpu(), scaler.get_scale()


def test_training_follows_the_curve_of_the_reference(backend):
    (curve, _), (expected, _) = train(backend), train("reference")
    assert expected[-1] < 0.5 * expected[0]
    torch.testing.assert_close(curve, expected, rtol=1e-3, atol=0)


@pytest.mark.parametrize(
    "dtype, teacher_in_float32", [(torch.bfloat16, False), (torch.float16, False), (torch.float16, True)]
)
def test_under_autocast_training_stays_close_to_float32(backend, dtype, teacher_in_float32):
    curve, scale = train(backend, dtype=dtype, teacher_in_float32=teacher_in_float32)
    expected, _ = train("reference")
    assert torch.isfinite(curve).all()
    torch.testing.assert_close(curve, expected, rtol=1e-2, atol=0)
    # As large as the reference keeps it: a gradient that overflows or vanishes in float16 would not.
    assert scale == train("reference", dtype=dtype, teacher_in_float32=teacher_in_float32)[1]
    assert dtype != torch.float16 or scale >= 2.0**12


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_maps_of_one_step_under_autocast_have_its_dtype(backend, dtype):
    student, teacher = taps()
    images, _ = batch(0)
    with torch.autocast(DEVICE.type, dtype):
        _, wanted = teacher(images)
        _, maps = student(images)
        maps = [m.to(dtype) for m in maps]
        loss = skd.spectral_loss(maps, wanted, backend=backend)
        grads = torch.autograd.grad(loss * 1024, maps)
    assert loss.dtype == torch.float32 and {g.dtype for g in grads} == {dtype}
    assert all(torch.isfinite(g).all() and g.count_nonzero() > 0.9 * g.numel() for g in grads)


# --- DistributedDataParallel ---


@pytest.fixture
def process_group(tmp_path):
    """A group of this process alone, over NCCL if that works here."""
    for name in ("nccl", "gloo"):
        try:
            dist.init_process_group(
                name,
                init_method=f"file://{tmp_path}/{name}",
                rank=0,
                world_size=1,
                timeout=datetime.timedelta(seconds=60),
            )
            dist.all_reduce(torch.ones(1, device=DEVICE))
            torch.cuda.synchronize()
            break
        except (RuntimeError, ValueError):
            if dist.is_initialized():
                dist.destroy_process_group()
    else:
        pytest.skip("neither NCCL nor Gloo starts here")
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("options", [{}, {"gradient_as_bucket_view": True}, {"static_graph": True}], ids=str)
def test_distributed_training_has_the_same_gradients(backend, options, process_group):
    student, teacher = taps()
    alone = copy.deepcopy(student)
    together = nn.parallel.DistributedDataParallel(student, **options)
    for seed in range(3):
        results = []
        for module in (alone, together):
            module.zero_grad(set_to_none=True)
            loss = loss_of(module, teacher, *batch(seed), backend)
            loss.backward()
            results.append((loss.detach(), gradients(module)))
        (loss, expected), (got_loss, got) = results
        torch.testing.assert_close(got_loss, loss)
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-7)
    with together.no_sync():  # accumulates over two batches
        loss_of(together, teacher, *batch(3), backend).backward()
    loss_of(together, teacher, *batch(4), backend).backward()
    for seed in (3, 4):
        loss_of(alone, teacher, *batch(seed), backend).backward()
    torch.testing.assert_close(gradients(together), gradients(alone), rtol=1e-4, atol=1e-6)


# --- torch.compile ---


def reduce_overhead_equals_eager(backend):
    """Run in a process of its own, where nothing that the loss keeps was made outside the graphs."""
    student, teacher = taps()
    compiled = torch.compile(loss_of, fullgraph=True, mode="reduce-overhead")
    for seed in range(8):
        results = []
        for function in (loss_of, compiled) if seed % 2 else (compiled, loss_of):
            torch.compiler.cudagraph_mark_step_begin()
            student.zero_grad(set_to_none=True)
            loss = function(student, teacher, *batch(seed), backend)
            (0.5 * loss).backward()
            results.append((loss.detach().clone(), gradients(student)))
        torch.testing.assert_close(results[1], results[0], rtol=1e-4, atol=1e-6)
    assert counters["inductor"]["cudagraph_skips"] == 0


def run(code, *arguments):
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]


def test_compiled_with_reduced_overhead(backend):
    pytest.importorskip("triton", reason="Inductor needs Triton")
    run(
        "import sys; sys.path.insert(0, sys.argv[2])\n"
        "import test_gpu_training\n"
        "test_gpu_training.reduce_overhead_equals_eager(sys.argv[1])",
        backend,
        str(Path(__file__).parent),
    )


def test_compiled_once_for_all_batch_sizes(backend):
    pytest.importorskip("triton", reason="Inductor needs Triton")

    def loss(a, b, s, t):
        losses = skd.spectral_loss([a.sin(), b * 2], [s, t], reduction="none", backend=backend)
        return losses[0] * 0.3 - losses[1]

    torch._dynamo.reset()
    compiled = torch.compile(loss, fullgraph=True, dynamic=True)
    try:
        with torch._dynamo.config.patch(error_on_recompile=True):
            for size in (3, 2, 5, 64):
                students, teachers = pairs([Case(size, 16, 32, 7, 7, "tokens"), Case(size, 24, 12, 14, 14)])
                results = []
                for function in (loss, compiled):
                    value = function(*students, *teachers)
                    results.append((value.detach(), *torch.autograd.grad(value, students)))
                torch.testing.assert_close(results[1], results[0], rtol=1e-5, atol=1e-9)
    finally:
        torch._dynamo.reset()


# --- fork ---


def test_a_forked_child_can_use_the_gpu(backend):
    """Trap 6: importing the package and making a loss leave CUDA alone in the parent."""
    run(
        """
import os, sys, traceback
import torch
import skd

align = skd.SpectralLoss(backend=sys.argv[1])
assert not torch.cuda.is_initialized()
child = os.fork()
if not child:
    code = 1
    try:
        student = torch.ones(2, 8, 7, 7, device=sys.argv[2], requires_grad=True)
        loss = align(student, torch.zeros(2, 16, 7, 7, device=sys.argv[2]))
        loss.backward()
        assert abs(loss.item() - 0.875) < 1e-6 and (student.grad > 0).all()
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)
sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
""",
        backend,
        DEVICE.type,
    )
