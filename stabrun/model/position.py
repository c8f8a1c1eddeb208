"""Rotary position encoding (RoPE, arXiv 2104.09864)."""

import torch
from torch import Tensor, nn


class Rotary(nn.Module):
    """Rotates pairs of the first `width` channels of each head by an angle that grows with the position.

    Channel i and channel i + width/2 form a pair, turned by position · base^(−2i/width). `[..., T, d]` → same.
    """

    def __init__(self, width: int, seq_len: int, base: float) -> None:
        super().__init__()
        self.width = width
        frequency = base ** (-torch.arange(0, width, 2, dtype=torch.float64) / width)
        angle = torch.outer(torch.arange(seq_len, dtype=torch.float64), frequency)
        self.cos: Tensor
        self.sin: Tensor
        self.register_buffer("cos", angle.cos().float(), persistent=False)
        self.register_buffer("sin", angle.sin().float(), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        cos, sin = self.cos[: x.shape[-2]], self.sin[: x.shape[-2]]
        first, second, rest = x.split([self.width // 2, self.width // 2, x.shape[-1] - self.width], dim=-1)
        turned = first * cos - second * sin, second * cos + first * sin
        return torch.cat([*turned, rest] if rest.shape[-1] else turned, dim=-1)
