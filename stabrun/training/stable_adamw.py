"""AdamW with the update clipping of AdaFactor."""

from typing import Any

import torch
from torch import Tensor

from stabrun.training.composed import Composed


class StableAdamW(Composed):
    """StableAdamW (arXiv 2304.13013, algorithm 2): AdamW with a learning rate for each tensor, η / max(1, RMS).

    RMS = √(mean(g² / max(v̂, ε²))) with the bias-corrected second moment v̂ that includes this step's gradient g. It is
    above 1 where the second moment is too small for the gradient. Weight decay uses the lowered rate, too.

    `adamw` is fused, and each of its parameter groups has one parameter.
    """

    def __init__(self, adamw: torch.optim.AdamW) -> None:
        self.adamw = adamw
        super().__init__(adamw)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        rates = [group["lr"] for group in self.param_groups]
        for group in self.param_groups:
            group["lr"] = group["lr"] / self.rms(group).clamp(min=1)
        self.adamw.found_inf = self.found()  # type: ignore[attr-defined]
        self.adamw.step()
        for group, rate in zip(self.param_groups, rates, strict=True):
            group["lr"] = rate

    def rms(self, group: dict[str, Any]) -> Tensor:
        """The RMS of the only parameter of a group, 0-dim."""
        (parameter,) = group["params"]
        state, beta2 = self.state[parameter], group["betas"][1]
        square = parameter.grad.square()
        if not state:  # the second moment of the first step is g²
            return square.new_ones(())
        steps = (state["step"] + 1).to(square.dtype)
        moment = state["exp_avg_sq"].lerp(square, 1 - beta2).div_(1 - beta2**steps)
        return square.div_(moment.clamp_(min=group["eps"] ** 2)).mean().sqrt()
