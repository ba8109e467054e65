"""skd bench: a figure only for a right result, memory and floors that are counted right, files that are complete."""

import csv
import gc
import importlib.util
import json
import os
import platform
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from skd import bench, reference
from skd.bench import correctness, memory, report, runner, tables, timing
from skd.bench import spectral_align as measured
from skd.bench.case import COPY, Variant, select_from
from skd.bench.maps import Shape, select_shapes
from skd.bench.pairs import BASELINE, PairCase, PairRun
from skd.ops import backends

ROOT = Path(__file__).resolve().parent.parent
# Small, with pooling that is no integer ratio, and large enough that a loss and its gradient take measurable time.
SMALL = "12<-20 6x5 B3"


def config(tmp_path, **options):
    """A measurement of a second or two that leaves malloc alone."""
    given = {"shapes": (SMALL,), "threads": (1,), "rounds": 2, "compile": False, "allocator": "default"}
    return bench.BenchConfig(**(given | {"out": tmp_path / "out"} | options))


def read_rows(tmp_path):
    with open(tmp_path / "out" / "rows.csv", newline="") as file:
        return list(csv.DictReader(file))


# --- What is measured ---


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"device": "tpu"}, "device='tpu' is not known"),
        ({"batches": (64, 0)}, "batches="),
        ({"add": True}, "with device 'cuda' and out"),
        ({"rounds": 0}, "rounds=0"),
        ({"threads": (2, 0)}, "threads="),
        ({"upstream": 0.0}, "upstream=0"),
        ({"layouts": ()}, "layouts is empty"),
        ({"shapes": ("13x14",)}, "'13x14' is part of no default shape"),
        ({"shapes": ("0<-4 2x2 B1",)}, "positive numbers"),
        ({"variants": ("skd-gpu",)}, "'skd-gpu' is not known"),
    ],
)
def test_a_configuration_that_cannot_be_meant_ends_with_one_sentence(options, sentence, tmp_path, capsys):
    assert bench.run(config(tmp_path, **options)) == 2
    error = capsys.readouterr().err
    assert sentence in error and error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_shapes_are_chosen_by_part_of_their_name_or_spelt_out():
    assert [s.name for s in select_shapes(("56x56",), measured.SHAPES)] == ["96<-96 56x56 B32"]
    assert select_shapes(("B64", "7x7"), measured.SHAPES) == [measured.SHAPES[0], measured.SHAPES[2]]
    assert select_shapes(("5<-3 2x9 B4",), measured.SHAPES) == [Shape(5, 3, 2, 9, 4)]
    assert select_shapes((), measured.SHAPES) == list(measured.SHAPES)


def test_baseline_and_floor_stay_whatever_is_chosen():
    def select(names, compile):
        return select_from(measured.VARIANTS, measured.ALWAYS, names, compile, "not known")

    assert [v.name for v in select(("closed-form",), True)] == [BASELINE, "closed-form", COPY]
    assert not any(v.compiled for v in select((), False))


def test_floor_counts_each_map_once():
    case = PairCase(Shape(192, 384, 14, 14, 64), "nchw", "float32")
    student, teacher = 64 * 192 * 196 * 4, 64 * 384 * 196 * 4
    assert case.floor_bytes("forward") == student + teacher
    assert case.floor_bytes("backward") == student
    assert case.floor_bytes("both") == 2 * student + teacher
    assert PairCase(case.shape, "nchw", "bfloat16").floor_bytes("both") == (2 * student + teacher) // 2


def test_copy_moves_the_floor():
    case = PairCase(Shape(12, 20, 6, 5, 3), "nchw", "float32", upstream=0.2)
    run = PairRun(next(v for v in measured.VARIANTS if v.name == COPY), case, case.make_inputs())
    copied = run.forward()
    assert 2 * copied.nbytes == case.floor_bytes("both")
    assert copied.data_ptr() != run.forward().data_ptr()


@pytest.mark.parametrize("layout", ["tokens<-nchw", "nchw<-tokens"])
def test_student_and_teacher_may_differ_in_memory_order(layout):
    student, teacher = layout.split("<-")
    shape = Shape(12, 20, 6, 5, 3)
    mixed = PairCase(shape, layout, "float32").make_inputs()
    of = {order: PairCase(shape, order, "float32").make_inputs() for order in (student, teacher)}
    assert mixed.student.stride() == of[student].student.stride()
    assert mixed.teacher.stride() == of[teacher].teacher.stride()
    assert mixed.student_nchw.is_contiguous() and torch.equal(mixed.student, mixed.student_nchw)
    assert mixed.teacher_nchw.is_contiguous() and torch.equal(mixed.teacher, mixed.teacher_nchw)


def test_token_maps_are_views_behind_a_class_token():
    shape = Shape(12, 20, 6, 5, 3)
    tokens = PairCase(shape, "tokens", "float32").make_inputs()
    nchw = PairCase(shape, "nchw", "float32").make_inputs()
    assert tokens.student.stride() == (12 * 31, 1, 12 * 5, 12) and tokens.student.storage_offset() == 12
    assert tokens.teacher.stride() == (20 * 30, 1, 20 * 5, 20)
    assert nchw.student.is_contiguous() and tokens.student_nchw.is_contiguous()
    assert torch.equal(tokens.student, nchw.student) and torch.equal(tokens.teacher, nchw.teacher)
    assert tokens.student.is_leaf and tokens.student.requires_grad and not tokens.teacher.requires_grad


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("layout", ["nchw", "tokens"])
@pytest.mark.parametrize("match", ["complex", "mse"])
def test_every_implementation_is_right_on_its_own_terms(layout, dtype, match):
    case = PairCase(Shape(12, 20, 6, 5, 3), layout, dtype, match)
    maps = case.make_inputs()
    expected = case.truth(maps)
    for variant in measured.VARIANTS:
        if variant.compiled or variant.name == COPY:
            continue
        result = runner.examine(PairRun(variant, case, maps), expected, case)
        if variant.backend == "cpu" and backends.backends()["cpu"] is not True:
            assert result.status == report.UNAVAILABLE and result.reason
        else:
            assert (result.status, result.reason) == (report.OK, "")


# --- Correctness ---


@pytest.fixture(scope="module")
def expected():
    case = PairCase(Shape(12, 20, 6, 5, 3), "nchw", "float32", upstream=0.2)
    return case.truth(case.make_inputs())


def test_truth_is_the_closed_form_too(expected):
    case = PairCase(Shape(12, 20, 6, 5, 3), "nchw", "float32", upstream=0.2)
    maps = case.make_inputs()
    student = maps.student.detach().double().requires_grad_()
    loss = reference.spectral_align_closed_form(student, maps.teacher.double())
    (gradient,) = torch.autograd.grad(loss * case.upstream, student)
    errors = correctness.compare(expected, loss, gradient)
    assert errors.loss < 1e-14 and errors.gradient < 1e-7  # upstream is 0.2 rounded to float32 there


@pytest.mark.parametrize(
    ("spoil", "sentence"),
    [
        (lambda loss, g: (loss * (1 + 3e-5), g), "the loss deviates"),
        (lambda loss, g: (loss, g * (1 + 3e-5)), "the gradient deviates"),
        (lambda loss, g: (loss, g / 0.2), "the gradient deviates"),  # upstream forgotten
        (lambda loss, g: (loss, -g), "the gradient deviates"),
        (lambda loss, g: (loss, g.roll(1, -1)), "the gradient deviates"),
        (lambda loss, g: (loss, g.index_fill(0, torch.tensor([2]), torch.nan)), "the gradient deviates"),
        (lambda loss, g: (loss * torch.nan, g), "the loss deviates"),
        (lambda loss, g: (loss, g[:, :-1]), "the loss deviates"),
    ],
)
def test_a_spoilt_result_is_found_out(expected, spoil, sentence):
    right = torch.tensor(expected.loss, dtype=torch.float64), expected.gradient
    assert correctness.compare(expected, *right).verdict("float32") == ""
    assert sentence in correctness.compare(expected, *spoil(*right)).verdict("float32")


def test_a_bias_below_the_l2_tolerance_is_still_found_out(expected):
    # Every element a little too large: small in L2 where a few elements dominate, yet training would drift.
    gradient = expected.gradient.clone()
    gradient.view(-1)[0] = 1e9 * gradient.abs().sum()
    expected = correctness.Truth(expected.loss, gradient)
    moved = gradient + 1e-8 * gradient.abs().max()
    errors = correctness.compare(expected, torch.tensor(expected.loss), moved)
    assert errors.gradient < 1e-5 < 1e-5 * gradient.numel()
    assert errors.bias == pytest.approx(1e-8 * gradient.numel(), rel=1e-3)


# --- Memory ---


def known_peak():
    a = torch.empty(1 << 20, dtype=torch.uint8)
    b = torch.empty(2 << 20, dtype=torch.uint8)  # the peak: 3 MiB are held
    del a
    return b, torch.empty(1 << 19, dtype=torch.uint8)


def test_peak_of_a_known_case():
    kept = torch.ones(1 << 20)
    counts = {memory.peak_tensor_bytes(known_peak) for _ in range(3)}
    assert counts == {3 << 20}
    assert kept.sum() == 1 << 20


def test_peak_sees_tensors_inside_an_operator():
    @torch.library.custom_op("skd_test::scratch", mutates_args=())
    def scratch(x: torch.Tensor) -> torch.Tensor:
        buffer = torch.empty(3 << 20, dtype=torch.uint8)
        return x + buffer.numel()

    x = torch.ones(4)
    scratch(x)
    assert 3 << 20 <= memory.peak_tensor_bytes(lambda: scratch(x)) < (3 << 20) + 1024


@pytest.mark.skipif(sys.platform != "linux", reason="resident memory is read from /proc")
def test_resident_peak_sees_what_torch_does_not_allocate():
    np = pytest.importorskip("numpy")
    hidden = 64 << 20

    def step():
        np.ones(hidden, dtype=np.uint8)

    step()
    resident = memory.peak_resident_bytes(step)
    if resident is None:
        pytest.skip("this system does not let a process reset its resident peak")
    assert memory.peak_tensor_bytes(step) == 0
    assert hidden * 0.95 < resident < hidden * 1.5


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc's malloc can be told to keep freed memory")
def test_recycled_memory_costs_no_page_faults():
    program = """
import sys, torch
from skd.bench import memory
torch.set_num_threads(1)
if sys.argv[1] == "recycle":
    assert "used again" in memory.recycle_freed_memory()
    memory.prefault(1 << 28)
before = memory.page_faults()
for _ in range(3):
    torch.ones(1 << 24)
print(memory.page_faults() - before)
"""
    counts = {}
    for mode in ("recycle", "default"):
        command = [sys.executable, "-c", program, mode]
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=True, timeout=120)
        counts[mode] = int(done.stdout)
    # 3 x 64 MiB are 49152 pages of 4 KiB, or 96 of 2 MiB where the system hands out those.
    assert 10 * counts["recycle"] < counts["default"]


# --- Timing ---


class Sleeper:
    """A run of known duration that notes when it was called."""

    def __init__(self, name, log, forward=0.0, backward=0.0):
        self.name, self.log, self.durations = name, log, (forward, backward)

    def forward(self):
        assert not gc.isenabled()
        self.log.append(self.name)
        time.sleep(self.durations[0])
        return torch.ones(())

    def backward(self, loss):
        time.sleep(self.durations[1])
        return loss


def test_rounds_are_interleaved_in_changing_order():
    log, flushed, seen = [], [], []
    runs = {name: Sleeper(name, log) for name in "abcd"}
    times = timing.interleaved(
        runs, 8, 60.0, seed=1, before_each=lambda: flushed.append(len(log)), after_round=seen.append
    )
    warm_up, rounds = log[:4], [log[4 * i : 4 * i + 4] for i in range(1, 9)]
    assert warm_up == list("abcd") and all(sorted(r) == list("abcd") for r in rounds)
    assert len({tuple(r) for r in rounds}) > 2
    assert all(len(times[name].samples[phase]) == 8 for name in "abcd" for phase in timing.PHASES)
    assert len(flushed) == 32 and seen == list(range(1, 9)) and gc.isenabled()


def test_time_goes_to_the_phase_that_took_it():
    times = timing.interleaved({"x": Sleeper("x", [], forward=0.004, backward=0.02)}, 3, 60.0)["x"]
    forward, backward, both = (times.summary(phase).median for phase in timing.PHASES)
    assert 4 <= forward < backward and backward >= 20
    for f, b, t in zip(*(times.samples[phase] for phase in timing.PHASES), strict=True):
        assert t == pytest.approx(f + b)


def test_seconds_end_the_rounds_but_not_before_the_least():
    log = []
    timing.interleaved({"x": Sleeper("x", log, forward=0.002)}, 1000, 0.0)
    assert len(log) == 1 + timing.LEAST_ROUNDS


def test_summary_is_median_and_outer_fifths():
    summary = timing.Summary.of([5.0, 1.0, 2.0, 4.0, 3.0, 100.0])
    assert (summary.median, summary.p20, summary.p80) == (3.5, 2.0, 5.0)
    assert timing.Summary.of([7.0]) == timing.Summary(7.0, 7.0, 7.0)


def test_median_ratio_pairs_the_rounds():
    assert timing.median_ratio([10.0, 40.0, 90.0], [1.0, 2.0, 3.0]) == 20.0


# --- The whole ---


def test_a_measurement_leaves_complete_rows(tmp_path, capsys):
    assert bench.run(config(tmp_path, threads=(1, 2))) == 0
    out = capsys.readouterr().out
    found = read_rows(tmp_path)
    # tokens: 5 implementations x 3 phases + the copy; nchw: one less, since published is the baseline there.
    assert len(found) == 2 * (5 * 3 + 1 + 4 * 3 + 1)
    for row in found:
        if row["status"] == report.UNAVAILABLE:
            assert row["variant"] == "skd-cpu" and row["reason"] and not row["median_ms"]
            continue
        assert row["status"] == report.OK and int(row["rounds"]) == 2
        assert 0 < float(row["p20_ms"]) <= float(row["median_ms"]) <= float(row["p80_ms"])
        rate = int(row["floor_bytes"]) / float(row["median_ms"]) / 1e6
        assert float(row["gb_per_s"]) == pytest.approx(rate)
        assert row["cpu"] and row["torch"] == torch.__version__ and row["date"] and row["skd_instruction_set"]
        if row["variant"] != COPY:
            assert float(row["gradient_relative_l2"]) < 1e-6 and int(row["extra_bytes"]) >= 12 * 30 * 3 * 4
    both = {(r["layout"], r["threads"], r["variant"]): r for r in found if r["phase"] == "both"}
    for (layout, threads, name), row in both.items():
        base, copy = both[layout, threads, BASELINE], both[layout, threads, COPY]
        if name != COPY and row["status"] == report.OK:
            ratio = float(base["median_ms"]) / float(row["median_ms"])
            assert float(row["ratio_to_baseline"]) == pytest.approx(ratio)
            assert float(row["times_floor"]) == pytest.approx(float(row["median_ms"]) / float(copy["median_ms"]))
    document = json.loads((tmp_path / "out" / "rows.json").read_text())
    assert len(document["rows"]) == len(found) and document["conditions"]["upstream_gradient"] == 1.0
    assert all(len(v) == 2 for s in document["samples"] for v in s["milliseconds"].values())
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["rows.csv", "rows.json"]
    for title in ("tokens, float32, complex, 1 thread;", "nchw, float32, complex, 2 threads;", "geometric mean"):
        assert title in out


def test_an_earlier_measurement_is_never_overwritten(tmp_path, capsys, monkeypatch):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "rows.csv").write_text("kept")
    assert bench.run(config(tmp_path)) == 2
    assert "holds a measurement already" in capsys.readouterr().err
    assert (tmp_path / "out" / "rows.csv").read_text() == "kept"
    monkeypatch.chdir(tmp_path)
    first = runner.new_folder(None)
    first.mkdir(parents=True)
    assert runner.new_folder(None) != first


def with_variants(monkeypatch, *more, replace=()):
    kept = [v for v in measured.VARIANTS if v.name not in replace]
    monkeypatch.setattr(measured, "VARIANTS", (*more, *kept))


def spoilt(name, **options):
    """The published form with one per cent too much gradient."""

    def build(match):
        def loss(student, teacher):
            right = reference.spectral_align_published(student, teacher, match)
            return right.detach() + 1.01 * (right - right.detach())

        return loss

    return Variant(name, build, **options)


def test_a_wrong_result_gets_no_time_and_no_ratio(tmp_path, capsys, monkeypatch):
    with_variants(monkeypatch, spoilt("spoilt"))
    assert bench.run(config(tmp_path, variants=("spoilt", "closed-form"), layouts=("nchw",))) == 1
    wrong = [row for row in read_rows(tmp_path) if row["variant"] == "spoilt"]
    assert len(wrong) == 3
    for row in wrong:
        assert row["status"] == report.WRONG and "1.0e-02" in row["reason"]
        for empty in ("median_ms", "p20_ms", "gb_per_s", "ratio_to_baseline", "times_floor", "rounds"):
            assert row[empty] == ""
    out = capsys.readouterr().out
    (line,) = [line for line in out.splitlines() if line.startswith("spoilt")]
    assert "WRONG: the gradient deviates" in line and "ms" not in line
    samples = json.loads((tmp_path / "out" / "rows.json").read_text())["samples"]
    assert {s["variant"] for s in samples} == {BASELINE, "closed-form", COPY}


def test_a_wrong_baseline_leaves_no_ratio_at_all(tmp_path, monkeypatch):
    with_variants(monkeypatch, spoilt(BASELINE, nchw=True), replace=(BASELINE,))
    assert bench.run(config(tmp_path, variants=("closed-form",), layouts=("nchw",))) == 1
    found = read_rows(tmp_path)
    assert all(row["ratio_to_baseline"] == "" for row in found)
    assert any(row["variant"] == "closed-form" and row["median_ms"] for row in found)


def test_times_of_a_wrong_result_stay_hidden_even_if_there_are_some():
    times = timing.Times({phase: [1.0, 2.0] for phase in timing.PHASES}, [0, 0])
    wrong = report.Result(Variant("spoilt", None), report.WRONG, "it is", times=times)
    right = report.Result(Variant(BASELINE, None), report.OK, times=times)
    group = report.Group(PairCase(Shape(1, 1, 1, 1, 1), "nchw", "float32"), 1, [right, wrong])
    assert group.ratio("spoilt", "both") is None and group.ratio(BASELINE, "both") == 1.0
    hidden = [row for row in report.rows(group) if row["variant"] == "spoilt"]
    assert len(hidden) == 3 and all(row["median_ms"] is row["ratio_to_baseline"] is None for row in hidden)


def failing(name, **options):
    def build(match):
        def loss(student, teacher):
            raise OSError("no C++ compiler here\nand a second line")

        return loss

    return Variant(name, build, **options)


def test_a_missing_compiler_is_a_row_and_a_failing_kernel_is_wrong(tmp_path, capsys, monkeypatch):
    with_variants(monkeypatch, failing("needs-compiler", compiled=True))
    options = {"variants": ("needs-compiler", "closed-form"), "layouts": ("nchw",), "compile": True}
    assert bench.run(config(tmp_path, **options)) == 0
    (row, *_) = [row for row in read_rows(tmp_path) if row["variant"] == "needs-compiler"]
    assert row["status"] == report.UNAVAILABLE and row["reason"] == "OSError: no C++ compiler here"
    assert "unavailable: OSError: no C++ compiler here" in capsys.readouterr().out
    with_variants(monkeypatch, failing("broken"))
    options = {"variants": ("broken",), "layouts": ("nchw",), "out": tmp_path / "second"}
    assert bench.run(config(tmp_path, **options)) == 1


def test_compiled_forms_are_measured(tmp_path):
    options = {"variants": ("closed-form-compile",), "layouts": ("tokens",), "compile": True}
    assert bench.run(config(tmp_path, **options)) == 0
    (row,) = [r for r in read_rows(tmp_path) if r["variant"] == "closed-form-compile" and r["phase"] == "both"]
    if row["status"] == report.UNAVAILABLE:
        pytest.skip(f"torch.compile does not work here: {row['reason']}")
    assert float(row["median_ms"]) > 0 and float(row["gradient_relative_l2"]) < 1e-6


def test_ctrl_c_leaves_nothing_behind(tmp_path, capsys, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    before = torch.get_num_threads()
    monkeypatch.setattr(runner, "measure", interrupted)
    assert bench.run(config(tmp_path, threads=(before + 1,))) == 130
    assert "nothing was written" in capsys.readouterr().err
    assert not (tmp_path / "out").exists() and torch.get_num_threads() == before


def test_a_ratio_that_is_expected_and_missed_fails(tmp_path, capsys):
    assert bench.run(config(tmp_path, layouts=("nchw",), expect_ratio=1e9)) == 1
    assert "expected 1000000000.0" in capsys.readouterr().err


def test_cold_caches(tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(timing.CacheFlush, "__call__", lambda self: calls.append(self._memory.nbytes))
    assert bench.run(config(tmp_path, cache="cold", variants=("closed-form",), layouts=("nchw",))) == 0
    assert len(calls) == 2 * 3 and min(calls) >= 2 * (runner.env.last_level_cache_bytes() or 2**25)


def test_plain_text_without_rich(tmp_path, capsys, monkeypatch):
    for name in ("rich", "rich.console", "rich.table"):
        monkeypatch.setitem(sys.modules, name, None)
    assert bench.run(config(tmp_path, variants=("closed-form",), layouts=("nchw",))) == 0
    assert "implementation" in capsys.readouterr().out


def test_plain_columns_line_up():
    text = tables.plain_table("title", ("name", "a", "b"), [["x", "1", "22"], ["long", "WRONG: " + "y" * 30, ""]])
    assert text.splitlines() == ["title", "name  a   b", "x     1  22", "long  WRONG: " + "y" * 30]


def test_importing_the_configuration_loads_no_torch():
    program = "import sys, skd.bench; skd.bench.BenchConfig().check(); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], cwd=ROOT, timeout=60).returncode == 0


@pytest.mark.skipif(importlib.util.find_spec("pytest_benchmark") is None, reason="pytest-benchmark is not installed")
def test_the_same_measurements_run_under_pytest_benchmark(tmp_path):
    names = ("spectral_align", "fourier_align", "spectral_intensity")
    paths = [ROOT / "benchmarks" / f"bench_{name}.py" for name in names]
    if not paths[0].is_file():
        pytest.skip("this is not a source tree: it has no benchmarks/")
    saved = tmp_path / "saved.json"
    aligned = "spectral_align and both and (copy or closed-form)"
    transformed = "fourier_align and log_magnitude and both and copy"
    intensities = "intensity and channel and (read or eager-nchw)"
    chosen = f"7x7 and tokens and not compile and ({aligned} or {transformed} or {intensities})"
    options = ["--benchmark-only", "-q", "-k", chosen, "-p", "no:cacheprovider", f"--benchmark-json={saved}"]
    command = [sys.executable, "-m", "pytest", *map(str, paths), *options]
    # pytest-benchmark would take the command for one of the processes that share these tests.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_XDIST")}
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=300, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    entries = json.loads(saved.read_text())["benchmarks"]
    floors = [entry["extra_info"]["floor_bytes"] for entry in entries]
    assert sorted(floors) == sorted([3 * 64 * 768 * 49 * 4] * 2 + [3 * 32 * 768 * 49 * 4] + [32 * 768 * 49 * 4] * 2)
    for floor, entry in zip(floors, entries, strict=True):
        assert entry["extra_info"]["gb_per_s"] == pytest.approx(floor / entry["stats"]["median"] / 1e9)
