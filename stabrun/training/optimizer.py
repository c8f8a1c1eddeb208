"""The optimizers: AdamW or Adam with L2, StableAdamW, and Muon with AdamW."""

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from stabrun.config import OptimConfig, UserError
from stabrun.training.muon import MuonAdamW
from stabrun.training.stable_adamw import StableAdamW


def make_optimizer(model: nn.Module, config: OptimConfig) -> torch.optim.Optimizer:
    """The optimizer of `optim.kind`. Matrices decay; gains, biases and scales do not.

    - `adam`: fused AdamW (arXiv 1711.05101), or Adam with L2.
    - `stable_adamw`: AdamW with update clipping.
    - `muon`: Muon (Jordan 2024) for the weights of the linear layers inside the blocks, with torch's constants and the
      scale of arXiv 2502.16982, which makes its rates those of AdamW; AdamW for all other parameters.

    AdamW and Muon subtract lr·λ·w from a weight. Independent decay (arXiv 2309.14322) subtracts λ·w times the ratio of
    the current rate to the peak; the optimizers multiply by the current rate, so λ is divided by the peak here.
    Raises UserError if torch has no Muon.
    """
    decay = config.weight_decay / (config.lr if config.decay_independent else 1.0)
    parameters = [p for p in model.parameters() if p.requires_grad]
    if config.kind == "muon":
        layers = model.get_submodule("blocks").modules()
        hidden = [layer.weight for layer in layers if isinstance(layer, nn.Linear)]
        if not hasattr(torch.optim, "Muon"):
            raise UserError(f"optim.kind=muon: requires torch 2.9 or later, and this is {torch.__version__}.")
        muon = unwrapped(torch.optim.Muon)(hidden, config.lr, decay, adjust_lr_fn="match_rms_adamw")
        chosen = set(map(id, hidden))
        others = [p for p in parameters if id(p) not in chosen]
        return unwrapped(MuonAdamW)(muon, adam(by_decay(others, decay), config))
    if config.kind == "stable_adamw":
        groups = [group for parameter in parameters for group in by_decay([parameter], decay)]
        return unwrapped(StableAdamW)(adam(groups, config))
    return adam(by_decay(parameters, decay), config)


def by_decay(parameters: Sequence[nn.Parameter], decay: float) -> list[dict[str, Any]]:
    """Parameter groups: those that decay, and those that do not, unless there are none."""
    groups = [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def adam(groups: list[dict[str, Any]], config: OptimConfig) -> Any:
    """Fused AdamW, or Adam with L2."""
    kind = unwrapped(torch.optim.AdamW if config.decay == "decoupled" else torch.optim.Adam)
    return kind(groups, config.lr, (config.beta1, config.beta2), config.eps, fused=True)


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
