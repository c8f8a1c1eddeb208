"""The variants that are named after published models, against the models of that name in transformers: loss, logits and
all gradients, with the same weights.

Both have weights in fp64. What transformers computes in fp32 all the same (RMSNorm, softmax, the tables of RoPE, the
loss) limits the equality to the rounding of fp32. A second comparison makes its casts to fp32 casts to fp64.
"""

import re
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.util import find_spec
from itertools import chain

import pytest
import torch
from reference import small
from test_variants import SEQ_LEN, SWITCHES, sample, stirred

from stabrun.training.objective import cross_entropy
from stabrun.variants import directories, file_values, typed

pytestmark = [
    pytest.mark.trainers,
    pytest.mark.skipif(not find_spec("transformers"), reason="stabrun[huggingface] is not installed"),
]

if find_spec("transformers"):
    import transformers as hf
    from transformers.pytorch_utils import Conv1D

TOLERANCE = {"fp32": 1e-5, "fp64": 1e-12}  # of each tensor's largest element, by the precision of their casts
FP32 = torch.float32
LAYERS, HEADS, WIDTH = 3, 3, 24  # √24 is no integer, and 8/3 · 24 is one
SHAPE = (f"model.n_layer={LAYERS}", f"model.n_head={HEADS}", f"model.d_model={WIDTH}")
SIZES = {
    "vocab_size": 40,
    "hidden_size": WIDTH,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "max_position_embeddings": SEQ_LEN,
    "pad_token_id": None,  # the embedding of a padding token has no gradient
    "bos_token_id": None,
    "eos_token_id": None,
    "attn_implementation": "eager",  # with a softmax of its own, where ours calls torch's fused attention
}

ENDS = {"embed": "model.embed_tokens", "norm": "model.norm"}
HEAD = {"head": "lm_head"}
ATTENTION = {
    "blocks.*.attn.layer.qkv": "model.layers.*.self_attn.q_proj model.layers.*.self_attn.k_proj "
    "model.layers.*.self_attn.v_proj",
    "blocks.*.attn.layer.proj": "model.layers.*.self_attn.o_proj",
}
FEEDFORWARD = {
    "blocks.*.mlp.layer.fc1": "model.layers.*.mlp.up_proj",
    "blocks.*.mlp.layer.fc2": "model.layers.*.mlp.down_proj",
}
GATED = FEEDFORWARD | {"blocks.*.mlp.layer.fc1": "model.layers.*.mlp.gate_proj model.layers.*.mlp.up_proj"}
PRE_NORMS = {
    "blocks.*.attn.pre_norm": "model.layers.*.input_layernorm",
    "blocks.*.mlp.pre_norm": "model.layers.*.post_attention_layernorm",
}
OUT_NORMS = {
    "blocks.*.attn.out_norm": "model.layers.*.post_attention_layernorm",
    "blocks.*.mlp.out_norm": "model.layers.*.post_feedforward_layernorm",
}
QK_NORMS = {f"blocks.*.attn.layer.{x}_norm.norm": f"model.layers.*.self_attn.{x}_norm" for x in "qk"}


@dataclass(frozen=True)
class Architecture:
    """A model of transformers.

    `modules`: our module with parameters → theirs, several if ours computes them at once, with * for the layer.
    `settings`: what its configuration needs beside sizes and its defaults, which are the values of the published model.
    """

    model: str
    config: str
    eps: str
    modules: dict
    settings: dict = field(default_factory=dict)

    def built(self, eps):
        """In fp64, without dropout."""
        config = getattr(hf, self.config)(**SIZES, **self.settings, **{self.eps: eps})
        torch.set_default_dtype(torch.float64)  # of buffers, too: Gemma's √d
        try:
            return getattr(hf, self.model)(config).eval()
        finally:
            torch.set_default_dtype(FP32)


ARCHITECTURES = {
    "gemma2": Architecture(
        "Gemma2ForCausalLM",
        "Gemma2Config",
        "rms_norm_eps",
        ENDS
        | ATTENTION
        | GATED
        | PRE_NORMS
        | OUT_NORMS
        | {"blocks.*.mlp.pre_norm": "model.layers.*.pre_feedforward_layernorm"},
        {
            "intermediate_size": 4 * WIDTH,
            "num_key_value_heads": HEADS,
            "head_dim": WIDTH // HEADS,
            "query_pre_attn_scalar": WIDTH // HEADS,  # as in the models of 2B and 9B
            "sliding_window": SEQ_LEN,  # so that all attention is global
        },
    ),
    "olmo2": Architecture(
        "Olmo2ForCausalLM",
        "Olmo2Config",
        "rms_norm_eps",
        ENDS | HEAD | ATTENTION | QK_NORMS | GATED | OUT_NORMS,
        {
            "intermediate_size": 8 * WIDTH // 3,
            "rope_parameters": {"rope_type": "default", "rope_theta": 500_000.0},  # the default is that of OLMo
        },
    ),
    "llama": Architecture(
        "LlamaForCausalLM",
        "LlamaConfig",
        "rms_norm_eps",
        ENDS | HEAD | ATTENTION | GATED | PRE_NORMS,
        {"intermediate_size": 8 * WIDTH // 3},
    ),
    "gpt2": Architecture(
        "GPT2LMHeadModel",
        "GPT2Config",
        "layer_norm_epsilon",
        {
            "embed": "transformer.wte",
            "position": "transformer.wpe",
            "blocks.*.attn.pre_norm": "transformer.h.*.ln_1",
            "blocks.*.attn.layer.qkv": "transformer.h.*.attn.c_attn",
            "blocks.*.attn.layer.proj": "transformer.h.*.attn.c_proj",
            "blocks.*.mlp.pre_norm": "transformer.h.*.ln_2",
            "blocks.*.mlp.layer.fc1": "transformer.h.*.mlp.c_fc",
            "blocks.*.mlp.layer.fc2": "transformer.h.*.mlp.c_proj",
            "norm": "transformer.ln_f",
        },
    ),
    "nemotron": Architecture(
        "NemotronForCausalLM",
        "NemotronConfig",
        "norm_eps",
        ENDS | HEAD | ATTENTION | FEEDFORWARD | PRE_NORMS,
        {"intermediate_size": 4 * WIDTH, "num_key_value_heads": HEADS},
    ),
}


def counterparts(ours, theirs, modules):
    """Name of our parameter → names of theirs that make it up, in order. Both models are covered, or it fails."""
    found = {}
    for name, _ in ours.named_parameters():
        module, _, kind = name.rpartition(".")
        layer = re.search(r"\d+", module)
        paths = modules.get(re.sub(r"^blocks\.\d+", "blocks.*", module), "nothing")
        found[name] = [f"{path.replace('*', layer[0] if layer else '')}.{kind}" for path in paths.split()]
    assert sorted(chain(*found.values())) == sorted(name for name, _ in theirs.named_parameters())
    return found


def oriented(model, name, tensor):
    """A parameter of theirs or its gradient, `[outputs, inputs]`: the matrices of GPT-2 are stored the other way."""
    return tensor.t() if isinstance(model.get_submodule(name.rpartition(".")[0]), Conv1D) else tensor


@torch.no_grad()
def copy(ours, theirs, names):
    for name, parameter in ours.named_parameters():
        parts = parameter.chunk(len(names[name]))
        for path, part in zip(names[name], parts, strict=True):
            place = oriented(theirs, path, theirs.get_parameter(path))
            assert place.shape == part.shape, name
            place.copy_(part)


@contextmanager
def casts(to):
    """Inside, casts that are written as casts to fp32 are casts to `to`."""
    with pytest.MonkeyPatch.context() as patch:
        if to == "fp64":
            patch.setattr(torch, "float32", torch.float64)
            patch.setattr(torch, "float", torch.float64)
            patch.setattr(torch.Tensor, "float", torch.Tensor.double)
        yield


def assert_equal(variant, config, to="fp32", seed=0):
    """The loss, the logits and each gradient of `config` and of the model of transformers."""
    architecture = ARCHITECTURES[variant]
    ours = stirred(config, seed, torch.float64)
    tokens, _ = sample(config, seed)
    logits = ours(tokens)
    loss = cross_entropy(logits[:, :-1], tokens[:, 1:])
    loss.backward()

    with casts(to):
        theirs = architecture.built(config.norm.eps)
        names = counterparts(ours, theirs, architecture.modules)
        copy(ours, theirs, names)
        output = theirs(tokens, labels=tokens)
        output.loss.backward()

    pairs = {"loss": (loss, output.loss), "logits": (logits, output.logits)}
    for name, parameter in ours.named_parameters():
        gradients = [oriented(theirs, path, theirs.get_parameter(path).grad) for path in names[name]]
        pairs[name] = (parameter.grad, torch.cat(gradients))
    off = {name: ((got - wanted).abs().max() / wanted.abs().max()).item() for name, (got, wanted) in pairs.items()}
    assert {name: far for name, far in off.items() if not far <= TOLERANCE[to]} == {}


@pytest.mark.parametrize("variant", ARCHITECTURES)
def test_the_variant_equals_the_model_of_transformers(variant):
    config = small(variant, *SHAPE).model
    assert_equal(variant, config)
    assert_equal(variant, config, to="fp64")  # second: what is imported on first use must see the true dtypes


OTHERS = SWITCHES | {"position.rope_base": (10_000.0, 500_000.0)}


@pytest.mark.parametrize("variant", ARCHITECTURES)
def test_another_value_of_any_key_of_the_variant_would_be_noticed(variant):
    for key, value in file_values("variant", variant, directories(None)).items():
        for other in OTHERS.get(key.removeprefix("model."), ()):
            if other != value:
                with pytest.raises(AssertionError):
                    assert_equal(variant, small(variant, *SHAPE, typed(key, other)).model)
