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

    def step(self, optimizer: torch.optim.Optimizer) -> None:
        """Update the weights unless a gradient is not finite."""
        self.scaler.step(optimizer)
        self.scaler.update()

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
