"""Initial weights: a scheme is a function from a matrix's name and shape to its standard deviation."""

import torch
from torch import nn

from stabrun.config import ModelConfig
from stabrun.model.linear import SigmaLinear

RESIDUAL_OUTPUTS = ("proj.weight", "fc2.weight")


def fan_in(name: str, shape: torch.Size, config: ModelConfig) -> float:
    """1/√fan_in for linear layers; 1/√d_model for embeddings."""
    return shape[1] ** -0.5


def gpt2(name: str, shape: torch.Size, config: ModelConfig) -> float:
    """0.02, and 0.02/√(2·n_layer) for the layers that write to the residual stream (GPT-2)."""
    return 0.02 * ((2 * config.n_layer) ** -0.5 if name.endswith(RESIDUAL_OUTPUTS) else 1.0)


SCHEMES = {"fan_in": fan_in, "gpt2": gpt2}


@torch.no_grad()
def initialise(model: nn.Module, config: ModelConfig, seed: int) -> None:
    """Draw every matrix of `model` from a normal distribution, in the order of its parameters; biases are zero."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if parameter.dim() == 2:
            std = SCHEMES[config.init](name, parameter.shape, config)
            parameter.normal_(0.0, std, generator=generator)
        elif name.endswith("bias"):
            parameter.zero_()
    for layer in model.modules():
        if isinstance(layer, SigmaLinear):
            layer.start(config.sigma_reparam == "sigma")
