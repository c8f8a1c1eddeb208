"""The closed forms of `stabrun model` against counts, traces and torch's own FLOP counter."""

from collections import Counter
from dataclasses import replace

import pytest
import torch
from helpers import PRESETS, VARIANTS, configured
from reference import small
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from stabrun.config import UserError
from stabrun.model import switches
from stabrun.model.counts import flops_per_token, parameters
from stabrun.model.describe import describe
from stabrun.model.gpt import GPT, meta_gpt
from stabrun.model.memory import fitting, memory
from stabrun.training.trace import traced_memory

SITES = ("qkv", "proj", "fc1", "fc2")
EXTRA = {
    "biases": ["model.bias=true", "+variant=qk_fc_norm"],
    "biases_sigma": ["model.bias=true", "+variant=sigma_reparam"],
    "no_gain": ["model.norm.affine=false", "+variant=qkv_norm"],
    "no_norm": ["model.norm.kind=none", "+variant=qk_norm"],
    "full": ["model.attn.qk_norm=full", "model.attn.v_norm=full", "model.bias=true"],
    "post": ["model.attn.post_norm=true", "model.mlp.post_norm=true", "model.mlp.pre_norm=false"],
    "swiglu": ["model.mlp.activation=swiglu", "model.mlp.width=100", "model.bias=true"],
    "geglu": ["model.mlp.activation=geglu"],
    "embedding_norm": ["model.embedding=norm", "model.bias=true"],
    "learned_tied": ["model.position.kind=learned", "model.tied=true"],
}
SETTINGS = {
    **{preset: [f"model={preset}"] for preset in PRESETS},
    **{f"nano-{variant}": [f"+variant={variant}"] for variant in VARIANTS},
    **{f"nano-{name}": words for name, words in EXTRA.items()},
}


def part_of(name):
    """The part that a parameter belongs to, by its name."""
    first, *_, module, _ = name.split(".") if name.count(".") > 1 else (*name.split("."), "")
    if first in ("embed", "position", "head"):
        return {"embed": "embedding"}.get(first, first)
    return module if module in SITES else "norms_and_scales"


def counted_parameters(config):
    """The parameters of the built model by part."""
    counted = Counter()
    for name, parameter in meta_gpt(config.model, config.data.seq_len).named_parameters():
        counted[part_of(name)] += parameter.numel()
    return counted


@pytest.mark.parametrize("setting", SETTINGS)
def test_parameters_by_part(setting):
    config = configured(*SETTINGS[setting])
    counted = counted_parameters(config)
    closed = parameters(config.model, config.data.seq_len)
    assert closed.pop("total") == counted.total()
    assert closed == {part: counted[part] for part in closed}


def test_830m_has_the_size_given_in_the_paper():
    config = configured("model=830m")
    assert 826e6 <= parameters(config.model, config.data.seq_len)["total"] <= 831e6


# Small batches, so that the optimizer's step has the peak.
UPDATE = ["model=micro", "train.batch_size=1", "data.seq_len=64", "data.tokenizer=bytes"]
# Many heads and few outputs, so that the logits of attention have the peak.
HEADS = ["model=mini", "model.n_head=16", "model.vocab_size=256", "data.tokenizer=bytes", "observe.every=0"]
MEMORY = {
    **{variant: [f"+variant={variant}"] for variant in VARIANTS},
    "swiglu-micro-batch": ["model.mlp.activation=swiglu", "train.micro_batch_size=8"],
    "geglu": ["model.mlp.activation=geglu"],
    "mini-soft_clip": ["model=mini", "+variant=soft_clip"],
    "mini-rmsnorm": ["model=mini", "model.norm.kind=rmsnorm"],
    "mini-bf16-rmsnorm": ["model=mini", "model.norm.kind=rmsnorm", "+variant=qkv_norm", "train.precision=bf16"],
    "mini-dropout": ["model=mini", "model.dropout=0.1"],
    "mini-bf16-dropout": ["model=mini", "model.dropout=0.1", "train.precision=bf16"],
    "mini-dropout-cap": ["model=mini", "model.dropout=0.1", "+variant=qk_norm_cap"],
    "mini-z_loss": ["model=mini", "model.vocab_size=50257", "optim.z_loss=1e-4"],
    "mini-recompute": ["model=mini", "train.recompute=blocks"],
    "mini-bf16-recompute": ["model=mini", "train.recompute=blocks", "train.precision=bf16"],
    "micro-long-cap": ["model=micro", "data.seq_len=512", "+variant=soft_cap"],
    "micro-long-clip-recompute": ["model=micro", "data.seq_len=512", "+variant=soft_clip", "train.recompute=blocks"],
    "mini-gpt2": ["model=mini", "model.position.kind=learned", "model.mlp.activation=gelu_tanh", "model.bias=true"],
    "mini-recompute-qk_clip": [*HEADS, "optim.qk_clip=100", "train.recompute=blocks"],
    "micro-muon": [*UPDATE, "optim.kind=muon"],
    "micro-stable_adamw": [*UPDATE, "optim.kind=stable_adamw", "model.vocab_size=8192"],
    **{
        f"mini-bf16-{variant}": ["model=mini", "train.precision=bf16", f"+variant={variant}"]
        for variant in ("baseline", "qkv_norm", "soft_cap", "qk_fc_norm", "layer_scale", "qk_norm_cap")
    },
}
MEMORY_SLOW = ("mini-bf16-baseline", "mini-bf16-layer_scale", "mini-bf16-qk_norm_cap")
# Half of the depth takes half of the time; soft_clip needs the whole depth to be within a tenth.
SHALLOW = [setting for setting in MEMORY if setting != "mini-soft_clip" and setting not in MEMORY_SLOW]
DEPTHS = [
    ("mini-soft_clip", ()),
    *((setting, ("model.n_layer=2",)) for setting in SHALLOW),
    *(pytest.param(setting, (), marks=pytest.mark.slow) for setting in MEMORY if setting != "mini-soft_clip"),
]


@pytest.mark.parametrize(("setting", "depth"), DEPTHS)
def test_memory_is_within_a_tenth_of_the_trace(setting, depth):
    config = configured(*MEMORY[setting], *depth)
    assert memory(config)["peak_bytes"] == pytest.approx(traced_memory(config), rel=0.1)


def test_the_largest_batch_is_refused_with_a_micro_batch_that_fits():
    """Its divisors are found at once: not by trying two billion numbers."""
    config = configured("train.batch_size=2147483646")
    assert fitting(config, "cpu", 4 << 30)[0].startswith("train.micro_batch_size=")
    with pytest.raises(UserError, match=r"train\.batch_size=999999999999: must be at least 1 and at most 2147483647"):
        configured("train.batch_size=999999999999")


PAPER = [
    "baseline", "soft_temp", "soft_cap", "soft_clip", "layer_scale", "sigma_reparam", "qk_norm", "qk_fc_norm",
    "qkv_norm", "qk_norm_cap",
]  # fmt: skip
A_GPU = 76 * 2**30  # bytes of an 80 GB GPU that are left to a process


@pytest.mark.parametrize("variant", ["qkv_norm", *(pytest.param(v, marks=pytest.mark.slow) for v in PAPER)])
def test_830m_is_within_a_twentieth_of_the_trace_and_fits_a_gpu(variant):
    config = configured("model=830m", "train.device=cuda", f"+variant={variant}")
    predicted = memory(config)["peak_bytes"]
    assert predicted < A_GPU
    assert predicted == pytest.approx(traced_memory(config), rel=0.05)


@pytest.mark.parametrize("variant", PAPER)
def test_the_paper_s_grid_fits_a_gpu(variant):
    config = configured("+experiment=rybakov2024_divergence", "train.device=cuda", f"+variant={variant}")
    assert memory(config)["peak_bytes"] < A_GPU


def counted_flops(config, batch):
    """Of one forward and backward pass, by operator, as torch counts matrix products."""
    model = GPT(config.model, config.data.seq_len)
    tokens = torch.zeros(batch, config.data.seq_len, dtype=torch.long)
    with FlopCounterMode(display=False) as counter:
        F.cross_entropy(model(tokens).flatten(0, 1), tokens.flatten()).backward()
    return {str(op): count for op, count in counter.get_flop_counts()["Global"].items()}


SHAPES = {
    **{variant: (variant,) for variant in VARIANTS},
    "swiglu": ("baseline", "model.n_head=4", "model.mlp.activation=swiglu", "model.mlp.width=24"),
    "geglu": ("baseline", "model.mlp.activation=geglu"),
    "learned-tied": ("soft_cap", "model.position.kind=learned", "model.tied=true", "model.bias=true"),
}


@pytest.mark.parametrize("shape", SHAPES)
def test_flops_equal_torchs_count_exactly(shape):
    """With SDPA's math kernel: torch does not count the fused kernel of the CPU, and those of CUDA recompute logits."""
    config = small(*SHAPES[shape])
    expected = flops_per_token(config.model, config.data.seq_len) * 3 * config.data.seq_len
    with sdpa_kernel(SDPBackend.MATH):
        assert sum(counted_flops(config, batch=3).values()) == expected


def test_flops_of_attention_are_those_that_the_fused_kernel_hides():
    config = small("baseline")
    model, seq_len = config.model, config.data.seq_len
    attention = 12 * model.n_layer * model.d_model * seq_len
    expected = flops_per_token(model, seq_len) * seq_len
    counted = counted_flops(config, batch=1)
    assert counted["aten.mm"] == expected - attention * seq_len


@pytest.fixture
def first_layer_differs(monkeypatch):
    """The first block has no norms before its branches, norms of Q, K and V, an out norm, and a wide gated FFN."""

    def of_layer(model, index):
        if index:
            return model
        attn = replace(model.attn, pre_norm=False, qk_norm="full", v_norm="head")
        mlp = replace(model.mlp, pre_norm=False, out_norm=True, activation="swiglu", width=6 * model.d_model)
        return replace(model, attn=attn, mlp=mlp, bias=True)

    monkeypatch.setattr(switches, "of_layer", of_layer)


@pytest.mark.usefixtures("first_layer_differs")
def test_a_difference_between_layers_is_in_the_model_and_in_every_closed_form():
    config = configured("model=mini")
    model = meta_gpt(config.model, config.data.seq_len)
    first, second = (dict(block.named_parameters()) for block in model.blocks[:2])
    assert first["mlp.layer.fc1.weight"].shape == (12 * 128, 128)
    assert first.keys() - second.keys() >= {"mlp.out_norm.weight", "attn.layer.q_norm.norm.weight"}
    counted = counted_parameters(config)
    closed = parameters(config.model, config.data.seq_len)
    assert closed == {"total": counted.total(), **{part: counted[part] for part in closed if part != "total"}}
    assert memory(config)["peak_bytes"] == pytest.approx(traced_memory(config), rel=0.1)
    tokens = 2 * config.data.seq_len
    with sdpa_kernel(SDPBackend.MATH):
        flops = flops_per_token(config.model, config.data.seq_len)
        assert sum(counted_flops(config, batch=2).values()) == flops * tokens


def test_the_difference_matters_to_each_of_them(request):
    """Or the test above could hold without it."""
    config = configured("model=mini")

    def numbers():
        shape = config.model, config.data.seq_len
        return parameters(*shape)["total"], flops_per_token(*shape), memory(config)["activations_bytes"]

    alike = numbers()
    request.getfixturevalue("first_layer_differs")
    assert all(a != b for a, b in zip(alike, numbers(), strict=True))


def test_describe_names_the_switches_that_differ_from_their_defaults():
    assert describe(small("baseline"))["switches"] == {}
    assert describe(small("qk_norm_cap"))["switches"] == {
        "model.attn.qk_norm": "head",
        "model.attn.soft_cap": 50.0,
    }
