"""Muon for the matrices inside the blocks, AdamW for everything else."""

import torch

from stabrun.training.composed import Composed


class MuonAdamW(Composed):
    """`torch.optim.Muon`, which orthogonalizes momentum, for its parameters, and a fused AdamW for the others.

    Muon has no `found_inf` of its own: its weights and momenta are copied before a step that may be skipped.
    """

    def __init__(self, muon: torch.optim.Muon, adamw: torch.optim.AdamW) -> None:
        self.matrices = [p for group in muon.param_groups for p in group["params"]]
        for matrix in self.matrices:
            muon.state[matrix]["momentum_buffer"] = torch.zeros_like(matrix)
        self.muon, self.adamw = muon, adamw
        super().__init__(muon, adamw)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        found = self.found()
        moments = [self.state[matrix]["momentum_buffer"] for matrix in self.matrices]
        changed = [] if found is None else [*self.matrices, *moments]
        before = [tensor.clone() for tensor in changed]
        self.adamw.found_inf = found  # type: ignore[attr-defined]
        self.adamw.step()
        self.muon.step()
        if found is not None:
            for tensor, kept in zip(changed, before, strict=True):
                tensor.copy_(torch.where(found > 0, kept, tensor))
