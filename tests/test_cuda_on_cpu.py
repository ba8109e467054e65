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
FLAGS += ["-U_FORTIFY_SOURCE"]  # which takes a jump from stack to stack for an error
FLAGS += ["-Dalways_inline=unused"]  # what is to be inlined need not be, and costs the compiler half of its time
LIMITS = {**os.environ, "OMP_NUM_THREADS": "1"}

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CXX is None, reason="needs a C++ compiler"),
    pytest.mark.skipif(platform.system() != "Linux", reason="the fibers are made with Linux's ucontext"),
]


def compile_all(sources: list[Path], folder: Path, flags: list[str]) -> list[Path]:
    """C++ and CUDA sources, compiled as C++; returns the objects in their order."""

    def compile_(source: Path) -> Path:
        out = folder / f"{source.name}.o"
        # Only kernels make the addresses that the sanitizer is to see, and only they take long to run.
        quick = ["-O0", "-fno-sanitize=alignment"] if source.suffix == ".cpp" else []
        command = [CXX, *FLAGS, *flags, *quick, f"-I{ROOT / 'csrc'}", "-x", "c++", "-c", source, "-o", out]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return out

    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(compile_, sources))


def link(objects: list[Path], target: Path, *flags: str) -> Path:
    subprocess.run([CXX, *objects, *flags, "-pthread", "-o", target], check=True)
    return target


@pytest.fixture(scope="module")
def extension(tmp_path_factory):
    """skd._cuda for the CPU."""
    import pybind11

    folder = tmp_path_factory.mktemp("cuda_on_cpu")
    target = folder / f"_cuda{sysconfig.get_config_var('EXT_SUFFIX')}"
    sources = sorted([*ROOT.glob("csrc/cuda/*.cpp"), *ROOT.glob("csrc/cuda/*.cu")])
    includes = [f"-I{pybind11.get_include()}", f"-I{sysconfig.get_path('include')}"]
    aligned = ["-fsanitize=alignment", "-fno-sanitize-recover=alignment"]
    return link(compile_all(sources, folder, ["-O1", "-fvisibility=hidden", *aligned, *includes]), target, "-shared")


EVERY = "cuda or any_shape or training"  # what runs a kernel, by its name or with all others
SOME = (  # all cases with one match, and some with every combination of options
    f"({EVERY}) and (not (test_every_combination or test_loss_and_gradient)"
    " or test_loss_and_gradient and not log_magnitude"
    " or test_every_combination and (focal or spectra) and (7x7 or 300x1 or 5x9 or 16x32 or 30x17))"
)


@pytest.mark.parametrize(
    ("operation", "selection", "at_least"),
    [("spectral_align", EVERY, 930), ("fourier_align", SOME, 500), ("spectral_intensity", EVERY, 310)],
    ids=["spectral_align", "fourier_align", "spectral_intensity"],
)
def test_the_matrix_of_cases_and_the_contract(extension, operation, selection, at_least):
    """The operation's tests in a process of their own; none may fail."""
    # The last words of a kernel that ends the program: nothing is to capture them or to put a traceback below them.
    plain = ["-q", "-x", "-p", "no:cacheprovider", "-p", "no:faulthandler", "--capture=sys"]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *plain, f"tests/test_{operation}.py", "-k", selection],
        cwd=ROOT,
        env={**LIMITS, "SKD_TEST_CUDA_EXTENSION": str(extension), "SKD_TEST_KERNELS": "cuda"},
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    assert int(re.search(r"(\d+) passed", done.stdout)[1]) > at_least


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

RACES = {
    "races": ["align_plan.cpp", "tile_layout.cpp", "spectral_align.cu"],
    "spectra_races": [
        *("fourier_plan.cpp", "intensity_plan.cpp", "tile_layout.cpp", "block_sums.cu"),
        *("fourier_tiles_16.cu", "fourier_align.cu", "spectral_intensity.cu"),
    ],
}
"""The programs in tests/cuda_on_cpu, and what of csrc/cuda they run."""

SANITIZED = ["-O1", "-g1", "-fsanitize=thread", "-DSKD_CUDA_THREADS"]


@pytest.fixture(scope="module")
def race_objects(tmp_path_factory):
    """The objects of both programs, by the names of their sources."""
    names = sorted({name for parts in RACES.values() for name in parts})
    sources = [ROOT / f"tests/cuda_on_cpu/{program}.cpp" for program in RACES]
    sources += [ROOT / "csrc/cuda" / name for name in names]
    objects = compile_all(sources, tmp_path_factory.mktemp("races"), SANITIZED)
    return dict(zip([*RACES, *names], objects, strict=True))


def race(objects: dict[str, Path], folder: Path, program: str, *arguments: str) -> subprocess.CompletedProcess:
    """Runs a program under ThreadSanitizer."""
    parts = [objects[name] for name in (program, *RACES[program])]
    # A mutant's inline functions count, wherever else they were compiled too: the linker takes the first.
    parts.sort(key=lambda part: part.parent != folder)
    command = [link(parts, folder / program, "-fsanitize=thread"), *arguments]
    environment = {**LIMITS, "TSAN_OPTIONS": ""}
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
    if "unexpected memory mapping" in done.stderr:
        pytest.skip("ThreadSanitizer does not run on this kernel (address space randomisation)")
    return done


def race_of_mutant(objects, folder: Path, file: str, text: str, kernel: str, program: str, *arguments: str):
    """The same with another text of a file in csrc/cuda, of which only this kernel is compiled again."""
    (folder / "cuda").mkdir()
    (folder / "cuda" / file).write_text(text)
    source = folder / "cuda" / file if file == kernel else ROOT / "csrc/cuda" / kernel
    (mutant,) = compile_all([source], folder, [*SANITIZED, f"-I{folder}"])
    return race({**objects, kernel: mutant}, folder, program, *arguments)


def test_the_threads_of_a_block_do_not_race(race_objects, tmp_path):
    done = race(race_objects, tmp_path, "races")
    assert done.returncode == 0 and "WARNING" not in done.stderr, done.stderr[:4000]


@pytest.mark.parametrize("barrier", [0, 1])
def test_a_removed_barrier_is_noticed(race_objects, tmp_path, barrier):
    """Either of the two in the path through shared memory: after the fetch, and before the gradient is written back."""
    text = (ROOT / "csrc/cuda/spectral_align.cu").read_text()
    begin, end = text.index("void align_tile("), text.index("// --- The direct path ---")
    pieces = text[begin:end].split("__syncthreads();")
    assert len(pieces) == 3
    pieces[barrier : barrier + 2] = [pieces[barrier] + pieces[barrier + 1]]
    mutant = text[:begin] + "__syncthreads();".join(pieces) + text[end:]
    done = race_of_mutant(race_objects, tmp_path, "spectral_align.cu", mutant, "spectral_align.cu", "races")
    assert done.returncode != 0 and "data race" in done.stderr


def test_the_threads_of_a_block_with_transforms_do_not_race(race_objects, tmp_path):
    done = race(race_objects, tmp_path, "spectra_races")
    assert done.returncode == 0 and "WARNING" not in done.stderr, done.stderr[:4000]
    assert re.findall(r"\w+(?=:)", done.stdout) == 2 * ["tile", "tile", "general", "general", "pieces"]


@pytest.mark.parametrize(
    ("part", "kernel", "file", "before"),
    [
        ("tile", "fourier_tiles_16.cu", "fourier_tiles.h", "{ forward_rows<w>(layer, tile); });\n  "),
        ("general", "fourier_align.cu", "block_fft.h", "to);\n    "),
        ("intensity", "spectral_intensity.cu", "spectral_intensity.cu", "wait_for_copies();\n      "),
    ],
    ids=["tile", "general", "intensity"],
)
def test_a_removed_barrier_between_transforms_is_noticed(race_objects, tmp_path, part, kernel, file, before):
    text = (ROOT / "csrc/cuda" / file).read_text()
    assert text.count(f"{before}__syncthreads();") == 1
    mutant = text.replace(f"{before}__syncthreads();", before)
    done = race_of_mutant(race_objects, tmp_path, file, mutant, kernel, "spectra_races", part)
    assert done.returncode != 0 and "data race" in done.stderr
