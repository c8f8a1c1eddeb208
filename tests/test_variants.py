"""Every variant, and every pair of switches, against the reference: logits and all gradients."""

import itertools
import random
from dataclasses import replace

import pytest
import reference
import torch
from helpers import ALL_VARIANTS, TINY, VARIANTS, a_trainer, configured, run, tiny
from reference import small
from torch import nn
from torch.nn import functional as F

from stabrun.config import AttentionConfig, Config, ModelConfig, UserError, keys, value_of
from stabrun.model.attention import AttentionCore
from stabrun.model.gpt import GPT
from stabrun.model.linear import SigmaLinear
from stabrun.model.norm import Norm
from stabrun.model.switches import leak

TOLERANCE = 1e-9  # of each tensor's largest element, in float64
ROUNDING = 1e-14  # of the largest gradient: the error of gradients that are zero by formula, or nearly so
SEQ_LEN = 10


@torch.no_grad()
def stirred(config, seed=0, dtype=torch.float32):
    """A model in which no gain, bias, γ or scale has its initial value, and where attention is far from uniform."""
    torch.set_default_dtype(dtype)
    try:
        model = GPT(config, SEQ_LEN, seed)
    finally:
        torch.set_default_dtype(torch.float32)
    generator = torch.Generator().manual_seed(seed + 1)
    size = 0.5 if config.norm.kind == "none" else 1.0  # without norms, activations would grow from layer to layer
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if parameter.dim() == 2:
            parameter.copy_(noise * size * parameter.shape[1] ** -0.5 * (2 if "qkv" in name else 1))
        else:
            parameter.add_(0.3 * noise)
    for layer in model.sigma_layers:
        layer.u.copy_(torch.randn(layer.u.shape, generator=generator))
        layer.iterate()  # u and v far from the singular vectors, yet σ(W) > 0
    return model


def sample(config, seed=0, batch=3):
    """Tokens and targets, `[batch, SEQ_LEN]` each."""
    generator = torch.Generator().manual_seed(seed + 2)
    return torch.randint(config.vocab_size, (2, batch, SEQ_LEN), generator=generator).unbind()


def assert_near(name, got, wanted, largest=0.0):
    """`largest`: the size of the largest gradient; what a norm undoes has a much smaller one."""
    scale = wanted.abs().max()
    worst = (got - wanted).abs().max()
    assert worst <= TOLERANCE * scale + ROUNDING * largest, f"{name}: off by {worst:.3g}, of {scale:.3g}"


def assert_equals_reference(config, seed=0):
    """Logits and all gradients, in float64."""
    model = stirred(config, seed, torch.float64)
    tokens, targets = sample(config, seed)
    ours = model(tokens)
    F.cross_entropy(ours.flatten(0, 1), targets.flatten()).backward()

    tensors = {name: t.detach().clone() for name, t in model.state_dict().items()}
    names = [name for name, _ in model.named_parameters()]
    for name in names:
        tensors[name].requires_grad_()
    theirs = reference.logits(tensors, config, tokens)
    reference.cross_entropy(theirs, targets).backward()

    assert_near("logits", ours.detach(), theirs.detach())
    largest = max(tensors[name].grad.abs().max() for name in names)
    for name, parameter in model.named_parameters():
        assert_near(name, parameter.grad, tensors[name].grad, largest)


@pytest.mark.parametrize("seed", [0, pytest.param(1, marks=pytest.mark.slow)])
@pytest.mark.parametrize("variant", VARIANTS)
def test_variant_equals_the_reference(variant, seed):
    assert_equals_reference(small(variant, "model.n_layer=4").model, seed)


@pytest.mark.parametrize("variant", [name for name in VARIANTS if name != "baseline"])
def test_variant_is_not_the_baseline(variant):
    """Or the comparison above could be between two models that both ignore the switch."""
    tokens, _ = sample(ModelConfig(vocab_size=40))
    baseline = stirred(small("baseline", "model.n_layer=4").model)
    model = stirred(small(variant, "model.n_layer=4").model)
    with torch.no_grad():
        own, shared = model.state_dict(), baseline.state_dict()
        model.load_state_dict(own | {k: v for k, v in shared.items() if k in own and v.shape == own[k].shape})
        assert (model(tokens) - baseline(tokens)).abs().max() > 1e-3


# Every value of every switch. Numbers exceed those of the variants, so that each makes a difference at this size.
SWITCHES = {
    "norm.kind": ("layernorm", "rmsnorm", "layernorm1p", "rmsnorm1p", "dyt", "batchnorm", "none"),
    "mlp.activation": ("gelu", "gelu_tanh", "relu2", "swiglu", "geglu", "geglu_tanh"),
    "attn.qk_norm": ("none", "head", "full"),
    "attn.v_norm": ("none", "head", "full"),
    "sigma_reparam": ("none", "one", "sigma"),
    "position.kind": ("rope", "learned", "none"),
    "clip": ((0.0, 1.0), (-0.1, 1.1), (-0.05, 1.0), (0.0, 1.2)),
    "norm.affine": (True, False),
    "norm.bias": (None, True, False),
    "norm.alpha": (0.5, 0.8),
    "norm.depth_scaled": (False, True),
    "norm.doubled": (False, True),
    "attn.pre_norm": (True, False),
    "attn.out_norm": (False, True),
    "attn.post_norm": (False, True),
    "mlp.pre_norm": (True, False),
    "mlp.out_norm": (False, True),
    "mlp.post_norm": (False, True),
    "mlp.width": (None, 24),
    "mlp.ratio": (4.0, 2.7),
    "attn.gate": (False, True),
    "attn.norm_after_position": (False, True),
    "attn.soft_temp": (1.0, 0.5),
    "attn.soft_cap": (None, 2.0),
    "position.rope_fraction": (1.0, 0.5),
    "layer_scale": (None, 0.5),
    "bias": (False, True),
    "tied": (False, True),
    "embedding": ("plain", "scaled", "norm"),
    "residual": (True, False),
    "post_ln_share": (0.0, 0.5),
    "final_norm": (True, False),
    "final_cap": (None, 3.0),
}
SIZES = {"n_layer", "n_head", "d_model", "vocab_size"}
CLIP = {"attn.clip_low", "attn.clip_high"}  # together the switch `clip`
ELSEWHERE = {"init", "dropout", "norm.eps", "position.rope_base"}  # in test_init, below, and in every comparison


def test_switches_are_those_of_the_schema():
    schema = {k.path.removeprefix("model."): k for k in keys() if k.path.startswith("model.")}
    assert schema.keys() == SWITCHES.keys() - {"clip"} | SIZES | CLIP | ELSEWHERE
    for name in SWITCHES.keys() - {"clip"}:
        default = value_of(Config(), f"model.{name}")
        allowed = (True, False) if isinstance(default, bool) else schema[name].bounds.get("allowed")
        assert allowed is None or set(SWITCHES[name]) == set(allowed), name


def pairs(row):
    return set(itertools.combinations(row.items(), 2))


def covering_array(seed):
    """A few rows of settings, always the same, that contain every pair of values of every two switches."""
    wanted = set()
    for (a, of_a), (b, of_b) in itertools.combinations(SWITCHES.items(), 2):
        wanted |= {((a, x), (b, y)) for x in of_a for y in of_b}
    missing, rows, dice = dict.fromkeys(sorted(wanted, key=repr)), [], random.Random(seed)
    while missing:
        candidates = []
        for _ in range(5):
            (a, x), (b, y) = dice.choice(list(missing))
            row = {a: x, b: y}
            for name in dice.sample(list(SWITCHES), len(SWITCHES)):
                if name not in row:
                    row[name] = max(SWITCHES[name], key=lambda v, n=name, r=row: gain(missing, r, n, v))
            candidates.append({name: row[name] for name in SWITCHES})
        best = max(candidates, key=lambda row: len(pairs(row) & missing.keys()))
        missing = {pair: None for pair in missing if pair not in pairs(best)}
        rows.append(best)
    return rows, wanted


ORDER = {name: index for index, name in enumerate(SWITCHES)}


def gain(missing, row, name, value):
    """The missing pairs that `value` for the switch `name` would add to an unfinished row."""
    new = (name, value)
    return sum(((new, item) if ORDER[name] < ORDER[item[0]] else (item, new)) in missing for item in row.items())


ROWS, WANTED = covering_array(0)


def label(row):
    """The switches of a row that differ from the first value, abbreviated."""
    changed = {k: v for k, v in row.items() if v != SWITCHES[k][0]}
    return ",".join(f"{k.replace('_norm', '').replace('norm.', 'n.')}={v}".replace(" ", "") for k, v in changed.items())


def model_config(row, n_layer=2):
    """A ModelConfig from dotted keys; `clip` stands for both ends."""
    values = dict(row)
    low, high = values.pop("clip", (0.0, 1.0))
    values |= {"attn.clip_low": low, "attn.clip_high": high}
    config = ModelConfig(n_layer=n_layer, n_head=2, d_model=16, vocab_size=40)
    for path, value in values.items():
        group, _, name = path.rpartition(".")
        if group:
            config = replace(config, **{group: replace(getattr(config, group), **{name: value})})
        else:
            config = replace(config, **{name: value})
    return config


def test_rows_cover_every_pair():
    assert set().union(*map(pairs, ROWS)) >= WANTED


@pytest.mark.parametrize("row", ROWS, ids=label)
def test_pairs_of_switches_equal_the_reference(row):
    assert_equals_reference(model_config(row, n_layer=4))


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(1, 8))
def test_pairs_equal_the_reference_in_other_rows_and_with_other_weights(seed):
    for row in covering_array(seed)[0]:
        assert_equals_reference(model_config(row, n_layer=4), seed)


def test_the_reference_refuses_values_that_it_does_not_know():
    with pytest.raises(AssertionError, match="no formula for activation selu"):
        reference.activation("selu", torch.zeros(1, 2))
    with pytest.raises(AssertionError, match="no formula for norm batch"):
        reference.norm({}, model_config({"norm.kind": "batch"}), "norm", torch.zeros(1, 2))


@pytest.mark.parametrize("kind", ["layernorm", "rmsnorm"])
@pytest.mark.parametrize("where", ["head", "full"])
@pytest.mark.parametrize("fraction", [1.0, 0.5])
@pytest.mark.parametrize("last", [False, True], ids=["norm-first", "position-first"])
def test_norms_around_rope_equal_the_reference(kind, where, fraction, last):
    """Three switches that only act together, which pairs need not combine."""
    row = {"norm.kind": kind, "attn.qk_norm": where, "attn.norm_after_position": last}
    assert_equals_reference(model_config({**row, "position.rope_fraction": fraction}))


@pytest.mark.parametrize("kind", SWITCHES["norm.kind"])
@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_gains_and_biases_of_each_norm_equal_the_reference(kind, affine, bias):
    row = {"norm.kind": kind, "norm.affine": affine, "bias": bias, "attn.qk_norm": "head", "attn.v_norm": "full"}
    assert_equals_reference(model_config(row))


def test_gpt2_shape_equals_the_reference_and_torchs_own_layers():
    words = ["model.position.kind=learned", "model.mlp.activation=gelu_tanh", "model.bias=true", "model.tied=true"]
    config = small("baseline", *words, "model.init=gpt2").model
    assert_equals_reference(config)
    model, (tokens, _) = stirred(config, dtype=torch.float64), sample(config)
    mask = nn.Transformer.generate_square_subsequent_mask(SEQ_LEN, dtype=torch.float64)
    x = model.embed(tokens) + model.position.weight
    for block in model.blocks:
        theirs = nn.TransformerEncoderLayer(
            config.d_model,
            config.n_head,
            4 * config.d_model,
            dropout=0.0,
            activation=lambda h: F.gelu(h, approximate="tanh"),
            batch_first=True,
            norm_first=True,
            dtype=torch.float64,
        )
        names = {"attn.pre_norm": "norm1", "mlp.pre_norm": "norm2", "attn.layer.proj": "self_attn.out_proj"}
        names |= {"attn.layer.qkv": "self_attn.in_proj", "mlp.layer.fc1": "linear1", "mlp.layer.fc2": "linear2"}
        state = {}
        for name, value in block.state_dict().items():
            part, _, which = name.rpartition(".")
            if part in names:
                state[f"{names[part]}{'_' if part.endswith('qkv') else '.'}{which}"] = value
        theirs.load_state_dict(state)
        x = theirs(x, src_mask=mask, is_causal=True)
    x = F.layer_norm(x, (config.d_model,), model.norm.weight, model.norm.bias)
    torch.testing.assert_close(model(tokens), x @ model.embed.weight.T, rtol=1e-9, atol=1e-9)


def test_nemotron_shape_equals_the_reference():
    words = ["model.norm.kind=layernorm1p", "model.mlp.activation=relu2", "model.tied=false"]
    config = small("baseline", *words, "model.position.kind=rope", "model.position.rope_fraction=0.5").model
    assert_equals_reference(config)


@pytest.mark.parametrize(("width", "fraction"), [(24, 0.5), (24, 0.99), (20, 1.0)])
def test_rope_over_an_odd_share_of_the_head(width, fraction):
    words = [f"model.d_model={width}", f"model.position.rope_fraction={fraction}", "model.n_head=4"]
    assert_equals_reference(small("qk_norm", *words).model)


CAUSAL = [name for name in VARIANTS if name != "batch_norm"]


@pytest.mark.parametrize("position", SWITCHES["position.kind"])
@pytest.mark.parametrize("variant", CAUSAL)
def test_a_shorter_context_gives_the_start_of_a_longer_one(variant, position):
    config = small(variant, f"model.position.kind={position}").model
    model, (tokens, _) = stirred(config), sample(config)
    torch.testing.assert_close(model(tokens[:, :4]), model(tokens)[:, :4], rtol=1e-5, atol=1e-5)


def moved_by_a_token(variant):
    """The largest change of the logits at each position, `[SEQ_LEN]`, if the token at position 6 is another one."""
    config = small(variant).model
    model, (tokens, _) = stirred(config), sample(config)
    other = tokens.clone()
    other[:, 6] = (other[:, 6] + 1) % config.vocab_size
    return (model(tokens) - model(other)).abs().amax(dim=(0, 2))


@pytest.mark.parametrize("variant", CAUSAL)
def test_no_token_sees_the_future(variant):
    moved = moved_by_a_token(variant)
    assert (moved[:6] == 0).all()
    assert (moved[6:] > 1e-6).all()


def test_batch_norm_lets_each_token_see_the_future(capsys, tmp_path):
    assert (moved_by_a_token("batch_norm") > 1e-6).all()
    sentence = "model.norm.kind=batchnorm: each token sees the tokens after it"
    assert [name for name in VARIANTS if leak(small(name).model)] == ["batch_norm"]
    assert sentence in run(capsys, "model", "+variant=batch_norm")[1]
    assert sentence in run(capsys, "train", *TINY, "+variant=batch_norm", "train.steps=2", f"run_dir={tmp_path}")[1]


@pytest.mark.parametrize(("word", "wanted"), [("train.micro_batch_size=2", "null"), ("train.ranks=2", "1")])
def test_batch_norm_needs_the_whole_batch(word, wanted):
    with pytest.raises(UserError, match=f"^{word}: must be {wanted} with model.norm.kind=batchnorm"):
        tiny("+variant=batch_norm", word)


@pytest.mark.parametrize(("n_in", "n_out"), [(16, 48), (24, 8)])
def test_power_iteration_reaches_the_spectral_norm(n_in, n_out):
    torch.manual_seed(0)
    layer = SigmaLinear(n_in, n_out, bias=False)
    for _ in range(300):
        layer.iterate()
    torch.testing.assert_close(layer.sigma(), torch.linalg.matrix_norm(layer.weight, 2), rtol=1e-5, atol=0)


def test_one_power_iteration_per_step_and_none_in_the_forward_pass():
    config = small("sigma_reparam").model
    model, (tokens, _) = stirred(config), sample(config)
    layer = model.blocks[0].attn.layer.qkv
    before = layer.u.clone()
    model(tokens).sum().backward()
    assert torch.equal(layer.u, before)
    model.before_step()
    v = layer.weight.T @ before
    u = layer.weight @ (v / v.norm())
    torch.testing.assert_close(layer.u, (u / u.norm()).detach())


@pytest.mark.parametrize("init", ["fan_in", "gpt2"])
def test_gamma_started_at_sigma_changes_nothing(init):
    plain, sigma = (
        GPT(small("baseline", f"model.init={init}", f"model.sigma_reparam={start}").model, SEQ_LEN, seed=3)
        for start in ("none", "sigma")
    )
    tokens, _ = sample(small("baseline").model)
    for (name, ours), theirs in zip(plain.named_parameters(), sigma.named_parameters(), strict=False):
        if name == theirs[0]:
            assert torch.equal(ours, theirs[1])
    assert len(sigma.sigma_layers) == 8
    torch.testing.assert_close(sigma(tokens), plain(tokens), rtol=1e-5, atol=1e-5)


def test_gamma_started_at_one_gives_unit_spectral_norm():
    model = GPT(small("sigma_reparam").model, SEQ_LEN)
    for layer in model.sigma_layers:
        for _ in range(300):
            layer.iterate()
        weight = layer(torch.eye(layer.in_features))
        assert torch.linalg.matrix_norm(weight, 2).item() == pytest.approx(1, rel=1e-4)


def test_soft_clip_reaches_zero_and_one_exactly():
    torch.manual_seed(0)
    core = AttentionCore(AttentionConfig(clip_low=-0.03, clip_high=1.03), 8)
    q, k = 3 * torch.randn(2, 1, 2, 8, 8)
    weights = core(q, k, torch.eye(8).expand(1, 2, 8, 8))  # the identity as V shows the weights themselves
    past = weights[:, :, *torch.tril_indices(8, 8, -1)]
    soft = core.shaped(core.logits(q, k)).softmax(-1)
    assert weights.min() == 0
    assert weights.max() == 1
    assert (weights[:, :, 0, 0] == 1).all()
    assert (past == 0).any()
    assert torch.equal(weights == 0, 1.06 * soft - 0.03 <= 0)
    assert (soft[:, :, *torch.tril_indices(8, 8)] > 0).all()


@pytest.mark.parametrize("variant", ["baseline", "soft_cap", "soft_clip"])
def test_dropout_acts_only_in_training(variant):
    still = stirred(small(variant).model)
    wet = stirred(small(variant, "model.dropout=0.3").model)
    tokens, _ = sample(small(variant).model)
    assert torch.equal(wet.eval()(tokens), still(tokens))
    wet.train()
    torch.manual_seed(0)
    first, second = wet(tokens), wet(tokens)
    assert not torch.allclose(first, second)
    assert not torch.allclose(first, still(tokens))


@pytest.mark.parametrize("variant", ["baseline", "soft_cap", "soft_clip"])
def test_dropout_acts_on_attention_weights_and_keeps_their_mean(variant):
    torch.manual_seed(0)
    config = replace(small(variant).model.attn)
    q, k = torch.randn(2, 64, 8, 8, 8)
    v = torch.eye(8).expand(64, 8, 8, 8)
    wet, dry = AttentionCore(config, 8, 0.5), AttentionCore(config, 8)
    weights, wanted = wet(q, k, v), dry(q, k, v)
    kept = weights != 0
    torch.testing.assert_close(weights[kept], 2 * wanted[kept])
    assert kept[..., 0, 0].float().mean().item() == pytest.approx(0.5, abs=0.1)


EXTRA = {
    "rmsnorm": ("model.norm.kind=rmsnorm", "model.bias=true"),
    "learned": ("model.position.kind=learned",),
    "v_norm": ("model.position.kind=none", "model.attn.v_norm=full"),
    "full": ("model.attn.qk_norm=full", "model.attn.norm_after_position=true"),
}


@pytest.mark.parametrize("variant", [*VARIANTS, *EXTRA])
def test_bf16_keeps_norms_softmax_stream_and_logits_in_fp32(variant, monkeypatch):
    config = small("baseline", *EXTRA[variant]) if variant in EXTRA else small(variant)
    model, (tokens, targets) = stirred(config.model), sample(config.model)
    seen = {"norm": [], "stream": [], "linear": [], "logits": [], "softmax": []}
    shape, scores = AttentionCore.shaped, AttentionCore.logits

    def watch(kind):
        return lambda module, args, output: seen[kind].append(output.dtype)

    for module in model.modules():
        if isinstance(module, Norm):
            module.register_forward_hook(watch("norm"))
        elif isinstance(module, nn.Linear):
            module.register_forward_hook(watch("linear"))
    for block in model.blocks:
        block.register_forward_hook(watch("stream"))

    def logits(core, q, k):
        seen["logits"].append(scores(core, q, k).dtype)
        return scores(core, q, k)

    def shaped(core, logits):
        seen["softmax"] += [logits.dtype, shape(core, logits).dtype]
        return shape(core, logits)

    monkeypatch.setattr(AttentionCore, "logits", logits)
    monkeypatch.setattr(AttentionCore, "shaped", shaped)
    with torch.autocast("cpu", torch.bfloat16):
        out = model(tokens)
        loss = F.cross_entropy(out.flatten(0, 1), targets.flatten())
    loss.backward()
    assert out.dtype == loss.dtype == torch.float32
    assert set(seen["linear"]) == {torch.bfloat16}
    plain = config.model.attn.soft_cap is not None or config.model.attn.clip_high > 1
    normed = any(isinstance(module, Norm) for module in model.modules())
    for kind in (*["norm"] * normed, "stream", *(("logits", "softmax") if plain else ())):
        assert set(seen[kind]) == {torch.float32}, kind
    assert all(p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in model.parameters())
    torch.testing.assert_close(out, model(tokens), rtol=0, atol=0.3)


@pytest.mark.parametrize("variant", ALL_VARIANTS)
def test_each_variant_learns_at_nano(variant):
    trainer = a_trainer(configured("model=nano", f"+variant={variant}", "optim.lr=3e-3", "schedule.warmup_steps=10"))
    losses = [trainer.step(step).read()["train/loss"] for step in range(20)]
    assert losses[-1] < losses[0] - 0.2


def test_bf16_logits_of_the_plain_path_are_not_rounded():
    """With cap or clip, attention in bf16 is as exact as SDPA, whose logits stay in fp32."""
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 2, 2, 16, 64)
    q, k, v = (30 * q).bfloat16(), k.bfloat16(), v.bfloat16()  # logits near 100, as before a divergence
    plain, fused = AttentionCore(AttentionConfig(soft_cap=1e9), 8), AttentionCore(AttentionConfig(), 8)
    exact = fused(q.double(), k.double(), v.double())
    with torch.autocast("cpu", torch.bfloat16):
        far, near = ((core(q, k, v).double() - exact).abs().max().item() for core in (plain, fused))
    assert far <= 2 * near
