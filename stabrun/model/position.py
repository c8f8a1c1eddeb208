"""Rotary position encoding (RoPE, arXiv 2104.09864)."""

import torch
from torch import Tensor, nn


class Rotary(nn.Module):
    """Rotates pairs of the first `width` channels of each head: `[B, T, h, d]` → same.

    Channels i and i + width/2 form a pair, rotated by the angle position · base^(−2i/width).
    """

    def __init__(self, width: int, seq_len: int, base: float) -> None:
        super().__init__()
        self.width = width
        frequency = base ** (-torch.arange(0, width, 2, dtype=torch.float64) / width)
        angle = torch.outer(torch.arange(seq_len, dtype=torch.float64), frequency)
        self.cos: Tensor
        self.sin: Tensor
        cos, sin = (table.to(torch.get_default_dtype())[:, None] for table in (angle.cos(), angle.sin()))
        # With the signs of (−sin, +sin) in the table, a rotation is one product and one fused multiply-add.
        self.register_buffer("cos", torch.cat([cos, cos], -1), persistent=False)
        self.register_buffer("sin", torch.cat([-sin, sin], -1), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        if self.width == x.shape[-1]:
            return self.rotate(x)
        return torch.cat([self.rotate(x[..., : self.width]), x[..., self.width :]], dim=-1)

    def rotate(self, x: Tensor) -> Tensor:
        cos, sin = self.cos[: x.shape[1]], self.sin[: x.shape[1]]
        return torch.addcmul(x * cos, x.roll(self.width // 2, dims=-1), sin)
