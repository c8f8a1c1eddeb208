"""An optimizer that is made of others."""

import torch
from torch import Tensor


class Composed(torch.optim.Optimizer):
    """Its parameter groups and its state are those of its parts, so that checkpoints and the probe see one optimizer.

    Like fused optimizers, it changes nothing if the attribute `found_inf`, 0-dim, is set and 1. Derived classes see to
    that in `step`.
    """

    _step_supports_amp_scaling = True  # GradScaler then sets `found_inf` instead of waiting for it

    def __init__(self, *parts: torch.optim.Optimizer) -> None:
        super().__init__([group for part in parts for group in part.param_groups], {})
        for part in parts:
            self.state.update(part.state)
            part.state = self.state

    def found(self) -> Tensor | None:
        """1 if the gradient is not finite or the step is to be skipped, else 0; None if nothing checks that."""
        return getattr(self, "found_inf", None)
