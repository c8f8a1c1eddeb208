"""Adam with decoupled or L2 weight decay."""

import inspect
from typing import Any

import torch
from torch import nn

from stabrun.config import OptimConfig


def make_optimizer(model: nn.Module, config: OptimConfig) -> torch.optim.Optimizer:
    """Fused AdamW (arXiv 1711.05101), or Adam with L2. Matrices decay; gains, biases and scales do not.

    AdamW subtracts lr·λ·w from a weight. Independent decay (arXiv 2309.14322) subtracts λ·w times the ratio of the
    current rate to the peak; AdamW multiplies by the current rate, so λ is divided by the peak here.
    """
    decay = config.weight_decay / (config.lr if config.decay_independent else 1.0)
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    kind = unwrapped(torch.optim.AdamW if config.decay == "decoupled" else torch.optim.Adam)
    betas = (config.beta1, config.beta2)
    return kind([g for g in groups if g["params"]], config.lr, betas, config.eps, fused=True)


def unwrapped(kind: type[torch.optim.Optimizer]) -> Any:
    """The optimizer class without torch.compile's wrappers of its methods: they import Dynamo, which takes 3 s.

    Optimizers are never compiled here.
    """
    names = ("add_param_group", "zero_grad", "state_dict", "load_state_dict", "step")
    methods = {name: inspect.unwrap(getattr(kind, name)) for name in names}
    return type(kind.__name__, (kind,), methods | {"step": torch.no_grad()(methods["step"])})


def set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Set the learning rate of all parameter groups."""
    for group in optimizer.param_groups:
        group["lr"] = rate
