"""The Triton kernels on tensors of the CPU. Run by test_triton_interpreted.py, in a process with TRITON_INTERPRET=1.

The interpreter cuts the lower bits off where a GPU rounds a float32 to bfloat16: one unit in the last place is allowed
there, where everything else is held to the bounds of test_spectral_align.py.
"""

import math

import pytest
import torch
from cases import BF16, F16, F32, F64, Case, constant_difference, matrix
from skd.kernels import scale_gradients, spectral_align
from test_spectral_align import assert_close_to_float64

from skd.ops.spectral_align import numbers_in_mean, row_weight
from skd.ops.stored_gradients import stored_dtype, stored_scale


def layer_of(student, teacher, match, with_gradient=True):
    """As skd.ops.spectral_align describes it, its gradient poisoned."""
    number, dtype = numbers_in_mean(match, student, teacher), stored_dtype(student, teacher)
    return {
        "student": student.detach(),
        "teacher": teacher,
        "gradient": torch.empty_like(student, dtype=dtype).fill_(float("nan")) if with_gradient else None,
        "row_weight": row_weight(match, student.shape[3]),
        "loss_scale": 1.0 / number if number else 0.0,
        "gradient_scale": stored_scale(number, 1.0, dtype),
    }


def run_one(case, match):
    student, teacher = case.make()
    layer = layer_of(student, teacher, match)
    out = torch.full((1,), float("nan"))
    spectral_align.run([layer], out)
    return student.detach(), teacher, layer, out[0]


WHOLE = [c for c in matrix() if F64 not in (c.student_dtype, c.teacher_dtype)]


# "mse" differs in what a number counts only, and takes every second case: the interpreter is slow.
@pytest.mark.parametrize(
    ("match", "case"), [*(("complex", c) for c in WHOLE), *(("mse", c) for c in WHOLE[::2])], ids=str
)
def test_loss_and_gradient_are_those_of_float64(case, match):
    student, teacher, layer, loss = run_one(case, match)
    if case.student_dtype != F32:  # the same without the last rounding, which is then checked by itself
        rounded = layer["gradient"].float()
        layer["gradient"] = torch.full_like(layer["gradient"], float("nan"), dtype=F32)
        spectral_align.run([layer], torch.empty(1))
        unit, smallest = {BF16: (2.0**-7, 1e-40), F16: (2.0**-11, 3e-8)}[case.student_dtype]
        assert ((rounded - layer["gradient"]).abs() <= layer["gradient"].abs() * unit + smallest).all()
    in_full = 2.0 / numbers_in_mean(match, student, teacher) / layer["gradient_scale"]
    assert_close_to_float64(case, match, loss, layer["gradient"] * in_full, student.float(), teacher)


@pytest.mark.parametrize("order", ["nchw", "tokens", "sliced"])
@pytest.mark.parametrize("shape", [(1, 16, 16, 56, 56), (1, 4, 4, 128, 128), (2, 512, 512, 7, 7), (1, 4, 4, 16, 512)])
def test_equal_numbers_add_up_without_drift(shape, order):
    case = Case(*shape, order, order, content=constant_difference)
    student, teacher = case.make()
    layer = layer_of(student.detach() * 1.1, teacher, "complex")
    out = torch.full((), float("nan"))
    spectral_align.run([layer], out)
    assert_close_to_float64(case, "complex", out, layer["gradient"], layer["student"], teacher)


@pytest.mark.parametrize("case", [Case(1, 2, 2, 3, 2500), Case(1, 2, 2, 200, 120), Case(2, 2, 4, 70, 64)], ids=str)
@pytest.mark.parametrize("order", ["nchw", "tokens"])
def test_large_planes_and_wide_rows(case, order):
    student, teacher, layer, loss = run_one(Case(*list(vars(case).values())[:5], order, order), "complex")
    assert_close_to_float64(case, "complex", loss, layer["gradient"], student, teacher)


CASES = [
    Case(2, 16, 32, 7, 7, "tokens", "nchw"),
    Case(0, 16, 32, 7, 7),
    Case(8, 24, 24, 14, 14),
    Case(1, 6, 4, 3, 5),
]


@pytest.mark.parametrize("cases", [CASES, CASES[::2], CASES[1:2]], ids=["empty one", "full", "only empty"])
def test_layers_of_all_sizes_in_one_call(cases, poisoned):
    layers = [layer_of(*case.make(), "complex", with_gradient=i != 2) for i, case in enumerate(cases)]
    losses, total = torch.full((len(cases),), float("nan")), torch.full((), float("nan"))
    spectral_align.run(layers, losses)
    spectral_align.run(layers, total)
    for case, layer, loss in zip(cases, layers, losses, strict=True):
        alone = torch.full((1,), float("nan"))
        spectral_align.run([layer], alone)
        assert torch.equal(alone[0], loss)  # whatever is beside it
        assert (loss == 0) == (case.batch == 0)
        assert layer["gradient"] is None or not layer["gradient"].isnan().any()
    torch.testing.assert_close(total, losses.double().sum().float(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("order", ["nchw", "tokens", "padded_rows"])
@pytest.mark.parametrize("channels", [(16, 32), (32, 16), (20, 37)])
def test_nothing_but_the_gradient_is_written(order, channels):
    student, teacher = Case(2, *channels, 7, 7, order, order).make()
    layer = layer_of(student, teacher, "complex")
    expected = torch.empty(1)
    spectral_align.run([layer], expected)
    around = torch.full((4, channels[0] + 2, 9, 9), 7.0)
    inner = around[1:3, 1:-1, 1:-1, 1:-1]
    contiguous, layer["gradient"] = layer["gradient"], inner.fill_(float("nan"))
    spectral_align.run([layer], expected)
    torch.testing.assert_close(inner, contiguous, rtol=1e-5, atol=1e-9)
    inner.fill_(7.0)
    assert (around == 7.0).all()


@pytest.mark.parametrize("order", ["nchw", "tokens", "sliced"])
@pytest.mark.parametrize("channels", [(16, 32), (32, 16)])
def test_an_infinity_stays_alone_where_rows_do_not_count(order, channels):
    student, teacher = Case(2, *channels, 7, 8, order, order).make()
    teacher[0, 3, 2, 1] = float("inf")
    layer = layer_of(student, teacher, "mse")
    spectral_align.run([layer], torch.empty(1))
    assert not layer["gradient"].isnan().any()
    assert layer["gradient"].isinf().sum() == max(1, channels[0] // channels[1])


@pytest.mark.parametrize("dtype", [F32, BF16, F16])
@pytest.mark.parametrize("in_place", [True, False])
def test_gradients_are_scaled_by_factors_on_the_device(dtype, in_place):
    torch.manual_seed(0)
    stored = [torch.randn(n).to(dtype) for n in (5000, 0, 4096, 1, 8192 + 16)]
    upstream = torch.tensor([0.7, 3.0, 1.0, float("inf"), float("nan")])
    powers = [2.0**-20, 1.0, 1.0, 1.0, 1.0]
    expected = [(x.float() * (u * p)) for x, u, p in zip(stored, upstream, powers, strict=True)]
    outputs = stored if in_place else [torch.full_like(x, 7.0) for x in stored]
    scale_gradients.run(stored, outputs, upstream, powers)
    for out, true in zip(outputs, expected, strict=True):
        ulp = {F32: 0.0, BF16: 2.0**-7, F16: 0.0}[dtype]
        torch.testing.assert_close(out, true.to(dtype), rtol=ulp, atol=0, equal_nan=True)


def test_any_stride_of_the_upstream_gradient():
    stored = [torch.randn(3, 4).t() for _ in range(3)]
    for upstream in (torch.tensor(-2.0).expand(3), torch.arange(12.0).view(3, 4)[:, 1], torch.zeros(3)):
        outputs = [torch.empty_like(x) for x in stored]
        scale_gradients.run(stored, outputs, upstream, [1.0, 0.5, 1.0])
        for x, out, u, p in zip(stored, outputs, upstream.tolist(), (1.0, 0.5, 1.0), strict=True):
            assert torch.equal(out, x * (u * p)) and math.isfinite(u)
