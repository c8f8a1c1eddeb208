"""Every tensor is on the model's device, shown on the meta device."""

import pytest
import torch
from helpers import VARIANTS
from reference import small
from torch import nn
from torch.nn import functional as F
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from stabrun.config import ObserveConfig
from stabrun.model.gpt import meta_gpt
from stabrun.observe.probe import Probe
from stabrun.observe.sites import model_sites

BATCH, SEQ_LEN = 2, 10
EXTRA = {
    "learned": ("model.position.kind=learned", "model.bias=true", "model.tied=true"),
    "swiglu": ("model.mlp.activation=swiglu", "model.norm.kind=rmsnorm", "model.position.rope_fraction=0.5"),
    "full": ("model.attn.qk_norm=full", "model.attn.v_norm=full", "model.norm.kind=layernorm1p"),
    "dropout": ("model.dropout=0.1", "model.attn.soft_cap=5.0", "model.layer_scale=0.1"),
}


class DeviceGuard(TorchDispatchMode):
    """Raises at any operation whose inputs or outputs include a tensor of another device, in either pass."""

    def __init__(self, device):
        super().__init__()
        self.device, self.seen = device, []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in pytree.tree_leaves((args, kwargs, out)):
            if isinstance(tensor, torch.Tensor) and tensor.device.type != self.device:
                raise AssertionError(f"{func}: a tensor of {tensor.device}, shape {tuple(tensor.shape)}")
        self.seen.append(str(func))
        return out


def setting(name, *words):
    return small("baseline", *EXTRA[name], *words) if name in EXTRA else small(name, *words)


def probed(model):
    return Probe(model, ObserveConfig(), model_sites(model), BATCH, model.cores)


def loss_of(model, tokens):
    return F.cross_entropy(model(tokens).flatten(0, 1), tokens.flatten())


@pytest.mark.parametrize("step", [0, 1], ids=["slow", "fast"])
@pytest.mark.parametrize("variant", [*VARIANTS, *EXTRA])
def test_no_tensor_is_made_on_another_device(variant, step):
    model = meta_gpt(setting(variant).model, SEQ_LEN)
    probe = probed(model)
    probe.arm(step)
    tokens = torch.zeros(BATCH, SEQ_LEN, dtype=torch.long, device="meta")
    with DeviceGuard("meta") as guard:
        model.before_step()
        probe.begin(0)
        loss_of(model, tokens).backward()
        probe.merge()
        probe.merge()
    assert any("backward" in name for name in guard.seen)
    assert ("aten.amax.default" in guard.seen) == (step == 0)
    assert all(p.grad.is_meta for p in model.parameters())


class Planted(nn.Module):
    """A linear layer combined with a CPU tensor: as a constant, as an index, or only in its backward pass."""

    def __init__(self, where):
        super().__init__()
        self.where, self.linear = where, nn.Linear(4, 4)

    def forward(self, x):
        if self.where == "constant":
            return self.linear(x) + torch.arange(4)
        if self.where == "index":
            return self.linear(x)[torch.tensor([0, 1])]
        if self.where == "matmul":
            return F.linear(x, torch.ones(4, 4)) + self.linear(x)
        y = self.linear(x)
        if self.where == "backward":
            y.register_hook(lambda gradient: gradient * torch.ones(4))
        return y


@pytest.mark.parametrize("where", ["constant", "index", "matmul", "backward"])
def test_the_guard_detects_a_cpu_tensor(where):
    with torch.device("meta"):
        model, x = Planted(where), torch.ones(2, 4)
    with pytest.raises(AssertionError, match="a tensor of cpu"), DeviceGuard("meta"):
        model(x).sum().backward()


def test_the_guard_accepts_a_correct_module():
    with torch.device("meta"):
        model, x = Planted("nowhere"), torch.ones(2, 4)
    with DeviceGuard("meta"):
        model(x).sum().backward()
