"""Causal self-attention with the switches of `model.attn`."""

from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention
from torch.utils.checkpoint import checkpoint

from stabrun.config import AttentionConfig, ModelConfig, rotated
from stabrun.model.linear import make_linear, no_autocast
from stabrun.model.norm import make_norm, wide
from stabrun.model.position import Rotary
from stabrun.model.switches import FLEX, QUERIES, SDPA, attention_path, clips


class AttentionCore(nn.Module):
    """Attention of queries, keys and values that are already normalized and position-encoded: `[B, h, T, d]` each.

    The paper's logit is QKᵀ/√d. The weights are clip((ζ−γ)·softmax(c·tanh(β·logit/c)) + γ, 0, 1) over the past
    (arXiv 2410.16682); by default each of these switches is off. `attention_path` tells how they are computed. No
    matrix of T × T is kept for the backward pass if T is above `QUERIES`.
    """

    def __init__(self, config: AttentionConfig, head_dim: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.config, self.head_dim = config, head_dim
        self.temp, self.cap = config.soft_temp, config.soft_cap
        self.low, self.high = config.clip_low, config.clip_high
        self.dropout = dropout
        self.mask: BlockMask | None = None  # of the flex path; set by `mask_for`

    def path(self, device: str) -> str:
        return attention_path(self.config, self.head_dim, self.dropout, device)

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        path = self.path(q.device.type)
        if path == SDPA:
            scale, dropout = self.temp * q.shape[-1] ** -0.5, self.dropout if self.training else 0.0
            return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, dropout_p=dropout)
        if path == FLEX:
            return self.flex(q, k, v)
        blocks = range(0, q.shape[2], QUERIES)
        if len(blocks) == 1:
            return self.explicit(q, k, v)
        return torch.cat([self.recomputed(q, k, v, start) for start in blocks], dim=2)

    def recomputed(self, q: Tensor, k: Tensor, v: Tensor, start: int) -> Tensor:
        """`explicit` of the block of queries from `start` on, computed again in the backward pass."""
        stop = start + QUERIES
        part = q[:, :, start:stop], k[:, :, :stop], v[:, :, :stop]
        out: Tensor = checkpoint(self.explicit, *part, use_reentrant=False, preserve_rng_state=self.dropout > 0)
        return out

    def explicit(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """The outputs of the last Q queries: `[B, h, Q, d]`, and `[B, h, K, d]` twice → `[B, h, Q, d]`."""
        weights = self.shaped(self.logits(q, k)).softmax(-1)
        if clips(self.config):
            weights = ((self.high - self.low) * weights + self.low).clamp(0, 1)
        return F.dropout(weights, self.dropout, self.training).to(v.dtype) @ v

    def logits(self, q: Tensor, k: Tensor) -> Tensor:
        """QKᵀ/√d in fp32, before temperature, cap and mask: `[B, h, Q, K]`.

        Autocast is off: it would round the product to bf16, unlike the sums inside SDPA. With `train.precision=tf32`
        the factors are rounded to tf32, as in every matrix product of that precision.
        """
        with no_autocast(q.device.type):
            return (wide(q) * q.shape[-1] ** -0.5) @ wide(k).mT

    def shaped(self, logits: Tensor) -> Tensor:
        """The input of the softmax: logits with temperature, cap and causal mask applied."""
        return self.capped(logits) + causal_mask(logits)

    def capped(self, logits: Tensor) -> Tensor:
        if self.temp != 1.0:
            logits = self.temp * logits
        if self.cap is not None:
            logits = self.cap * torch.tanh(logits / self.cap)
        return logits

    def flex(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """The same by torch's flex_attention, which applies temperature and cap inside a fused kernel."""

        def score(logit: Tensor, b: Tensor, h: Tensor, query: Tensor, key: Tensor) -> Tensor:
            return self.capped(logit)

        kernel = flex_attention if torch.compiler.is_compiling() else compiled_flex_attention()
        low = torch.get_autocast_dtype(q.device.type) if torch.is_autocast_enabled(q.device.type) else v.dtype
        out: Tensor = kernel(q.to(low), k.to(low), v.to(low), score_mod=score, block_mask=self.mask)
        return out

    def mask_for(self, time: int, device: torch.device) -> None:
        """Prepare the causal mask of the flex path, outside of compiled code."""
        self.mask = causal_blocks(time, device) if self.path(device.type) == FLEX else None


def allow_graphs() -> None:
    """Let torch.compile make more graphs of a function than 8: a worker trains many arms, each with its own."""
    import torch._dynamo.config as dynamo

    dynamo.recompile_limit = dynamo.accumulated_recompile_limit = 1 << 16


@cache
def compiled_flex_attention() -> Any:
    """flex_attention is a fused kernel only if it is compiled, and otherwise keeps the T × T logits."""
    allow_graphs()
    return torch.compile(flex_attention, fullgraph=True, dynamic=False)


@cache
def causal_blocks(time: int, device: torch.device) -> BlockMask:
    """Which blocks of keys each block of queries attends to; the same object for all layers."""
    return create_block_mask(lambda b, h, query, key: query >= key, None, None, time, time, device)


def causal_mask(logits: Tensor) -> Tensor:
    """A mask to add, `[Q, K]`: the lowest finite number where a key comes after its query, else 0.

    The queries are those of the last Q keys.
    """
    queries, keys = logits.shape[-2:]
    lowest = torch.finfo(logits.dtype).min
    return torch.full((queries, keys), lowest, dtype=logits.dtype, device=logits.device).triu(1 + keys - queries)


class Attention(nn.Module):
    """Projection to Q, K and V, their norms and positions, attention, projection: `[B, T, d_model]` → same.

    With `model.attn.gate`, a fourth part of the first projection gates the output of attention, before the second, by
    its sigmoid (arXiv 2505.06708, the gate G1).
    """

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
        self.core = AttentionCore(attn, self.head_dim, config.dropout)
        self.proj = make_linear(config, "proj")

    def forward(self, x: Tensor) -> Tensor:
        batch, time, width = x.shape
        q, k, v, *gate = self.qkv(x).view(batch, time, -1, self.n_head, self.head_dim).unbind(2)
        q, k, v = self.encode(q, self.q_norm), self.encode(k, self.k_norm), self.v_norm(v)
        out = self.core(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)).transpose(1, 2)
        if gate:
            out = out * torch.sigmoid(gate[0])
        return self.proj(out.reshape(batch, time, width))

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
