"""The CUDA kernels without a GPU: the same sources compiled by the C++ compiler against tests/cuda_on_cpu.

Fibers run the whole matrix of cases, with shared memory full of NaN for every block, the threads of a block in a new
order between barriers, and every address checked for its alignment; real threads under ThreadSanitizer run a few tiles,
and a kernel with a barrier removed must not get past it.
"""

import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
CXX = os.environ.get("CXX") or shutil.which("g++") or shutil.which("c++")
FLAGS = ["-std=c++17", "-fPIC", "-Wno-unknown-pragmas", "-DSKD_CUDA_ON_CPU", f"-I{ROOT / 'tests/cuda_on_cpu'}"]
LIMITS = {**os.environ, "OMP_NUM_THREADS": "1"}

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CXX is None, reason="needs a C++ compiler"),
    pytest.mark.skipif(platform.system() != "Linux", reason="the fibers are made with Linux's ucontext"),
]


def build(folder: Path, sources: list[Path], target: Path, flags: list[str], link: list[str]) -> None:
    """Compiles C++ and CUDA sources as C++ and links them."""

    def compile_(source: Path) -> Path:
        out = folder / f"{target.stem}-{source.name}.o"
        command = [CXX, *FLAGS, *flags, f"-I{ROOT / 'csrc'}", "-x", "c++", "-c", source, "-o", out]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return out

    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(compile_, sources))
    subprocess.run([CXX, *objects, *link, "-pthread", "-o", target], check=True)


@pytest.fixture(scope="module")
def extension(tmp_path_factory):
    """skd._cuda for the CPU."""
    import pybind11

    folder = tmp_path_factory.mktemp("cuda_on_cpu")
    target = folder / f"_cuda{sysconfig.get_config_var('EXT_SUFFIX')}"
    sources = sorted([*ROOT.glob("csrc/cuda/*.cpp"), *ROOT.glob("csrc/cuda/*.cu")])
    includes = [f"-I{pybind11.get_include()}", f"-I{sysconfig.get_path('include')}"]
    aligned = ["-fsanitize=alignment", "-fno-sanitize-recover=alignment"]
    build(folder, sources, target, ["-O1", "-fvisibility=hidden", *aligned, *includes], ["-shared"])
    return target


def run_tests(extension: Path, selection: str, operation: str = "spectral_align") -> int:
    """The number of an operation's tests that passed, in a process of their own; none may fail."""
    # The last words of a kernel that ends the program: nothing is to capture them or to put a traceback below them.
    plain = ["-p", "no:cacheprovider", "-p", "no:faulthandler", "--capture=sys"]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", *plain, f"tests/test_{operation}.py", "-k", selection],
        cwd=ROOT,
        env={**LIMITS, "SKD_TEST_CUDA_EXTENSION": str(extension), "SKD_TEST_KERNELS": "cuda"},
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    return int(re.search(r"(\d+) passed", done.stdout)[1])


def test_the_matrix_of_cases(extension):
    assert run_tests(extension, "test_loss_and_gradient_are_those_of_float64") > 800


def test_the_contract_of_the_operation(extension):
    assert run_tests(extension, "not test_loss_and_gradient_are_those_of_float64") > 90


@pytest.mark.parametrize("operation", ["fourier_align", "spectral_intensity"])
def test_the_contract_of_the_operations_with_transforms(extension, operation):
    slow = "test_every_combination or test_loss_and_gradient or test_intensity_is"
    assert run_tests(extension, f"not ({slow})", operation) > 45


def test_the_matrix_of_cases_with_transforms(extension):
    """All cases with one match, and some with every combination of options."""
    both = "test_loss_and_gradient_are_those_of_float64 and not log_magnitude"
    some = "test_every_combination and (focal or spectra) and (7x7 or 300x1 or 5x9 or 16x32 or 30x17)"
    assert run_tests(extension, f"({both}) or ({some})", "fourier_align") > 400
    assert run_tests(extension, "test_intensity_is_that_of_float64", "spectral_intensity") > 270


# --- Plans and launches ---

PRELUDE = """
import sys, importlib.util, torch
spec = importlib.util.spec_from_file_location("skd._cuda", sys.argv[1])
cuda = importlib.util.module_from_spec(spec)
spec.loader.exec_module(cuda)
sys.path.insert(0, "tests")
from cases import Case, F32, BF16, F16
from skd.ops.extensions import map_of
def plan_of(maps):
    layers = [cuda.AlignLayer(map_of(cuda, s), map_of(cuda, t), map_of(cuda, g), 1.0, 1.0, 1.0) for s, t, g in maps]
    return cuda.AlignPlan(layers, True)
def maps_of(*cases):
    return [(s, t, torch.empty_like(s)) for s, t in (case.make() for case in cases)]
def plan(*cases):
    return plan_of(maps_of(*cases))
"""


def run_script(extension: Path, text: str) -> None:
    command = [sys.executable, "-c", PRELUDE + text, extension]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_usual_maps_take_the_path_through_shared_memory(extension):
    run_script(
        extension,
        """
for dtype in (F32, BF16, F16):
    for student, teacher in ((192, 384), (192, 192), (192, 768), (96, 96), (768, 768), (384, 384)):
        for height in (7, 14, 28, 56):
            for orders in (("nchw", "nchw"), ("tokens", "tokens"), ("tokens", "nchw"), ("nchw", "tokens")):
                case = Case(1, student, teacher, height, height, *orders, dtype, dtype)
                assert plan(case).paths == ["tile"], case
for orders in (("sliced", "nchw"), ("nchw", "expanded"), ("transposed", "tokens")):
    assert plan(Case(1, 16, 16, 7, 7, *orders)).paths == ["direct"], orders
assert plan(Case(1, 32, 16, 7, 7)).paths == ["direct"]
for dtype in (F32, BF16, F16):  # the layers whose launches tests/test_gpu_costs.py counts
    assert plan(Case(4, 24, 48, 9, 5, "nchw", "tokens", dtype, dtype)).paths == ["tile"]
assert plan(*[Case(1, 16, 16, 7, 7)] * 16).launches == 1
assert plan(*[Case(1, 16, 16, 7, 7)] * 17).launches == 2
assert plan(Case(1, 16, 16, 7, 7), Case(1, 8, 8, 4, 4, student_dtype=F16)).launches == 2
""",
    )


def test_paths_are_in_the_order_of_the_layers(extension):
    """Though launches take layers of one path and pair of dtypes together."""
    run_script(
        extension,
        """
tile, other, direct = Case(1, 16, 16, 7, 7), Case(1, 16, 16, 7, 7, student_dtype=F16), Case(1, 16, 16, 7, 7, "sliced")
mixed = plan(direct, tile, other, direct, tile, direct, other)
assert mixed.launches == 3 and mixed.paths == ["direct", "tile", "tile", "direct", "tile", "direct", "tile"]
assert plan().paths == []
""",
    )


def test_the_usual_maps_are_transformed_in_the_tile_path(extension):
    run_script(
        extension,
        """
def fourier(case):
    s, t = case.make()
    given = [map_of(cuda, x) for x in (s, t, torch.empty_like(s))]
    return cuda.FourierPlan([cuda.FourierLayer(*given, 0, 0, 1, 0.0, 1.0, 1.0, 1.0)]).paths[0]

for dtype in (F32, BF16, F16):
    for student, teacher in ((192, 384), (192, 192), (192, 768), (96, 96), (768, 768)):
        for size in (4, 7, 8, 14, 16, 28, 32):
            for orders in (("nchw", "nchw"), ("tokens", "tokens"), ("tokens", "nchw"), ("nchw", "tokens")):
                case = Case(1, student, teacher, size, size, *orders, dtype, dtype)
                assert fourier(case) == "tile", case
    assert fourier(Case(1, 96, 192, 56, 56, student_dtype=dtype, teacher_dtype=dtype)) == "tile"
for case in (Case(1, 16, 16, 7, 7, "sliced"), Case(1, 32, 16, 7, 7), Case(1, 16, 16, 9, 9), Case(1, 16, 16, 14, 28)):
    assert fourier(case) == "general", case

def intensity(order, *shape):
    x = getattr(__import__("cases"), order)(*shape)
    return cuda.IntensityPlan(map_of(cuda, x), 0, 1.0, 0).path

for order in ("nchw", "tokens"):
    assert intensity(order, 1, 384, 14, 14) == "pieces"
assert intensity("nchw", 1, 384, 7, 7) == "numbers"
assert intensity("tokens", 1, 768, 7, 7) == "pieces"
assert intensity("tokens", 1, 4096, 2, 2) == "pieces"
assert intensity("tokens", 1, 8192, 2, 2) == "global"
""",
    )


def test_a_launch_without_a_ticket_of_its_stream_counts_in_its_workspace(extension):
    """In a graph's capture, on the stream of each thread, and on streams beyond those that have tickets."""
    run_script(
        extension,
        """
maps = maps_of(Case(2, 64, 96, 14, 14), Case(2, 16, 16, 7, 7, "sliced"), Case(3, 32, 64, 7, 7, student_dtype=F16))
mixed = plan_of(maps)
assert mixed.launches == 3

def launch(plan, stream):
    workspace = torch.full((8 * plan.workspace_doubles,), 0xff, dtype=torch.uint8)  # what no ticket may begin with
    loss = torch.full((), torch.nan)
    plan.launch(loss.data_ptr(), workspace.data_ptr(), 0, stream)
    return loss, workspace[:4].tolist() == [0, 0, 0, 0]  # and a zero again afterwards

def results(stream):
    for *_, gradient in maps:
        gradient.fill_(torch.nan)
    loss, own = launch(mixed, stream)
    return [loss, *(gradient.clone() for *_, gradient in maps)], own

expected, own = results(0)
assert not own and all(x.isfinite().all() for x in expected)
for stream in (3, 3, 2):  # captured, as tests/cuda_on_cpu has it; the stream of each thread
    found, own = results(stream)
    assert own and all(torch.equal(x, y) for x, y in zip(found, expected)), stream

kept = maps_of(Case(1, 16, 16, 2, 2))
small = plan_of(kept)
first, _ = launch(small, 0)
launches = [launch(small, stream) for stream in range(16, 16 + 1100)]
assert all(torch.equal(loss, first) for loss, _ in launches)
assert [own for _, own in launches] == [False] * 1023 + [True] * 77
""",
    )


# --- Races ---


@pytest.fixture(scope="module")
def race_folder(tmp_path_factory):
    return tmp_path_factory.mktemp("races")


KERNELS = {
    "tile": "fourier_tiles_16.cu",
    "general": "fourier_align.cu",
    "intensity": "spectral_intensity.cu",
}
"""What tests/cuda_on_cpu/spectra_races.cpp runs, and the file with its kernel."""


def race_spectra(folder: Path, name: str, changed: dict[str, str], only: str = "") -> subprocess.CompletedProcess:
    """tests/cuda_on_cpu/spectra_races.cpp under ThreadSanitizer, with the changed texts of some files of csrc/cuda."""
    overlay = folder / name
    (overlay / "cuda").mkdir(parents=True)
    for file, text in changed.items():
        (overlay / "cuda" / file).write_text(text)

    def source(file: str) -> Path:
        return overlay / "cuda" / file if file in changed else ROOT / "csrc/cuda" / file

    shared = ["fourier_plan.cpp", "intensity_plan.cpp", "tile_layout.cpp", "block_sums.cu"]
    sources = [ROOT / "tests/cuda_on_cpu/spectra_races.cpp", *map(source, [*shared, *KERNELS.values()])]
    flags = ["-O1", "-g", "-fsanitize=thread", "-DSKD_CUDA_THREADS", f"-I{overlay}"]
    program = overlay / "races"
    build(overlay, sources, program, flags, ["-fsanitize=thread"])
    environment = {**LIMITS, "TSAN_OPTIONS": ""}
    # Threads that a busy machine wakes up one after another have met at the next barrier before they can race.
    for _ in range(3 if changed else 1):
        done = subprocess.run([program, *only.split()], capture_output=True, text=True, timeout=300, env=environment)
        if "data race" in done.stderr:
            break
    return done


def race(folder: Path, name: str, kernel: Path) -> subprocess.CompletedProcess:
    """tests/cuda_on_cpu/races.cpp with this version of the kernels, under ThreadSanitizer."""
    plans = [ROOT / "csrc/cuda" / name for name in ("align_plan.cpp", "tile_layout.cpp")]
    sources = [ROOT / "tests/cuda_on_cpu/races.cpp", *plans, kernel]
    program = folder / name
    flags = ["-O1", "-g", "-fsanitize=thread", "-DSKD_CUDA_THREADS"]
    build(folder, sources, program, flags, ["-fsanitize=thread"])
    return subprocess.run([program], capture_output=True, text=True, timeout=300, env={**LIMITS, "TSAN_OPTIONS": ""})


def needs_sanitizer(done: subprocess.CompletedProcess) -> None:
    if "unexpected memory mapping" in done.stderr:
        pytest.skip("ThreadSanitizer does not run on this kernel (address space randomisation)")


def test_the_threads_of_a_block_do_not_race(race_folder):
    done = race(race_folder, "right", ROOT / "csrc/cuda/spectral_align.cu")
    needs_sanitizer(done)
    assert done.returncode == 0 and "WARNING" not in done.stderr, done.stderr[:4000]


@pytest.mark.parametrize("barrier", [0, 1])
def test_a_removed_barrier_is_noticed(race_folder, barrier):
    """Either of the two in the path through shared memory: after the fetch, and before the gradient is written back."""
    text = (ROOT / "csrc/cuda/spectral_align.cu").read_text()
    begin, end = text.index("void align_tile("), text.index("// --- The direct path ---")
    pieces = text[begin:end].split("__syncthreads();")
    assert len(pieces) == 3
    pieces[barrier : barrier + 2] = [pieces[barrier] + pieces[barrier + 1]]
    mutant = race_folder / f"mutant{barrier}.cu"
    mutant.write_text(text[:begin] + "__syncthreads();".join(pieces) + text[end:])
    done = race(race_folder, f"mutant{barrier}", mutant)
    needs_sanitizer(done)
    assert done.returncode != 0 and "data race" in done.stderr


def test_the_threads_of_a_block_with_transforms_do_not_race(race_folder):
    done = race_spectra(race_folder, "spectra", {})
    needs_sanitizer(done)
    assert done.returncode == 0 and "WARNING" not in done.stderr, done.stderr[:4000]
    assert re.findall(r"\w+(?=:)", done.stdout) == 2 * ["tile", "tile", "general", "general", "pieces"]


@pytest.mark.parametrize(
    "kernel, file, before",
    [
        ("tile", "fourier_tiles.h", "{ forward_rows<w>(layer, tile); });\n  "),
        ("general", "block_fft.h", "to);\n    "),
        ("intensity", "spectral_intensity.cu", "wait_for_copies();\n      "),
    ],
)
def test_a_removed_barrier_between_transforms_is_noticed(race_folder, kernel, file, before):
    text = (ROOT / "csrc/cuda" / file).read_text()
    assert text.count(f"{before}__syncthreads();") == 1
    mutant = text.replace(f"{before}__syncthreads();", before)
    done = race_spectra(race_folder, f"mutant-{kernel}", {file: mutant}, kernel)
    needs_sanitizer(done)
    assert done.returncode != 0 and "data race" in done.stderr
