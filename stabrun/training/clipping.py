"""Gradient clipping: a class for each value of `optim.clip_by`. Nothing waits for the device."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from stabrun.config import OptimConfig
from stabrun.record.jsonl import jsonable, number

ADAGC_RATIO, ADAGC_DECAY, ADAGC_WARMUP = 1.05, 0.98, 100  # λ_rel, β and the first steps (arXiv 2502.11034)
ZCLIP_Z, ZCLIP_DECAY, ZCLIP_WARMUP = 2.5, 0.97, 25  # z threshold, α and the first steps (arXiv 2504.02507)
ZCLIP_EPS = 1e-6  # added to the standard deviation, as in the published code


class Clipping:
    """Leaves gradients as they are. The rules are derived from it.

    A rule may remember numbers of earlier updates in `memory`. They are part of each checkpoint, equal on all ranks,
    and contain no update that is skipped or whose gradient is not finite.
    """

    keys: tuple[str, ...] = ()
    always = False  # whether the rule clips if `optim.clip` is null

    def __init__(self, parameters: Sequence[Tensor], limit: float) -> None:
        self.parameters, self.limit = parameters, limit
        self.memory: dict[str, Tensor] = {}

    def clip(self, norms: Tensor, total: Tensor, skipped: Tensor | None = None) -> tuple[Tensor, ...]:
        """Clip the gradients in place. Returns the share of their values that this changed, 0-dim, if there is a rule.

        `norms` are those of the gradients, `[parameters]`, and `total` is the norm of all, 0-dim. `skipped`, 0-dim, is
        1 if the update is left out.
        """
        return ()

    def gradients(self) -> list[Tensor]:
        return [p.grad for p in self.parameters if p.grad is not None]

    def state(self) -> dict[str, Any]:
        """What is remembered, for a checkpoint, of JSON's types."""
        return {name: jsonable(values.flatten().tolist()) for name, values in self.memory.items()}

    def load(self, state: dict[str, Any]) -> None:
        for name, values in state.items():
            self.memory[name].copy_(torch.tensor([number(value) for value in values]).view_as(self.memory[name]))


class ByNorm(Clipping):
    """Scales all gradients by min(1, limit / (norm of all + 1e-6)), as torch does."""

    keys = ("grad/clipped",)

    def clip(self, norms: Tensor, total: Tensor, skipped: Tensor | None = None) -> tuple[Tensor, ...]:
        nn.utils.clip_grads_with_norm_(self.parameters, self.limit, total)
        return ((self.limit / (total + 1e-6) < 1).float(),)


class ByValue(Clipping):
    """Clamps each value of the gradients to ±limit."""

    keys = ("grad/clipped",)

    def clip(self, norms: Tensor, total: Tensor, skipped: Tensor | None = None) -> tuple[Tensor, ...]:
        gradients = self.gradients()
        large = torch.stack([(gradient.abs() > self.limit).sum() for gradient in gradients]).sum()
        nn.utils.clip_grad_value_(self.parameters, self.limit)
        return (large.float() / sum(gradient.numel() for gradient in gradients),)


class AdaGC(Clipping):
    """Limits the norm of each gradient to a multiple of its usual norm γ (AdaGC, arXiv 2502.11034).

    After the first steps each gradient is scaled by min(1, λγ/‖g‖), and γ ← β·γ + (1 − β)·‖clipped g‖. In the first
    steps all are scaled by min(1, limit / norm of all), and γ is the smallest ‖clipped g‖.

    Inferred: a gradient of zeros does not enter γ. Initial weights may make one, and its γ would stay 0.
    """

    keys = ("grad/clipped",)
    always = True

    def __init__(self, parameters: Sequence[Tensor], limit: float) -> None:
        super().__init__(parameters, limit)
        device = parameters[0].device
        self.sizes = torch.tensor([float(p.numel()) for p in parameters], device=device)
        self.memory["usual"] = torch.full((len(parameters),), math.inf, device=device)  # γ
        self.memory["updates"] = torch.zeros((), device=device)

    @torch.no_grad()
    def clip(self, norms: Tensor, total: Tensor, skipped: Tensor | None = None) -> tuple[Tensor, ...]:
        usual, updates = self.memory["usual"], self.memory["updates"]
        first = updates < ADAGC_WARMUP
        factors = torch.where(first, shrinking(total, self.limit), shrinking(norms, ADAGC_RATIO * usual))
        torch._foreach_mul_(self.gradients(), factors.unbind())
        clipped, counts = norms * factors, applied(total, skipped)
        smallest, mean = torch.minimum(usual, clipped), usual.lerp(clipped, 1 - ADAGC_DECAY)
        new = torch.where(first | usual.isinf(), smallest, mean)
        self.memory["usual"] = torch.where(counts & (norms > 0), new, usual)
        self.memory["updates"] = updates + counts
        return ((self.sizes * (factors < 1)).sum() / self.sizes.sum(),)


class ZClip(Clipping):
    """Limits the norm of all gradients where it is an outlier among the recent ones (ZClip, arXiv 2504.02507).

    With z = (norm − μ)/σ above the threshold z₀, gradients are scaled to the norm μ + (z₀²/z)·σ. μ and σ² are moving
    averages of this limited norm. In the first steps they are those of all steps so far, and only `limit` applies. It
    does later, too. As in the published code, `limit` does not change what μ and σ are computed from.
    """

    keys = ("grad/clipped",)
    always = True

    def __init__(self, parameters: Sequence[Tensor], limit: float) -> None:
        super().__init__(parameters, limit)
        for name in ("mean", "variance", "updates"):
            self.memory[name] = torch.zeros((), device=parameters[0].device)

    @torch.no_grad()
    def clip(self, norms: Tensor, total: Tensor, skipped: Tensor | None = None) -> tuple[Tensor, ...]:
        mean, variance, updates = (self.memory[name] for name in ("mean", "variance", "updates"))
        first, sigma = updates < ZCLIP_WARMUP, variance.sqrt()
        z = (total - mean) / (sigma + ZCLIP_EPS)
        usual = torch.where(~first & (z > ZCLIP_Z), mean + ZCLIP_Z**2 / z * sigma, total)
        factor = shrinking(total, usual.clamp(max=self.limit))
        torch._foreach_mul_(self.gradients(), factor)
        counts = applied(total, skipped)
        # The variance over the first steps in the form of Welford (1962), then that of the paper.
        weight = torch.where(first, 1 / (updates + 1), 1 - ZCLIP_DECAY)
        new = mean.lerp(usual, weight)
        squares = torch.where(first, usual - mean, usual - new) * (usual - new)
        self.memory["mean"] = torch.where(counts, new, mean)
        self.memory["variance"] = torch.where(counts, variance.lerp(squares, weight), variance)
        self.memory["updates"] = updates + counts
        return ((factor < 1).float(),)


RULES: dict[str, type[Clipping]] = {"norm": ByNorm, "value": ByValue, "adagc": AdaGC, "zclip": ZClip}


def make_clipping(config: OptimConfig, parameters: Sequence[Tensor]) -> Clipping:
    """The configured rule for the gradients of `parameters`."""
    rule = RULES[config.clip_by]
    if config.clip is None and not rule.always:
        return Clipping(parameters, math.inf)
    return rule(parameters, math.inf if config.clip is None else config.clip)


def shrinking(norm: Tensor, limit: Tensor | float) -> Tensor:
    """The factors that bring norms down to their limits: limit / norm where the norm is larger, else 1."""
    return torch.where(norm > limit, limit / norm, 1.0)


def applied(total: Tensor, skipped: Tensor | None) -> Tensor:
    """Whether an update is made of a gradient with this norm, 0-dim: it is finite, and not `skipped`."""
    finite = torch.isfinite(total)
    return finite if skipped is None else finite & (skipped == 0)
