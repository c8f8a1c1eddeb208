"""A fault planted in a module is found there, and what is healthy is left in peace, to the bit."""

import copy
import math
import random
import warnings
from contextlib import nullcontext
from types import MethodType

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from stabrun.watching.locate import locate

BATCH, TIME, VOCAB = 2, 8, 50
NAN = float("nan")


def llama(attention="eager", seed=0, **options):
    """4 layers of width 16, and their config's other names."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(seed)
    config = transformers.LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=32,
        attn_implementation=attention,
        **options,
    )
    return transformers.LlamaForCausalLM(config).train()


def batch(seed=0):
    return torch.randint(0, VOCAB, (BATCH, TIME), generator=torch.Generator().manual_seed(seed))


def step_of(model, ids=None, context=nullcontext):
    ids = batch() if ids is None else ids

    def step():
        with context():
            return model(input_ids=ids, labels=ids)

    return step


def half():
    return torch.autocast("cpu", dtype=torch.float16)


def train(model, steps, seed=0):
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for step in range(steps):
        optimizer.zero_grad()
        step_of(model, batch(100 * seed + step))().loss.backward()
        optimizer.step()


def planted(module, place):
    """Replaces the forward pass of a module by one with NaN at (sequence, position)."""
    forward = module.forward

    def broken(self, *args, **kwargs):
        output = forward(*args, **kwargs)
        first = output[0] if isinstance(output, tuple) else output
        mark = torch.zeros(first.shape[:2], dtype=torch.bool)
        mark[place] = True
        marked = first.masked_fill(mark.view(*mark.shape, *[1] * (first.ndim - 2)), NAN)
        return (marked, *output[1:]) if isinstance(output, tuple) else marked

    module.forward = MethodType(broken, module)


LAYER = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"]
LAYER += ["mlp.gate_proj", "mlp.up_proj", "mlp.down_proj", "input_layernorm", "post_attention_layernorm"]
WITH_WEIGHTS = [f"model.layers.{index}.{name}" for index in range(4) for name in LAYER]
WITH_WEIGHTS += ["model.embed_tokens", "model.norm", "lm_head"]
TWENTY = random.Random(0).sample(WITH_WEIGHTS, 20)
WITHOUT = ["model.layers.1.mlp.act_fn", "model.layers.2.mlp", "model.layers.0.self_attn", "model.layers.3"]


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_a_bad_weight_in_each_of_20_modules(attention):
    model = llama(attention)
    named = []
    for path in TWENTY:
        broken = copy.deepcopy(model)
        weight = broken.get_submodule(path).weight
        with torch.no_grad():
            weight[batch()[1, 3] if path.endswith("embed_tokens") else 0] = NAN
        fault = locate(broken, step_of(broken))
        named.append(fault.module)
        assert (fault.pass_, fault.kind) == ("forward", type(broken.get_submodule(path)).__name__)
        assert math.isnan(fault.weights_largest["weight"])
        assert "weight already held" in fault.sentence()
    assert named == TWENTY


@pytest.mark.parametrize("precision", ["half", "autocast"])
def test_an_overflow_of_fp16_in_each_of_20_modules(precision):
    """The weights are finite in fp16, and the outputs are not."""
    model = llama()
    if precision == "half":
        model.half()
    context = half if precision == "autocast" else nullcontext
    places = [path for path in WITH_WEIGHTS if not path.endswith(("embed_tokens", "norm"))]  # fp32 under autocast
    if precision == "half":
        places += ["model.norm", "model.layers.2.input_layernorm"]
    named, chosen = [], random.Random(1).sample(places, 20)
    for path in chosen:
        broken = copy.deepcopy(model)
        with torch.no_grad():
            broken.get_submodule(path).weight.fill_(6e4)
            if path.endswith("down_proj"):
                broken.get_submodule(path.replace("down", "up")).weight.fill_(10)
                broken.get_submodule(path.replace("down", "gate")).weight.fill_(10)
            if path.endswith("o_proj"):
                broken.get_submodule(path.replace("o_proj", "v_proj")).weight.fill_(10)
        fault = locate(broken, step_of(broken, context=context))
        named.append(fault.module)
        assert (fault.pass_, fault.dtype, fault.overflow) == ("forward", "float16", True)
        assert fault.input_finite
        assert "65504" in fault.sentence()
        assert fault.weights_largest["weight"] == pytest.approx(6e4, rel=1e-3)
    assert named == chosen


@pytest.mark.parametrize("path", [*TWENTY, *WITHOUT])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_nan_at_one_token(path, attention):
    """Its place and the ids there. A block is named for what its own code does."""
    model = llama(attention)
    planted(model.get_submodule(path), (1, 5))
    fault = locate(model, step_of(model))
    assert (fault.module, fault.pass_, fault.positions) == (path, "forward", ((1, 5),))
    assert fault.tokens == (tuple(batch()[1, :6].tolist()),)
    assert "sequence 1 at position 5" in fault.sentence()


def test_tokens_that_the_caller_gives():
    """With embeddings as input, the model has seen none."""
    model = llama()
    planted(model.model.layers[1].mlp, (0, 7))

    def step():
        return model(inputs_embeds=model.model.embed_tokens.weight[batch()], labels=batch())

    assert locate(model, step).tokens == ()
    assert locate(model, step, batch() + 100).tokens == (tuple((batch()[0] + 100).tolist()),)


@pytest.mark.parametrize("bad", [VOCAB, -1, 10**9])
def test_a_token_outside_the_vocabulary(bad):
    model = llama()
    ids = batch()
    ids[1, 2] = bad
    fault = locate(model, step_of(model, ids))
    assert (fault.module, fault.pass_, fault.token, fault.rows) == ("model.embed_tokens", "token", bad, VOCAB)
    assert fault.positions == ((1, 2),)
    assert fault.tokens == (tuple(ids[1, :3].tolist()),)
    ids = " ".join(map(str, ids[1, :3].tolist()))
    assert fault.sentence() == (
        f"Id {bad}, in sequence 1 at position 2 (token ids up to there: {ids}), has no row in model.embed_tokens "
        "(Embedding), whose ids go from 0 to 49."
    )


def test_a_position_outside_its_embedding():
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(vocab_size=VOCAB, n_positions=6, n_embd=8, n_layer=1, n_head=1)
    model = transformers.GPT2LMHeadModel(config)
    fault = locate(model, step_of(model))
    assert (fault.module, fault.token, fault.rows) == ("transformer.wpe", 6, 6)
    assert fault.positions[0] == (0, 6)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_20_healthy_runs(attention):
    """Some steps trained, with padding on the left and in fp16 as well."""
    for seed in range(20):
        model = llama(attention, seed)
        train(model, 3, seed)
        ids = batch(seed)
        mask = torch.ones_like(ids)
        mask[0, : seed % 5] = 0
        context = half if seed % 2 else nullcontext

        def step(model=model, ids=ids, mask=mask, context=context):
            with context():
                return model(input_ids=ids, attention_mask=mask, labels=ids)

        assert locate(model, step, scale=1024.0 if seed % 2 else 1.0) is None


# Backward


class Reverse(torch.autograd.Function):
    """Its gradient is what a function makes of it."""

    @staticmethod
    def forward(ctx, x, function):
        ctx.function = function
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        return ctx.function(gradient), None


def mark(gradient):
    gradient = gradient.clone()
    gradient[1, 5] = NAN
    return gradient


BACKWARD = [path for path in [*TWENTY, *WITHOUT] if not path.endswith("embed_tokens")]


def break_backward(module):
    forward = module.forward

    def broken(self, x=None, *args, hidden_states=None, **kwargs):
        if hidden_states is not None:
            return forward(*args, hidden_states=Reverse.apply(hidden_states, mark), **kwargs)
        return forward(Reverse.apply(x, mark), *args, **kwargs)

    module.forward = MethodType(broken, module)


@pytest.mark.parametrize("path", BACKWARD)
def test_nan_in_the_backward_pass_alone(path):
    model = llama("sdpa")
    break_backward(model.get_submodule(path))
    fault = locate(model, step_of(model))
    assert (fault.module, fault.pass_, fault.positions) == (path, "backward", ((1, 5),))
    assert fault.tokens == (tuple(batch()[1, :6].tolist()),)
    assert fault.gradient_largest > 0
    assert "In the backward pass" in fault.sentence()


class Layered(nn.Module):
    """Three layers, a function after the second one, and a loss."""

    def __init__(self, function=lambda x: x):
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(VOCAB, 4)
        self.layers = nn.ModuleList(Layer(function if index == 1 else lambda x: x) for index in range(3))
        self.head = nn.Linear(4, VOCAB)

    def forward(self, ids):
        x = self.embed(ids)
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


class Layer(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.linear, self.function = nn.Linear(4, 4), function

    def forward(self, x):
        return self.function(x + self.linear(x))


def cross_entropy(model):
    return lambda: F.cross_entropy(model(batch()).flatten(0, 1), batch().flatten())


def minus_infinity(gradient):
    """Among zeros, where a mask would have it."""
    return torch.zeros_like(gradient).index_fill_(0, torch.tensor([1]), -torch.inf)


@pytest.mark.parametrize(
    "function",
    [
        lambda x: x + (x - x).sqrt(),  # 1 / (2·0) · 0
        lambda x: torch.where(x > 0, x, (x * 0).exp() * 0 + (x.abs() * 0).sqrt()),
        lambda x: Reverse.apply(x, lambda gradient: gradient / 0),
        lambda x: Reverse.apply(x, minus_infinity),
    ],
    ids=["sqrt", "where", "custom", "-inf"],
)
def test_functions_whose_gradient_is_not_finite(function):
    model = Layered(function)
    fault = locate(model, cross_entropy(model))
    assert (fault.module, fault.kind, fault.pass_) == ("layers.1", "Layer", "backward")


def test_functions_whose_value_is_not_finite():
    model = Layered(lambda x: (x - x) / (x - x))
    fault = locate(model, cross_entropy(model))
    assert (fault.module, fault.pass_) == ("layers.1", "forward")


def test_a_gradient_of_weights_that_overflows():
    """In fp16: its sum over tokens is not finite, and the gradient at the input is."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4, bias=False)).half()
    with torch.no_grad():
        model[1].weight.mul_(1e-3)
        model[0].bias.fill_(100)
    x = torch.randn(BATCH, TIME, 4).half()

    def step():
        return model(x).float().sum()

    assert locate(model, step, scale=8.0) is None
    fault = locate(model, step, scale=1024.0)
    assert (fault.module, fault.pass_, fault.parameter, fault.overflow) == ("1", "weight gradient", "1.weight", True)
    assert fault.gradient_largest == 1024
    assert "with a loss scale of 1024" in fault.sentence()


# Loss, input


def test_a_loss_function():
    model = Layered()
    fault = locate(model, lambda: F.cross_entropy(model(batch()).flatten(0, 1), torch.full((BATCH * TIME,), -100)))
    assert (fault.module, fault.kind, fault.pass_) == ("", "", "loss")
    assert fault.input_largest > 0
    assert "no targets" in fault.sentence()


def test_the_loss_function_of_a_model():
    """It runs within the model's forward pass."""
    model, ids = llama(), batch()
    fault = locate(model, lambda: model(input_ids=ids, labels=torch.full_like(ids, -100)))
    assert (fault.module, fault.pass_) == ("", "loss")


@pytest.mark.parametrize("inside", [True, False])
def test_the_gradient_of_a_loss_function(inside):
    model, ids = llama(), batch()

    def function(logits, labels, **options):
        return F.cross_entropy(logits.flatten(0, 1), labels.flatten()) + (logits * 0).sqrt().sum()

    model.loss_function = function
    fault = locate(model, step_of(model) if inside else lambda: function(model(input_ids=ids).logits, ids))
    assert (fault.module, fault.pass_) == ("", "loss")
    assert "although the loss was finite" in fault.sentence()


def test_a_scale_that_the_loss_cannot_bear():
    model = nn.Linear(4, 4).half()
    x = torch.ones(2, 4).half()
    assert locate(model, lambda: model(x).sum(), scale=2.0**16).pass_ == "loss"


def test_an_input_that_is_not_finite():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 1))
    x = torch.ones(2, 3, 4)
    x[1, 2, 0] = NAN
    fault = locate(model, lambda: model(x).sum())
    assert (fault.module, fault.kind, fault.pass_, fault.positions) == ("", "Sequential", "input", ((1, 2),))


def test_a_step_without_gradient():
    """What it returns is judged, or the model's output if it returns nothing."""
    model = llama()
    ids = batch()
    planted(model.model.layers[2].mlp, (0, 0))
    for value in (True, False):

        def step(value=value):
            with torch.no_grad():
                output = model(input_ids=ids)
            return output if value else None

        assert locate(model, step).module == "model.layers.2.mlp"
        del model.model.layers[2].mlp.forward
        assert locate(model, step) is None
        planted(model.model.layers[2].mlp, (0, 0))


# −inf


class Mask(nn.Module):
    def __init__(self, slope):
        super().__init__()
        self.slope = slope

    def forward(self, time):
        if isinstance(time, torch.Tensor):
            time = time.shape[1]
        distance = torch.arange(time)[:, None] - torch.arange(time)
        return (-self.slope * distance.float()).masked_fill(distance < 0, -torch.inf)


class Masked(nn.Module):
    """Attention with a bias of −inf from a module, and scores of another one."""

    def __init__(self, slope):
        super().__init__()
        torch.manual_seed(0)
        self.mask, self.qkv, self.softmax, self.out = Mask(slope), nn.Linear(4, 12), nn.Softmax(-1), nn.Linear(4, 4)

    def forward(self, x):
        q, k, v = self.qkv(x).chunk(3, -1)
        return self.out(self.softmax(q @ k.mT + self.mask(x.shape[1])) @ v)


@pytest.mark.parametrize("slope", [0.0, 0.5])
def test_masks_are_healthy(slope):
    """Beside a fault that comes later, too."""
    model = nn.Sequential(Masked(slope), Masked(slope))
    x = torch.ones(BATCH, TIME, 4)
    assert locate(model, lambda: model(x).square().sum()) is None
    with torch.no_grad():
        model[1].out.weight[0, 0] = NAN
    assert locate(model, lambda: model(x).square().sum()).module == "1.out"


@pytest.mark.parametrize("slope", [0.0, 0.5])
def test_masks_are_not_named_for_what_is_done_with_them(slope):
    """One is of zeros and −inf; the other one is made without any number."""

    class Given(nn.Module):
        def forward(self, x, mask):
            return (x @ x.mT + mask).softmax(-1) @ x

    class Apart(nn.Module):
        def __init__(self):
            super().__init__()
            self.mask, self.attention, self.out = Mask(slope), Given(), nn.Linear(4, 4)

        def forward(self, x):
            return self.out(self.attention(x, self.mask(x.shape[1] if slope else x)))

    model, x = Apart(), torch.ones(BATCH, TIME, 4)
    assert locate(model, lambda: model(x).sum()) is None
    planted(model.attention, (1, 1))
    assert locate(model, lambda: model(x).sum()).module == "attention"


def test_a_mask_that_a_module_made_finite_is_not_named():
    """The fault is in the code around both."""

    class Ranked(nn.Module):
        def __init__(self):
            super().__init__()
            self.log, self.softmax = Log(), nn.Softmax(-1)

        def forward(self, x):
            return (self.softmax(self.log(x)) * 0 - x.sum() * torch.inf) * 0

    class Log(nn.Module):
        def forward(self, x):
            return x.log()

    model = Ranked()
    fault = locate(model, lambda: model(torch.tensor([[0.0, 2.0, 3.0]])).sum())
    assert (fault.module, fault.kind, fault.pass_) == ("", "Ranked", "forward")


class Gated(nn.Module):
    def __init__(self, act):
        super().__init__()
        self.gate, self.act, self.down = nn.Linear(4, 4), act, nn.Linear(4, 1)

    def forward(self, x):
        return self.down(self.act(self.gate(x)))


@pytest.mark.parametrize("act", [nn.SiLU(), F.silu], ids=["module", "function"])
def test_an_overflow_to_minus_infinity(act):
    """It is found where it arose, and not where it became NaN."""
    model = nn.Sequential(nn.Linear(4, 4), Gated(act)).half()
    with torch.no_grad():
        model[0].weight.fill_(1)
        model[1].gate.weight.fill_(1)
        model[1].gate.weight[2] = -6e4
    fault = locate(model, lambda: model(torch.full((2, 3, 4), 2.0).half()).float().sum())
    assert (fault.module, fault.overflow) == ("1.gate", True)


@pytest.mark.parametrize("bad", [NAN, math.inf])
def test_what_does_no_harm_is_not_named(bad):
    """A module whose result is thrown away, beside one whose result is not."""

    class Cleaned(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, x):
            return torch.nan_to_num(self.layer(x)) * 0 + x

    model = nn.Sequential(Cleaned(), nn.Linear(4, 4), nn.Linear(4, 4)).requires_grad_(False)
    with torch.no_grad():
        model[0].layer.weight[0, 0] = bad
    assert locate(model, lambda: model(torch.ones(2, 3, 4)).sum()) is None
    with torch.no_grad():
        model[1].weight[0, 0] = NAN
    assert locate(model, lambda: model(torch.ones(2, 3, 4)).sum()).module == "1"


class DropsNaN(torch.autograd.Function):
    """x² with zeros for NaN, and the derivative of x²: as kernels of attention do on some CPUs."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.square().nan_to_num()

    @staticmethod
    def backward(ctx, gradient):
        return 2 * ctx.saved_tensors[0] * gradient


def test_nan_that_is_dropped_in_the_forward_pass_and_back_in_the_backward_pass():
    class Dropping(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, x):
            return DropsNaN.apply(self.layer(x))

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), Dropping(), nn.Linear(4, 4))
    with torch.no_grad():
        model[1].layer.weight[0, 0] = NAN
    x = torch.randn(2, 3, 4)
    assert model(x).isfinite().all()
    fault = locate(model, lambda: model(x).sum())
    assert (fault.module, fault.pass_) == ("1.layer", "forward")


# Ways to build a model


def test_tied_embeddings():
    model = llama(tie_word_embeddings=True)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert locate(model, step_of(model)) is None
    planted(model.lm_head, (0, 3))
    assert locate(model, step_of(model)).module == "lm_head"
    del model.lm_head.forward
    break_backward(model.lm_head)
    assert locate(model, step_of(model)).module == "lm_head"
    del model.lm_head.forward
    with torch.no_grad():
        model.lm_head.weight[batch()[0, 0]] = NAN
    assert locate(model, step_of(model)).module == "model.embed_tokens"


class Adapted(nn.Module):
    """A linear layer that is frozen, beside a low-rank one that learns."""

    def __init__(self, base):
        super().__init__()
        self.base, self.a, self.b = base, nn.Linear(16, 2, bias=False), nn.Linear(2, base.out_features, bias=False)

    def forward(self, x):
        return self.base(x) + self.b(self.a(x))


@pytest.mark.parametrize("part", ["base", "a", "b"])
@pytest.mark.parametrize("backward", [True, False])
def test_a_frozen_model_with_adapters(part, backward):
    model = llama().requires_grad_(False)
    for layer in model.model.layers:
        layer.self_attn.q_proj = Adapted(layer.self_attn.q_proj)
    assert locate(model, step_of(model)) is None
    path = f"model.layers.2.self_attn.q_proj.{part}"
    (break_backward if backward else lambda module: planted(module, (0, 1)))(model.get_submodule(path))
    assert locate(model, step_of(model)).module == path


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("path", ["model.layers.2.mlp.up_proj", "model.layers.1.self_attn", "model.layers.3"])
def test_activation_checkpointing(reentrant, path):
    model = llama()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # of its name
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    assert locate(model, step_of(model)) is None
    module = model.get_submodule(path)
    planted(module, (1, 2))
    assert locate(model, step_of(model)).module == path
    del module.forward
    break_backward(module)
    fault = locate(model, step_of(model))
    assert (fault.module, fault.pass_, fault.positions) == (path, "backward", ((1, 5),))


def test_checkpointing_of_a_function_and_its_weight_gradients():
    torch.manual_seed(0)
    first, second = nn.Linear(4, 4), nn.Linear(4, 4, bias=False)
    model = nn.Sequential(first, second).half()
    with torch.no_grad():
        second.weight.mul_(1e-3)
        first.bias.fill_(100)
    x = torch.randn(BATCH, TIME, 4).half().requires_grad_()
    fault = locate(model, lambda: checkpoint(model, x, use_reentrant=True).float().sum(), scale=1024.0)
    assert (fault.module, fault.pass_) == ("1", "weight gradient")


def test_a_module_that_is_called_again():
    """The second call of three gets what it cannot bear."""

    class Repeated(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.act = nn.Linear(4, 4), nn.Tanh()

        def forward(self, x):
            for factor in (1.0, 1e39, 1.0):
                x = self.act(self.layer(x * factor))
            return x

    torch.manual_seed(0)
    model = Repeated()
    fault = locate(model, lambda: model(torch.ones(2, 3, 4)).sum())
    assert fault.module == ""
    assert fault.kind == "Repeated", "its own code multiplies by infinity"


@pytest.mark.parametrize("in_place", [True, False])
def test_activations_in_place_and_modules_that_return_their_input(in_place):
    torch.manual_seed(0)
    x = torch.ones(BATCH, TIME, 4)
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(in_place), nn.Identity(), nn.Linear(4, 4), nn.Dropout(0.0))
    assert locate(model, lambda: model(x).sum()) is None
    break_backward(model[3])
    assert locate(model, lambda: model(x).sum()).module == "3"


def test_a_module_that_returns_its_input_to_broken_code():
    class Around(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear, self.same = nn.Linear(4, 4), nn.Identity()

        def forward(self, x):
            return Reverse.apply(self.same(self.linear(x)), mark)

    model = nn.Sequential(nn.Linear(4, 4), Around())
    assert locate(model, lambda: model(torch.ones(BATCH, TIME, 4)).sum()).module == "1"


def test_modules_see_that_two_inputs_are_one_tensor():
    class Self(nn.Module):
        def forward(self, query, key):
            assert query is key
            return query @ key.mT

    class Outer(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear, self.attention = nn.Linear(4, 4), Self()

        def forward(self, x):
            x = self.linear(x)
            return self.attention(x, key=x)

    model = Outer()
    assert locate(model, lambda: model(torch.ones(BATCH, TIME, 4)).sum()) is None


def test_attention_of_pytorch():
    """Self-attention in PyTorch has a path of its own if query, key and value are one tensor."""
    torch.manual_seed(0)
    model = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    x = torch.randn(BATCH, TIME, 8, requires_grad=True)
    assert locate(model, lambda: model(x).sum()) is None
    with torch.no_grad():
        model.self_attn.out_proj.bias[0] = NAN
    fault = locate(model, lambda: model(x).sum())
    assert (fault.module, fault.kind) == ("self_attn", "MultiheadAttention")
    assert math.isnan(fault.weights_largest["out_proj.bias"])


# What stays as it was


class Noisy(nn.Module):
    """Random numbers of three kinds, and buffers: two that each forward pass changes, and a cache that grows."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.norm, self.drop, self.last = (
            nn.Linear(4, 4),
            nn.BatchNorm1d(4),
            nn.Dropout(0.3),
            nn.Linear(4, 1),
        )
        self.register_buffer("mean", torch.zeros(4))
        self.register_buffer("cache", torch.zeros(1))

    def forward(self, x):
        if len(x) > len(self.cache):
            self.cache = torch.arange(float(len(x)))
        self.mean = 0.9 * self.mean + 0.1 * x.detach().mean(0)
        x = self.drop(self.norm(self.first(x + self.cache[: len(x), None] * random.random() * np.random.rand())))
        return self.last(x + self.mean)


@pytest.mark.parametrize("mode", [True, False])
@pytest.mark.parametrize("fault", [True, False])
def test_training_goes_on_to_the_bit(fault, mode):
    """Gradients of the step before are there as well, and so are those of a criterion with weights."""
    ends = []
    for located in (True, False):
        model = Noisy()
        criterion = nn.Linear(1, 1)
        random.seed(0)
        np.random.seed(0)
        optimizer = torch.optim.AdamW([*model.parameters(), *criterion.parameters()], lr=0.1)
        for batch_number in range(4):
            x = torch.randn(8, 4, generator=torch.Generator().manual_seed(batch_number))

            def step(model=model, x=x, criterion=criterion, factor=1.0, mode=True):
                model.train(mode)
                return criterion(model(x) * factor).square().mean()

            if located:
                found = locate(model, lambda step=step: step(factor=NAN if fault else 0.5, mode=mode))
                assert (found is None) != fault
            assert model.training
            step().backward()
            optimizer.step()
            if batch_number % 2:
                optimizer.zero_grad()
        gradients = [p.grad for p in [*model.parameters(), *criterion.parameters()]]
        state = [*model.state_dict().values(), *criterion.parameters(), torch.rand(3), torch.tensor(np.random.rand())]
        ends.append((state, gradients, random.random(), list(optimizer.state_dict()["state"].values())))
    (first, *rest), (second, *others) = ends
    assert all(map(torch.equal, first, second))
    assert rest[0] == others[0] == [None] * len(rest[0])
    assert rest[1:2] == others[1:2]


def test_gradients_and_weights_are_untouched():
    """By an optimizer that works within the backward pass, too."""
    model = llama()
    step = step_of(model)
    step().loss.backward()
    gradients = [p.grad for p in model.parameters()]
    before = [(p.clone(), p.grad.clone()) for p in model.parameters()]
    calls = []
    for p in model.parameters():
        p.register_post_accumulate_grad_hook(lambda p: calls.append(p.data.zero_()))
    assert locate(model, step) is None
    assert not calls
    for p, gradient, (weight, copied) in zip(model.parameters(), gradients, before, strict=True):
        assert p.grad is gradient
        assert torch.equal(p, weight)
        assert torch.equal(gradient, copied)
    step().loss.backward()
    assert len(calls) == len(before)


def hooks(model):
    kinds = [name for name in vars(model) if "hooks" in name]
    return [(kind, dict(getattr(module, kind))) for module in model.modules() for kind in kinds] + [
        dict(p._backward_hooks or {}) for p in model.parameters()
    ]


@pytest.mark.parametrize("backward", [True, False])
def test_an_exception_within_the_model(backward):
    """It reaches the caller, and nothing is left behind."""
    model = Layered()
    model.register_buffer("count", torch.zeros(()))

    def fails(gradient):
        raise ValueError("mine")

    def fail(x):
        model.count += 1
        torch.rand(1)
        return Reverse.apply(x, fails) if backward else fails(x)

    model.layers[2].function = fail
    before, state = hooks(model), torch.get_rng_state()
    with pytest.raises(ValueError, match="mine"):
        locate(model, cross_entropy(model))
    assert hooks(model) == before
    assert torch.equal(torch.get_rng_state(), state)
    assert model.count == 0
    assert all(p.grad is None for p in model.parameters())


def test_errors_that_a_model_catches():
    """The calls that they end are no parents of later ones."""

    class Tries(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = Layered(), nn.Linear(4, 4)

        def forward(self, x):
            try:
                self.first(x)
            except (RuntimeError, IndexError, TypeError):
                return self.second(x)

    model = Tries()
    planted(model.second, (0, 0))
    assert locate(model, lambda: model(torch.ones(2, 3, 4)).sum()).module == "second"


# Compiled models, anomaly detection, wrappers and ranks


@pytest.mark.parametrize("in_place", [True, False])
def test_a_compiled_model(in_place):
    """It runs eagerly, and is not compiled again afterwards."""
    from torch._dynamo.testing import CompileCounterWithBackend

    torch._dynamo.reset()
    counter = CompileCounterWithBackend("eager")
    model = Layered()
    if in_place:
        model.compile(backend=counter)
        compiled = model
    else:
        compiled = torch.compile(model, backend=counter)
    step = cross_entropy(compiled)
    step().backward()
    count = counter.frame_count
    assert locate(compiled, step) is None
    planted(model.layers[1].linear, (1, 4))
    fault = locate(compiled, step)
    assert (fault.module, fault.positions) == ("layers.1.linear", ((1, 4),))
    assert counter.frame_count == count > 0
    del model.layers[1].linear.forward
    step().backward()
    assert counter.frame_count == count


def test_anomaly_detection_of_pytorch():
    """It would raise an error in place of the sentence."""
    model = llama()
    break_backward(model.model.layers[1].mlp)
    with torch.autograd.set_detect_anomaly(True):
        assert locate(model, step_of(model)).module == "model.layers.1.mlp"
        assert torch.is_anomaly_enabled()


def on_rank(rank, place):
    """The second of two ranks has NaN in its backward pass."""
    dist.init_process_group("gloo", init_method=f"file://{place}/meeting", rank=rank, world_size=2)
    found = []
    for sharded in (False, True):
        model = Layered(lambda x: Reverse.apply(x, lambda gradient: gradient * (NAN if rank else 1)))
        if sharded:
            mesh = init_device_mesh("cpu", (2,))
            for layer in model.layers:
                fully_shard(layer, mesh=mesh)
            fully_shard(model, mesh=mesh)
        else:
            model = DistributedDataParallel(model)
        fault = locate(model, cross_entropy(model))
        found.append((fault.module, fault.pass_))
    torch.save(found, f"{place}/{rank}")
    dist.destroy_process_group()


def test_each_rank_judges_its_own_part(tmp_path):
    """With DDP and FSDP2. The other one sees what comes out of the exchange."""
    torch.multiprocessing.spawn(on_rank, (str(tmp_path),), nprocs=2)
    first, second = (torch.load(tmp_path / str(rank)) for rank in range(2))
    assert first == [("", "exchange")] * 2
    assert second == [("module.layers.1", "backward"), ("layers.1", "backward")]


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu():
    """A bad token does not end the device's context, and the random state is restored."""
    model = llama("sdpa").cuda()
    ids = batch().cuda()
    ids[1, 2] = VOCAB
    assert locate(model, step_of(model, ids)).token == VOCAB
    ids[1, 2] = 0
    state = torch.cuda.get_rng_state()

    def step():
        torch.rand(1, device="cuda")
        return model(input_ids=ids, labels=ids)

    assert locate(model, step) is None
    assert torch.equal(torch.cuda.get_rng_state(), state)
    compiled = torch.compile(model)
    step_of(compiled, ids)().loss.backward()
    with torch.no_grad():
        model.model.layers[2].mlp.up_proj.weight[0, 0] = NAN
    assert locate(compiled, step_of(compiled, ids)).module == "model.layers.2.mlp.up_proj"
    with torch.no_grad():
        model.model.layers[2].mlp.up_proj.weight.fill_(6e4)

    def autocast():
        return torch.autocast("cuda", dtype=torch.float16)

    fault = locate(compiled, step_of(compiled, ids, autocast))
    assert (fault.module, fault.overflow, fault.dtype) == ("model.layers.2.mlp.up_proj", True, "float16")
