"""The linear layers of a block, plain or reparametrized by their spectral norm."""

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from stabrun.config import ModelConfig
from stabrun.model.switches import linears


class SigmaLinear(nn.Linear):
    """σReparam (arXiv 2303.06296; a row of 2410.16682): y = x·Ŵᵀ + b with Ŵ = (γ/σ(W))·W.

    σ(W) = uᵀWv is differentiated through W with u and v held constant. `iterate` moves u and v by one step of the power
    iteration; it is called once per training step, outside the forward pass. γ starts at 1, or at σ(W₀).
    """

    def __init__(self, n_in: int, n_out: int, bias: bool, start_at_sigma: bool = False) -> None:
        super().__init__(n_in, n_out, bias)
        self.start_at_sigma = start_at_sigma
        self.gamma = nn.Parameter(torch.ones(()))
        self.u: Tensor
        self.v: Tensor
        self.register_buffer("u", torch.full((n_out,), n_out**-0.5))
        self.register_buffer("v", torch.full((n_in,), n_in**-0.5))

    @torch.no_grad()
    def iterate(self) -> None:
        self.v.copy_(F.normalize(self.weight.T @ self.u, dim=0))
        self.u.copy_(F.normalize(self.weight @ self.v, dim=0))

    @torch.no_grad()
    def start(self) -> None:
        """Move u and v close to the singular vectors of the initial weights, and set γ."""
        for _ in range(32):
            self.iterate()
        self.gamma.copy_(self.sigma() if self.start_at_sigma else torch.ones_like(self.gamma))

    def sigma(self) -> Tensor:
        """σ(W), 0-dim, in the weights' own precision: rounding it would move the whole layer in steps."""
        with no_autocast(self.weight.device.type):
            return self.u @ (self.weight @ self.v)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight * (self.gamma / self.sigma()), self.bias)


def no_autocast(device: str) -> AbstractContextManager:
    """A context in which autocast is off."""
    # Not torch.amp.is_autocast_available, which torch.compile cannot trace before torch 2.13.
    return nullcontext() if device == "meta" else torch.autocast(device, enabled=False)


def make_linear(model: ModelConfig, site: str) -> nn.Linear:
    """The configured linear layer at `site` of a block: qkv, proj, fc1 or fc2."""
    n_in, n_out = linears(model)[site]
    if model.sigma_reparam == "none":
        return nn.Linear(n_in, n_out, model.bias)
    return SigmaLinear(n_in, n_out, model.bias, start_at_sigma=model.sigma_reparam == "sigma")
