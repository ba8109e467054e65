"""The decisions of the build, for machines of every kind; nothing is compiled here."""

import subprocess
import sys
from pathlib import Path

import pytest

GXX = "g++ (Test) 12.2.0"
NVCC = "nvcc: NVIDIA (R) Cuda compiler driver\nCuda compilation tools, release {0}, V{0}.88"


# --- Switches ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("switch", ["SKD_BUILD_CPU", "SKD_BUILD_CUDA"])
class TestSwitch:
    @pytest.mark.parametrize("value", [None, "", "auto", " AUTO "])
    def test_auto_builds_what_it_can(self, support, switch, value):
        env = {} if value is None else {switch: value}
        assert support.reason_to_skip(env, switch, None) is None
        assert support.reason_to_skip(env, switch, "there is no compiler") == "there is no compiler"

    def test_0_leaves_out(self, support, switch):
        assert support.reason_to_skip({switch: "0"}, switch, None) == f"{switch}=0 at build time"
        assert support.reason_to_skip({switch: "0"}, switch, "there is no compiler") == f"{switch}=0 at build time"

    def test_1_builds_or_fails(self, support, switch):
        assert support.reason_to_skip({switch: "1"}, switch, None) is None
        with pytest.raises(support.BuildError, match=f"{switch}=1, but there is no compiler"):
            support.reason_to_skip({switch: "1"}, switch, "there is no compiler")

    @pytest.mark.parametrize("value", ["2", "yes", "true", "01", "of"])
    def test_anything_else_is_an_error(self, support, switch, value):
        for obstacle in (None, "there is no compiler"):
            with pytest.raises(support.BuildError, match=f"{switch}='{value}' means nothing; set it to auto, 0"):
                support.reason_to_skip({switch: value}, switch, obstacle)


class TestJobs:
    @pytest.mark.parametrize(
        ("cores", "gib", "jobs"), [(8, 64, 8), (64, 16, 8), (2, 3, 1), (4, 1, 1), (1, 0, 1), (16, 8.5, 4)]
    )
    def test_default_is_bounded_by_cores_and_memory(self, support, cores, gib, jobs):
        assert support.read_jobs({}, cores, int(gib * support.GIB)) == jobs

    @pytest.mark.parametrize(("value", "jobs"), [("1", 1), (" 12 ", 12)])
    def test_max_jobs_wins(self, support, value, jobs):
        assert support.read_jobs({"MAX_JOBS": value}, 4, 64 * support.GIB) == jobs

    @pytest.mark.parametrize("value", ["0", "-1", "two", "1.5", "4x"])
    def test_bad_max_jobs(self, support, value):
        with pytest.raises(support.BuildError, match=f"MAX_JOBS='{value}' is no number of jobs"):
            support.read_jobs({"MAX_JOBS": value}, 4, 64 * support.GIB)

    def test_a_container_limits_memory(self, support, tmp_path):
        (tmp_path / "limited").write_text("3221225472\n")
        (tmp_path / "unlimited").write_text("max\n")
        unlimited = support.machine_memory([str(tmp_path / "unlimited"), str(tmp_path / "absent")])
        assert unlimited > 3 * support.GIB
        assert support.machine_memory([str(tmp_path / "limited")]) == 3 * support.GIB

    def test_this_machine_has_a_core(self, support):
        assert support.machine_cores() >= 1


# --- The C++ compiler --------------------------------------------------------------------------------------------


class TestFindCxx:
    def test_none(self, support, tmp_path):
        tool = support.find_cxx({"PATH": str(tmp_path)})
        assert tool.command == []
        assert "no C++ compiler was found: install g++ or clang++" in tool.obstacle

    def test_no_path_at_all(self, support):
        assert support.find_cxx({}).obstacle

    def test_first_that_runs(self, support, program):
        program("c++", "no developer tools", status=1)  # what macOS has in its place
        folder = program("g++", GXX)
        tool = support.find_cxx({"PATH": folder})
        assert tool == ([f"{folder}/g++"], GXX, None)

    def test_cxx_wins_and_may_have_arguments(self, support, program):
        folder = program("g++", GXX)
        other = program("ccache", "clang version 17.0.6\nTarget: x86_64", folder="other")
        tool = support.find_cxx({"PATH": f"{folder}:{other}", "CXX": "ccache clang++ -m64"})
        assert tool.command == [f"{other}/ccache", "clang++", "-m64"]
        assert tool.description == "clang version 17.0.6"

    def test_cxx_that_does_not_exist_is_not_replaced(self, support, program):
        tool = support.find_cxx({"PATH": program("g++", GXX), "CXX": "/no/such/compiler"})
        assert tool.command == []
        assert tool.obstacle == "CXX='/no/such/compiler' is no compiler that runs here"


# --- nvcc and its architectures ----------------------------------------------------------------------------------


class TestFindNvcc:
    def test_none(self, support, tmp_path):
        nvcc = support.find_nvcc({"PATH": str(tmp_path), "CUDA_HOME": str(tmp_path)})
        assert nvcc.command == []
        assert "nvcc was not found" in nvcc.obstacle

    def test_order_is_skd_nvcc_then_cuda_home_then_path(self, support, program):
        path = program("nvcc", NVCC.format("11.8"), folder="path")
        home = program("nvcc", NVCC.format("12.4"), folder="home/bin")
        own = program("my-nvcc", NVCC.format("13.0"), folder="own")
        env = {"PATH": path}
        assert support.find_nvcc(env) == ([f"{path}/nvcc"], (11, 8), None)
        env["CUDA_HOME"] = str(Path(home).parent)
        assert support.find_nvcc(env) == ([f"{home}/nvcc"], (12, 4), None)
        env["SKD_NVCC"] = f"{own}/my-nvcc"
        assert support.find_nvcc(env) == ([f"{own}/my-nvcc"], (13, 0), None)

    def test_skd_nvcc_that_does_not_exist_is_not_replaced(self, support, program):
        nvcc = support.find_nvcc({"PATH": program("nvcc", NVCC.format("13.0")), "SKD_NVCC": "/no/nvcc"})
        assert nvcc.command == []
        assert nvcc.obstacle == "SKD_NVCC='/no/nvcc' is no program on this machine"

    @pytest.mark.parametrize("release", ["9.2", "10.2"])
    def test_too_old(self, support, program, release):
        nvcc = support.find_nvcc({"PATH": program("nvcc", NVCC.format(release))})
        assert nvcc.command == []
        assert nvcc.obstacle == f"nvcc {release} is too old; 11.8 or later is needed"

    @pytest.mark.parametrize(("prints", "status"), [("hello", 0), (NVCC.format("13.0"), 1)])
    def test_says_nothing_of_use(self, support, program, prints, status):
        nvcc = support.find_nvcc({"PATH": program("nvcc", prints, status)})
        assert nvcc.command == []
        assert "does not say which release" in nvcc.obstacle

    def test_versions_are_numbers(self, support):
        versions = [support.parse_nvcc_version(NVCC.format(text)) for text in ("9.2", "10.2", "11.10", "11.8", "13.0")]
        assert versions == [(9, 2), (10, 2), (11, 10), (11, 8), (13, 0)]
        assert sorted(versions)[3] == (11, 10)  # as text, 11.10 is before 11.8 and 9.2 is the last
        assert support.parse_nvcc_version("release unknown") is None


def _names(archs):
    return " ".join(f"{number}{suffix}{'+PTX' if ptx else ''}" for number, suffix, ptx in archs)


class TestArchs:
    @pytest.mark.parametrize(
        ("version", "archs"),
        [
            ((11, 8), "80 86 89 90+PTX"),
            ((12, 6), "80 86 89 90+PTX"),
            ((12, 8), "80 86 89 90 100 120+PTX"),
            ((12, 10), "80 86 89 90 100 120+PTX"),  # 12.10 is after 12.8
            ((13, 0), "80 86 89 90 100 120+PTX"),
        ],
    )
    @pytest.mark.parametrize("env", [{}, {"SKD_CUDA_ARCHS": " "}])
    def test_default_is_what_this_nvcc_knows(self, support, version, archs, env):
        assert _names(support.cuda_archs(env, version)) == archs

    @pytest.mark.parametrize(
        ("text", "archs"),
        [
            ("90", "90"),
            ("80;90", "80 90"),
            ("8.0 9.0+PTX", "80 90+PTX"),
            ("80, 90a,12.0+ptx;", "80 90a 120+PTX"),
            ("75", "75"),
        ],
    )
    def test_as_asked(self, support, text, archs):
        assert _names(support.cuda_archs({"SKD_CUDA_ARCHS": text}, (13, 0))) == archs

    @pytest.mark.parametrize("text", ["hopper", "9", "80;sm_90", "90+PTXX", "90b", "8.", "-80", ";", "80 1234"])
    def test_malformed(self, support, text):
        with pytest.raises(support.BuildError, match="is no architecture; write compute capabilities like"):
            support.cuda_archs({"SKD_CUDA_ARCHS": text}, (13, 0))

    def test_newer_than_nvcc(self, support):
        with pytest.raises(support.BuildError, match="architecture 120 needs nvcc 12.8 or later, this is nvcc 12.4"):
            support.cuda_archs({"SKD_CUDA_ARCHS": "90;120"}, (12, 4))

    def test_not_yet_known_is_left_to_nvcc(self, support):
        assert _names(support.cuda_archs({"SKD_CUDA_ARCHS": "130"}, (14, 0))) == "130"

    def test_flags(self, support):
        assert support.arch_flags([(86, "", False), (80, "", False), (90, "a", True)]) == [
            *("-gencode", "arch=compute_80,code=[sm_86,sm_80]"),
            *("-gencode", "arch=compute_90a,code=sm_90a"),
            *("-gencode", "arch=compute_90a,code=compute_90a"),
        ]
        assert support.arch_flags([(90, "", True)]) == ["-gencode", "arch=compute_90,code=[sm_90,compute_90]"]


# --- Obstacles ---------------------------------------------------------------------------------------------------


class TestObstacles:
    def test_none_here(self, support):
        assert support.common_obstacle({"PATH": ""}, "linux") is None

    def test_windows(self, support):
        assert "Windows" in support.common_obstacle({}, "win32")

    def test_no_pybind11(self, support, monkeypatch):
        monkeypatch.setitem(sys.modules, "pybind11", None)
        assert support.common_obstacle({}, "linux") == "the Python package pybind11 is not installed"

    def test_no_ninja(self, support, monkeypatch, program):
        monkeypatch.setitem(sys.modules, "ninja", None)
        assert "ninja was not found" in support.common_obstacle({"PATH": ""}, "linux")
        folder = program("ninja", "1.11")
        assert support.common_obstacle({"PATH": folder}, "linux") is None
        assert support.find_ninja({"PATH": folder}) == f"{folder}/ninja"

    def test_no_python_headers(self, support, monkeypatch, tmp_path):
        monkeypatch.setattr(support.sysconfig, "get_path", lambda name: str(tmp_path))
        assert "Python.h does not exist: install the development files" in support.common_obstacle({}, "linux")


# --- What is compiled, and how -----------------------------------------------------------------------------------

SOURCES = ["csrc/cpu/module.cpp", "csrc/cpu/spectral_align.cpp", "csrc/cpu/thread_pool.cpp"]


class TestObjects:
    def test_x86_64_links_the_humblest_instructions_first(self, support):
        """Otherwise a function emitted into several objects could be kept in its AVX-512 form."""
        objects = support.cpu_objects(SOURCES, "b", "linux-x86_64")
        assert [item.path for item in objects] == [
            *("b/module.o", "b/thread_pool.o"),
            *("b/spectral_align.baseline.o", "b/spectral_align.avx2.o", "b/spectral_align.avx512.o"),
        ]
        assert all("-DSKD_X86_KERNELS" in item.flags for item in objects)

    def test_x86_64_flags(self, support):
        flags = {item.path: item.flags for item in support.cpu_objects(SOURCES, "b", "linux-x86_64")}
        assert flags["b/module.o"] == flags["b/thread_pool.o"] == ["-DSKD_X86_KERNELS"]
        assert flags["b/spectral_align.baseline.o"] == ["-DSKD_ISA=baseline", "-DSKD_X86_KERNELS"]
        assert {"-mavx2", "-mfma", "-mf16c", "-DSKD_ISA=avx2"} <= set(flags["b/spectral_align.avx2.o"])
        assert {"-mavx512f", "-mavx512bw", "-DSKD_ISA=avx512"} <= set(flags["b/spectral_align.avx512.o"])
        assert not any(flag.startswith("-mavx512") for flag in flags["b/spectral_align.avx2.o"])

    @pytest.mark.parametrize("platform", ["linux-aarch64", "macosx-11.0-arm64", "macosx-11.0-universal2", "linux-i686"])
    def test_other_processors_get_portable_code(self, support, platform):
        objects = support.cpu_objects(SOURCES, "b", platform)
        assert [item.path for item in objects] == ["b/module.o", "b/thread_pool.o", "b/spectral_align.baseline.o"]
        assert [item.flags for item in objects] == [[], [], ["-DSKD_ISA=baseline"]]

    def test_every_kernel_has_its_source(self, support):
        root = Path(support.__file__).parent
        stems = {Path(source).stem for source in support.cpu_sources(root)}
        assert {"module", "thread_pool", *support.CPU_KERNELS} <= stems

    def test_cuda_sources_need_a_kernel(self, support, tmp_path):
        (tmp_path / "csrc/cuda").mkdir(parents=True)
        (tmp_path / "csrc/cuda/module.cpp").touch()
        assert support.cuda_sources(tmp_path) == []
        (tmp_path / "csrc/cuda/spectral_align.cu").touch()
        sources = support.cuda_sources(tmp_path)
        assert sources == ["csrc/cuda/module.cpp", "csrc/cuda/spectral_align.cu"]
        assert [item.path for item in support.cuda_objects(sources, "b")] == ["b/module.cpp.o", "b/spectral_align.cu.o"]


class TestCommands:
    def test_a_wheel_runs_on_other_machines(self, support):
        for platform in ("linux-x86_64", "linux-aarch64", "macosx-11.0-arm64"):
            compile_, link = support.cxx_commands(["g++"], ["csrc"], {}, platform)
            assert not any(flag.startswith("-march") or flag == "-ffast-math" for flag in compile_ + link)
            assert {"-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden", "-ffp-contract=fast", "-Icsrc"} <= set(
                compile_
            )

    def test_link(self, support):
        assert {"-shared", "-s"} <= set(support.cxx_commands(["g++"], [], {}, "linux-x86_64")[1])
        assert {"-bundle", "dynamic_lookup"} <= set(support.cxx_commands(["c++"], [], {}, "macosx-11.0-arm64")[1])

    def test_the_users_flags_do_not_overrule_ours(self, support):
        env = {"CXXFLAGS": "-O1 -DNAME='a b'", "LDFLAGS": "-L/opt/lib"}
        compile_, link = support.cxx_commands(["g++"], [], env, "linux-x86_64")
        assert compile_.index("-O1") < compile_.index("-O3")
        assert "-DNAME=a b" in compile_
        assert link[-1] == "-L/opt/lib"

    def test_nvcc(self, support):
        compile_, link = support.nvcc_commands(["nvcc"], ["/bin/g++"], ["csrc"], [(90, "", True)])
        assert compile_[:3] == link[:3] == ["nvcc", "-ccbin", "/bin/g++"]
        assert "arch=compute_90,code=[sm_90,compute_90]" in compile_
        for command in (compile_, link):
            assert command[command.index("-cudart") + 1] == "static"
        assert "-ccbin" not in support.nvcc_commands(["nvcc"], ["ccache", "g++"], [], [])[0]

    def test_jobs_are_architectures_at_once(self, support):
        archs = [(80, "", False), (90, "", True)]
        assert "--threads" not in support.nvcc_commands(["nvcc"], ["g++"], [], archs)[0]
        compile_ = support.nvcc_commands(["nvcc"], ["g++"], [], archs, 3)[0]
        assert compile_[compile_.index("--threads") + 1] == "3"

    def test_ninja_text_escapes(self, support):
        objects = [support.Object("a b.cpp", "out dir/a.o", ["-DPRICE=$5"])]
        text = support.ninja_text(["g++", "-I/my include"], ["g++", "-shared"], objects, "out dir/x.so", "out dir")
        assert "command = g++ '-I/my include' -MMD -MF $out.d $flags -c $in -o $out\n" in text
        assert "build out$ dir/a.o: compile a$ b.cpp\n  flags = '-DPRICE=$$5'\n" in text
        assert text.endswith("build out$ dir/x.so: link out$ dir/a.o\n")

    @pytest.mark.parametrize(
        ("output", "line"),
        [
            ("[1/2] compile\nx.cpp:3:1: error: no ;\nx.cpp:9: error: b", "x.cpp:3:1: error: no ;"),
            ("ld: a.o: undefined reference to `f'\nfailed", "ld: a.o: undefined reference to `f'"),
            ("nvcc fatal   : Unsupported gpu architecture\nfailed", "nvcc fatal   : Unsupported gpu architecture"),
            ("killed\n\n", "killed"),
            ("", "the compiler said nothing"),
        ],
    )
    def test_first_error(self, support, output, line):
        assert support.first_error(output) == line


# --- setup.py itself ---------------------------------------------------------------------------------------------


class TestPlans:
    """What setup.py makes of a machine: a recipe, or the reason why there is none."""

    def test_cpu(self, setup_module, program):
        folder = program("g++", GXX)
        recipe = setup_module.plan_cpu({"PATH": folder}, "b")
        assert recipe.compiler == GXX
        assert recipe.commands[0][0] == f"{folder}/g++"
        assert recipe.details["instruction_sets"][0] == "baseline"

    def test_cpu_without_compiler(self, setup_module, tmp_path):
        assert "no C++ compiler" in setup_module.plan_cpu({"PATH": str(tmp_path)}, "b")
        with pytest.raises(setup_module.support.BuildError, match="SKD_BUILD_CPU=1, but no C\\+\\+ compiler"):
            setup_module.plan_cpu({"PATH": str(tmp_path), "SKD_BUILD_CPU": "1"}, "b")

    def test_cpu_without_sources(self, setup_module, program, monkeypatch, tmp_path):
        monkeypatch.setattr(setup_module, "ROOT", tmp_path)
        assert setup_module.plan_cpu({"PATH": program("g++", GXX)}, "b") == "this source tree has no C++ kernels"

    @pytest.fixture
    def cuda_tree(self, setup_module, monkeypatch, tmp_path):
        """setup.py in a source tree with a CUDA kernel."""
        (tmp_path / "csrc/cuda").mkdir(parents=True)
        (tmp_path / "csrc/cuda/spectral_align.cu").touch()
        monkeypatch.setattr(setup_module, "ROOT", tmp_path)
        return setup_module

    def test_cuda_without_sources(self, setup_module, program, monkeypatch, tmp_path):
        monkeypatch.setattr(setup_module, "ROOT", tmp_path)
        program("g++", GXX)
        env = {"PATH": program("nvcc", NVCC.format("13.0"))}
        assert setup_module.plan_cuda(env, "b") == "this source tree has no CUDA kernels"
        with pytest.raises(setup_module.support.BuildError, match="SKD_BUILD_CUDA=1, but this source tree has no CUDA"):
            setup_module.plan_cuda(env | {"SKD_BUILD_CUDA": "1"}, "b")

    def test_cuda(self, cuda_tree, program):
        program("g++", GXX)
        recipe = cuda_tree.plan_cuda({"PATH": program("nvcc", NVCC.format("12.4"))}, "b")
        assert recipe.compiler == f"nvcc 12.4 with {GXX}"
        assert recipe.details == {"architectures": ["80", "86", "89", "90+PTX"]}

    def test_cuda_without_nvcc(self, cuda_tree, program):
        assert "nvcc was not found" in cuda_tree.plan_cuda({"PATH": program("g++", GXX)}, "b")

    def test_cuda_without_host_compiler(self, cuda_tree, program):
        assert "no C++ compiler" in cuda_tree.plan_cuda({"PATH": program("nvcc", NVCC.format("13.0"))}, "b")

    def test_cuda_with_old_nvcc(self, cuda_tree, program):
        program("g++", GXX)
        env = {"PATH": program("nvcc", NVCC.format("10.2"))}
        assert "nvcc 10.2 is too old" in cuda_tree.plan_cuda(env, "b")
        with pytest.raises(cuda_tree.support.BuildError, match="SKD_BUILD_CUDA=1, but nvcc 10.2 is too old"):
            cuda_tree.plan_cuda(env | {"SKD_BUILD_CUDA": "1"}, "b")

    def test_cuda_archs_are_checked(self, cuda_tree, program):
        program("g++", GXX)
        env = {"PATH": program("nvcc", NVCC.format("12.4")), "SKD_CUDA_ARCHS": "90;x"}
        with pytest.raises(cuda_tree.support.BuildError, match="'x' is no architecture"):
            cuda_tree.plan_cuda(env, "b")

    def test_cuda_switched_off_needs_nothing(self, cuda_tree, tmp_path):
        env = {"PATH": str(tmp_path), "SKD_BUILD_CUDA": "0"}
        assert cuda_tree.plan_cuda(env, "b") == "SKD_BUILD_CUDA=0 at build time"


def test_jobs_reach_ninja_and_its_output_the_screen(setup_module, monkeypatch, tmp_path, capfd):
    ninja = tmp_path / "ninja"
    ninja.write_text('#!/bin/sh\necho "ninja $*"\necho "x.cpp:1: error: no such thing" >&2\nexit 1\n')
    ninja.chmod(0o755)
    monkeypatch.setattr(setup_module, "ROOT", tmp_path)
    monkeypatch.setattr(setup_module.support, "find_ninja", lambda env: str(ninja))
    recipe = setup_module.Recipe("g++", (["g++"], ["g++"]), [], {})
    reason = setup_module.run_ninja(recipe, "build/x", "build/x/x.so", jobs=3)
    assert reason == "compilation failed: x.cpp:1: error: no such thing"
    assert "ninja -f build/x/build.ninja -j 3\nx.cpp:1: error" in capfd.readouterr().out


def test_nothing_but_setuptools_is_needed_to_read_setup_py(support):
    """An isolated build reads it before pybind11 and ninja are asked for; torch is never there."""
    code = (
        "import sys\nfor name in ('torch', 'numpy', 'pybind11', 'ninja', 'skd'): sys.modules[name] = None\nimport setup"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=Path(support.__file__).parent, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
