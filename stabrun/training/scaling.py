"""Dynamic loss scaling for fp16: gradients too small for it are lifted, and a step that overflows is left out."""

from typing import Any

import torch
from torch import Tensor

from stabrun.config import TrainConfig


class LossScale:
    """torch's GradScaler (arXiv 1710.03740) and what it did, as scalars on the device, so that nothing waits for them.

    The scale halves after a step whose gradient is not finite, which is skipped, and doubles after
    `train.loss_scale_growth` finite ones. In other precisions it does nothing and has no `keys`.
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
        """Divide the gradients by the scale; returns it, 0-dim, or None where there is none.

        Notes the share of zeros in the gradients of `weights`: what fell below fp16's smallest number, 6e-8, and what
        is zero by its own (a dead ReLU).
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
        """Update the weights, unless a gradient was not finite."""
        self.scaler.step(optimizer)
        self.scaler.update()

    def values(self) -> tuple[Tensor, ...]:
        """The step's scale, whether it was skipped (0 or 1), and the share of underflow: as many as `keys`."""
        if not self.keys:
            return ()
        return self.used, (self.scaler.scale(self.one) < self.used).float(), self.underflow

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps: numbers alone."""
        return self.scaler.state_dict()

    def load(self, state: dict[str, Any]) -> None:
        if self.keys and state:
            self.scaler.load_state_dict(state)
