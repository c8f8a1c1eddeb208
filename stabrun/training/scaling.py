"""Dynamic loss scaling for fp16: keeps small gradients from underflowing and skips steps that overflow."""

from typing import Any

import torch
from torch import Tensor

from stabrun.config import TrainConfig


class LossScale:
    """torch's GradScaler (arXiv 1710.03740), with its effects as scalars on the device, so that nothing waits for them.

    A step whose gradient is not finite is skipped, and halves the scale; `train.loss_scale_growth` finite steps in a
    row double it. In other precisions this does nothing and `keys` is empty.
    """

    def __init__(self, config: TrainConfig, device: torch.device) -> None:
        enabled = config.precision == "fp16"
        self.keys = ("scale/loss_scale", "scale/skipped", "scale/underflow") if enabled else ()
        self.one = torch.ones((), device=device)
        self.scaler = torch.amp.GradScaler(
            device.type, config.loss_scale, growth_interval=config.loss_scale_growth, enabled=enabled
        )

    def scaled(self, loss: Tensor) -> Tensor:
        return self.scaler.scale(loss)

    def unscale(self, optimizer: torch.optim.Optimizer, weights: list[Tensor]) -> Tensor | None:
        """Divide the gradients by the scale. Returns the scale, 0-dim, or None if there is none.

        Also measures the share of zeros in the gradients of `weights`: values below fp16's smallest number, 6e-8, and
        values that are zero for other reasons, such as a dead ReLU.
        """
        if not self.keys:
            return None
        self.used = self.scaler.scale(self.one)
        gradients = [weight.grad for weight in weights if weight.grad is not None]
        alive = torch.stack([torch.count_nonzero(gradient) for gradient in gradients]).sum()
        self.underflow = 1 - alive / sum(gradient.numel() for gradient in gradients)
        self.scaler.unscale_(optimizer)
        return self.used

    def step(self, optimizer: torch.optim.Optimizer, skipped: Tensor | None = None) -> None:
        """Update the weights unless a gradient is not finite in fp16, or `skipped`, 0-dim, is 1.

        Fused optimizers look at `found_inf` on the device, where GradScaler puts it, and then change nothing.
        """
        if skipped is None:
            self.scaler.step(optimizer)
        else:
            overflow = self.overflow(optimizer) if self.keys else torch.zeros_like(skipped)
            optimizer.grad_scale, optimizer.found_inf = None, torch.maximum(skipped, overflow)  # type: ignore[attr-defined]
            optimizer.step()
            del optimizer.grad_scale, optimizer.found_inf  # type: ignore[attr-defined]
        self.scaler.update()

    def overflow(self, optimizer: torch.optim.Optimizer) -> Tensor:
        """1 if a gradient is not finite, else 0; 0-dim."""
        gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        largest = torch.nn.utils.get_total_norm(gradients, float("inf"))
        return (~torch.isfinite(largest)).float()

    def values(self) -> tuple[Tensor, ...]:
        """The step's scale, whether it was skipped (0 or 1), and the share of underflow: one value per key."""
        if not self.keys:
            return ()
        return self.used, (self.scaler.scale(self.one) < self.used).float(), self.underflow

    def state(self) -> dict[str, Any]:
        """The state for a checkpoint: numbers only."""
        return self.scaler.state_dict()

    def load(self, state: dict[str, Any]) -> None:
        if self.keys and state:
            self.scaler.load_state_dict(state)
