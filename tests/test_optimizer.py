import pytest
import torch
from conftest import a_trainer, tiny
from torch import nn

from stabrun.model.gpt import GPT
from stabrun.train.optimizer import clip, make_optimizer, set_rate


def test_matrices_decay_and_nothing_else():
    config = tiny("model.bias=true", "+variant=layer_scale", "model.position.kind=learned")
    model = GPT(config.model, config.data.seq_len)
    groups = make_optimizer(model, config.optim).param_groups
    assert all(p.dim() == 2 for p in groups[0]["params"])
    assert all(p.dim() < 2 for p in groups[1]["params"])
    assert [g["weight_decay"] for g in groups] == [0.1, 0.0]
    assert sum(len(g["params"]) for g in groups) == len(list(model.parameters()))


def test_update_equals_the_formula_of_adamw():
    config = tiny("optim.lr=0.01", "optim.eps=1e-6").optim
    torch.manual_seed(0)
    layer = nn.Linear(5, 3).double()
    optimizer = make_optimizer(layer, config)
    weight, m, v = layer.weight.detach().clone(), 0.0, 0.0
    for t in range(1, 6):
        rate = 0.01 * t
        gradient = torch.randn(3, 5, dtype=torch.float64)
        layer.weight.grad, layer.bias.grad = gradient.clone(), torch.zeros(3, dtype=torch.float64)
        set_rate(optimizer, rate)
        optimizer.step()
        m = 0.9 * m + 0.1 * gradient
        v = 0.95 * v + 0.05 * gradient**2
        weight = weight * (1 - rate * 0.1) - rate * (m / (1 - 0.9**t)) / ((v / (1 - 0.95**t)).sqrt() + 1e-6)
        torch.testing.assert_close(layer.weight.detach(), weight, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("limit", [1e-3, 1.0, 1e3, None])
def test_clipping_is_torchs_bit_for_bit(limit):
    torch.manual_seed(0)
    ours = [torch.randn(n, 3) for n in (4, 7, 1)]
    theirs = [nn.Parameter(torch.zeros_like(g)) for g in ours]
    for parameter, gradient in zip(theirs, ours, strict=True):
        parameter.grad = gradient.clone()
    each = [float(g.double().norm()) for g in ours]
    total, norms = clip(ours, limit)
    expected = nn.utils.clip_grad_norm_(theirs, limit if limit is not None else float("inf"))
    assert total.equal(expected)
    assert norms.tolist() == pytest.approx(each, rel=1e-6)
    for gradient, parameter in zip(ours, theirs, strict=True):
        assert gradient.equal(parameter.grad)


def test_micro_batches_add_up_to_the_batch():
    """In fp64, for fp32 sums of different order part after some steps (4e-13 against 5e-7)."""
    gradients = {}
    for micro in (1, 2, 4):
        trainer = a_trainer(tiny(f"train.micro_batch_size={micro}", "observe.every=0"))
        trainer.model.double()
        trainer.backward(0)
        gradients[micro] = [p.grad for p in trainer.parameters]
    for whole, half, single in zip(gradients[4], gradients[2], gradients[1], strict=True):
        torch.testing.assert_close(half, whole, rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(single, whole, rtol=1e-10, atol=1e-12)
