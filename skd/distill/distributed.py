"""The processes of a run: one, or those that torchrun started."""

import datetime
import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor

from skd.distill.errors import DistillError, first_line

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

    def largest_of(self, values: Sequence[float]) -> list[float]:
        """The largest of each number over the processes, without waiting for any device."""
        return self.largest(torch.tensor(values, dtype=torch.float64)).tolist()

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
        DistillError: there are fewer CUDA devices than processes on this machine, or the others do not come.
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
        try:
            dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo", timeout=TIMEOUT)
        except RuntimeError as error:
            raise DistillError(
                f"the processes of this run do not find each other ({first_line(error)}); start it again"
            ) from error
    return World(dist.get_rank(), dist.get_world_size(), device)


def leave(world: World) -> None:
    if world.size > 1 and dist.is_initialized():
        dist.destroy_process_group()


def is_connection_error(error: RuntimeError) -> bool:
    """Whether an error of torch means that another process is gone; gloo has no type of its own for it."""
    return isinstance(error, dist.DistError) or "gloo" in str(error).lower()


def launch(nproc: int, arguments: Sequence[str]) -> int:
    """Run ``skd distill`` with these arguments in ``nproc`` processes on this machine, with torchrun.

    SIGTERM and Ctrl-C are passed on; the processes have half a minute to save what they have.

    Returns:
        The exit status of the process that failed first, 0 if none did, or 128 and the number of the signal.
    """
    from torch.distributed import run as torchrun
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    # As many threads as there are cores, shared out; torchrun alone would give every process one.
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // nproc)))
    # With torch's shared store a group of gloo processes that is started again often fails to meet.
    os.environ.setdefault("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")
    # The processes say themselves what was wrong.
    logging.getLogger("torch.distributed.elastic.multiprocessing").setLevel(logging.CRITICAL)
    # The dashes keep torchrun from taking our --nproc for a short form of its own.
    options = ["--standalone", f"--nproc-per-node={nproc}", "-m", "--", "skd", "distill", *arguments]
    try:
        torchrun.run(torchrun.parse_args(options))
    except ChildFailedError as error:
        _, failure = error.get_first_failure()
        return failure.exitcode if failure.exitcode > 0 else 128 - failure.exitcode
    except SignalException as stopped:
        return 128 + stopped.sigval
    return 0
