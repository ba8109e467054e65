"""From gradients to new weights: mixed precision, clipping, skipped updates, the learning rate, the moving average."""

from contextlib import AbstractContextManager, nullcontext

import torch
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.task import TrainingTask
from torch import Tensor

from skd.distill.config import EngineConfig, OptimConfig
from skd.distill.distributed import World
from skd.distill.errors import DistillError

AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}

SCALINGS = 24
"""How often in a row a gradient may overflow in float16: from torch's first scale of 2^16 that leads to 2^-8."""

_REFUSALS = (ValueError, TypeError, AssertionError, KeyError, ModuleNotFoundError)
"""What timm's optimizers raise for options they do not take."""


class Updates:
    """The optimizer of a task and all that stands between a loss and its step.

    Nothing here makes the host wait for the device, if torch has a fused form of the optimizer (AdamW, Adam, SGD):
    that one skips a bad update on the device. For others the decision is read from it at every update.

    Args:
        task: on its device, not yet compiled or wrapped.
        optim: filled in.
        engine: its ``amp``.
        world: whose processes decide together.
        epochs, updates_per_epoch: the length of the schedule.

    Raises:
        DistillError: timm does not know the optimizer, or cannot make it.
    """

    def __init__(
        self,
        task: TrainingTask,
        optim: OptimConfig,
        engine: EngineConfig,
        world: World,
        *,
        epochs: int,
        updates_per_epoch: int,
    ):
        self.task, self.optim, self.amp, self.world = task, optim, engine.amp, world
        self.updates_per_epoch = updates_per_epoch
        self.optimizer = make_optimizer(task, optim)
        self.scheduler, _ = create_scheduler_v2(
            self.optimizer,
            sched="cosine",
            num_epochs=epochs,
            warmup_epochs=min(optim.warmup_epochs, epochs - 1),
            warmup_lr=optim.warmup_lr,
            min_lr=optim.min_lr,
            step_on_epochs=optim.schedule != "step",
            updates_per_epoch=updates_per_epoch,
        )
        self.scaler = torch.amp.GradScaler(world.device.type) if engine.amp == "fp16" else None
        self._skips_on_device = getattr(self.optimizer, "_step_supports_amp_scaling", False)
        self._overflows = torch.zeros((), dtype=torch.int64, device=world.device)  # in a row
        self._parameters = [p for group in self.optimizer.param_groups for p in group["params"]]

    @property
    def lr(self) -> float:
        return self.optimizer.param_groups[0]["lr"]

    def autocast(self) -> AbstractContextManager:
        """The precision to compute in."""
        return autocast(self.amp, self.world.device)

    def begin(self, epoch: int, update: int) -> None:
        """Set the learning rate of an update, counted within its epoch."""
        if self.optim.schedule == "step":
            self.scheduler.step_update(epoch * self.updates_per_epoch + update)
        else:
            late = self.optim.schedule == "epoch-late"
            self.scheduler.step(max(epoch - late, 0))

    def backward(self, loss: Tensor) -> None:
        """Add the gradient of a loss; the update's loss is the mean of ``accumulate`` of them."""
        loss = loss / self.optim.accumulate
        (loss if self.scaler is None else self.scaler.scale(loss)).backward()

    def apply(self, bad: Tensor) -> Tensor:
        """Make the update, unless it is bad for any process.

        Args:
            bad: [] bool, whether a loss of this process was not finite.

        Returns:
            [] bool, whether it is bad: a loss or the gradient is not finite. (In float16 a gradient that overflows is
            the ordinary way to find the scale; the scaler skips it, and nothing is wrong before
            :data:`SCALINGS` of them in a row.)
        """
        if self.scaler is not None:
            bad = self._step_scaled(self.world.largest(bad.int()) > 0)
        else:
            norm = self._norm()
            bad = self.world.largest((bad | ~norm.isfinite()).int()) > 0
            self._step_unless(bad)
        self.optimizer.zero_grad()
        if self.optim.ema is not None:
            self.task.update_ema()
        return bad

    def _step_scaled(self, bad: Tensor) -> Tensor:
        # The scaler skips what is not finite, without the host; so a bad loss is made to look like it.
        gradient = next(p.grad for p in self._parameters if p.grad is not None)
        gradient += torch.where(bad, torch.nan, 0.0)
        self.scaler.unscale_(self.optimizer)
        overflows = ~self._norm().isfinite()
        self._overflows = (self._overflows + 1) * overflows
        self.scaler.step(self.optimizer)
        self.scaler.update()
        return bad | (self._overflows > SCALINGS)

    def _norm(self) -> Tensor:
        gradients = [p.grad for p in self._parameters if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients)
        if self.optim.clip_grad is not None:
            torch.nn.utils.clip_grads_with_norm_(self._parameters, self.optim.clip_grad, norm)
        return norm

    def _step_unless(self, bad: Tensor) -> None:
        if self._skips_on_device:
            self.optimizer.grad_scale, self.optimizer.found_inf = None, bad.float()
            self.optimizer.step()
        elif not bad:
            self.optimizer.step()

    def state_dict(self) -> dict:
        return {
            "optimizer": self.optimizer.state_dict(),
            "scaler": None if self.scaler is None else self.scaler.state_dict(),
            "overflows": self._overflows.cpu(),
        }

    def load_state_dict(self, state: dict) -> None:
        self.optimizer.load_state_dict(state["optimizer"])
        if self.scaler is not None:
            self.scaler.load_state_dict(state["scaler"])
        self._overflows.copy_(state["overflows"])


def autocast(amp: str, device: torch.device) -> AbstractContextManager:
    """The context of ``--amp``: "none", "bf16" or "fp16"."""
    return torch.autocast(device.type, AUTOCAST[amp]) if amp in AUTOCAST else nullcontext()


def make_optimizer(task: TrainingTask, optim: OptimConfig) -> torch.optim.Optimizer:
    """timm's optimizer for what the task trains, torch's fused form of it if there is one.

    Raises:
        DistillError: timm does not know it, or cannot make it.
    """
    module = task.get_trainable_module()
    options = {"opt": optim.opt, "lr": optim.lr, "weight_decay": optim.weight_decay}
    try:
        return create_optimizer_v2(module, **options, fused=True)
    except (RuntimeError, *_REFUSALS):  # it has no fused form, on this device; what else is wrong comes again
        pass
    try:
        return create_optimizer_v2(module, **options)
    except _REFUSALS as error:
        raise DistillError(f"timm cannot make the optimizer --opt {optim.opt}: {error}") from error
