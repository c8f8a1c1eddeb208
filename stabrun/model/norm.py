"""Norms, all computed in fp32 (fp64 stays) whatever the precision around them."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from stabrun.config import NormConfig


def wide(x: Tensor) -> Tensor:
    """`x` in fp32, or in fp64 where it is that already."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


class Norm(nn.Module):
    """A norm over the last dimension, `[..., width]` → `[..., width]` in fp32, with an optional gain and bias.

    `gain_offset` is added to the stored gain: 1 for layernorm1p (NeMo), whose weight decay pulls towards 1.
    """

    def __init__(self, width: int, eps: float, affine: bool, bias: bool, gain_offset: float = 0.0) -> None:
        super().__init__()
        self.width, self.eps, self.gain_offset = (width,), eps, gain_offset
        self.weight = nn.Parameter(torch.full((width,), 1.0 - gain_offset)) if affine else None
        self.bias = nn.Parameter(torch.zeros(width)) if affine and bias else None

    def gain(self) -> Tensor | None:
        return self.weight + self.gain_offset if self.gain_offset and self.weight is not None else self.weight


class LayerNorm(Norm):
    """(x − mean) / √(var + ε) · gain + bias."""

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(wide(x), self.width, self.gain(), self.bias, self.eps)


class RMSNorm(Norm):
    """x / √(mean(x²) + ε) · gain + bias."""

    def forward(self, x: Tensor) -> Tensor:
        y = F.rms_norm(wide(x), self.width, self.gain(), self.eps)
        return y if self.bias is None else y + self.bias


def make_norm(config: NormConfig, width: int, bias: bool, present: bool = True) -> nn.Module:
    """The configured norm over `width` channels; the identity where it is not `present` or of kind none."""
    if not present or config.kind == "none":
        return nn.Identity()
    if config.kind == "rmsnorm":
        return RMSNorm(width, config.eps, config.affine, bias)
    offset = 1.0 if config.kind == "layernorm1p" else 0.0
    return LayerNorm(width, config.eps, config.affine, bias, offset)
