"""What ptxas makes of the Triton kernels: no spills, few registers, wide loads, no atomics. No GPU is needed.

A launch is compiled exactly as the JIT would (specialised to the tensors' alignment and strides), less the launch. A
compilation takes about a second and a half: every pair of dtypes on sm_90, one on the others, in two processes.
"""

import itertools

import pytest
import torch
import triton_ahead_of_time as ahead
from skd.kernels import spectral_align

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
ORDERS = list(itertools.product(("nchw", "tokens"), repeat=2))
REGISTERS = {4: 168, 8: 128, 16: 64}
"""Per warps of a program: three programs of four warps, or two of eight, fit the 65536 of a multiprocessor."""

LAYERS = [
    *((90, orders, (192, 384), 14, d) for orders in ORDERS for d in itertools.product((F32, BF16, F16), repeat=2)),
    *((90, orders, (192, 192), 14, (d, d)) for orders in ORDERS for d in (F32, BF16)),
    *((90, orders, (192, 768), 7, (BF16, BF16)) for orders in ORDERS),
    *((90, orders, (96, 96), 56, (d, d)) for orders in ORDERS for d in (F32, BF16)),
    *((a, orders, (192, 384), 14, (BF16, BF16)) for a in (80, 86, 89, 100, 120) for orders in ORDERS),
]
# Windows that overlap, and a pooled student: compiled, with nothing promised but the absence of spills and atomics.
GENERAL = [(a, ("tokens", "nchw"), c, 14, (BF16, F32)) for a in (80, 90, 120) for c in ((192, 320), (384, 192))]
OTHERS = [(ahead.compile_finish, (a,)) for a in (80, 90, 120)]
OTHERS += [(ahead.compile_scale, (90, d, place, 1000)) for d in (F32, BF16, F16) for place in (True, False)]
OTHERS += [(ahead.compile_scale, (a, BF16, True, 1 << 20)) for a in (80, 86, 89, 100, 120)]


@pytest.fixture(scope="module")
def compiled():
    with ahead.compiled_elsewhere([(ahead.compile_layer, x) for x in (*LAYERS, *GENERAL)] + OTHERS) as result:
        yield result


def check_every_kernel(code, registers=None):
    assert code.local == 0, f"{code.local} accesses to spilled registers"
    assert code.atomics == 0
    assert code.registers <= (registers or REGISTERS[code.warps])


def contiguous_bits(kernel, order, dtype, side, ratio):
    """The widest access that a map's memory order allows: 128 bits, or what a row's or plane's end cuts off from it."""
    numbers = 16 // dtype.itemsize
    if order == "nchw" and kernel == "tile_kernel":
        numbers = min(numbers, side & -side)  # vectors lie within one row, where tokens must be met
    elif order == "nchw" and ratio > 1 and side % 2 == 0:
        numbers = min(numbers, side**2 & -(side**2))  # teacher planes side by side: within one plane
    return numbers * dtype.itemsize * 8


@pytest.mark.slow
@pytest.mark.parametrize("case", LAYERS, ids=ahead.name)
def test_fast_paths_access_memory_in_wide_vectors(compiled, case):
    _, orders, channels, side, dtypes = case
    kernel, code = compiled(ahead.compile_layer, case)
    assert kernel == ("planes_kernel" if orders == ("nchw", "nchw") else "tile_kernel")
    check_every_kernel(code)
    ratio = channels[1] // channels[0]
    # In flat streams of unequal dtypes the plane's end cuts both where it cuts the longer vector.
    bits = [contiguous_bits(kernel, o, d, side, ratio) for o, d in zip(orders, dtypes, strict=True)]
    assert set(code.loads) == set(bits)
    gradient = F32 if dtypes[0] == F16 != dtypes[1] else dtypes[0]
    partial = 64  # one double per program
    assert set(code.stores) == {contiguous_bits(kernel, orders[0], gradient, side, ratio), partial}


@pytest.mark.slow
@pytest.mark.parametrize("case", GENERAL, ids=ahead.name)
def test_the_general_kernel_compiles_without_spills(compiled, case):
    kernel, code = compiled(ahead.compile_layer, case)
    assert kernel == "general_kernel"
    check_every_kernel(code, 255)


@pytest.mark.slow
@pytest.mark.parametrize("function, arguments", OTHERS, ids=ahead.name)
def test_small_kernels(compiled, function, arguments):
    kernel, code = compiled(function, arguments)
    check_every_kernel(code)
    if kernel == "_scale_kernel":
        assert code.loads.get(128, 0) >= 4 and code.stores.get(128, 0) >= 4  # full blocks; the last one has a mask


# --- The choice of a kernel, a pure function of shapes, strides and dtypes ---


def meta_layer(shape, teacher_channels, student_stride=None, row_weight=0.5, dtype=F32):
    b, _, h, w = shape
    student = torch.empty(shape, device="meta", dtype=dtype)
    if student_stride:
        student = torch.empty_strided(shape, student_stride, device="meta", dtype=dtype)
    teacher = torch.empty(b, teacher_channels, h, w, device="meta", dtype=dtype)
    return {"student": student, "teacher": teacher, "gradient": torch.empty_like(student), "row_weight": row_weight}


@pytest.mark.parametrize(
    "shape, teacher_channels, kernel",
    [
        ((8, 192, 14, 14), 384, "planes_kernel"),
        ((8, 192, 14, 14), 320, "general_kernel"),
        ((8, 384, 14, 14), 192, "general_kernel"),
        ((70000, 1, 4, 4), 1, "planes_kernel"),
        ((1, 70001, 4, 4), 70001, "planes_kernel"),
        ((1, 4, 16, 512), 4, "planes_kernel"),
        ((1, 4, 3, 5001), 4, "general_kernel"),
        ((3, 5, 7, 7), 5, "tile_kernel"),  # 15 planes of 49: no group of them ends with a vector
    ],
)
def test_each_layer_has_its_kernel(shape, teacher_channels, kernel):
    plan = spectral_align.plan(meta_layer(shape, teacher_channels))
    assert plan.kernel.fn.__name__ == kernel
    assert 0 < plan.programs < 2**31


def test_tiles_that_span_two_gigabytes_of_numbers_use_64_bit_offsets():
    wide = meta_layer((2, 64, 14, 14), 64, student_stride=(1, 2**27, 2, 28))
    assert spectral_align.plan(wide).kernel is spectral_align.general_kernel
    narrow = meta_layer((2, 64, 14, 14), 64, student_stride=(1, 2**20, 2, 28))
    assert spectral_align.plan(narrow).kernel is spectral_align.tile_kernel


@pytest.mark.parametrize("shape", [(8, 192, 14, 14), (8, 96, 56, 56), (8, 768, 7, 7), (2, 64, 128, 128), (4, 10, 5, 6)])
@pytest.mark.parametrize("ratio", [1, 2, 4])
@pytest.mark.parametrize("dtype", [F32, BF16])
def test_planes_are_covered_once_and_begin_at_vectors(shape, ratio, dtype):
    plan = spectral_align.plan(meta_layer(shape, shape[1] * ratio, dtype=dtype))
    assert plan.kernel is spectral_align.planes_kernel
    c, area = plan.constants, shape[2] * shape[3]
    count = c["PLANES"] * area // c["CHUNKS"]
    assert plan.programs * count >= shape[0] * shape[1] * area > (plan.programs - c["CHUNKS"]) * count
    assert count <= c["ROWS"] * c["COLUMNS"] and count // shape[3] <= c["ROWS"]
    assert count % c["VECTOR"] == 0 and (c["EVEN"] or area % c["VECTOR"] == 0)
