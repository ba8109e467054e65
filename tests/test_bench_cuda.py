"""skd bench --device cuda without a GPU: the plan, the samples, the rows and the verdicts, on devices made of Python.

What these cannot tell is whether ``skd.bench.cuda.device.CudaDevice`` speaks to a GPU rightly; that file is all there
is between this and a real device, and the tests at the end are for machines that have one.
"""

import collections
import csv
import dataclasses
import json
import time

import pytest
import torch

from skd import bench, reference
from skd.bench import __main__ as command
from skd.bench import memory, timing
from skd.bench.cuda import device as real
from skd.bench.cuda import goals, report, runner, sampling, variants, workloads
from skd.bench.cuda.sampling import MODES, Subject
from skd.bench.cuda.variants import COPY_GRAPH, Run, Variant
from skd.bench.report import OK, UNAVAILABLE, WRONG
from skd.bench.spectral_align import BASELINE, COPY, Shape

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


def test_the_defaults_are_the_recipes_and_shapes_of_the_issue():
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
    cases = workloads.select_cases(default())
    steps = runner.plan(cases, variants.select_variants(()), in_two_looks=True)
    assert len(steps) == 2 * len(cases)
    looks = [[v.name for v in look] for _, look in steps]
    assert looks[0] == [BASELINE, COPY, COPY_GRAPH, "skd-cuda", "skd-cuda-graph", "skd-triton", "skd-triton-graph"]
    first = [(case.workload, case.dtype) for case, _ in steps[:4]]
    assert first == [
        (f"{recipe} B128", dtype)
        for recipe in ("deit-tiny<-cait-s24", "swin-tiny<-swin-small")
        for dtype in ("float32", "bfloat16")
    ]
    large = [case.floor_bytes("both") >= 64_000_000 for case, _ in steps]
    assert all(large[: large.index(False)]) and large.index(False) > 20
    compiled = [any(v.compiled for v in look) for _, look in steps]
    beyond = steps[compiled.index(True)][0]
    assert beyond.recipe and beyond.batch == 128 and compiled.index(True) < len(steps) // 2


def test_what_was_asked_for_by_name_is_one_look():
    chosen = variants.select_variants(("closed-form",))
    assert [v.name for v in chosen] == [BASELINE, COPY, COPY_GRAPH, "closed-form"]
    assert len(runner.plan(workloads.select_cases(default()), chosen, in_two_looks=False)) == 162
    assert not any(v.compiled for v in variants.select_variants((), compile=False))


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


def case_of(*layers, orders=("tokens", "nchw"), dtype="float32", **options):
    return workloads.Case("made up B3", tuple(Shape(*layer, 3) for layer in layers), *orders, dtype, **options)


TWO = ((12, 20, 6, 5), (16, 8, 4, 7))


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


def on_the_cpu():
    """The variants that can run here."""
    return [v for v in variants.VARIANTS if not v.compiled and v.backend not in ("cuda", "triton")]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("orders", [("tokens", "nchw"), ("nhwc", "nhwc"), ("nchw", "nchw")])
def test_every_implementation_is_right_on_all_layers_of_a_call(orders, dtype):
    case, device = case_of(*TWO, orders=orders, dtype=dtype, upstream=0.5), CpuDevice()
    inputs = workloads.make_inputs(case, device.torch_device, 2)
    expected = runner.truth(case, inputs, device)
    for variant in on_the_cpu():
        result, subject = runner.examine(variant, case, inputs, expected, device)
        assert (result.status, result.reason) == (OK, ""), variant.name
        assert (subject.replays is not None) == variant.graph and result.extra_bytes > 0
        assert result.launches["both"] == (1.0 if variant.graph else 2)  # the graph has two calls
    assert device.poisoned == len(on_the_cpu()) * 2 * case.floor_bytes("both")


def test_the_copy_moves_the_floor():
    case = case_of(*TWO)
    inputs = workloads.make_inputs(case, torch.device("cpu"), 2)
    run = Run(next(v for v in variants.VARIANTS if v.name == COPY), case, inputs, CpuDevice())
    copied, gradients = run.both(1)
    assert 2 * copied.nbytes == case.floor_bytes("both") and gradients[0].data_ptr() == copied.data_ptr()
    assert copied.data_ptr() != run.both(1)[0].data_ptr() and copied.unique().numel() > 100


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
    monkeypatch.setattr(variants, "VARIANTS", (*more, *kept))


# --- Sampling ---


class Queue(CpuDevice):
    """A device behind a queue, in a time of its own: the host goes on while the device does what it was given."""

    def __init__(self):
        super().__init__()
        self.host = self.done = 0.0
        self.log = []

    def work(self, host, device, note=None):
        self.host += host
        self.done = max(self.done, self.host) + device
        self.log.append(note)

    def seconds(self):
        return self.host / 1e3

    def mark(self):
        self.log.append("mark")
        return max(self.done, self.host)

    def passed(self, mark):
        return self.host >= mark

    def milliseconds(self, start, end):
        self.host = max(self.host, end)
        return end - start

    def hold(self, milliseconds):
        self.work(0, milliseconds, "hold")

    def flush_cache(self):
        self.work(0.001, 0.01, "flush")


class Job:
    """Costs the host and the device known times per call."""

    def __init__(self, device, sets=8, host=0.1, forward=0.02, backward=0.01):
        self.device, self.sets, self.costs = device, sets, (host, forward, backward)
        self.alive, self.most_alive = 0, 0

    def forward(self, index):
        self.device.work(self.costs[0], self.costs[1], ("forward", index))
        return Result(self)

    def backward(self, forward):
        self.device.work(self.costs[0], self.costs[2], "backward")
        return Result(self)

    def both(self, index):
        return self.backward(self.forward(index))


class Result:
    """Counts how many of its kind are kept."""

    def __init__(self, job):
        self.job = job
        job.alive += 1
        job.most_alive = max(job.most_alive, job.alive)

    def __del__(self):
        self.job.alive -= 1


def test_a_sample_holds_the_devices_time_though_the_host_is_slower():
    device = Queue()
    times = sampling.interleaved(device, {"x": Subject(Job(device))}, 5, 60.0)["x"]
    for mode, expected in zip(MODES, (0.03, 0.02, 0.01, 0.03, 0.02), strict=True):
        assert times.device[mode] == pytest.approx([expected] * 5) and times.late[mode] == 0, mode
        assert times.host[mode] == pytest.approx([0.2 if mode[1] == "both" else 0.1] * 5)
        assert times.calls[mode] == 8


def test_a_device_that_cannot_be_held_is_reported_as_late():
    device = Queue()
    device.hold = lambda milliseconds: None
    times = sampling.interleaved(device, {"x": Subject(Job(device))}, 5, 60.0)["x"]
    assert times.late["cold", "both"] == 5
    assert min(times.device["cold", "both"]) > 0.1  # that is the host's time, and marked as such


def test_a_host_that_became_slower_is_held_for_longer():
    device = Queue()
    job = Job(device)
    sampler = sampling._Sampler(device, Subject(job), "cold", "both")
    job.costs = (0.25, 0.02, 0.01)
    milliseconds, _, late = sampler.take()
    assert milliseconds == pytest.approx(0.03) and not late


def test_cold_calls_take_turns_and_keep_their_results_and_warm_ones_do_neither():
    device = Queue()
    job = Job(device, sets=4)
    cold = sampling._Sampler(device, Subject(job), "cold", "both")
    device.log, job.most_alive = [], 0
    cold.take()
    forwards = [("forward", index) for index in range(4)]
    interleaved = [note for forward in forwards for note in (forward, "backward")]
    assert device.log == ["flush", "hold", "mark", *interleaved, "mark"] and job.most_alive >= 4
    warm = sampling._Sampler(device, Subject(job), "warm", "both")
    device.log, job.most_alive = [], 0
    warm.take()
    assert device.log == [("forward", 0), "backward", "hold", "mark", *[("forward", 0), "backward"] * 4, "mark"]
    assert job.most_alive <= 2


def test_the_forwards_before_a_backward_are_not_timed():
    device = Queue()
    sampler = sampling._Sampler(device, Subject(Job(device, sets=3)), "cold", "backward")
    device.log = []
    sampler.take()
    assert device.log[:3] == [("forward", index) for index in range(3)]
    assert device.log[3:] == ["flush", "hold", "mark", *["backward"] * 3, "mark"]


def test_a_sample_is_no_longer_than_the_queue_and_patience_allow():
    device = Queue()
    slow = sampling._Sampler(device, Subject(Job(device, sets=64, host=0.5)), "cold", "both")
    assert slow.calls == 4  # of 1 ms each for the host
    many = sampling._Sampler(device, Subject(Job(device, sets=64, host=0.001), launches=100), "cold", "both")
    assert many.calls == 5
    slowest = sampling._Sampler(device, Subject(Job(device, host=50.0), launches=9000), "cold", "both")
    assert slowest.calls == 1


def test_a_graph_is_replayed_as_a_whole():
    device = Queue()
    replays = {cache: (lambda cache=cache: device.work(0.02, 0.5, cache), 5) for cache in ("cold", "warm")}
    times = sampling.interleaved(device, {"g": Subject(Job(device), replays=replays)}, 5, 60.0)["g"]
    assert set(times.device) == {("cold", "both"), ("warm", "both")}
    assert times.device["cold", "both"] == pytest.approx([0.1] * 5) and times.calls["cold", "both"] == 5
    assert times.summary("cold", "forward") is None and times.host_milliseconds("cold", "forward") is None


def test_rounds_are_interleaved_in_changing_order_until_time_is_over():
    device = Queue()
    jobs = {name: Subject(Job(device), undivided=True) for name in "abc"}
    order = []

    class Noted(sampling._Sampler):
        def take(self):
            order.append(next(name for name, subject in jobs.items() if subject.run is self._run))
            return super().take()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sampling, "_Sampler", Noted)
        sampling.interleaved(device, jobs, 8, 60.0, seed=1)
    rounds = [tuple(order[6 * i : 6 * i + 6]) for i in range(8)]
    assert all(collections.Counter(r) == {"a": 2, "b": 2, "c": 2} for r in rounds) and len(set(rounds)) > 2
    times = sampling.interleaved(device, {"a": jobs["a"]}, 1000, 0.0)["a"]
    assert len(times.device["cold", "both"]) == timing.LEAST_ROUNDS


# --- The whole ---


def test_a_measurement_leaves_complete_rows(tmp_path, capsys, monkeypatch):
    with_variants(monkeypatch, *(v for v in variants.VARIANTS if v.name == "skd-cuda"))
    monkeypatch.setattr(runner.backends, "backends", lambda: {"cuda": "no kernels here", "reference": True})
    assert runner.run(config(tmp_path), CpuDevice()) == 0
    found = read_rows(tmp_path)
    by = {(row["variant"], row["cache"], row["phase"], row["group"]): row for row in found}
    assert {row["group"] for row in found} == {"1", "2"}  # two looks
    absent = by["skd-cuda", "cold", "both", "1"]
    assert absent["status"] == UNAVAILABLE and absent["reason"] == "no kernels here" and not absent["median_ms"]
    for row in found:
        if row["status"] != OK:
            continue
        assert 0 < float(row["p20_ms"]) <= float(row["median_ms"]) <= float(row["p80_ms"]) and row["samples"] == "2"
        assert float(row["gb_per_s"]) == pytest.approx(int(row["floor_bytes"]) / float(row["median_ms"]) / 1e6)
        assert row["device"] == "no GPU at all" and row["driver"] == "1.2" and row["date"] and row["torch"]
        copies = [by[name, row["cache"], "both", row["group"]] for name in (COPY, COPY_GRAPH)]
        if row["phase"] == "both":
            copy = min(float(copied["median_ms"]) for copied in copies)
            assert float(row["percent_of_copy"]) == pytest.approx(100 * copy / float(row["median_ms"]))
        if row["variant"] in (COPY, COPY_GRAPH):
            assert row["phase"] == "both" and not row["ratio_to_published_nchw"]
            continue
        assert float(row["gradient_relative_l2"]) < 1e-6
        if not row["variant"].endswith("-graph"):
            base = by[BASELINE, row["cache"], row["phase"], row["group"]]
            ratio = float(base["median_ms"]) / float(row["median_ms"])
            assert float(row["ratio_to_published_nchw"]) == pytest.approx(ratio)
            assert row["launches"] == ("0" if row["phase"] == "backward" else "2")
    (run,) = json.loads((tmp_path / "out" / "rows.json").read_text())["runs"]
    assert len(run["rows"]) == len(found) and run["conditions"]["left_out"] == ""
    assert all(len(v) == 2 for sample in run["samples"] for v in sample["milliseconds"].values())
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["rows.csv", "rows.json", "table.md"]
    page = (tmp_path / "out" / "table.md").read_text()
    out = capsys.readouterr().out
    for text in (page, out):
        assert "12<-20 6x5 B3, tokens<-nchw, float32, complex; at least 0.0 MB" in text
        assert "not measured: skd-cuda, 12<-20 6x5 B3" in text and "no kernels here" in text
    assert "| implementation | forward ms |" in page and "driver 1.2" in page


def test_a_wrong_result_gets_no_time_and_no_ratio(tmp_path, capsys, monkeypatch):
    replays_only = spoilt("spoilt-graph", when=lambda: device.captured > 0, graph=True)
    device = CpuDevice()
    with_variants(monkeypatch, spoilt("spoilt"), replays_only)
    names = ("spoilt", "spoilt-graph", "closed-form")
    assert runner.run(config(tmp_path, variants=names), device) == 1
    found = read_rows(tmp_path)
    wrong = [row for row in found if row["variant"].startswith("spoilt")]
    assert len(wrong) == len(MODES) + 2
    for row in wrong:
        assert row["status"] == WRONG and "1.0e-02" in row["reason"]
        assert row["reason"].startswith("replayed from a CUDA graph") == (row["variant"] == "spoilt-graph")
        for empty in ("median_ms", "p20_ms", "host_ms", "gb_per_s", "ratio_to_published_nchw", "percent_of_copy"):
            assert row[empty] == ""
    out = capsys.readouterr().out
    assert "WRONG: spoilt on 12<-20 6x5 B3" in out
    (line,) = [line for line in out.splitlines() if line.startswith("spoilt ")]
    assert "WRONG: the gradient deviates" in line
    (run,) = json.loads((tmp_path / "out" / "rows.json").read_text())["runs"]
    assert not any(sample["variant"].startswith("spoilt") for sample in run["samples"])


def test_times_of_a_wrong_result_stay_hidden_even_if_there_are_some():
    times = sampling.Times(
        {("cold", "both"): [1.0]}, {("cold", "both"): [1.0]}, {("cold", "both"): 1}, {("cold", "both"): 0}
    )
    wrong = report.Result(spoilt("spoilt"), WRONG, "it is", times=times)
    right = report.Result(variants.VARIANTS[0], OK, times=times)
    group = report.Group(1, case_of(*TWO), 1, [right, wrong])
    hidden = [row for row in report.rows(group) if row["variant"] == "spoilt"]
    assert all(row["median_ms"] is row["ratio_to_published_nchw"] is None for row in hidden)
    assert [row["median_ms"] for row in report.rows(group) if row["variant"] == BASELINE][0] == 1.0


def failing(name, error, **options):
    def build(match):
        def loss(students, teachers):
            raise error

        return loss

    return Variant(name, build, **options)


def test_what_cannot_run_is_a_row_and_a_failing_kernel_is_wrong(tmp_path, monkeypatch):
    with_variants(
        monkeypatch,
        failing("uncompiled", OSError("no Triton here\nand more"), compiled=True),
        failing("uncaptured-graph", RuntimeError("operation not permitted when stream is capturing"), graph=True),
        failing("too-large", torch.OutOfMemoryError("out of memory")),
        failing("broken", RuntimeError("launch failed")),
    )
    names = ("uncompiled", "uncaptured-graph", "too-large", "broken", "closed-form")
    assert runner.run(config(tmp_path, variants=names, compile=True), CpuDevice()) == 1
    found = {row["variant"]: row for row in read_rows(tmp_path)}
    statuses = {name: found[name]["status"] for name in names}
    assert statuses == dict.fromkeys(names[:3], UNAVAILABLE) | {"broken": WRONG, "closed-form": OK}
    assert found["uncompiled"]["reason"] == "OSError: no Triton here" and found["closed-form"]["median_ms"]


def test_a_device_that_fails_ends_the_run_and_what_was_measured_is_kept(tmp_path, capsys, monkeypatch):
    device = CpuDevice()

    def build(match):
        def loss(students, teachers):
            device.broken = students[0].dtype == torch.bfloat16
            if device.broken:
                raise RuntimeError("CUDA error: an illegal memory access was encountered")
            return reference.spectral_align_published(students[0], teachers[0], match)

        return loss

    with_variants(monkeypatch, Variant("crashing", build))
    options = {"variants": ("crashing",), "dtypes": ("float32", "bfloat16", "float16")}
    assert runner.run(config(tmp_path, **options), device) == 1
    assert "the device failed in crashing" in capsys.readouterr().err
    assert {row["dtype"] for row in read_rows(tmp_path)} == {"float32"}


def test_a_run_that_is_cut_off_leaves_what_it_had(tmp_path, capsys, monkeypatch):
    with_variants(monkeypatch)
    measure, seen = runner.measure, []

    def interrupted(number, case, *rest):
        if number == 2:
            seen.append(read_rows(tmp_path))  # there already, before anything ends the run in order
            raise KeyboardInterrupt
        return measure(number, case, *rest)

    monkeypatch.setattr(runner, "measure", interrupted)
    options = {"variants": ("closed-form",), "dtypes": ("float32", "bfloat16")}
    assert runner.run(config(tmp_path, **options), CpuDevice()) == 130
    assert "interrupted" in capsys.readouterr().err
    assert seen[0] and {row["dtype"] for row in read_rows(tmp_path)} == {"float32"}
    assert "1 configurations for want of time" in seen[0][0]["left_out"]


def test_no_configuration_begins_after_the_last_second(tmp_path, capsys, monkeypatch):
    with_variants(monkeypatch)
    options = {"variants": ("closed-form",), "dtypes": ("float32", "bfloat16"), "total_seconds": 1e-9}
    device = CpuDevice()
    ticks = iter(range(10**9))
    device.seconds = lambda: 0.0 if next(ticks) < 2 else time.perf_counter()
    assert runner.run(config(tmp_path, **options), device) == 0
    assert {row["dtype"] for row in read_rows(tmp_path)} == {"float32"}
    assert "left out: 1 configurations for want of time" in capsys.readouterr().out
    assert "left out: 1 configurations" in (tmp_path / "out" / "table.md").read_text()


def test_a_measurement_is_gone_on_with_and_never_overwritten(tmp_path, capsys, monkeypatch):
    with_variants(monkeypatch)
    assert runner.run(config(tmp_path, variants=("closed-form",)), CpuDevice()) == 0
    first = read_rows(tmp_path)
    assert runner.run(config(tmp_path, variants=("closed-form",)), CpuDevice()) == 2
    assert "holds a measurement already" in capsys.readouterr().err
    more = {"variants": ("closed-form",), "dtypes": ("float32", "bfloat16"), "add": True}
    assert runner.run(config(tmp_path, **more), CpuDevice()) == 0
    both = read_rows(tmp_path)
    assert both[: len(first)] == first and {row["dtype"] for row in both[len(first) :]} == {"bfloat16"}
    assert len(json.loads((tmp_path / "out" / "rows.json").read_text())["runs"]) == 2
    page = (tmp_path / "out" / "table.md").read_text()
    assert page.count("### 12<-20 6x5 B3") == 2
    (tmp_path / "out" / "table.md").unlink()
    assert report.main([str(tmp_path / "out")]) == 0 and (tmp_path / "out" / "table.md").read_text() == page
    assert runner.run(config(tmp_path, **more), CpuDevice()) == 0 and read_rows(tmp_path) == both  # nothing is missing
    (tmp_path / "out" / "rows.json").write_text("{}")
    assert runner.run(config(tmp_path, **more), CpuDevice()) == 2
    assert "holds no measurement on CUDA" in capsys.readouterr().err


def test_a_quick_run_is_one_small_configuration(tmp_path, monkeypatch):
    with_variants(monkeypatch)
    monkeypatch.setattr(workloads, "RECIPES", (workloads.Recipe("r", ((4, 8, 4, 4),) * 2, "tokens", "nchw"),))
    monkeypatch.setattr(workloads, "SINGLE", ())
    assert runner.run(config(tmp_path, shapes=(), quick=True, variants=("closed-form",)), CpuDevice()) == 0
    assert {(row["workload"], row["batch"]) for row in read_rows(tmp_path)} == {("r B16", "16")}


def test_an_expected_ratio_that_is_missed_fails(tmp_path, capsys, monkeypatch):
    with_variants(monkeypatch)
    assert runner.run(config(tmp_path, variants=("closed-form",), expect_ratio=8.0), CpuDevice()) == 1
    assert "no ratio, expected 8.0" in capsys.readouterr().err


def test_a_copied_tree_can_be_told_its_commit(tmp_path, monkeypatch):
    monkeypatch.setattr(runner.cpu.env, "git_commit", lambda: None)
    monkeypatch.setenv("SKD_COMMIT", "abc123")
    assert runner._conditions(config(tmp_path), CpuDevice())["commit"] == "abc123"


# --- Goals ---


def row(variant="skd-cuda", **changes):
    """A row that reaches every goal."""
    made = dict.fromkeys(report.ROW_FIELDS) | {
        "group": 1, "variant": variant, "cache": "cold", "phase": "both", "status": OK, "reason": "",
        "dtype": "float32", "workload": "w", "layout": "nchw",
        "layers": "192<-384 14x14 B128", "floor_bytes": 90_000_000, "student_bytes": 30_000_000, "median_ms": 0.03,
        "gb_per_s": 3000.0, "percent_of_copy": 91.0,
        "ratio_to_published_nchw": 8.5, "launches": 2, "extra_bytes": 30_500_000, "loss_relative_error": 1e-7,
        "gradient_relative_l2": 1e-7,
    }  # fmt: skip
    return made | changes


def judged(goal, *rows):
    return [v.status for v in goals.verdicts(rows) if v.goal == goal]


@pytest.mark.parametrize(
    ("goal", "changes", "status"),
    [
        ("bandwidth", {}, goals.REACHED),
        ("bandwidth", {"percent_of_copy": 89.9}, goals.MISSED),
        ("bandwidth", {"variant": "skd-triton", "percent_of_copy": 86.0}, goals.REACHED),
        ("bandwidth", {"variant": "skd-triton", "percent_of_copy": 84.0}, goals.MISSED),
        ("bandwidth", {"layers": "768<-768 7x7 B256", "percent_of_copy": 81.0}, goals.REACHED),
        ("bandwidth", {"layers": "96<-96 56x56 B9; 768<-768 7x7 B9", "percent_of_copy": 81.0}, goals.MISSED),
        ("bandwidth", {"percent_of_copy": None}, goals.UNKNOWN),
        ("published", {}, goals.REACHED),
        ("published", {"ratio_to_published_nchw": 7.9}, goals.MISSED),
        ("published", {"dtype": "bfloat16", "ratio_to_published_nchw": 13.9}, goals.MISSED),
        ("published", {"dtype": "bfloat16", "ratio_to_published_nchw": 14.0}, goals.REACHED),
        ("memory", {"extra_bytes": 31_500_000}, goals.MISSED),
        ("memory", {}, goals.REACHED),
        ("accuracy", {}, goals.REACHED),
        ("accuracy", {"gradient_relative_l2": 2e-6}, goals.MISSED),
        ("accuracy", {"loss_relative_error": 2e-6}, goals.MISSED),
        ("all", {"status": UNAVAILABLE, "reason": "no kernels", "median_ms": None}, goals.UNKNOWN),
        ("all", {"status": WRONG, "reason": "it is", "median_ms": None}, goals.UNKNOWN),
    ],
)
def test_a_goal_is_reached_missed_or_not_measured(goal, changes, status):
    assert judged(goal, row(**changes)) == [status]


def test_small_maps_are_held_against_the_floor_and_four_microseconds():
    copy = row(COPY, floor_bytes=300_000_000, gb_per_s=3000.0)
    small = {"floor_bytes": 15_000_000, "group": 2}  # 5 us at 3 TB/s
    forward = row(phase="forward", launches=1, group=2)
    assert judged("small", copy, row(median_ms=0.0089, **small), forward) == [goals.REACHED]
    assert judged("small", copy, row(median_ms=0.0091, **small), forward) == [goals.MISSED]
    assert judged("small", copy, row(median_ms=0.0089, **small), forward | {"launches": 2}) == [goals.MISSED]
    assert judged("small", copy, row(median_ms=0.0089, **small)) == [goals.UNKNOWN]
    assert judged("small", copy, row(median_ms=0.5, floor_bytes=20_000_000), forward) == []  # no goal in between


def test_the_compiled_closed_form_is_compared_within_its_group():
    compiled = row("closed-form-compile", median_ms=0.045)
    assert judged("compiled", row(), compiled) == [goals.REACHED]
    assert judged("compiled", row(), compiled | {"median_ms": 0.035}) == [goals.MISSED]
    assert judged("compiled", row(), compiled | {"group": 2}) == []


def test_verdicts_read_as_sentences_with_the_missed_ones_first():
    lines = goals.sentences(goals.verdicts([row(percent_of_copy=70.0)]))
    assert lines[0] == "bandwidth: 1 NOT REACHED"
    assert lines[4] == "NOT REACHED: skd-cuda, w, nchw, float32: 70.0% of the copy bandwidth (goal 90%)"
    assert all(line.startswith("reached: ") for line in lines[5:])
    assert goals.sentences([]) == ["no goal was measured: there are no rows of skd-cuda or skd-triton"]


# --- The device, as far as it goes without one ---


def test_kernels_of_a_trace_are_what_ran_on_the_device():
    events = [
        {"cat": "kernel", "name": "second", "ts": 2.0},
        {"cat": "cpu_op", "name": "aten::add", "ts": 0.0},
        {"cat": "cuda_runtime", "name": "cudaLaunchKernel", "ts": 0.5},
        {"cat": "gpu_memcpy", "name": "Memcpy DtoD", "ts": 3.0},
        {"cat": "gpu_memset", "name": "Memset", "ts": 1.0},
        {"cat": "gpu_user_annotation", "name": "step", "ts": 1.0},
        {"name": "process_name", "ts": 0.0},
    ]
    assert real.kernels_of_trace({"traceEvents": events}) == ["Memset", "second", "Memcpy DtoD"]
    assert real.kernels_of_trace({"traceEvents": events[1:3]}) == []
    with pytest.raises(ValueError, match="saw nothing of CUDA"):
        real.kernels_of_trace({"traceEvents": events[1:2]})


@pytest.fixture
def cuda_in_name_only(monkeypatch):
    """A CudaDevice whose tensors are on the CPU and whose calls into torch.cuda are noted."""
    calls = []

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            calls.append("record")

        def query(self):
            return True

        def synchronize(self):
            calls.append("event.synchronize")

        def elapsed_time(self, end):
            return 0.25

    class Graph:
        def replay(self):
            calls.append("replay")

    class Entered:
        def __init__(self, *arguments):
            calls.append("enter")

        def __enter__(self):
            return self

        def __exit__(self, *_):
            calls.append("exit")

        def wait_stream(self, other):
            calls.append("wait")

    properties = collections.namedtuple("P", "name major minor multi_processor_count total_memory L2_cache_size")
    device = object.__new__(real.CudaDevice)
    device.torch_device, device.l2_bytes = torch.device("cpu"), 4096
    device._properties = properties("Some GPU", 9, 0, 132, 2**36, 4096)
    device._lines, device._sink = torch.ones(4096), torch.empty(())
    peaks = iter([100, 175])
    stand_ins = {
        "Event": Event, "CUDAGraph": Graph, "Stream": Entered, "stream": Entered, "graph": Entered,
        "current_stream": Entered, "synchronize": lambda *_: calls.append("synchronize"),
        "_sleep": lambda cycles: calls.append(("sleep", cycles)), "empty_cache": lambda: calls.append("empty_cache"),
        "reset_peak_memory_stats": lambda *_: calls.append("reset"), "memory_allocated": lambda *_: next(peaks),
        "max_memory_allocated": lambda *_: next(peaks),
    }  # fmt: skip
    for name, stand_in in stand_ins.items():
        monkeypatch.setattr(torch.cuda, name, stand_in)
    return device, calls


def test_the_calls_into_cuda_are_in_order(cuda_in_name_only):
    device, calls = cuda_in_name_only
    start = device.mark()
    device.hold(1.5)
    assert device.passed(start) and device.milliseconds(start, device.mark()) == 0.25
    assert calls == ["record", ("sleep", 3_000_000), "record", "event.synchronize"]
    device.flush_cache()
    assert device._sink == 4096
    assert device.peak_extra_bytes(lambda: torch.ones(3)) == 75
    calls.clear()
    steps = []
    replay, results = device.capture(lambda: steps.append(len(steps)) or len(steps))
    assert steps == [0, 1, 2] and results == 3  # warmed up twice on another stream, then captured once
    replay()
    assert calls[-1] == "replay"
    device.poison(64)
    device.release()
    facts = device.conditions()
    assert facts["device"] == "Some GPU" and facts["compute_capability"] == "9.0" and "spin kernel" in facts["queue"]


@pytest.mark.filterwarnings("ignore:CUDA is not available")
@pytest.mark.skipif(torch.cuda.is_available(), reason="the profiler sees this GPU")
def test_launches_are_unknown_where_the_profiler_sees_no_device(cuda_in_name_only):
    assert cuda_in_name_only[0].kernels(lambda: torch.ones(3)) is None


def test_nvidia_smi_may_be_missing_or_broken(tmp_path, monkeypatch):
    tool = tmp_path / "nvidia-smi"
    monkeypatch.setenv("PATH", str(tmp_path))
    assert real.smi("driver_version") is None
    tool.write_text("#!/bin/sh\necho 580.1\necho 580.1\n")
    tool.chmod(0o755)
    assert real.smi("driver_version") == "580.1"
    tool.write_text("#!/bin/sh\nexit 9\n")
    assert real.smi("driver_version") is None


def test_a_failed_device_has_a_sentence():
    failed = real.Failed("skd-cuda")
    assert "the device failed in skd-cuda" in str(failed)
    with pytest.raises(real.Failed):
        raise failed


# --- With a GPU ---

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.mark.gpu
@needs_gpu
def test_a_gpu_is_held_counted_and_captured():
    device = real.open_device()
    x = torch.ones(2**20, device=device.torch_device)
    device.synchronize()
    start = device.mark()
    device.hold(20.0)
    end = device.mark()
    assert not device.passed(end)
    assert 5 < device.milliseconds(start, end) < 1000  # in clock cycles: longer on a clock that is idle
    assert device.peak_extra_bytes(lambda: x + 1) == 4 * 2**20
    replay, result = device.capture(lambda: x + 1)
    result.fill_(torch.nan)
    replay()
    device.synchronize()
    assert torch.equal(result, x + 1)
    device.flush_cache()
    device.poison(2**24)
    names = device.kernels(lambda: x + 1)
    assert names is None or len(names) == 1, names


@pytest.mark.gpu
@needs_gpu
def test_a_measurement_on_a_gpu(tmp_path):
    ours = [name for name in ("cuda", "triton") if runner.backends.backends()[name] is True]
    names = tuple(f"skd-{name}{graph}" for name in ours for graph in ("", "-graph"))
    options = {"shapes": ("192<-384 14x14 B2",), "variants": names or ("closed-form",)}
    assert bench.run(config(tmp_path, **options)) == 0
    found = {(row["variant"], row["cache"], row["phase"]): row for row in read_rows(tmp_path)}
    for name in (BASELINE, COPY, *names):
        row = found[name, "cold", "both"]
        assert row["status"] == OK and float(row["median_ms"]) > 0, (name, row["reason"])
