import pytest
import torch
from helpers import RICH, a_trainer, metrics, tiny, train_interrupted
from torch import nn

from stabrun.config import UserError
from stabrun.model.gpt import GPT
from stabrun.training.objective import cross_entropy, z_loss
from stabrun.training.optimizer import make_optimizer, set_rate
from stabrun.training.run import train


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


def fill(parameters, generator, size=1.0):
    """Give parameters gradients, larger or smaller ones from tensor to tensor. Returns them."""
    gradients = [size * 10.0**-n * torch.randn(p.shape, dtype=p.dtype, generator=generator) for n, p in parameters]
    for (_, parameter), gradient in zip(parameters, gradients, strict=True):
        parameter.grad = gradient.clone()
    return gradients


@pytest.mark.parametrize(("beta1", "beta2", "eps"), [(0.9, 0.95, 1e-8), (0.0, 0.999, 1e-15), (0.5, 0.5, 1e-2)])
@pytest.mark.parametrize("independent", [False, True])
def test_stable_adamw_equals_the_formula(beta1, beta2, eps, independent):
    """Algorithm 2 of arXiv 2304.13013, with its debiased β, which it calls β̂, and gradients of very different sizes."""
    words = f"optim.beta1={beta1}", f"optim.beta2={beta2}", f"optim.eps={eps}", "optim.weight_decay=0.03"
    config = tiny("optim.kind=stable_adamw", *words, f"optim.decay_independent={independent}".lower()).optim
    layer, generator = nn.Linear(5, 3).double(), torch.Generator().manual_seed(0)
    optimizer = make_optimizer(layer, config)
    parameters = list(enumerate([layer.weight, layer.bias]))
    states = [[p.detach().clone(), torch.zeros_like(p), torch.zeros_like(p)] for _, p in parameters]
    lowered = 0
    for t in range(1, 9):
        rate = 0.01 * t / 8
        gradients = fill(parameters, generator, 30.0 if t == 6 else 1.0)
        set_rate(optimizer, rate)
        optimizer.step()
        one, two = ((beta - beta**t) / (1 - beta**t) for beta in (beta1, beta2))
        for state, g, decay in zip(states, gradients, (0.03, 0.0), strict=True):
            theta, v, u = state
            v = one * v + (1 - one) * g
            u = two * u + (1 - two) * g**2
            rms = float((g**2 / u.clamp(min=eps**2)).mean().sqrt())
            lowered += rms > 1
            own = rate / max(1.0, rms)
            theta = theta - own * (decay / (0.01 if independent else 1)) * theta - own * v / (u.sqrt() + eps)
            state[:] = theta, v, u
        for (_, parameter), (theta, *_) in zip(parameters, states, strict=True):
            torch.testing.assert_close(parameter.detach(), theta, rtol=1e-10, atol=1e-12)
    assert [group["lr"] for group in optimizer.param_groups] == [rate] * 2
    assert lowered


def orthogonal(matrix):
    """What Muon's iteration is an approximation of: U·Vᵀ of the SVD."""
    u, _, v = torch.linalg.svd(matrix, full_matrices=False)
    return u @ v


def test_muon_updates_the_matrices_of_blocks_and_adamw_the_rest():
    """Each part against an optimizer of its own, and Muon's step against the SVD that it approximates."""
    config = tiny("optim.kind=muon", "model.bias=true", "model.position.kind=learned", "optim.weight_decay=0.1")
    model, other = (GPT(config.model, config.data.seq_len) for _ in range(2))
    optimizer, adamw = make_optimizer(model, config.optim), make_optimizer(other, tiny("model.bias=true").optim)
    inside = {f"{name}.weight" for name, layer in model.blocks.named_modules() if isinstance(layer, nn.Linear)}
    inside = {f"blocks.{name}" for name in inside}
    assert len(inside) == 2 * 4
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    generator = torch.Generator().manual_seed(0)
    gradients = {name: torch.randn(p.shape, generator=generator) for name, p in model.named_parameters()}
    for step, of in ((optimizer, model), (adamw, other)):
        for name, parameter in of.named_parameters():
            parameter.grad = gradients[name].clone()
        set_rate(step, 0.01)
        step.step()
    for (name, ours), theirs in zip(model.named_parameters(), other.parameters(), strict=True):
        if name not in inside:
            assert torch.equal(ours, theirs), name
            assert set(optimizer.state[ours]) == {"step", "exp_avg", "exp_avg_sq"}
            continue
        assert set(optimizer.state[ours]) == {"momentum_buffer"}
        change = (start[name] * (1 - 0.01 * 0.1) - ours.detach()) / (0.01 * 0.2 * max(ours.shape) ** 0.5)
        exact = orthogonal(gradients[name])
        cosine = float((change * exact).sum() / change.norm() / exact.norm())
        assert cosine > 0.95, name
        assert 0.6 < float(change.norm() / exact.norm()) < 1.3, "singular values of 0.7 to 1.2"


@pytest.mark.parametrize("kind", ["muon", "stable_adamw"])
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_a_step_that_is_not_finite_or_an_outlier_changes_nothing(kind, precision):
    """The first step as well, before which there are no moments."""
    words = f"optim.kind={kind}", f"train.precision={precision}", "train.loss_scale=1", "train.recovery=skip"
    trainer = a_trainer(tiny(*words))
    judge = trainer.outliers.judge
    for step in range(4):
        before = [p.detach().clone() for p in trainer.parameters]
        moments = [{k: v.clone() for k, v in trainer.optimizer.state[p].items()} for p in trainer.parameters]
        skipped = step % 2 == 0
        trainer.outliers.judge = lambda *values: torch.ones(()) if skipped else judge(*values)  # noqa: B023
        trainer.step(step).read()
        assert skipped == all(map(torch.equal, before, trainer.parameters))
        for parameter, parts in zip(trainer.parameters, moments, strict=True):
            state = trainer.optimizer.state[parameter]
            if skipped:
                assert all(
                    torch.equal(value, parts.get(k, torch.zeros(()))) for k, value in state.items() if k in parts
                )
                assert all(torch.isfinite(value).all() for value in state.values())


@pytest.mark.parametrize("kind", ["muon", "stable_adamw"])
def test_a_gradient_that_overflows_fp16_changes_nothing(kind):
    trainer = a_trainer(tiny(f"optim.kind={kind}", "train.precision=fp16", "train.loss_scale=4294967296"))
    before = [p.detach().clone() for p in trainer.parameters]
    assert trainer.step(0).read()["scale/skipped"] == 1
    assert all(map(torch.equal, before, trainer.parameters))


@pytest.mark.parametrize("kind", ["muon", "stable_adamw"])
def test_an_interrupted_run_is_the_whole_one(tmp_path, monkeypatch, kind):
    words = (*RICH, f"optim.kind={kind}", "model.bias=true")
    train(tiny(*words, f"run_dir={tmp_path / 'whole'}"))
    config = tiny(*words, f"run_dir={tmp_path / 'cut'}")
    assert train_interrupted(config, monkeypatch, 19)["status"] == "interrupted"
    train(config)
    assert metrics(tmp_path / "cut") == metrics(tmp_path / "whole")


@pytest.mark.parametrize("kind", ["muon", "stable_adamw"])
def test_l2_is_refused(kind):
    with pytest.raises(UserError, match=f"optim.decay=l2: requires optim.kind=adam, not {kind}"):
        tiny(f"optim.kind={kind}", "optim.decay=l2")
