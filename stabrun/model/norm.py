"""Norms. All compute in fp32 (fp64 stays fp64) whatever the precision around them."""

import torch
from torch import Tensor, nn

from stabrun.config import ModelConfig
from stabrun.model import functional as F
from stabrun.model.switches import NORMS, NormKind, norm_vectors


def wide(x: Tensor) -> Tensor:
    """`x` in fp32, or in fp64 if it already is."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


class Norm(nn.Module):
    """A norm over the last dimension, `[..., width]` → `[..., width]` in fp32, times a constant `scale`."""

    def __init__(self, model: ModelConfig, kind: NormKind, width: int, scale: float) -> None:
        super().__init__()
        self.kind, self.eps, self.scale = kind, model.norm.eps, scale
        gain, bias = norm_vectors(model)
        self.weight = nn.Parameter(torch.full((width,), 1.0 - kind.gain_offset)) if gain else None
        self.bias = nn.Parameter(torch.zeros(width)) if bias else None
        self.alpha = nn.Parameter(torch.tensor(model.norm.alpha)) if kind.learned_alpha else None

    def forward(self, x: Tensor) -> Tensor:
        gain: Tensor | None = self.weight
        if gain is not None and self.kind.gain_offset:
            gain = gain + self.kind.gain_offset
        y: Tensor = self.kind.function(F, wide(x), gain, self.bias, self.eps if self.alpha is None else self.alpha)
        return y if self.scale == 1 else y * self.scale


def make_norm(model: ModelConfig, width: int, present: bool = True, scale: float = 1.0) -> nn.Module:
    """The configured norm over `width` channels; the identity if it is not `present` or its kind is `none`."""
    kind = NORMS[model.norm.kind]
    if kind is None or not present:
        return nn.Identity()
    return Norm(model, kind, width, scale)


def make_pre_norm(model: ModelConfig, present: bool, number: int) -> nn.Module:
    """The norm before a sub-layer of block `number`, counted from 1."""
    norm = make_norm(model, model.d_model, present, number**-0.5 if model.norm.depth_scaled else 1.0)
    return nn.Sequential(make_norm(model, model.d_model, present), norm) if model.norm.doubled else norm
