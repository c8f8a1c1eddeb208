"""The feed-forward network, the residual branch and the block of two of them."""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from stabrun.config import AttentionConfig, MlpConfig, ModelConfig
from stabrun.model.attention import Attention
from stabrun.model.linear import make_linear
from stabrun.model.norm import make_norm


def gelu_tanh(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")


def relu2(x: Tensor) -> Tensor:
    """The squared ReLU, max(x, 0)² (arXiv 2109.08668)."""
    return F.relu(x).square()


def swiglu(x: Tensor) -> Tensor:
    """silu(gate) · up, the two halves of x: `[..., 2w]` → `[..., w]` (arXiv 2002.05202)."""
    gate, up = x.chunk(2, dim=-1)
    return F.silu(gate) * up


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_tanh": gelu_tanh,
    "relu2": relu2,
    "swiglu": swiglu,
}


def ffn_width(config: ModelConfig) -> int:
    return config.mlp.width or 4 * config.d_model


class Mlp(nn.Module):
    """`[B, T, d_model]` → the same: FC1, activation, FC2."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        width = ffn_width(config)
        fan_out = 2 * width if config.mlp.activation == "swiglu" else width
        self.fc1 = make_linear(config.sigma_reparam, config.d_model, fan_out, config.bias)
        self.activation = ACTIVATIONS[config.mlp.activation]
        self.fc2 = make_linear(config.sigma_reparam, width, config.d_model, config.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.activation(self.fc1(x)))


class LayerScale(nn.Module):
    """A learned scale for each channel (arXiv 2103.17239)."""

    def __init__(self, width: int, start: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((width,), start))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight


class Residual(nn.Module):
    """One sub-layer on the residual stream, with its norms before, inside and after: `[B, T, d_model]` → same."""

    def __init__(self, config: ModelConfig, norms: AttentionConfig | MlpConfig, layer: nn.Module) -> None:
        super().__init__()

        def norm(present: bool) -> nn.Module:
            return make_norm(config.norm, config.d_model, config.bias, present)

        self.pre_norm, self.layer, self.out_norm = norm(norms.pre_norm), layer, norm(norms.out_norm)
        start = config.layer_scale
        self.scale = nn.Identity() if start is None else LayerScale(config.d_model, start)
        self.dropout = nn.Dropout(config.dropout) if config.dropout else nn.Identity()
        self.post_norm = norm(norms.post_norm)
        self.residual = config.residual

    def forward(self, x: Tensor) -> Tensor:
        branch = self.dropout(self.scale(self.out_norm(self.layer(self.pre_norm(x)))))
        return self.post_norm(x + branch if self.residual else branch)


class Block(nn.Module):
    """Attention, then the feed-forward network."""

    def __init__(self, config: ModelConfig, seq_len: int) -> None:
        super().__init__()
        self.attn = Residual(config, config.attn, Attention(config, seq_len))
        self.mlp = Residual(config, config.mlp, Mlp(config))

    def forward(self, x: Tensor) -> Tensor:
        return self.mlp(self.attn(x))
