"""QK-Clip against logits computed from captured queries and keys, and against other divisions of the batch."""

import math

import pytest
import torch
from helpers import a_trainer, tiny
from torch import nn

from stabrun.config import UserError
from stabrun.model.attention import Attention, AttentionCore
from stabrun.record.run_dir import RunDir
from stabrun.training import compilation
from stabrun.training import trainer as module
from stabrun.training.run import train

STILL = ("optim.lr=1e-12", "schedule.warmup_steps=0", "optim.weight_decay=0")  # updates that change nothing
WORDS = (*STILL, "model.n_layer=1", "model.n_head=4", "model.bias=true")


def logits(trainer):
    """The logits of each head on the batch of step 0 at visible positions, `[heads, values]`, by an einsum."""
    seen = []
    handles = [
        core.register_forward_pre_hook(lambda core, args: seen.append(args[:2]))
        for core in trainer.model.modules()
        if isinstance(core, AttentionCore)
    ]
    with torch.no_grad():
        trainer.model(trainer.batch(0)[:, :-1])
    for handle in handles:
        handle.remove()
    (q, k), *_ = seen
    products = torch.einsum("bhqd,bhkd->hbqk", q, k) / math.sqrt(q.shape[-1])
    visible = torch.ones(products.shape[-2:]).tril().bool()
    return products[:, :, visible].flatten(1)


def stirred(trainer, seed=0):
    """Weights and biases that differ from head to head."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for layer in trainer.model.modules():
            if isinstance(layer, nn.Linear) and layer.bias is not None:
                layer.bias.normal_(0, 0.3)
            if isinstance(layer, Attention):
                layer.qkv.weight.mul_(torch.linspace(0.5, 3.0, len(layer.qkv.weight))[:, None])
    return trainer


@pytest.mark.parametrize(
    "words",
    [(), ("train.micro_batch_size=1",), ("train.recompute=blocks",), ("model.attn.soft_cap=5",), ("optim.kind=muon",),
     ("model.position.kind=learned", "data.seq_len=9")],
    ids=str,
)  # fmt: skip
def test_the_largest_logits_are_at_most_the_threshold(words):
    before = logits(stirred(a_trainer(tiny(*WORDS, *words)))).amax(1)
    threshold = float(before.sort().values[1:3].mean())
    trainer = stirred(a_trainer(tiny(*WORDS, *words, f"optim.qk_clip={threshold}")))
    (layer,) = (module for module in trainer.model.modules() if isinstance(module, Attention))
    weight, bias = layer.qkv.weight.detach().clone(), layer.qkv.bias.detach().clone()
    trainer.step(0).read()
    after = logits(trainer).amax(1)
    torch.testing.assert_close(after, before.clamp(max=threshold), rtol=1e-5, atol=1e-5)
    above = before > threshold
    assert above.sum() == 2
    factors = torch.where(above, (threshold / before).sqrt(), 1.0)
    for now, then in ((layer.qkv.weight, weight), (layer.qkv.bias, bias)):
        q, k, v = now.detach().view(3, 4, -1)
        for rows, old in zip((q, k), then.view(3, 4, -1)[:2], strict=True):
            torch.testing.assert_close(rows, old * factors[:, None], rtol=1e-5, atol=1e-7)
            assert torch.allclose(rows[~above], old[~above], rtol=0, atol=1e-9)
        assert torch.allclose(v, then.view(3, 4, -1)[2], rtol=0, atol=1e-9)


def test_a_high_threshold_changes_nothing():
    losses = {}
    for word in ("null", "1e6"):
        trainer = a_trainer(tiny(f"optim.qk_clip={word}"))
        losses[word] = [trainer.step(step).read()["train/loss"] for step in range(6)]
    assert losses["null"] == losses["1e6"]


def test_validation_does_not_count():
    trainer = a_trainer(tiny("optim.qk_clip=1e-3"))
    before = [p.detach().clone() for p in trainer.parameters]
    trainer.validate()
    assert all(float(peak.max()) == -math.inf for peak in trainer.qk_clip.peaks)
    assert all(map(torch.equal, before, trainer.parameters))


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_a_skipped_step_changes_no_weight(precision):
    words = "optim.qk_clip=1e-3", "train.recovery=skip", f"train.precision={precision}", "train.loss_scale=1"
    trainer = a_trainer(tiny(*words))
    trainer.outliers.judge = lambda loss, norm: torch.ones(())
    before = [p.detach().clone() for p in trainer.parameters]
    trainer.step(0).read()
    assert all(map(torch.equal, before, trainer.parameters))
    assert all(float(peak.max()) == -math.inf for peak in trainer.qk_clip.peaks)


def test_compiled_it_is_one_graph_for_all_layers(monkeypatch):
    torch._dynamo.reset()
    monkeypatch.setattr(module, "compile_parts", lambda objective: compilation.compile_parts(objective, "aot_eager"))
    words = "model.n_layer=3", "optim.qk_clip=0.1", "observe.every=0"
    eager, compiled = (a_trainer(tiny(*words, f"train.compile={word}")) for word in ("false", "true"))
    before = compilation.graphs()
    for step in range(3):
        for one in (eager, compiled):
            one.step(step).read()
    assert compilation.graphs() - before == 2, "a block, and the output layer"
    for ours, theirs in zip(compiled.parameters, eager.parameters, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


def test_two_ranks_scale_by_the_largest_logit_of_both(tmp_path):
    """Nothing but QK-Clip changes the weights, so that the losses show what it did."""
    losses = {}
    for name, words in (
        ("without", ()),
        ("alone", ("optim.qk_clip=0.2",)),
        ("together", ("optim.qk_clip=0.2", "train.ranks=2")),
    ):
        train(tiny(*STILL, "train.steps=6", "train.val_every=0", *words, f"run_dir={tmp_path / name}"))
        losses[name] = [row["train/loss"] for row in RunDir(tmp_path / name).rows()]
    assert losses["together"] == pytest.approx(losses["alone"], rel=1e-6)
    assert losses["without"][1:] != pytest.approx(losses["alone"][1:], rel=1e-4)


@pytest.mark.parametrize("word", ["model.attn.qk_norm=head", "model.attn.qk_norm=full", "model.sigma_reparam=one"])
def test_norms_that_undo_it_are_refused(word):
    with pytest.raises(UserError, match=rf"optim\.qk_clip=100\.0: not possible with {word}, which undoes a scaling"):
        tiny("optim.qk_clip=100", word)
