"""Initial weights against their formulas and torch's functions, and the check at step 0."""

import json
import math

import pytest
import torch
from helpers import VARIANTS, configured, run, tiny
from torch import nn

from stabrun.config import UserError
from stabrun.model.gpt import GPT
from stabrun.record.run_dir import RunDir
from stabrun.training.initial_check import check_initial
from stabrun.training.run import train

N, D = 3, 32
SHAPE = f"model.n_layer={N}", f"model.d_model={D}", "model.vocab_size=300", "model.position.kind=learned"


def drawn(init, *words, seed=5):
    config = configured(*SHAPE, f"model.init={init}", *words)
    return GPT(config.model, config.data.seq_len, seed)


def matrices(model):
    return {name: p.detach() for name, p in model.named_parameters() if p.dim() == 2}


TORCHS = {
    "xavier": lambda t, g: nn.init.xavier_normal_(t, generator=g),
    "kaiming": lambda t, g: nn.init.kaiming_normal_(t, nonlinearity="relu", generator=g),
    "fan_in": lambda t, g: nn.init.kaiming_normal_(t, nonlinearity="linear", generator=g),
    "trunc_fan_in": lambda t, g: nn.init.trunc_normal_(
        t, 0, t.shape[1] ** -0.5 / CUT, -2 * t.shape[1] ** -0.5 / CUT, 2 * t.shape[1] ** -0.5 / CUT, generator=g
    ),
}
# Variance of a unit normal cut off at ±2: 1 − 2·2φ(2)/(2Φ(2) − 1).
CUT = math.sqrt(1 - 4 * math.exp(-2) / math.sqrt(2 * math.pi) / math.erf(2 / math.sqrt(2)))


@pytest.mark.parametrize("init", TORCHS)
def test_weights_equal_torchs_bit_for_bit(init):
    generator = torch.Generator().manual_seed(5)
    for name, weight in matrices(drawn(init)).items():
        assert weight.equal(TORCHS[init](torch.empty_like(weight), generator)), name


def expected(init, name, rows, columns):
    residual = name.endswith(("proj.weight", "fc2.weight"))
    return {
        "fan_in": columns**-0.5,
        "trunc_fan_in": columns**-0.5,
        "gpt2": 0.02 / math.sqrt(2 * N) if residual else 0.02,
        "xavier": math.sqrt(2 / (rows + columns)),
        "kaiming": math.sqrt(2 / columns),
        "small": math.sqrt(2 / (5 * D)) * (math.sqrt(1 / (2 * N)) if residual else 1),
        "zero_out": 0.0 if residual else columns**-0.5,
        "zero": 0.0,
    }[init]


@pytest.mark.parametrize("init", ["fan_in", "trunc_fan_in", "gpt2", "xavier", "kaiming", "small", "zero_out", "zero"])
def test_standard_deviation_of_each_matrix_equals_its_formula(init):
    for name, weight in matrices(drawn(init)).items():
        std = expected(init, name, *weight.shape)
        # The standard error of a sample's standard deviation is 1/√2n of it.
        assert float(weight.std()) == pytest.approx(std, rel=5 / math.sqrt(2 * weight.numel())), name
        assert abs(float(weight.mean())) <= 5 * std / math.sqrt(weight.numel())
        if init == "trunc_fan_in":
            assert float(weight.abs().max()) <= 2 * std / CUT


def test_sigma_reparam_refuses_zero_initialization():
    with pytest.raises(UserError, match="spectral norm, which is 0"):
        configured("+variant=sigma_reparam", "model.init=zero_out")


@pytest.mark.parametrize("variant", [*VARIANTS, "model.init=gpt2", "model.init=zero_out", "model=mini"])
def test_no_findings_for_sound_configurations(variant):
    facts = check_initial(configured(variant if "=" in variant else f"+variant={variant}"))
    assert facts["findings"] == []


BARE = "model.norm.kind=none", "model.residual=false", "model.n_layer=8", "model.mlp.activation=gelu"
PROBLEMS = {
    "zero": (("model.init=zero",), ["All gradients are zero", "output zeros"]),
    "large logits": (("model.init=kaiming",), ["the logits are too large"]),
    "fades": (("model.init=fan_in", *BARE), ["The gradient fades", "The signal fades with depth"]),
    "lost": (("model.init=gpt2", *BARE), ["All gradients are zero", "output zeros"]),
    "grows": (("model.init=kaiming", *BARE), ["logits are too large", "gradient grows", "signal grows with depth"]),
    "not finite": (("model.init=kaiming", *BARE[:3]), ["not finite"]),
}


@pytest.mark.parametrize("case", PROBLEMS)
def test_problems_are_reported(case):
    words, expected_parts = PROBLEMS[case]
    found = check_initial(configured(*words))["findings"]
    assert len(found) == len(expected_parts), found
    for text, part in zip(found, expected_parts, strict=True):
        assert part in text


def test_variances_are_those_of_the_tensors():
    """Of the outputs and gradients of the layers, computed by autograd."""
    config = tiny("model.n_head=2")
    facts = check_initial(config)
    model = GPT(config.model, config.data.seq_len, config.seed)
    kept = {}
    for name, layer in model.named_modules():
        if isinstance(layer, nn.Linear):
            layer.register_forward_hook(lambda m, x, y, name=name: kept.__setitem__(name, (x[0], y)))
    tokens = torch.randint(256, (4, 17), generator=torch.Generator().manual_seed(config.seed))
    loss = nn.functional.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())
    assert facts["loss"] == pytest.approx(float(loss.detach()), rel=1e-6)
    for layer in range(2):
        for site, name in {"qkv": "attn.layer.qkv", "fc1": "mlp.layer.fc1", "fc2": "mlp.layer.fc2"}.items():
            x, y = kept[f"blocks.{layer}.{name}"]
            (gradient,) = torch.autograd.grad(loss, x, retain_graph=True)
            norms = y.detach().norm(dim=-1)
            variances = facts["variances"]
            assert variances[f"{site} out"][layer] == pytest.approx(float(norms.mean() ** 2 / y.shape[-1]), rel=1e-4)
            assert variances[f"{site} in grad"][layer] == pytest.approx(float(gradient.square().mean()), rel=1e-4)


def test_the_check_is_deterministic():
    words = "model.dropout=0.5", "train.precision=bf16"
    assert check_initial(tiny(*words)) == check_initial(tiny(*words)) == check_initial(tiny())


def test_the_check_on_the_command_line(capsys):
    status, out, _ = run(capsys, "model", "+check=init", "model.init=zero")
    assert status == 0
    assert out.splitlines()[-2].startswith("All gradients are zero")
    status, out, _ = run(capsys, "model", "+check=init", "--json", *BARE[:3], "model.init=kaiming")
    assert json.loads(out)["init"]["loss"] == "nan"
    assert "No problems found." in run(capsys, "model", "+check=init")[1]
    status, _, err = run(capsys, "model", "+check=exit")
    assert status == 2
    assert "init" in err


def test_a_run_reports_findings_at_its_first_step(capsys, tmp_path):
    train(tiny("model.init=zero", f"run_dir={tmp_path / 'run'}"))
    assert "All gradients are zero" in capsys.readouterr().out
    events = [event for event in RunDir(tmp_path / "run").events() if event["event"] == "init"]
    assert [event["finding"].split(":")[0] for event in events] == [
        "All gradients are zero",
        "The blocks output zeros",
    ]
