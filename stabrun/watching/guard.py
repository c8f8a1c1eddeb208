"""A guard of an optimizer: an update whose gradient is not finite is not applied."""

from collections.abc import Callable
from functools import wraps
from types import MethodType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from stabrun.observe.norms import dense


class Guard:
    """Replaces `optimizer.step`: if a gradient holds NaN or infinity, parameters and optimizer state stay as they are.

    `skipped` counts the updates that were left out, `last_skipped` tells about the last call. A closure is evaluated
    before the check. Each call waits for the device once.

    `norm` returns a norm over all gradients if the caller has computed it for this step, or None; it spares the guard
    its own. Ranks decide alike where their gradients are equal (DDP), and where they hold parts of the same parameters
    as DTensor (FSDP2): these exchange one number. In other cases `group` names the ranks that have to decide alike.
    The gradients of a skipped update remain, as after a call of `step`.

    A GradScaler leaves out updates too, mostly without a call of `step`: these are not counted here.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        norm: Callable[[], Tensor | None] | None = None,
        group: dist.ProcessGroup | None = None,
    ) -> None:
        self.optimizer, self.norm, self.group = optimizer, norm, group
        self.skipped, self.last_skipped = 0, False
        self._active = True
        self._own = optimizer.__dict__.get("step")  # set by learning-rate schedulers; else the method of the class
        step = optimizer.step

        @wraps(step)  # with the marks that learning-rate schedulers and GradScaler look for
        def guarded(optimizer: Optimizer, closure: Callable[[], Any] | None = None, *args: Any, **options: Any) -> Any:
            if not self._active:
                return step(*args, **options) if closure is None else step(closure, *args, **options)
            if closure is not None:
                with torch.enable_grad():
                    loss = closure()
            self.last_skipped = not self._finite()
            if self.last_skipped:
                self.skipped += 1
                optimizer._opt_called = True  # type: ignore[attr-defined]  # or schedulers warn that it was not
                return None if closure is None else loss
            return step(*args, **options) if closure is None else step(_replayed(closure, loss), *args, **options)

        self._guarded = MethodType(guarded, optimizer)  # schedulers that come later ask for its `__func__`
        optimizer.step = self._guarded  # type: ignore[method-assign]

    def remove(self) -> None:
        """Restore `optimizer.step`. If it has been wrapped again since, the guard stays there and does nothing."""
        self._active = False
        if self.optimizer.__dict__.get("step") is self._guarded:
            if self._own is None:
                del self.optimizer.step
            else:
                self.optimizer.step = self._own  # type: ignore[method-assign]

    def _finite(self) -> bool:
        total = self.norm() if self.norm is not None else None
        if isinstance(total, DTensor):
            total = total.full_tensor()
        return bool(torch.isfinite(self._largest() if total is None else total))

    @torch.no_grad()
    def _largest(self) -> Tensor:
        """The largest |gradient|, which unlike the L2 norm does not overflow; NaN if one is."""
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        largest = torch.nn.utils.get_total_norm(
            [dense(_local(p.grad)) for p in parameters if p.grad is not None], float("inf")
        )
        groups = {
            group for p in parameters if isinstance(p, DTensor) for group in p.device_mesh.get_all_groups()
        }  # of all parameters, so that every rank takes part
        if self.group is not None:
            groups.add(self.group)
        if groups:
            device = next((_local(p).device for p in parameters), largest.device)
            largest = (~torch.isfinite(largest)).to(device, torch.float32)  # a maximum of ranks may lose NaN
            for group in sorted(groups, key=lambda group: group.group_name):
                dist.all_reduce(largest, dist.ReduceOp.MAX, group)
            largest = torch.where(largest > 0, torch.inf, largest)
        return largest


def _local(x: Tensor) -> Tensor:
    """What this rank holds of a tensor."""
    return x.to_local() if isinstance(x, DTensor) else x


def _replayed(closure: Callable[[], Any], loss: Any) -> Callable[[], Any]:
    """A closure that returns the loss of an evaluation that is done, and evaluates again from the second call on."""
    done = [loss]
    return lambda: done.pop() if done else closure()
