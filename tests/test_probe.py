"""Each statistic against its formula, computed independently by autograd on the same batch."""

import pytest
import torch
from helpers import a_trainer, tiny
from torch import nn
from torch.nn import functional as F

from stabrun.config import ObserveConfig
from stabrun.data.batches import training_batch
from stabrun.model.switches import SAMPLED
from stabrun.observe.probe import Probe
from stabrun.observe.sites import Sites, linear_sites
from stabrun.observe.token_means import TokenMeans


@pytest.fixture(scope="module", params=["baseline", "qk_norm_cap", "qkv_norm"])
def measured(request):
    """A row of step 3 (every step slow), and the layers' tensors of the same step taken by retain_grad."""
    words = [f"+variant={request.param}", "observe.slow_every=1", "optim.clip=0.5"]
    trainer = a_trainer(tiny(*words))
    for step in range(3):
        trainer.step(step).read()
    twin = a_trainer(tiny(*words, "observe.every=0"))
    for step in range(3):
        twin.step(step)
    seen = {}

    def keep(name):
        def hook(module, args, output):
            args[0].retain_grad()
            seen[name] = (args[0], output)

        return hook

    def own_input(module, args):
        return (args[0].view_as(args[0]),)

    for name, module in twin.model.named_modules():
        if isinstance(module, nn.Linear):
            module.register_forward_pre_hook(own_input)
            module.register_forward_hook(keep(name))
        if name.endswith("core"):
            module.register_forward_hook(lambda m, args, out, name=name: seen.__setitem__(name, args))
        if name.startswith("blocks.") and name.count(".") == 1:
            module.register_forward_hook(lambda m, args, out, name=name: seen.__setitem__(name, out))
    before = {name: p.detach().clone() for name, p in twin.model.named_parameters()}
    config = twin.config
    batch = training_batch(twin.data.train, 0, 3, config.train.batch_size, config.data.seq_len)
    loss = F.cross_entropy(twin.model(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten())
    loss.backward()
    raw = {name: p.grad.clone() for name, p in twin.model.named_parameters()}
    row = trainer.step(3).read()
    return row, trainer, twin, seen, before, raw, loss.item()


def tokens_mean(x):
    return float(x.detach().double().flatten(0, -2).pow(2).sum(-1).sqrt().mean())


def close(value, expected):
    assert value == pytest.approx(expected, rel=2e-5, abs=1e-9)


def test_loss_and_gradient_norm(measured):
    row, _, _, _, _, raw, loss = measured
    close(row["train/loss"], loss)
    close(row["grad/norm"], float(sum(g.double().pow(2).sum() for g in raw.values()) ** 0.5))


def test_norms_of_layers(measured):
    row, _, twin, seen, before, raw, _ = measured
    for site, layers in linear_sites(twin.model).items():
        for index, layer in enumerate(layers):
            (name,) = layer.modules
            x, y = seen[name]
            close(row[f"norm/out/{site}"][index], tokens_mean(y))
            close(row[f"norm/in/{site}"][index], tokens_mean(x))
            close(row[f"norm/in_grad/{site}"][index], float(x.grad.double().norm()))
            close(row[f"norm/weight/{site}"][index], float(before[f"{name}.weight"].double().norm()))
            close(row[f"norm/grad/{site}"][index], float(raw[f"{name}.weight"].double().norm()))


def test_norms_by_layer(measured):
    row, _, _, seen, _, raw, _ = measured
    for layer in range(2):
        close(row["residual/norm"][layer], tokens_mean(seen[f"blocks.{layer}"]))
        own = [g.double().pow(2).sum() for name, g in raw.items() if name.startswith(f"blocks.{layer}.")]
        close(row["grad/norm_by_layer"][layer], float(sum(own) ** 0.5))


def test_attention(measured):
    row, _, twin, seen, _, _, _ = measured
    cap = twin.config.model.attn.soft_cap
    for layer in range(2):
        q, k, _ = (x.detach().double() for x in seen[f"blocks.{layer}.attn.layer.core"])
        peak, entropy = -float("inf"), []
        for b in range(q.shape[0]):
            for h in range(q.shape[1]):
                for t in range(q.shape[2]):
                    logits = (k[b, h, : t + 1] @ q[b, h, t]) / q.shape[-1] ** 0.5
                    peak = max(peak, float(logits.max()))
                    if cap:
                        logits = cap * torch.tanh(logits / cap)
                    weights = logits.exp() / logits.exp().sum()
                    entropy.append(float(-(weights * weights.log()).sum()))
        close(row["attn/max_logit"][layer], peak)
        close(row["attn/entropy"][layer], sum(entropy) / len(entropy))


def test_update_and_moments(measured):
    row, trainer, _, _, before, raw, _ = measured
    total = float(sum(g.double().pow(2).sum() for g in raw.values()) ** 0.5)
    factor = min(1.0, 0.5 / (total + 1e-6))
    for site, layers in linear_sites(trainer.model).items():
        for index, place in enumerate(layers):
            ((name, layer),) = place.modules.items()
            state = trainer.optimizer.state[layer.weight]
            m, v = state["exp_avg"].double(), state["exp_avg_sq"].double()
            change = layer.weight.detach().double() - before[f"{name}.weight"].double()
            assert row[f"norm/update/{site}"][index] == pytest.approx(float(change.norm()), rel=1e-4)
            close(row[f"norm/adam_m/{site}"][index], float(m.norm()))
            close(row[f"norm/adam_v/{site}"][index], float(v.norm()))
            clipped = raw[f"{name}.weight"].double() * factor
            close(row[f"adam/surprise/{site}"][index], float(clipped.pow(2).mean() / (v.mean() / (1 - 0.95**4))))


def test_micro_batches_merge_to_the_values_of_the_batch():
    rows = []
    for micro in (4, 2, 1):
        trainer = a_trainer(tiny(f"train.micro_batch_size={micro}", "+variant=qk_norm"))
        rows.append(trainer.step(0).read())
    for row in rows[1:]:
        assert row.keys() == rows[0].keys()
        for key, value in rows[0].items():
            assert row[key] == pytest.approx(value, rel=1e-3 if "update" in key else 1e-4), key


@pytest.mark.parametrize("micro", [96, 48, 32, 8])
def test_attention_is_measured_on_the_first_sequences_of_the_batch(micro):
    assert SAMPLED == 64, "docs/metrics.md says so"
    keys = "attn/max_logit", "attn/entropy"
    first = a_trainer(tiny("train.batch_size=64")).step(0).read()
    found = a_trainer(tiny("train.batch_size=96", f"train.micro_batch_size={micro}")).step(0).read()
    whole = a_trainer(tiny("train.batch_size=32")).step(0).read()
    for key in keys:
        assert found[key] == pytest.approx(first[key], rel=1e-5)
        assert found[key] != pytest.approx(whole[key], rel=1e-5)


def test_observation_changes_no_bit():
    losses = {}
    for every in (0, 1, 3):
        trainer = a_trainer(tiny(f"observe.every={every}", "observe.slow_every=2", "+variant=qk_norm_cap"))
        losses[every] = [(row["train/loss"], row["grad/norm"]) for row in (trainer.step(s).read() for s in range(8))]
    assert losses[0] == losses[1] == losses[3]


class Foreign(nn.Module):
    """A model that is not stabrun's: two linear layers, one of them recomputed in the backward pass."""

    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(6, 8), nn.Linear(8, 6)

    def forward(self, x):
        return self.down(torch.utils.checkpoint.checkpoint(lambda y: self.up(y).relu(), x, use_reentrant=False))


def observed(model, optimizer, steps=1):
    """The row of the last of some steps, all of them slow, on random inputs."""
    probe = Probe(model, ObserveConfig(every=1, slow_every=1), Sites(linear_sites(model)))
    for step in range(steps):
        probe.arm(step)
        x = torch.randn(2, 5, 6, generator=torch.Generator().manual_seed(step), requires_grad=True)
        loss = model(x).square().mean()
        optimizer.zero_grad()
        loss.backward()
        probe.merge()
        norms = torch.stack([p.grad.norm() for p in model.parameters()])
        probe.before_update(norms)
        optimizer.step()
        probe.after_update(optimizer)
        row = probe.snapshot(loss.detach(), norms.norm()).read()
    return row, x


def a_foreign_model():
    torch.manual_seed(0)
    return Foreign()


def test_any_model_and_recomputation():
    model = a_foreign_model()
    row, x = observed(model, torch.optim.AdamW(model.parameters(), fused=True))
    assert row["norm/in/up"] == pytest.approx([tokens_mean(x)])
    assert row["norm/in_grad/up"] == pytest.approx([float(x.grad.norm())])
    assert "residual/norm" not in row


def test_an_optimizer_without_moments_is_observed_without_them():
    model = a_foreign_model()
    row, _ = observed(model, torch.optim.SGD(model.parameters(), lr=0.1))
    for name, layer in (("up", model.up), ("down", model.down)):
        assert row[f"norm/update/{name}"] == pytest.approx([0.1 * float(layer.weight.grad.norm())], rel=1e-4)
    assert not [key for key in row if "adam" in key]


class Mixed(torch.optim.Optimizer):
    """Adam's moments for the groups with betas; no state for the others."""

    def step(self):
        for group in self.param_groups:
            for p in group["params"]:
                if "betas" in group:
                    state = self.state[p]
                    state.setdefault("step", torch.tensor(0.0)).add_(1)
                    for name, beta, value in zip(
                        ("exp_avg", "exp_avg_sq"), group["betas"], (p.grad, p.grad**2), strict=True
                    ):
                        state.setdefault(name, torch.zeros_like(p)).lerp_(value, 1 - beta)
                p.data.add_(p.grad, alpha=-0.01)


@pytest.mark.parametrize("kind", [torch.optim.AdamW, Mixed])
def test_moments_are_those_of_each_group_of_parameters(kind):
    model = a_foreign_model()
    groups = [{"params": [*model.up.parameters()], "betas": (0.9, 0.5)}, {"params": [*model.down.parameters()]}]
    if kind is torch.optim.AdamW:
        groups[1]["betas"] = (0.9, 0.9)
    optimizer = kind(groups, {"lr": 0.01} if kind is Mixed else 0.01)
    row, _ = observed(model, optimizer, steps=3)
    recorded = {key for key in row if "adam" in key}
    having = {"up": 0.5} | ({"down": 0.9} if kind is torch.optim.AdamW else {})
    assert recorded == {f"{kind}/{name}" for kind in ("norm/adam_m", "norm/adam_v", "adam/surprise") for name in having}
    for name, beta2 in having.items():
        weight = getattr(model, name).weight
        state = optimizer.state[weight]
        assert row[f"norm/adam_m/{name}"] == pytest.approx([float(state["exp_avg"].norm())])
        assert row[f"norm/adam_v/{name}"] == pytest.approx([float(state["exp_avg_sq"].norm())])
        usual = state["exp_avg_sq"].mean() / (1 - beta2**3)
        assert row[f"adam/surprise/{name}"] == pytest.approx([float(weight.grad.square().mean() / usual)])


def test_validation_measures_nothing():
    trainer = a_trainer(tiny())
    trainer.step(0).read()
    before = trainer.probe.values.clone()
    trainer.validate()
    trainer.probe.merge()
    assert torch.equal(trainer.probe.values, before)
    assert not trainer.probe.tokens.kept


@pytest.mark.parametrize("kept", [4096, 3])
def test_means_over_tokens_of_calls_of_any_shape(kept, monkeypatch):
    """Sums and numbers equal those of all values together, also if what is kept has to be added up in between."""
    monkeypatch.setattr("stabrun.observe.token_means.KEPT", kept)
    means = TokenMeans([3, 0, 1, 2, 4], torch.device("cpu"))
    random = torch.Generator().manual_seed(0)
    values = {place: [] for place in range(5)}
    for number in range(40):
        place, shape = number % 5, [(2, 3), (6,), (), (7,)][number % 4]
        values[place].append(torch.rand(shape, generator=random, dtype=(torch.float32, torch.float64)[number % 2]))
        means.add(means.rows[place], values[place][-1])
    sums, numbers = torch.full((5,), 10.0), torch.full((5,), 1.0)
    means.collect(sums, numbers)
    assert sums.tolist() == pytest.approx([10 + float(sum(v.sum() for v in values[place])) for place in range(5)])
    assert numbers.tolist() == [1 + sum(v.numel() for v in values[place]) for place in range(5)]
    means.collect(sums, numbers)
    assert numbers.tolist() == [1 + sum(v.numel() for v in values[place]) for place in range(5)]
