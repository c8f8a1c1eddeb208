"""The feed-forward network, the residual branch, and the block of two such branches."""

import torch
from torch import Tensor, nn

from stabrun.config import AttentionConfig, MlpConfig, ModelConfig
from stabrun.model import functional as F
from stabrun.model.attention import Attention
from stabrun.model.linear import make_linear
from stabrun.model.norm import make_norm, make_pre_norm
from stabrun.model.switches import ACTIVATIONS


class Mlp(nn.Module):
    """FC1, activation, FC2: `[B, T, d_model]` → same."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.fc1 = make_linear(config, "fc1")
        self.activation = ACTIVATIONS[config.mlp.activation].function
        self.fc2 = make_linear(config, "fc2")

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.activation(F, self.fc1(x)))


class LayerScale(nn.Module):
    """A learned scale per channel (arXiv 2103.17239)."""

    def __init__(self, width: int, start: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((width,), start))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight


class Residual(nn.Module):
    """A sub-layer on the residual stream with its norms before, inside and after: `[B, T, d_model]` → same."""

    def __init__(self, config: ModelConfig, norms: AttentionConfig | MlpConfig, layer: nn.Module, number: int) -> None:
        super().__init__()
        self.pre_norm = make_pre_norm(config, norms.pre_norm, number)
        self.layer = layer
        self.out_norm = make_norm(config, config.d_model, norms.out_norm)
        start = config.layer_scale
        self.scale = nn.Identity() if start is None else LayerScale(config.d_model, start)
        self.dropout = nn.Dropout(config.dropout) if config.dropout else nn.Identity()
        self.post_norm = make_norm(config, config.d_model, norms.post_norm)
        self.residual = config.residual

    def forward(self, x: Tensor) -> Tensor:
        branch = self.dropout(self.scale(self.out_norm(self.layer(self.pre_norm(x)))))
        return self.post_norm(x + branch if self.residual else branch)


class Block(nn.Module):
    """Attention, then the feed-forward network. `number` counts the blocks from 1."""

    def __init__(self, config: ModelConfig, seq_len: int, number: int) -> None:
        super().__init__()
        self.attn = Residual(config, config.attn, Attention(config, seq_len), number)
        self.mlp = Residual(config, config.mlp, Mlp(config), number)

    def forward(self, x: Tensor) -> Tensor:
        return self.mlp(self.attn(x))
