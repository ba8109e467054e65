"""A run that is killed again and again: python killed_runs.py OUT KILLS SEED OPTIONS

Every life is a fork of one process that has done the imports. It ends by SIGKILL at a random moment after a random
number of updates, which it tells through a pipe; the last one may finish. One line is printed per life.
"""

import json
import os
import random
import signal
import sys
import time
from pathlib import Path

import torch

from skd.distill.config import DistillConfig
from skd.distill.engine import Training
from skd.distill.experiment import run

MOST_UPDATES, MOST_SECONDS = 3, 0.1
"""Between two kills."""


def live(config: DistillConfig, pipe: int) -> int:
    """One run in a process of its own."""
    original = Training._update

    def update(self, batches):
        original(self, batches)
        os.write(pipe, b".")

    Training._update = update
    sys.stdout = open(os.devnull, "w")  # noqa: SIM115  (until the process ends)
    return run(config)


def await_updates(pipe: int, count: int) -> bool:
    """Whether the life came that far."""
    return all(os.read(pipe, 1) for _ in range(count))


def main(out: Path, kills: int, seed: int, options: dict) -> int:
    torch.set_num_threads(1)  # a pool of threads would not survive the fork
    config = DistillConfig().replace(**options).replace(run={**options.get("run", {}), "out": out, "resume": "auto"})
    draw = random.Random(seed)
    for life in range(kills + 1):
        reading, writing = os.pipe()
        child = os.fork()
        if child == 0:
            os.close(reading)
            os._exit(live(config, writing))
        os.close(writing)
        updates = draw.randint(0, MOST_UPDATES) if life < kills else 10**9
        if await_updates(reading, updates) and life < kills:
            time.sleep(draw.uniform(0, MOST_SECONDS))
            os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        os.close(reading)
        rows = len((out / "metrics.csv").read_text().splitlines()) - 1 if (out / "metrics.csv").exists() else 0
        print(f"{updates} updates, {rows} epochs, {'killed' if os.WIFSIGNALED(status) else 'ended'}", flush=True)
    return os.waitstatus_to_exitcode(status)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), json.loads(sys.argv[4])))
