"""Causal self-attention over the switches of `model.attn`."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from stabrun.config import AttentionConfig, ModelConfig, rotated
from stabrun.model.linear import exactly, make_linear
from stabrun.model.norm import make_norm, wide
from stabrun.model.position import Rotary


class AttentionCore(nn.Module):
    """Queries, keys and values, after norms and position encoding, to their attention: `[B, h, T, d]` each.

    The paper's logit is QKᵀ/√d; the weights are clip((ζ−γ)·softmax(c·tanh(β·logit/c)) + γ, 0, 1) over the
    past (2410.16682), each switch at rest by default. SDPA where neither cap nor clip is set; a plain path with
    logits and softmax in fp32 where one is.
    """

    def __init__(self, config: AttentionConfig, dropout: float) -> None:
        super().__init__()
        self.temp, self.cap = config.soft_temp, config.soft_cap
        self.low, self.high = config.clip_low, config.clip_high
        self.clips = (self.low, self.high) != (0.0, 1.0)
        self.dropout = dropout

    def logits(self, q: Tensor, k: Tensor) -> Tensor:
        """QKᵀ/√d in fp32, before temperature, cap and mask: `[B, h, T, T]`.

        Autocast is off, for its product would come rounded to bf16, unlike the sums inside SDPA.
        """
        with exactly(q.device.type):
            return (wide(q) * q.shape[-1] ** -0.5) @ wide(k).mT

    def shaped(self, logits: Tensor) -> Tensor:
        """What the softmax takes: logits tempered, capped and, where a key comes after its query, far below."""
        if self.temp != 1.0:
            logits = self.temp * logits
        if self.cap is not None:
            logits = self.cap * torch.tanh(logits / self.cap)
        return logits + future(logits)

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        dropout = self.dropout if self.training else 0.0
        if self.cap is None and not self.clips:
            scale = self.temp * q.shape[-1] ** -0.5
            return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, dropout_p=dropout)
        weights = self.shaped(self.logits(q, k)).softmax(-1)
        if self.clips:
            weights = ((self.high - self.low) * weights + self.low).clamp(0, 1)
        return F.dropout(weights, dropout).to(v.dtype) @ v


def future(logits: Tensor) -> Tensor:
    """A causal mask to add, `[T, T]`: 0, and the lowest finite number where a key comes after its query."""
    time = logits.shape[-1]
    lowest = torch.finfo(logits.dtype).min
    return torch.full((time, time), lowest, dtype=logits.dtype, device=logits.device).triu(1)


class Attention(nn.Module):
    """`[B, T, d_model]` → the same: project to Q, K, V; norm and place them; attend; project."""

    def __init__(self, config: ModelConfig, seq_len: int) -> None:
        super().__init__()
        width, attn = config.d_model, config.attn
        self.n_head, self.head_dim = config.n_head, width // config.n_head
        self.norm_last = attn.norm_after_position

        def norm(where: str) -> nn.Module:
            size = width if where == "full" else self.head_dim
            inner = make_norm(config.norm, size, config.bias, present=where != "none")
            return FullWidth(inner) if where == "full" else inner

        self.qkv = make_linear(config.sigma_reparam, width, 3 * width, config.bias)
        self.q_norm, self.k_norm, self.v_norm = norm(attn.qk_norm), norm(attn.qk_norm), norm(attn.v_norm)
        rope = config.position.kind == "rope"
        self.rotary = Rotary(rotated(config), seq_len, config.position.rope_base) if rope else nn.Identity()
        self.core = AttentionCore(attn, config.dropout)
        self.proj = make_linear(config.sigma_reparam, width, width, config.bias)

    def forward(self, x: Tensor) -> Tensor:
        batch, time, width = x.shape
        q, k, v = self.qkv(x).view(batch, time, 3, self.n_head, self.head_dim).unbind(2)
        q, k, v = self.place(q, self.q_norm), self.place(k, self.k_norm), self.v_norm(v)
        out = self.core(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
        return self.proj(out.transpose(1, 2).reshape(batch, time, width))

    def place(self, x: Tensor, norm: nn.Module) -> Tensor:
        return norm(self.rotary(x)) if self.norm_last else self.rotary(norm(x))


class FullWidth(nn.Module):
    """A norm over all heads at once, for tensors that are split by head: `[B, T, h, d]` → the same."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.norm = norm

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x.flatten(2)).view(x.shape)
