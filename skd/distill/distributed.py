"""The processes of a run: one, or those that torchrun started."""

import datetime
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor

from skd.distill.errors import DistillError

TIMEOUT = datetime.timedelta(minutes=10)
"""How long a process waits for the others; a dataset may take minutes to open on one of them."""


@dataclass(frozen=True)
class World:
    """Which of the processes this is.

    Attributes:
        rank, size: number of this process, and how many there are.
        device: where it computes.
    """

    rank: int = 0
    size: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    @property
    def is_main(self) -> bool:
        """Whether this is the process that writes files and speaks."""
        return self.rank == 0

    def total(self, x: Tensor) -> Tensor:
        """``x`` added up over the processes, in place."""
        if self.size > 1:
            dist.all_reduce(x)
        return x

    def largest(self, x: Tensor) -> Tensor:
        """The largest of each number of ``x`` over the processes, in place."""
        if self.size > 1:
            dist.all_reduce(x, op=dist.ReduceOp.MAX)
        return x

    def shared(self, value):
        """What the main process has for ``value``, on every process; of tensors, numbers, strings, lists and dicts."""
        if self.size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0)
        return box[0]

    def gathered(self, value) -> list:
        """The ``value`` of every process, by rank."""
        if self.size == 1:
            return [value]
        values = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    def wait(self) -> None:
        """Until every process is here."""
        if self.size > 1:
            dist.barrier()


def is_launched() -> bool:
    """Whether torchrun, or something like it, started this process as one of several."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def join(device: torch.device) -> World:
    """Meet the other processes; a process of its own is a world of one.

    Args:
        device: what was asked for; of CUDA devices each process on a machine takes its own.

    Raises:
        DistillError: there are fewer CUDA devices than processes on this machine.
    """
    if not is_launched():
        return World(device=device)
    if device.type == "cuda":
        local, devices = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
        if local >= devices:
            raise DistillError(
                f"process {local + 1} of this machine has no CUDA device, there are {devices}; "
                "start as many processes as there are devices, or give --device cpu"
            )
        device = torch.device("cuda", local)
        torch.cuda.set_device(device)
    if not dist.is_initialized():
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=TIMEOUT)
    return World(dist.get_rank(), dist.get_world_size(), device)


def leave(world: World) -> None:
    if world.size > 1 and dist.is_initialized():
        dist.destroy_process_group()


def is_connection_error(error: RuntimeError) -> bool:
    """Whether an error of torch means that another process is gone; gloo has no type of its own for it."""
    return isinstance(error, dist.DistError) or "gloo" in str(error).lower()


def launch(nproc: int, arguments: Sequence[str]) -> int:
    """Run ``skd distill`` with these arguments in ``nproc`` processes on this machine, with torchrun.

    Returns:
        torchrun's exit status.
    """
    environment = dict(os.environ)
    # As many threads as there are cores, shared out; torchrun alone would give every process one.
    environment.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // nproc)))
    # With torch's shared store a group of gloo processes that is started again often fails to meet.
    environment.setdefault("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={nproc}"]
    # The dashes keep torchrun from taking our --nproc for a short form of its own.
    return subprocess.call([*torchrun, "-m", "--", "skd", "distill", *arguments], env=environment)
