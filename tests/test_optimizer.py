import pytest
import torch
from helpers import a_trainer, tiny
from torch import nn

from stabrun.model.gpt import GPT
from stabrun.training.objective import cross_entropy, z_loss
from stabrun.training.optimizer import make_optimizer, set_rate


def test_only_matrices_decay():
    config = tiny("model.bias=true", "+variant=layer_scale", "model.position.kind=learned")
    model = GPT(config.model, config.data.seq_len)
    groups = make_optimizer(model, config.optim).param_groups
    assert all(p.dim() == 2 for p in groups[0]["params"])
    assert all(p.dim() < 2 for p in groups[1]["params"])
    assert [g["weight_decay"] for g in groups] == [0.1, 0.0]
    assert sum(len(g["params"]) for g in groups) == len(list(model.parameters()))


# kind of decay → overrides, what λ adds to the gradient, and what it subtracts from the weight at rate r
DECAYS = {
    "decoupled": (("optim.decay=decoupled",), lambda w, λ, r: 0.0, lambda w, λ, r: r * λ * w),
    "independent": (("optim.decay_independent=true",), lambda w, λ, r: 0.0, lambda w, λ, r: r / 0.01 * λ * w),
    "l2": (("optim.decay=l2",), lambda w, λ, r: λ * w, lambda w, λ, r: 0.0),
}


@pytest.mark.parametrize("kind", DECAYS)
@pytest.mark.parametrize(("beta1", "beta2", "eps"), [(0.9, 0.95, 1e-6), (0.0, 0.999, 1e-15), (0.5, 0.0, 1e-3)])
def test_update_equals_the_formula(kind, beta1, beta2, eps):
    words, into_gradient, off_weight = DECAYS[kind]
    betas = f"optim.beta1={beta1}", f"optim.beta2={beta2}", f"optim.eps={eps}"
    config = tiny("optim.lr=0.01", "optim.weight_decay=0.03", *betas, *words).optim
    torch.manual_seed(0)
    layer = nn.Linear(5, 3).double()
    optimizer = make_optimizer(layer, config)
    weight, m, v = layer.weight.detach().clone(), 0.0, 0.0
    for t in range(1, 6):
        rate = 0.01 * t / 5
        gradient = torch.randn(3, 5, dtype=torch.float64)
        layer.weight.grad, layer.bias.grad = gradient.clone(), torch.zeros(3, dtype=torch.float64)
        set_rate(optimizer, rate)
        optimizer.step()
        gradient = gradient + into_gradient(weight, 0.03, rate)
        m = beta1 * m + (1 - beta1) * gradient
        v = beta2 * v + (1 - beta2) * gradient**2
        step = rate * (m / (1 - beta1**t)) / ((v / (1 - beta2**t)).sqrt() + eps)
        weight = weight - off_weight(weight, 0.03, rate) - step
        torch.testing.assert_close(layer.weight.detach(), weight, rtol=1e-12, atol=1e-12)


def test_objective_equals_its_formula():
    torch.manual_seed(0)
    logits, targets = torch.randn(2, 5, 7, dtype=torch.float64), torch.randint(7, (2, 5))
    z = logits.exp().sum(-1)
    p = logits.exp() / z[..., None]
    picked = torch.tensor([[float(p[b, t, targets[b, t]]) for t in range(5)] for b in range(2)])
    assert float(cross_entropy(logits, targets)) == pytest.approx(float(-picked.log().mean()), rel=1e-6)
    assert float(z_loss(logits, 1e-4)) == pytest.approx(1e-4 * float(z.log().square().mean()), rel=1e-12)


def test_z_loss_is_minimized_and_is_not_part_of_the_loss():
    rows = {}
    for weight in (0.0, 0.5):
        trainer = a_trainer(tiny(f"optim.z_loss={weight}", "observe.every=0", "train.micro_batch_size=2"))
        rows[weight] = [dict(trainer.step(step).read()) for step in range(12)]
    assert rows[0.5][0]["train/loss"] == rows[0.0][0]["train/loss"], "the same before the first update"
    assert rows[0.5][0]["grad/norm"] != rows[0.0][0]["grad/norm"]
    assert "train/z_loss" not in rows[0.0][0]
    assert rows[0.5][-1]["train/z_loss"] < 0.75 * rows[0.5][0]["train/z_loss"]


def test_micro_batches_add_up_to_the_batch():
    """In fp64: sums in another order differ by 4e-13, and by 5e-7 in fp32."""
    gradients = {}
    for micro in (1, 2, 4):
        trainer = a_trainer(tiny(f"train.micro_batch_size={micro}", "observe.every=0"))
        trainer.model.double()
        trainer.backward(0)
        gradients[micro] = [p.grad for p in trainer.parameters]
    for whole, half, single in zip(gradients[4], gradients[2], gradients[1], strict=True):
        torch.testing.assert_close(half, whole, rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(single, whole, rtol=1e-10, atol=1e-12)
