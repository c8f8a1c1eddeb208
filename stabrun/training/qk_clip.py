"""QK-Clip: the weights of Q and K of a head whose attention logits are too large are scaled down after the update."""

import math

import torch
from torch import Tensor, nn

from stabrun.model.attention import Attention, AttentionCore
from stabrun.observe.hooks import Hook
from stabrun.observe.reductions import largest_logits
from stabrun.training.clipping import applied, shrinking
from stabrun.training.ranks import Ranks


class QKClip:
    """QK-Clip for multi-head attention (Kimi K2, arXiv 2507.20534, section 2.1).

    S is the largest logit QKᵀ/√d of a head over visible positions, in all sequences of a step. If S is above the
    threshold τ, the rows of W_Q and W_K of the head, and their biases, are multiplied by √(τ/S) after the update.

    Hooks compute S in each pass with gradients, a second time beside the attention itself. A step that is skipped
    changes no weight.
    """

    def __init__(self, model: nn.Module, threshold: float) -> None:
        self.threshold = threshold
        self.layers = [module for module in model.modules() if isinstance(module, Attention)]
        device = next(model.parameters()).device
        self.peaks = [torch.full((layer.n_head,), -math.inf, device=device) for layer in self.layers]
        for layer, peak in zip(self.layers, self.peaks, strict=True):
            watch(layer.core, peak)

    @torch.no_grad()
    def step(self, ranks: Ranks, total: Tensor, skipped: Tensor | None) -> None:
        """Scale the heads. `total` is the norm of the gradient and `skipped` whether the update was skipped, 0-dim."""
        peaks = ranks.gather(torch.cat(self.peaks)).amax(0)
        factors = torch.where(applied(total, skipped), shrinking(peaks, self.threshold).sqrt(), 1.0)
        split = factors.split([layer.n_head for layer in self.layers])
        for layer, own, peak in zip(self.layers, split, self.peaks, strict=True):
            peak.fill_(-math.inf)
            for tensor in (layer.qkv.weight, layer.qkv.bias):
                if tensor is not None:  # rows: Q of all heads, then K, then the others
                    parts = len(tensor) // (layer.n_head * layer.head_dim)
                    tensor.view(parts, layer.n_head, -1)[:2].mul_(own[:, None])


def watch(core: AttentionCore, peak: Tensor) -> None:
    """Let `peak`, `[heads]`, rise to the largest logits of each pass with gradients."""

    def after(core: AttentionCore, args: tuple[Tensor, ...], output: Tensor) -> None:
        if torch.is_grad_enabled():
            with torch.no_grad():
                peak.copy_(torch.maximum(peak, largest_logits(core, *args[:2])))

    core.register_forward_hook(Hook(after))
