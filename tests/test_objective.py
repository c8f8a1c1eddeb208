"""The objective in parts of the sequence, and recomputation, against the whole kept in memory."""

from functools import partial

import pytest
import torch
from helpers import VARIANTS, a_trainer, tiny
from torch.nn import functional as F

from stabrun.model import switches
from stabrun.model.switches import LOGITS, sequence_parts
from stabrun.training import trainer as module
from stabrun.training.compilation import compile_parts
from stabrun.training.objective import Objective

TOLERANCE = {torch.float32: (1e-6, 1e-5), torch.float64: (1e-12, 1e-12)}  # of the terms, of the gradients


@pytest.fixture
def in_parts(monkeypatch):
    """Make trainers split the sequence of 16 tokens into four."""
    return lambda: monkeypatch.setattr(switches, "LOGITS", 4 * 4 * 256)


def gradients(model):
    found = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    return found


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("tied", ["true", "false"])
@pytest.mark.parametrize("parts", [2, 4, 16])
def test_parts_have_the_terms_and_gradients_of_the_formula(parts, tied, dtype):
    trainer = a_trainer(tiny("optim.z_loss=1e-2", f"model.tied={tied}"))
    model, batch, weight = trainer.model.to(dtype), trainer.batch(0), 1e-2
    logits = model(batch[:, :-1]).flatten(0, 1)
    loss = F.cross_entropy(logits, batch[:, 1:].flatten())
    z_loss = weight * logits.exp().sum(-1).log().square().mean()
    (loss + z_loss).backward()
    expected = gradients(model)
    terms = Objective(model, weight, parts).accumulate(batch, 1, lambda loss: loss)
    of_terms, of_gradients = TOLERANCE[dtype]
    torch.testing.assert_close(terms, (loss.detach(), z_loss.detach()), rtol=of_terms, atol=0)
    for found, wanted in zip(gradients(model), expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=0, atol=of_gradients * float(wanted.abs().max()))
    with torch.no_grad():
        torch.testing.assert_close(Objective(model, weight, parts).mean(batch), terms, rtol=of_terms, atol=0)


def rows(*words):
    trainer = a_trainer(tiny(*words))
    return [trainer.step(step).read() for step in range(4)], trainer


def alike(found, expected, rel):
    for row, wanted in zip(found, expected, strict=True):
        assert row.keys() == wanted.keys()
        for key, value in wanted.items():
            assert row[key] == pytest.approx(value, rel=rel, abs=1e-7), key


OBSERVED = "observe.slow_every=2", "optim.z_loss=1e-3", "train.micro_batch_size=2"


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_rows_of_a_run_in_parts(in_parts, precision):
    words = *OBSERVED, f"train.precision={precision}", "train.loss_scale=1024"
    whole, trainer = rows(*words)
    assert trainer.objective.parts == 1
    in_parts()
    found, trainer = rows(*words)
    assert trainer.objective.parts == 2
    assert trainer.validate() == pytest.approx(trainer.validate())
    alike(found[:1], whole[:1], rel=1e-4 if precision == "fp32" else 2e-2)
    losses = [[row["train/loss"] for row in each] for each in (found, whole)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4 if precision == "fp32" else 1e-2)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("variant", [name for name in VARIANTS if name != "batch_norm"])  # refuses micro-batches
def test_recomputed_blocks_give_the_same_bits(variant, precision):
    words = f"+variant={variant}", *OBSERVED, f"train.precision={precision}", "model.dropout=0.1"
    kept, _ = rows(*words)
    again, trainer = rows(*words, "train.recompute=blocks")
    assert trainer.model.recompute
    assert again == kept


def test_blocks_are_recomputed():
    trainer = a_trainer(tiny("train.recompute=blocks", "observe.every=0"))
    calls = []
    trainer.model.blocks[0].mlp.layer.fc1.register_forward_hook(lambda *_: calls.append(0))
    trainer.step(0)
    assert len(calls) == 2
    trainer.validate()
    assert len(calls) == 3


def test_parts_and_recomputation_when_compiled(in_parts, monkeypatch):
    torch._dynamo.reset()
    monkeypatch.setattr(module, "compile_parts", partial(compile_parts, backend="aot_eager"))
    plain, _ = rows(*OBSERVED)
    in_parts()
    words = *OBSERVED, "train.compile=true", "model.n_layer=2"
    compiled, trainer = rows(*words)
    assert trainer.objective.parts == 2
    alike(compiled[:1], plain[:1], rel=1e-4)
    assert compiled[3]["train/loss"] == pytest.approx(plain[3]["train/loss"], rel=1e-4)
    assert rows(*words, "train.recompute=blocks")[0] == compiled
    torch._dynamo.reset()


@pytest.mark.parametrize(
    ("vocab_size", "sequences", "seq_len", "parts"),
    [(256, 16, 64, 1), (256000, 4, 4096, 8), (256000, 1, 1024, 1), (50257, 16, 1024, 2), (50257, 64, 1023, 11)],
)
def test_parts_follow_from_the_vocabulary(vocab_size, sequences, seq_len, parts):
    assert sequence_parts(vocab_size, sequences, seq_len) == parts
    assert vocab_size * sequences * seq_len // parts <= LOGITS
    assert parts == 1 or any(
        vocab_size * sequences * seq_len // fewer > LOGITS for fewer in range(1, parts) if seq_len % fewer == 0
    )
