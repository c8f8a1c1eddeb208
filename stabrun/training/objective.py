"""The training objective: cross-entropy and additional terms."""

import torch
from torch import Tensor
from torch.nn import functional as F


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean −log p of the targets, in nats: `[B, T, V]` and `[B, T]` → 0-dim."""
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


def z_loss(logits: Tensor, weight: float) -> Tensor:
    """weight · mean (log Z)², Z = Σ exp(logit), in nats² (PaLM, arXiv 2204.02311, section 5): `[B, T, V]` → 0-dim."""
    return weight * torch.logsumexp(logits, dim=-1).square().mean()
