"""AdamW, and the clipping of the global gradient norm."""

import torch
from torch import Tensor, nn

from stabrun.config import OptimConfig


def make_optimizer(model: nn.Module, config: OptimConfig) -> torch.optim.AdamW:
    """Fused AdamW; matrices decay, gains, biases and scales do not."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    betas = (config.beta1, config.beta2)
    return torch.optim.AdamW([g for g in groups if g["params"]], config.lr, betas, config.eps, fused=True)


def set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = rate


def clip(gradients: list[Tensor], limit: float | None) -> tuple[Tensor, Tensor]:
    """Scale the gradients in place so that their global L2 norm is at most `limit`.

    Returns, as they were before clipping and without waiting for the device, the global norm, 0-dim, and the
    norm of each gradient, `[len(gradients)]`. The factor is min(1, limit / (norm + 1e-6)), as in torch.
    """
    each = torch.stack(torch._foreach_norm(gradients))
    total = torch.linalg.vector_norm(each)
    if limit is not None:
        torch._foreach_mul_(gradients, (limit / (total + 1e-6)).clamp(max=1.0))
    return total, each
