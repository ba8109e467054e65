#!/usr/bin/env bash
# Everything that needs a GPU, in one go and under ten minutes, without a network:
#
#     bash benchmarks/gpu_check.sh
#
# environment, build (into the Python that is there), tests marked gpu, a first benchmark, compute-sanitizer, and a
# fuller benchmark until time is over. What is worth most comes first, each part has its share of the time, and a run
# that is cut off leaves what it had in results/<device>-<date>/ (in $OUT if that is set). Figures are taken only after
# the tests passed in the same run. The last line is "gpu_check: pass", or "gpu_check: FAILED:" and what.
#
# SKD_PYTHON         the Python with torch, default python3
# SKD_CHECK_SECONDS  the time for everything, default 570
# SKD_CHECK_BUILD    inplace: build in the source tree and install nothing
# SKD_CUDA_ARCHS     default: only the architecture of this GPU, to be quick
# SKD_COMMIT         the commit, where the tree is a copy without its repository
set -uo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
cd "$root" || exit 1
python=${SKD_PYTHON:-python3}
total=${SKD_CHECK_SECONDS:-570}
scratch=$(mktemp -d)
folder=      # where the results go
child=       # the running part
current=start
problems=()  # what failed
notes=()     # what was not checked, though nothing failed

say() {
    echo "$*"
    if [ -n "$folder" ]; then echo "$*" >>"$folder/check.txt"; fi
}
problem() { problems+=("$1"); say "FAILED: $1"; }
note() { notes+=("$1"); say "NOT CHECKED: $1"; }
# Of the whole time in percent, in seconds.
share() { echo $((total * $1 / 100 > 4 ? total * $1 / 100 : 4)); }
left() { echo $((total - SECONDS)); }

# The end, whatever led to it: what was not checked, and the last line.
finish() {
    trap '' TERM INT HUP
    local text status=$1 each
    say ""
    for each in "${notes[@]+"${notes[@]}"}"; do say "not checked: $each"; done
    if [ -n "$folder" ]; then say "results in $folder after $SECONDS s"; fi
    if [ ${#problems[@]} -eq 0 ]; then
        text="gpu_check: pass"
    else
        text=$(printf '%s; ' "${problems[@]}")
        text="gpu_check: FAILED: ${text%; }"
        [ "$status" -ne 0 ] || status=1
    fi
    rm -rf "$scratch"
    say "$text"
    exit "$status"
}

stopped() {
    trap '' TERM INT HUP
    if [ -n "$child" ]; then
        kill -TERM "$child" 2>/dev/null  # timeout passes it on to all it has started
        wait "$child" 2>/dev/null
        child=
        keep_log
    fi
    problem "stopped by SIG$1 during $current"
    finish "$2"
}
trap 'stopped TERM 143' TERM
trap 'stopped INT 130' INT
trap 'stopped HUP 129' HUP

# Puts the end of a part's output where it stays, unless it was written there from the first line on.
keep_log() {
    if [ -n "$folder" ] && [ "${log:-}" = "$scratch/log" ] && [ -f "$log" ]; then
        tail -n 60 "$log" >>"$folder/check.txt"
        rm -f "$log"
    fi
}

# part NAME SECONDS LOG COMMAND...: runs a command for at most that long, and never beyond the whole time.
# Its exit status is left in $rc: 124 if it was cut, 125 if there was no time to begin.
part() {
    local limit=$2 began=$SECONDS
    current=$1 log=$3
    if [ "$limit" -gt $(($(left) - 5)) ]; then limit=$(($(left) - 5)); fi
    if [ "$limit" -lt 2 ]; then
        rc=125
        say "== $current: not begun, the time is over"
        return
    fi
    say "== $current (at most $limit s)"
    shift 3
    # In the background, so that a signal to this script is answered at once.
    timeout --signal=TERM --kill-after=3 "$limit" "$@" >>"$log" 2>&1 </dev/null &
    child=$!
    wait "$child"
    rc=$?
    child=
    # 137: it did not end by itself after the signal either.
    if [ "$rc" -eq 137 ] && [ $((SECONDS - began)) -ge "$limit" ]; then rc=124; fi
    keep_log
    say "== $current: exit status $rc after $((SECONDS - began)) s$([ "$rc" -ne 124 ] || echo ', cut')"
}

# What a part's exit status means, as a sentence.
why() {
    case $rc in
    124) echo "$current was cut after its time" ;;
    125) echo "there was no time for $current" ;;
    *) echo "$current ended with exit status $rc" ;;
    esac
}

# --- The device and the folder ---------------------------------------------------------------------------------------

probe='import torch
assert torch.cuda.is_available(), "PyTorch sees no CUDA device"
print("%d%d" % torch.cuda.get_device_capability(), torch.cuda.get_device_name(), sep="\n")'
if ! timeout 120 "$python" -c "$probe" >"$scratch/device" 2>"$scratch/error"; then
    sed 's/^/    /' "$scratch/error"
    problem "no GPU that $python could use: $(tail -n 1 "$scratch/error")"
    finish 1
fi
arch=$(sed -n 1p "$scratch/device")
device=$(sed -n 2p "$scratch/device" | tr 'A-Z ' 'a-z-' | tr -cd 'a-z0-9._-')
export SKD_CUDA_ARCHS=${SKD_CUDA_ARCHS:-$arch}
base=${OUT:-$root/results}/${device:-gpu}-$(date -u +%Y-%m-%d)
folder=$base
number=2
while [ -e "$folder" ]; do folder=$base-$((number++)); done
if ! mkdir -p "$folder"; then
    problem "the folder $folder for the results cannot be made"
    folder=
    finish 1
fi

commit=$(git -c safe.directory='*' rev-parse HEAD 2>/dev/null) || commit=${SKD_COMMIT:-}
if [ -n "$commit" ]; then export SKD_COMMIT=$commit; fi

environment() {
    echo "date: $(date -u +%Y-%m-%dT%H:%M:%SZ)"
    echo "commit: ${commit:-unknown; SKD_COMMIT can say it}"
    echo "changed files: $(git -c safe.directory='*' status --short 2>/dev/null | wc -l)"
    # Tells two copies of a tree apart where there is no repository.
    echo "sources: $(find skd csrc kernels setup.py build_support.py -type f ! -name '*.so' ! -name '*.pyc' \
        ! -name _build.json 2>/dev/null | LC_ALL=C sort | xargs sha256sum 2>/dev/null | sha256sum | cut -c1-16)"
    uname -srm
    echo "architectures to build for: $SKD_CUDA_ARCHS"
    nvidia-smi || echo "nvidia-smi: not found or failed"
    nvcc --version || echo "nvcc: not on the path"
    "$python" --version
    "$python" -m pip list --format=freeze 2>/dev/null |
        grep -iE '^(torch|triton|numpy|pybind11|ninja|setuptools|pytest|hypothesis|timm|tyro)[=-]' || true
    "$python" -m skd env || echo "skd env: failed"
}
export -f environment
export python commit
say "gpu_check of ${commit:-an unknown commit} on $(sed -n 2p "$scratch/device"), results in $folder"
part environment "$(share 8)" "$folder/environment.txt" bash -c environment

# --- Build -----------------------------------------------------------------------------------------------------------

built=no
export SKD_BUILD_CUDA=1
if [ "${SKD_CHECK_BUILD:-}" != inplace ] && "$python" -m pip --version >/dev/null 2>&1; then
    part build "$(share 28)" "$scratch/log" "$python" -m pip install -v --no-build-isolation --no-deps -e .
    if [ "$rc" -eq 0 ]; then
        built=yes
    elif [ "$rc" -lt 124 ] && ! grep -q 'compilation failed' "$folder/check.txt"; then
        say "pip cannot install here; building in the source tree instead"
        SKD_CHECK_BUILD=inplace
    fi
else
    SKD_CHECK_BUILD=inplace
fi
if [ "$built" = no ] && [ "${SKD_CHECK_BUILD:-}" = inplace ]; then
    part build "$(share 28)" "$scratch/log" "$python" setup.py build_ext --inplace
    if [ "$rc" -eq 0 ]; then
        # What an installation would do: the folder kernels/ is the package skd.kernels.
        mkdir -p "$scratch/site/skd"
        ln -s "$root"/skd/* "$scratch/site/skd/"
        ln -s "$root/kernels" "$scratch/site/skd/kernels"
        export PYTHONPATH=$scratch/site${PYTHONPATH:+:$PYTHONPATH}
        # Python (from 3.11 on) would put the current folder, and with it the bare source tree, in front of PYTHONPATH.
        export PYTHONSAFEPATH=1
        built=yes
    fi
fi
if [ "$built" = no ]; then
    problem "build: $(why)"
    say "tests, sanitizer and benchmarks were not run: there is nothing to run them on"
    finish 1
fi

backends='import skd
for name, there in skd.backends().items():
    print(f"backend {name}: {there}")'
part backends "$(share 8)" "$scratch/backends" "$python" -c "$backends"
while read -r line; do say "$line"; done <"$scratch/backends"
if ! grep -q '^backend cuda: True' "$scratch/backends"; then
    problem "build: skd has no CUDA kernels here ($(grep '^backend cuda' "$scratch/backends" || why))"
fi
required=cuda
if grep -q '^backend triton: True' "$scratch/backends"; then
    required=cuda,triton
else
    problem "Triton cannot serve ($(grep '^backend triton' "$scratch/backends" || why))"
fi

# --- Tests -----------------------------------------------------------------------------------------------------------

# The tests of a GPU take nothing from hypothesis, but tests/conftest.py and what they share imports it.
if ! timeout 60 "$python" -c 'import hypothesis' 2>/dev/null; then
    say "hypothesis is missing: an empty one stands in, and tests with generated cases are skipped"
    mkdir -p "$scratch/stand_in/hypothesis"
    cat >"$scratch/stand_in/hypothesis/__init__.py" <<'END'
"""Stands in for hypothesis: tests that need it are skipped."""

import pytest

from . import strategies  # noqa: F401


class settings:
    def __init__(self, *_, **__):
        pass

    def __call__(self, test):
        return test

    register_profile = load_profile = staticmethod(lambda *_, **__: None)


def given(*_, **__):
    def skipped(test):
        @pytest.mark.skip(reason="hypothesis is not installed")
        def stand_in():
            pass

        return stand_in

    return skipped


def example(*_, **__):
    return lambda test: test


assume = note = lambda *_: True
END
    cat >"$scratch/stand_in/hypothesis/strategies.py" <<'END'
"""Any strategy, which makes nothing."""


class _Nothing:
    def __call__(self, *_, **__):
        return self

    def __getattr__(self, name):
        return self


def __getattr__(name):
    return _Nothing()
END
    export PYTHONPATH=$scratch/stand_in${PYTHONPATH:+:$PYTHONPATH}
fi

tests_passed=no
mapfile -t files < <(grep -lE 'mark\.gpu\b' tests/test_*.py 2>/dev/null | grep -v 'tests/test_gpu_check.py')
if [ ${#files[@]} -eq 0 ]; then
    problem "tests: no file in tests/ has tests marked gpu"
else
    export SKD_TEST_REQUIRE=$required  # a backend that is missing fails its tests and does not skip them
    # Without pyproject.toml's options, which ask for pytest-xdist: the GPU is for one process at a time.
    part tests "$(share 34)" "$folder/tests.txt" "$python" -u -m pytest -o addopts= -ra --strict-markers -m gpu \
        -p no:cacheprovider --durations=10 "${files[@]}"
    tail -n 3 "$folder/tests.txt" 2>/dev/null | while read -r line; do say "    $line"; done
    if [ "$rc" -ne 0 ]; then
        problem "tests: $(why)"
    elif ! tail -n 3 "$folder/tests.txt" | grep -qE '(^|[^0-9])[1-9][0-9]* passed'; then
        problem "tests: none was run"
    else
        tests_passed=yes
    fi
fi

# --- Benchmarks and sanitizer ----------------------------------------------------------------------------------------

# What it is all for: skd, the published form and the copy, on recipes and on maps that fill the device.
first_benchmark() {
    part "first benchmark" "$(share 16)" "$scratch/log" "$python" -u -m skd.bench --device cuda --out "$folder" \
        --batches 128 --no-compile --seconds 2 --total-seconds "$(share 11)" --layouts tokens nchw \
        --variants published-nchw copy copy-graph skd-cuda skd-cuda-graph skd-triton skd-triton-graph
    judge_benchmark
    if [ ! -s "$folder/rows.csv" ]; then problem "first benchmark: it left no rows"; fi
}

# Everything else, until time is over; what the first one measured is not measured again.
full_benchmark() {
    local limit=$(($(left) - 10))
    if [ "$limit" -lt "$(share 3)" ]; then
        note "the full benchmark: there was no time for it"
        return
    fi
    part "full benchmark" "$limit" "$scratch/log" "$python" -u -m skd.bench --device cuda --out "$folder" --add \
        --what align magnitude intensity --seconds 2 --total-seconds $((limit * 8 / 10))
    if [ "$rc" -eq 124 ]; then
        note "the rest of the full benchmark: its time was over in the middle of a configuration"
    else
        judge_benchmark
    fi
}

judge_benchmark() { if [ "$rc" -ne 0 ]; then problem "$(why)"; fi; }

find_sanitizer() {
    local home
    command -v compute-sanitizer && return
    for home in "${CUDA_HOME:-}" "${CUDA_PATH:-}" /usr/local/cuda; do
        for home in "$home/bin" "$home/compute-sanitizer"; do
            if [ -x "$home/compute-sanitizer" ]; then echo "$home/compute-sanitizer" && return; fi
        done
    done
    return 1
}

sanitize() {
    local tool seconds output before
    # The kernels of Triton are compiled here, once; under the sanitizer they come from its cache.
    part "sanitizer's cases alone" "$(share 9)" "$folder/sanitizer.txt" "$python" benchmarks/sanitizer_cases.py \
        --seconds "$(share 3)" ${required//,/ }
    if [ "$rc" -ne 0 ]; then
        problem "$(why)"
        return
    fi
    if ! sanitizer=$(find_sanitizer); then
        note "memory accesses and races: compute-sanitizer is not found"
        return
    fi
    seconds=$(share 3)
    for tool in memcheck racecheck; do
        output=$scratch/$tool
        part "$tool" "$(share 14)" "$output" "$sanitizer" --tool "$tool" --error-exitcode 86 \
            --target-processes application-only "$python" benchmarks/sanitizer_cases.py \
            --seconds "$seconds" ${required//,/ }
        { echo "=== $tool"; cat "$output"; } >>"$folder/sanitizer.txt" 2>/dev/null
        if [ "$rc" -eq 86 ]; then
            problem "$tool found errors (sanitizer.txt)"
        elif grep -qiE 'device not supported|not supported on this' "$output" 2>/dev/null; then
            note "$tool: compute-sanitizer does not support this device or system"
        elif [ "$rc" -ne 0 ]; then
            problem "$(why)"
        elif ! grep -q '^sanitizer_cases: .* 0 wrong' "$output"; then
            problem "$tool ran no case"
        else
            say "    $(grep '^sanitizer_cases: ' "$output")"
        fi
    done
}

if [ "$tests_passed" = yes ]; then
    first_benchmark
else
    say "the benchmarks were not run: figures of results that are not known to be right count for nothing"
fi
sanitize
if [ "$tests_passed" = yes ]; then full_benchmark; fi
if [ -s "$folder/table.md" ]; then sed -n '/^## Goals/,/^## Times/p' "$folder/table.md" | grep '^- ' | head -n 40; fi
finish 0
