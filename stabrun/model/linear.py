"""The linear layer of a block, plain or reparametrised by its spectral norm."""

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class SigmaLinear(nn.Linear):
    """σReparam (arXiv 2303.06296; a row of 2410.16682): y = x·Ŵᵀ + b with Ŵ = (γ/σ(W))·W.

    σ(W) = uᵀWv is differentiated through W with u and v held; `iterate` moves them by one step of the power
    iteration, once a training step and outside of the forward pass. γ starts at 1, or at σ(W₀) after `start`.
    """

    def __init__(self, n_in: int, n_out: int, bias: bool) -> None:
        super().__init__(n_in, n_out, bias)
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
    def start(self, at_sigma: bool) -> None:
        """Settle u and v on the initial weights; γ becomes 1 or σ(W₀)."""
        for _ in range(32):
            self.iterate()
        self.gamma.copy_(self.sigma() if at_sigma else torch.ones_like(self.gamma))

    def sigma(self) -> Tensor:
        """σ(W), 0-dim, in the weights' own precision: rounded, it would move the whole layer by steps."""
        with exactly(self.weight.device.type):
            return self.u @ (self.weight @ self.v)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight * (self.gamma / self.sigma()), self.bias)


def exactly(device: str) -> AbstractContextManager:
    """A context in which autocast rounds nothing."""
    return torch.autocast(device, enabled=False) if torch.amp.is_autocast_available(device) else nullcontext()


def make_linear(sigma_reparam: str, n_in: int, n_out: int, bias: bool) -> nn.Linear:
    return nn.Linear(n_in, n_out, bias) if sigma_reparam == "none" else SigmaLinear(n_in, n_out, bias)
