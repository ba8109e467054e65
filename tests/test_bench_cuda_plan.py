"""What skd bench --device cuda measures when it is asked for something, and with which maps and implementations."""

import dataclasses

import pytest
import torch
from bench_cuda_helpers import TWO, CpuDevice, case_of, config, default, on_the_cpu

from skd import bench
from skd.bench import __main__ as command
from skd.bench.case import COPY
from skd.bench.cuda import intensity, losses, plan, runner, workloads
from skd.bench.cuda.losses import COPY_GRAPH, Run
from skd.bench.maps import MapShape, Shape
from skd.bench.pairs import BASELINE
from skd.bench.report import OK, WRONG

# --- What is asked for ---


def test_without_a_gpu_one_sentence_says_so(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert bench.run(config(tmp_path)) == 2
    error = capsys.readouterr().err
    assert "device='cuda'" in error and "use device 'cpu'" in error and error.count("\n") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"shapes": ("13x14",)}, "'13x14' is part of no known shape or recipe"),
        ({"shapes": ("0<-4 2x2 B1",)}, "positive numbers"),
        ({"variants": ("skd-cpu",)}, "'skd-cpu' is not known on CUDA"),
        ({"threads": (2,)}, "leave them out for 'cuda'"),
        ({"cache": "cold"}, "leave them out for 'cuda'"),
        ({"total_seconds": -1}, "total_seconds=-1"),
    ],
)
def test_a_configuration_that_cannot_be_meant_ends_with_one_sentence(options, sentence, tmp_path, capsys):
    assert runner.run(config(tmp_path, **options), CpuDevice()) == 2
    error = capsys.readouterr().err
    assert sentence in error and error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_the_defaults_are_the_recipes_and_the_shapes_with_known_floors():
    cases = workloads.select_cases(default())
    names = {case.workload for case in cases}
    for batch in (64, 128, 256):
        assert {f"192<-768 14x14 B{batch}", f"192<-192 14x14 B{batch}", f"192<-768 7x7 B{batch}"} <= names
        assert {f"deit-tiny<-cait-s24 B{batch}", f"swin-tiny<-swin-small B{batch}"} <= names
        assert {f"192<-384 14x14 B{batch}", f"96<-96 56x56 B{batch}", f"768<-768 7x7 B{batch}"} <= names
    assert {case.dtype for case in cases} == {"float32", "bfloat16"}
    assert {case.layout for case in cases if not case.recipe} == {"nchw", "tokens", "tokens<-nchw", "nchw<-tokens"}
    assert len(cases) == len(set(cases)) == 3 * 2 * (3 + 6 * 4)


def test_recipes_have_the_layers_and_memory_orders_of_their_models():
    chosen = {case.workload: case for case in workloads.select_cases(default(shapes=("-",), dtypes=("float32",)))}
    deit, swin = chosen["deit-tiny<-cait-s24 B64"], chosen["swin-tiny<-swin-small B64"]
    assert deit.layers == (Shape(192, 384, 14, 14, 64),) * 8 and deit.layout == "tokens<-nchw"
    assert deit.floor_bytes("both") == 8 * 64 * 196 * 4 * (192 + 384 + 192)
    assert [layer.student for layer in swin.layers] == [96, 192, 384, 768] and swin.layout == "nhwc"
    assert swin.floor_bytes("backward") == 64 * 4 * (96 * 56**2 + 192 * 28**2 + 384 * 14**2 + 768 * 7**2)


def test_shapes_batches_and_dtypes_are_chosen():
    chosen = workloads.select_cases(default(shapes=("deit-tiny", "5<-3 2x9 B4"), batches=(8,), dtypes=("float16",)))
    assert [case.workload for case in chosen if case.recipe] == ["deit-tiny<-cait-s24 B8"]
    own = [case for case in chosen if not case.recipe]
    assert {case.layers for case in own} == {(Shape(5, 3, 2, 9, 4),)} and len(own) == 4
    assert all(case.upstream_gradient() == 65536 for case in chosen)


def test_the_most_valuable_comes_first():
    steps = plan.in_order(plan.select(default()), in_two_looks=True)
    assert len(steps) == 2 * len(workloads.select_cases(default()))
    looks = [[v.name for v in step.variants] for step in steps]
    assert looks[0] == [BASELINE, COPY, COPY_GRAPH, "skd-cuda", "skd-cuda-graph", "skd-triton", "skd-triton-graph"]
    first = [(step.case.workload, step.case.dtype) for step in steps[:4]]
    assert first == [
        (f"{recipe} B128", dtype)
        for recipe in ("deit-tiny<-cait-s24", "swin-tiny<-swin-small")
        for dtype in ("float32", "bfloat16")
    ]
    large = [step.case.floor_bytes("both") >= 64_000_000 for step in steps]
    assert all(large[: large.index(False)]) and large.index(False) > 20
    compiled = [any(v.compiled for v in step.variants) for step in steps]
    beyond = steps[compiled.index(True)].case
    assert beyond.recipe and beyond.batch == 128 and compiled.index(True) < len(steps) // 2


def test_what_was_asked_for_by_name_is_one_look():
    steps = plan.in_order(plan.select(default(variants=("closed-form",))), in_two_looks=False)
    assert [v.name for v in steps[0].variants] == [BASELINE, COPY, COPY_GRAPH, "closed-form"]
    assert len(steps) == 162
    assert not any(v.compiled for step in plan.select(default(compile=False)) for v in step.variants)


def test_intensities_follow_the_losses_of_the_same_worth_and_have_shapes_of_their_own():
    steps = plan.in_order(plan.select(default(what=("align", "intensity"))), in_two_looks=True)
    kinds = [step.case.operation for step in steps]
    assert kinds[:8] == ["spectral_align"] * 8 and kinds.count("spectral_intensity") == 2 * 3 * 4 * 2 * 2 * 2
    largest = [step.case for step in steps if step.case.workload == "96 56x56 B256"]
    assert {(case.layout, case.dtype, case.axis) for case in largest} == {
        (layout, dtype, axis)
        for layout in ("tokens", "nchw")
        for dtype in ("float32", "bfloat16")
        for axis in ("channel", "space")
    }
    assert largest[0].floor_bytes("both") == 256 * 96 * 56**2 * 4 and largest[0].floor_bytes("backward") == 0

    def chosen(*shapes):
        options = {"what": ("align", "intensity"), "shapes": shapes, "batches": (8,), "dtypes": ("float32",)}
        return {step.case.workload for step in plan.select(default(**options))}

    assert chosen("7x7") == {"192<-768 7x7 B8", "768<-768 7x7 B8", "768 7x7 B8"}
    assert chosen("20 5x9 B3", "8<-4 2x2 B1") == {"20 5x9 B3", "8<-4 2x2 B1"}
    with pytest.raises(ValueError, match="shape '7x8' is part of no default shape .*'768 7x7 B8'"):
        chosen("7x7", "7x8")


def test_the_command_without_its_packages_takes_the_same_options(tmp_path, monkeypatch, capsys):
    seen = []
    monkeypatch.setattr(command, "run", lambda given: seen.append(given) or 0)
    text = "--device cuda --shapes deit-tiny B64 --batches 64 128 --dtypes bfloat16 --seconds 1.5 --no-compile"
    assert command.main([*text.split(), "--out", str(tmp_path), "--layouts", "tokens<-nchw", "--add"]) == 0
    (given,) = seen
    assert given == bench.BenchConfig(
        device="cuda", shapes=("deit-tiny", "B64"), batches=(64, 128), dtypes=("bfloat16",), seconds=1.5, compile=False,
        out=tmp_path, layouts=("tokens<-nchw",), add=True,
    )  # fmt: skip
    assert command.main([]) == 0 and seen[1] == bench.BenchConfig()
    options = {action.dest for action in command.parser()._actions} - {"help"}
    assert options == {field.name for field in dataclasses.fields(bench.BenchConfig)}
    with pytest.raises(SystemExit):
        command.main(["--dtypes", "float8"])
    assert "invalid choice" in capsys.readouterr().err


# --- Inputs and implementations ---


def test_every_set_has_the_same_numbers_in_memory_of_its_own():
    case = case_of(*TWO)
    inputs = workloads.make_inputs(case, torch.device("cpu"), 3)
    students = [maps.students[0] for maps in (*inputs.sets, *inputs.nchw)]
    assert len({s.data_ptr() for s in students}) == 6 and all(torch.equal(s, students[0]) for s in students)
    assert students[0].stride() == (12 * 31, 1, 12 * 5, 12) and students[0].storage_offset() == 12
    assert all(s.is_leaf and s.requires_grad for s in students)
    for maps in inputs.nchw:
        assert all(x.is_contiguous() for x in (*maps.students, *maps.teachers))
    assert inputs.sets[0].teachers[1].is_contiguous() and not inputs.sets[0].teachers[1].requires_grad
    nhwc = workloads.make_inputs(case_of(*TWO, orders=("nhwc", "nhwc")), torch.device("cpu"), 1).sets[0]
    assert nhwc.students[0].stride() == (12 * 30, 1, 12 * 5, 12) and nhwc.students[0].storage_offset() == 0
    plain = workloads.make_inputs(case_of(*TWO, orders=("nchw", "nchw")), torch.device("cpu"), 2)
    assert plain.nchw is plain.sets and torch.equal(plain.sets[0].students[0], students[0])


def test_as_many_sets_as_the_cache_asks_for():
    large = workloads.select_cases(default(shapes=("swin-tiny",), batches=(256,), dtypes=("float32",)))[0]
    small = workloads.select_cases(default(shapes=("192<-192 14x14",), batches=(64,), dtypes=("bfloat16",)))[0]
    assert workloads.number_of_sets(large, 50 * 2**20) == 1
    assert 8 * 50 * 2**20 <= workloads.number_of_sets(small, 50 * 2**20) * small.floor_bytes("both") < 9 * 50 * 2**20


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("orders", [("tokens", "nchw"), ("nhwc", "nhwc"), ("nchw", "nchw")])
def test_every_implementation_is_right_on_all_layers_of_a_call(orders, dtype):
    case, device = case_of(*TWO, orders=orders, dtype=dtype, upstream=0.5), CpuDevice()
    inputs = workloads.make_inputs(case, device.torch_device, 2)
    expected = losses.truth(case, inputs, device)
    step = plan.Step(losses, case, on_the_cpu())
    for variant in step.variants:
        result, subject = runner.examine(step, variant, inputs, expected, device)
        assert (result.status, result.reason) == (OK, ""), variant.name
        assert (subject.replays is not None) == variant.graph and result.extra_bytes > 0
        assert result.launches["both"] == (1.0 if variant.graph else 2)  # the graph has two calls
    assert device.poisoned == len(on_the_cpu()) * 2 * case.floor_bytes("both")


@pytest.mark.parametrize("axis", intensity.spectral_intensity.AXES)
@pytest.mark.parametrize("order", ["nchw", "tokens"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_every_implementation_of_an_intensity_is_right(order, dtype, axis):
    case, device = intensity.MapCase(MapShape(20, 6, 5, 3), order, dtype, axis), CpuDevice()
    inputs = intensity.make_inputs(case, device.torch_device, 2)
    own = inputs.sets[0]
    assert own.shape == case.size and own.is_contiguous() == (order == "nchw") and torch.equal(own, inputs.nchw[1])
    expected = intensity.truth(case, inputs, device)
    kept = [v for v in intensity.VARIANTS if not v.compiled and v.backend in (None, "reference")]
    step = plan.Step(intensity, case, kept)
    assert len(step.variants) == 5
    for variant in step.variants:
        result, subject = runner.examine(step, variant, inputs, expected, device)
        assert (result.status, result.reason) == (OK, ""), variant.name
        assert subject.undivided and subject.modes() == (("cold", "both"), ("warm", "both"))
    result, _ = runner.examine(step, step.variants[0], inputs, 1.0001 * expected, device)
    assert result.status == WRONG and "a bin deviates" in result.reason


def test_the_copy_moves_the_floor():
    case = case_of(*TWO)
    inputs = workloads.make_inputs(case, torch.device("cpu"), 2)
    run = Run(next(v for v in losses.VARIANTS if v.name == COPY), case, inputs, CpuDevice())
    copied, gradients = run.both(1)
    assert 2 * copied.nbytes == case.floor_bytes("both") and gradients[0].data_ptr() == copied.data_ptr()
    assert copied.data_ptr() != run.both(1)[0].data_ptr() and copied.unique().numel() > 100
