"""Norms. All compute in fp32 (fp64 stays fp64) whatever the precision around them."""

import torch
from torch import Tensor, nn

from stabrun.config import ModelConfig
from stabrun.model import functional as F
from stabrun.model.switches import NORMS, NormKind


def wide(x: Tensor) -> Tensor:
    """`x` in fp32, or in fp64 if it already is."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


class Norm(nn.Module):
    """A norm over the last dimension, `[..., width]` → `[..., width]` in fp32, with an optional gain and bias."""

    def __init__(self, kind: NormKind, width: int, eps: float, affine: bool, bias: bool) -> None:
        super().__init__()
        self.kind, self.eps = kind, eps
        self.weight = nn.Parameter(torch.full((width,), 1.0 - kind.gain_offset)) if affine else None
        self.bias = nn.Parameter(torch.zeros(width)) if affine and bias else None

    def forward(self, x: Tensor) -> Tensor:
        gain: Tensor | None = self.weight
        if gain is not None and self.kind.gain_offset:
            gain = gain + self.kind.gain_offset
        return self.kind.function(F, wide(x), gain, self.bias, self.eps)


def make_norm(model: ModelConfig, width: int, present: bool = True) -> nn.Module:
    """The configured norm over `width` channels; the identity if it is not `present` or its kind is `none`."""
    kind = NORMS[model.norm.kind]
    if kind is None or not present:
        return nn.Identity()
    return Norm(kind, width, model.norm.eps, model.norm.affine, model.bias)
