"""Adam with its two kinds of weight decay, and the clipping of gradients."""

import torch
from torch import Tensor, nn

from stabrun.config import OptimConfig


def make_optimizer(model: nn.Module, config: OptimConfig) -> torch.optim.Optimizer:
    """Fused AdamW (arXiv 1711.05101), or Adam with L2; matrices decay, gains, biases and scales do not.

    AdamW takes lr·λ·w from a weight; independent decay (arXiv 2309.14322) takes λ·w, times the schedule's share of the
    peak rate: λ is divided by the peak here, so that the rate in force brings back the share.
    """
    decay = config.weight_decay / (config.lr if config.decay_independent else 1.0)
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    kind = torch.optim.AdamW if config.decay == "decoupled" else torch.optim.Adam
    betas = (config.beta1, config.beta2)
    return kind([g for g in groups if g["params"]], config.lr, betas, config.eps, fused=True)


def set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = rate


def gradient_norms(gradients: list[Tensor]) -> tuple[Tensor, Tensor]:
    """The global L2 norm, 0-dim, and that of each gradient, `[len(gradients)]`; nothing waits for the device."""
    each = torch.stack(torch._foreach_norm(gradients))
    return torch.linalg.vector_norm(each), each


def clip_by_norm(gradients: list[Tensor], limit: float, total: Tensor) -> Tensor:
    """Scale the gradients in place by min(1, limit / (total + 1e-6)), as torch does. Returns 1 where it did, or 0."""
    factor = limit / (total + 1e-6)
    torch._foreach_mul_(gradients, factor.clamp(max=1.0))
    return (factor < 1).float()


def clip_by_value(gradients: list[Tensor], limit: float) -> Tensor:
    """Clamp each value to ±limit in place. Returns the share of values that it changed, 0-dim."""
    large = torch.stack([(gradient.abs() > limit).sum() for gradient in gradients]).sum()
    torch._foreach_clamp_max_(gradients, limit)
    torch._foreach_clamp_min_(gradients, -limit)
    return large.float() / sum(gradient.numel() for gradient in gradients)
