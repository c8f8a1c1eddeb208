"""Causal self-attention with the switches of `model.attn`."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from stabrun.config import AttentionConfig, ModelConfig, rotated
from stabrun.model.linear import make_linear, no_autocast
from stabrun.model.norm import make_norm, wide
from stabrun.model.position import Rotary


class AttentionCore(nn.Module):
    """Attention of queries, keys and values that are already normalized and position-encoded: `[B, h, T, d]` each.

    The paper's logit is QKᵀ/√d. The weights are clip((ζ−γ)·softmax(c·tanh(β·logit/c)) + γ, 0, 1) over the past
    (arXiv 2410.16682); by default each of these switches is off. Without cap and clip this is SDPA. With either, logits
    and softmax are computed explicitly, in fp32.
    """

    def __init__(self, config: AttentionConfig, dropout: float) -> None:
        super().__init__()
        self.temp, self.cap = config.soft_temp, config.soft_cap
        self.low, self.high = config.clip_low, config.clip_high
        self.clips = (self.low, self.high) != (0.0, 1.0)
        self.dropout = dropout

    def logits(self, q: Tensor, k: Tensor) -> Tensor:
        """QKᵀ/√d in fp32, before temperature, cap and mask: `[B, h, T, T]`.

        Autocast is off: it would round the product to bf16, unlike the sums inside SDPA.
        """
        with no_autocast(q.device.type):
            return (wide(q) * q.shape[-1] ** -0.5) @ wide(k).mT

    def shaped(self, logits: Tensor) -> Tensor:
        """The input of the softmax: logits with temperature, cap and causal mask applied."""
        if self.temp != 1.0:
            logits = self.temp * logits
        if self.cap is not None:
            logits = self.cap * torch.tanh(logits / self.cap)
        return logits + causal_mask(logits)

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        dropout = self.dropout if self.training else 0.0
        if self.cap is None and not self.clips:
            scale = self.temp * q.shape[-1] ** -0.5
            return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, dropout_p=dropout)
        weights = self.shaped(self.logits(q, k)).softmax(-1)
        if self.clips:
            weights = ((self.high - self.low) * weights + self.low).clamp(0, 1)
        return F.dropout(weights, dropout).to(v.dtype) @ v


def causal_mask(logits: Tensor) -> Tensor:
    """A mask to add, `[T, T]`: the lowest finite number where a key comes after its query, else 0."""
    time = logits.shape[-1]
    lowest = torch.finfo(logits.dtype).min
    return torch.full((time, time), lowest, dtype=logits.dtype, device=logits.device).triu(1)


class Attention(nn.Module):
    """Projection to Q, K and V, their norms and positions, attention, projection: `[B, T, d_model]` → same."""

    def __init__(self, config: ModelConfig, seq_len: int) -> None:
        super().__init__()
        attn = config.attn
        self.n_head, self.head_dim = config.n_head, config.d_model // config.n_head
        self.norm_last = attn.norm_after_position

        def norm(where: str) -> nn.Module:
            if where == "full":
                return FullWidth(make_norm(config, config.d_model))
            return make_norm(config, self.head_dim, present=where == "head")

        self.qkv = make_linear(config, "qkv")
        self.q_norm, self.k_norm, self.v_norm = norm(attn.qk_norm), norm(attn.qk_norm), norm(attn.v_norm)
        width = rotated(config)
        self.rotary = Rotary(width, seq_len, config.position.rope_base) if width else nn.Identity()
        self.core = AttentionCore(attn, config.dropout)
        self.proj = make_linear(config, "proj")

    def forward(self, x: Tensor) -> Tensor:
        batch, time, width = x.shape
        q, k, v = self.qkv(x).view(batch, time, 3, self.n_head, self.head_dim).unbind(2)
        q, k, v = self.encode(q, self.q_norm), self.encode(k, self.k_norm), self.v_norm(v)
        out = self.core(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
        return self.proj(out.transpose(1, 2).reshape(batch, time, width))

    def encode(self, x: Tensor, norm: nn.Module) -> Tensor:
        """Norm and position encoding of Q or K, in the configured order: `[B, T, h, d]` → same."""
        return norm(self.rotary(x)) if self.norm_last else self.rotary(norm(x))


class FullWidth(nn.Module):
    """A norm over all heads at once of a tensor that is split by head: `[B, T, h, d]` → same."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.norm = norm

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x.flatten(2)).view(x.shape)
