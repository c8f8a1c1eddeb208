"""The three ways to compute attention: which is taken, that they agree, and what they cost."""

import pytest
import torch
from helpers import VARIANTS, configured
from torch.nn.attention.flex_attention import flex_attention

from stabrun.config import AttentionConfig
from stabrun.model import attention
from stabrun.model.attention import AttentionCore, causal_blocks
from stabrun.model.switches import EXPLICIT, FLEX, QUERIES, SDPA, attention_path

CAPPED = AttentionConfig(soft_cap=2.0, soft_temp=0.7)


def inputs(time, dtype=torch.float32, requires_grad=False):
    generator = torch.Generator().manual_seed(0)
    shape = 2, 3, time, 16
    return [(2 * torch.randn(shape, generator=generator)).to(dtype).requires_grad_(requires_grad) for _ in range(3)]


def written_out(config, q, k, v):
    """The formula of the paper, for all queries at once, in the precision of its inputs."""
    logits = config.soft_temp * (q @ k.mT) / q.shape[-1] ** 0.5
    if config.soft_cap is not None:
        logits = config.soft_cap * torch.tanh(logits / config.soft_cap)
    future = torch.ones(logits.shape[-2:], dtype=torch.bool).triu(1)
    weights = logits.masked_fill(future, -torch.inf).softmax(-1)
    weights = (config.clip_high - config.clip_low) * weights + config.clip_low
    return weights.clamp(0, 1).masked_fill(future, 0.0) @ v


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_path_of_each_variant(variant):
    attn = configured(f"+variant={variant}").model.attn
    capped, clipped = attn.soft_cap is not None, variant == "soft_clip"
    on_cuda = EXPLICIT if clipped else FLEX if capped else SDPA
    assert attention_path(attn, 64, 0.0, "cuda") == on_cuda
    for case in ((64, 0.0, "cpu"), (64, 0.1, "cuda"), (8, 0.0, "cuda")):
        assert attention_path(attn, *case) == (EXPLICIT if capped or clipped else SDPA)


@pytest.mark.parametrize(
    "config", [CAPPED, AttentionConfig(clip_low=-0.03, clip_high=1.03), AttentionConfig()], ids=str
)
@pytest.mark.parametrize("time", [16, 2 * QUERIES + 30])
def test_blocks_of_queries_equal_the_formula(config, time):
    q, k, v = inputs(time, torch.float64, requires_grad=True)
    core, upstream = AttentionCore(config, 16), torch.linspace(-1, 1, 16, dtype=torch.float64)
    found = core(q, k, v)
    gradients = torch.autograd.grad((found * upstream).sum(), (q, k, v))
    expected = written_out(config, q, k, v)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(
        gradients, torch.autograd.grad((expected * upstream).sum(), (q, k, v)), rtol=1e-10, atol=1e-10
    )


def test_no_matrix_of_scores_is_kept_above_the_block_size():
    kept = []
    time = 4 * QUERIES
    q, k, v = inputs(time, requires_grad=True)
    core = AttentionCore(CAPPED, 16)
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.numel()) or x, lambda x: x):
        core(q, k, v).sum().backward()
    assert max(kept) < QUERIES * QUERIES * 2 * 3
    short = inputs(QUERIES, requires_grad=True)
    kept.clear()
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.numel()) or x, lambda x: x):
        core(*short)
    assert max(kept) == 2 * 3 * QUERIES * QUERIES, "the hooks see such a matrix"


@pytest.fixture
def flex(monkeypatch):
    """A core that takes the flex path on this machine, where flex_attention computes all scores."""
    monkeypatch.setattr(attention, "compiled_flex_attention", lambda: flex_attention)
    monkeypatch.setattr(AttentionCore, "path", lambda self, device: FLEX)
    core = AttentionCore(CAPPED, 16)
    return core


@pytest.mark.parametrize("time", [16, QUERIES])
def test_flex_attention_equals_the_explicit_path_forward(flex, time):
    q, k, v = inputs(time)
    flex.mask_for(time, q.device)
    assert flex.mask is causal_blocks(time, q.device)
    with torch.no_grad():
        assert flex(q, k, v).equal(flex.explicit(q, k, v))
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        assert flex(q, k, v).dtype == torch.bfloat16


def test_flex_attention_compiles_by_inductor(flex):
    q, k, v = inputs(256)
    flex.mask_for(256, q.device)
    torch._dynamo.reset()
    compiled = torch.compile(flex, fullgraph=True, dynamic=False)
    with torch.no_grad():
        torch.testing.assert_close(compiled(q, k, v), flex.recomputed(q, k, v, 0), rtol=1e-5, atol=1e-5)
    torch._dynamo.reset()


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("compiled", [True, False])
def test_flex_attention_on_cuda_has_the_gradients_of_the_formula(compiled):
    core, upstream = AttentionCore(CAPPED, 16), torch.linspace(-1, 1, 16, device="cuda")
    q, k, v = (x.detach().cuda().requires_grad_() for x in inputs(300))
    core.mask_for(300, q.device)
    assert core.path("cuda") == FLEX
    found = (torch.compile(core, fullgraph=True, dynamic=False) if compiled else core)(q, k, v)
    gradients = torch.autograd.grad((found * upstream).sum(), (q, k, v))
    wide = [x.detach().double().cpu().requires_grad_() for x in (q, k, v)]
    expected = written_out(CAPPED, *wide)
    torch.testing.assert_close(found.double().cpu(), expected, rtol=1e-3, atol=1e-3)
    for got, wanted in zip(
        gradients, torch.autograd.grad((expected * upstream.double().cpu()).sum(), wide), strict=True
    ):
        torch.testing.assert_close(got.double().cpu(), wanted, rtol=1e-2, atol=1e-3)
