"""Initial weights. A scheme maps a matrix's name and shape to its standard deviation; 0 gives zeros."""

import math

import torch
from torch import nn

from stabrun.config import ModelConfig
from stabrun.model.linear import SigmaLinear

RESIDUAL_OUTPUTS = ("proj.weight", "fc2.weight")
CUT = 0.87962566103423978  # standard deviation of a standard normal variable truncated at ±2


def fan_in(name: str, shape: torch.Size, config: ModelConfig) -> float:
    """1/√fan_in for linear layers, 1/√d_model for embeddings."""
    return shape[1] ** -0.5


def gpt2(name: str, shape: torch.Size, config: ModelConfig) -> float:
    """0.02; 0.02/√(2·n_layer) for the layers that write to the residual stream (GPT-2)."""
    return 0.02 * ((2 * config.n_layer) ** -0.5 if name.endswith(RESIDUAL_OUTPUTS) else 1.0)


def xavier(name: str, shape: torch.Size, config: ModelConfig) -> float:
    """√(2/(fan_in + fan_out)) (Glorot and Bengio 2010); Q, K and V count as one matrix."""
    return math.sqrt(2.0 / sum(shape))


def kaiming(name: str, shape: torch.Size, config: ModelConfig) -> float:
    """√(2/fan_in), which preserves the variance through a ReLU (arXiv 1502.01852)."""
    return math.sqrt(2.0) / math.sqrt(shape[1])


def small(name: str, shape: torch.Size, config: ModelConfig) -> float:
    """√(2/(5·d_model)), times √(1/(2·n_layer)) for the layers that write to the residual stream (arXiv 2312.16903)."""
    return math.sqrt(2 / (5 * config.d_model) / (2 * config.n_layer if name.endswith(RESIDUAL_OUTPUTS) else 1))


def zero_out(name: str, shape: torch.Size, config: ModelConfig) -> float:
    """Like fan_in, but 0 for the layers that write to the residual stream: each block starts as the identity."""
    return 0.0 if name.endswith(RESIDUAL_OUTPUTS) else fan_in(name, shape, config)


def zero(name: str, shape: torch.Size, config: ModelConfig) -> float:
    """0 everywhere, so that nothing is learned: an example of docs/lessons.md."""
    return 0.0


SCHEMES = {
    "fan_in": fan_in,
    "trunc_fan_in": fan_in,
    "gpt2": gpt2,
    "xavier": xavier,
    "kaiming": kaiming,
    "small": small,
    "zero_out": zero_out,
    "zero": zero,
}


@torch.no_grad()
def initialize(model: nn.Module, config: ModelConfig, seed: int) -> None:
    """Draw every matrix of `model` from a normal distribution, in the order of its parameters; set biases to zero.

    trunc_fan_in truncates the distribution at two standard deviations, and widens it so that the truncated one has the
    scheme's standard deviation.
    """
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if parameter.dim() == 2:
            std = SCHEMES[config.init](name, parameter.shape, config)
            if config.init == "trunc_fan_in":
                std /= CUT
                nn.init.trunc_normal_(parameter, 0.0, std, -2 * std, 2 * std, generator=generator)
            else:
                parameter.normal_(0.0, std, generator=generator)
        elif name.endswith("bias"):
            parameter.zero_()
    for layer in model.modules():
        if isinstance(layer, SigmaLinear):
            layer.start()
