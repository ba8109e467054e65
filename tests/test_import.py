"""What importing touches, and what a forked or compiled process can still do."""

import os
import pathlib
import subprocess
import sys

import pytest

from skd.ops import backends


def run(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_import_loads_neither_torch_nor_the_extension():
    run("import sys, skd; assert not {'torch', 'triton', 'timm', 'skd._cpu'} & set(sys.modules), sorted(sys.modules)")


def test_the_loss_loads_neither_triton_nor_timm_and_leaves_cuda_alone():
    run(
        "import sys; sys.modules['triton'] = None\n"  # importing it would raise
        "import torch, skd\n"
        "skd.SpectralLoss()(torch.randn(1, 4, 7, 7), torch.randn(1, 8, 7, 7))\n"
        "assert 'timm' not in sys.modules and 'matplotlib' not in sys.modules\n"
        "assert not torch.cuda.is_initialized()"
    )


def test_an_unknown_name_is_an_attribute_error_that_lists_the_known():
    run(
        "import skd\n"
        "try: skd.Spectral\n"
        "except AttributeError as error: assert 'SpectralLoss' in str(error)\n"
        "else: raise SystemExit('no error')"
    )
    assert "SpectralLoss" in run("import skd; print(dir(skd))")


def test_a_forked_child_computes_with_threads_of_its_own():
    if backends.backends()["cpu"] is not True:
        pytest.skip("no compiled CPU kernels in this installation")
    run(
        "import os, torch, skd\n"
        "torch.set_num_threads(2); torch.manual_seed(0)\n"
        "s, t = torch.randn(32, 64, 14, 14), torch.randn(32, 64, 14, 14)\n"
        "loss = skd.spectral_loss(s, t, backend='cpu').item()\n"
        "child = os.fork()\n"
        "if child == 0:\n"
        "    os._exit(0 if skd.spectral_loss(s, t, backend='cpu').item() == loss else 1)\n"
        "assert os.waitpid(child, 0)[1] == 0"
    )


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere a fork before skd is loaded is not noticed")
@pytest.mark.parametrize("imported", ["in the parent", "in the child"])
def test_a_child_forked_before_the_first_call_does_not_wait_for_threads_it_lost(imported):
    if backends.backends()["cpu"] is not True:
        pytest.skip("no compiled CPU kernels in this installation")
    run(
        ("import skd\n" if imported == "in the parent" else "") + "import os, signal, torch\n"
        "torch.set_num_threads(2)\n"
        "s, t = torch.randn(32, 64, 14, 14), torch.randn(32, 64, 14, 14)\n"
        "(s * t).sum(); (s @ t.mT).sum()\n"  # PyTorch begins its threads
        "child = os.fork()\n"
        "if child == 0:\n"
        "    signal.alarm(60)\n"
        "    import skd\n"
        "    os._exit(0 if skd.spectral_loss(s, t, backend='cpu').isfinite() else 1)\n"
        "assert os.waitpid(child, 0)[1] == 0"
    )


def test_a_child_forked_from_a_busy_process_still_has_a_pool():
    if backends.backends()["cpu"] is not True:
        pytest.skip("no compiled CPU kernels in this installation")
    run(
        "import os, threading, torch, skd\n"
        "torch.set_num_threads(2)\n"
        "s, t = torch.randn(32, 64, 14, 14), torch.randn(32, 64, 14, 14)\n"
        "call = lambda: skd.spectral_loss(s, t, backend='cpu').item()\n"
        "expected, going = call(), True\n"
        "def keep_busy():\n"
        "    while going: call()\n"
        "busy = threading.Thread(target=keep_busy); busy.start()\n"
        "for _ in range(5):\n"
        "    child = os.fork()\n"
        "    if child == 0:\n"
        "        same = call() == expected\n"
        "        threads = len(os.listdir('/proc/self/task')) if os.path.isdir('/proc/self/task') else 2\n"
        "        os._exit(0 if same and threads >= 2 else 1)\n"
        "    assert os.waitpid(child, 0)[1] == 0\n"
        "going = False; busy.join()"
    )


@pytest.mark.skipif(
    not pathlib.Path("/proc/thread-self/schedstat").exists(), reason="the system does not count threads' time"
)
@pytest.mark.skipif((os.cpu_count() or 1) < 2, reason="on one core a second thread may come too late")
@pytest.mark.parametrize(
    "call",
    [
        "skd.spectral_loss(s, t, backend='cpu')",
        "skd.spectral_loss(s, t, 'magnitude', backend='cpu')",
        "skd.spectral_intensity(s, backend='cpu')",
    ],
)
def test_a_call_runs_on_pytorchs_threads_and_begins_none(call):
    if backends.backends()["cpu"] is not True:
        pytest.skip("no compiled CPU kernels in this installation")
    if not backends.load("cpu").shares_threads():
        pytest.skip("this PyTorch has no OpenMP to share")
    run(
        "import os, time, torch, skd\n"
        "def busy():\n"  # nanoseconds of every thread
        "    tasks = os.listdir('/proc/self/task')\n"
        "    return {task: int(open(f'/proc/self/task/{task}/schedstat').read().split()[0]) for task in tasks}\n"
        "torch.set_num_threads(2)\n"
        "s, t = torch.randn(64, 64, 28, 28), torch.randn(64, 64, 28, 28)\n"
        "(s @ t.mT).sum()\n"  # PyTorch begins its threads
        f"call = lambda: {call}\n"
        "before, begin = busy(), time.monotonic()\n"
        "while time.monotonic() < begin + 0.5: call()\n"
        "after = busy()\n"
        "assert before.keys() == after.keys()\n"
        "assert sum(after[task] - before[task] > 1e7 for task in after) == 2, (before, after)"
    )


def test_many_python_threads_at_once_get_the_same_number():
    if backends.backends()["cpu"] is not True:
        pytest.skip("no compiled CPU kernels in this installation")
    run(
        "import concurrent.futures as f, torch, skd\n"
        "torch.set_num_threads(2)\n"
        "s, t = torch.randn(16, 64, 14, 14), torch.randn(16, 64, 14, 14)\n"
        "call = lambda _: skd.spectral_loss(s, t, backend='cpu').item()\n"
        "with f.ThreadPoolExecutor(6) as pool: assert len(set(pool.map(call, range(200)))) == 1"
    )
