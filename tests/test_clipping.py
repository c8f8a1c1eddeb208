"""Gradient clipping: each rule against its formula in Python's numbers, and what it remembers against lost updates."""

import math
import statistics

import pytest
import torch
from helpers import RICH, a_trainer, metrics, tiny, train_interrupted
from torch import nn

from stabrun.observe.norms import tensor_norms
from stabrun.record.run_dir import RunDir
from stabrun.training.clipping import make_clipping
from stabrun.training.run import train

SHAPES = (4, 3), (7,), (1, 3)
SIZE = sum(math.prod(shape) for shape in SHAPES)


class Clipped:
    """Clips gradients that are given, with a rule of its own."""

    def __init__(self, *words):
        self.parameters = [nn.Parameter(torch.zeros(shape, dtype=torch.float64)) for shape in SHAPES]
        self.rule = make_clipping(tiny(*words).optim, self.parameters)
        self.rule.memory = {name: values.double() for name, values in self.rule.memory.items()}

    def __call__(self, gradients, skipped=None):
        """The clipped gradients, and the share of values that were changed."""
        for parameter, gradient in zip(self.parameters, gradients, strict=True):
            parameter.grad = gradient.double().clone()
        norms = tensor_norms([p.grad for p in self.parameters])
        share = self.rule.clip(norms, norms.norm(), None if skipped is None else torch.tensor(float(skipped)))
        return [p.grad for p in self.parameters], [float(value) for value in share]


def drawn(steps, seed=0):
    """Gradients of some steps: their norms differ by steps and tensors."""
    generator = torch.Generator().manual_seed(seed)
    for step in range(steps):
        size = 3.0 if step % 9 == 0 else 1.0
        yield [size * torch.randn(shape, dtype=torch.float64, generator=generator) for shape in SHAPES]


def norm(*tensors):
    return math.sqrt(sum(float((tensor**2).sum()) for tensor in tensors))


def assert_close(ours, expected):
    for one, other in zip(ours, expected, strict=True):
        torch.testing.assert_close(one, other.double(), rtol=1e-9, atol=0)


@pytest.mark.parametrize("limit", [1e-3, 1.0, 1e3])
@pytest.mark.parametrize("by", ["norm", "value"])
def test_clipping_equals_its_formula(limit, by):
    (gradients,) = drawn(1)
    clipped, share = Clipped(f"optim.clip={limit}", f"optim.clip_by={by}")(gradients)
    total = norm(*gradients)
    if by == "norm":
        assert share == [total > limit]
        assert_close(clipped, [g * min(1.0, limit / (total + 1e-6)) for g in gradients])
    else:
        assert share == [pytest.approx(sum(int((g.abs() > limit).sum()) for g in gradients) / SIZE)]
        assert_close(clipped, [g.clamp(-limit, limit) for g in gradients])


@pytest.mark.parametrize("limit", ["null", 6.0])
def test_adagc_equals_its_formula(limit):
    rule, usual, shares = Clipped("optim.clip_by=adagc", f"optim.clip={limit}"), [math.inf] * len(SHAPES), set()
    for step, gradients in enumerate(drawn(140)):
        clipped, share = rule(gradients)
        if step < 100:
            total = norm(*gradients)
            factors = [1.0 if limit == "null" else min(1.0, limit / total)] * len(SHAPES)
        else:
            factors = [min(1.0, 1.05 * u / norm(g)) for u, g in zip(usual, gradients, strict=True)]
        expected = [f * g for f, g in zip(factors, gradients, strict=True)]
        assert_close(clipped, expected)
        changed = sum(g.numel() for f, g in zip(factors, gradients, strict=True) if f < 1)
        assert share == [pytest.approx(changed / SIZE)]
        after = [norm(g) for g in expected]
        pairs = list(zip(usual, after, strict=True))
        usual = [min(pair) if step < 100 else 0.98 * pair[0] + 0.02 * pair[1] for pair in pairs]
        shares.add(round(share[0], 3))
    assert {0.0, 1.0} < shares, "no tensor, some and all are scaled"


@pytest.mark.parametrize("limit", ["null", 5.0])
def test_zclip_equals_its_formula(limit):
    """The first 25 norms by the standard library's mean and variance."""
    rule, norms, above = Clipped("optim.clip_by=zclip", f"optim.clip={limit}"), [], 0
    mean = variance = math.nan
    for step, gradients in enumerate(drawn(80)):
        clipped, share = rule(gradients)
        total = usual = norm(*gradients)
        if step >= 25:
            z = (total - mean) / (math.sqrt(variance) + 1e-6)
            if z > 2.5:
                usual, above = mean + 2.5**2 / z * math.sqrt(variance), above + 1
        allowed = usual if limit == "null" else min(usual, limit)
        assert_close(clipped, [g * min(1.0, allowed / total) for g in gradients])
        assert share == [total > allowed]
        norms.append(usual)
        if step < 25:
            mean, variance = statistics.fmean(norms), statistics.pvariance(norms)
        else:
            mean = 0.97 * mean + 0.03 * usual
            variance = 0.97 * variance + 0.03 * (usual - mean) ** 2
    assert above > 2


@pytest.mark.parametrize("by", ["adagc", "zclip"])
def test_lost_updates_are_not_remembered(by):
    """Updates that are skipped, and those whose gradient is not finite, between others: the others are as without."""
    alone, mixed = (Clipped(f"optim.clip_by={by}", "optim.clip=null") for _ in range(2))
    for step, gradients in enumerate(drawn(130)):
        expected, _ = alone(gradients)
        if step % 7 == 3:
            mixed([1e3 * g for g in gradients], skipped=True)
            mixed([torch.full_like(g, math.nan if step % 2 else math.inf) for g in gradients])
            mixed([gradients[0], math.inf * gradients[1].abs(), gradients[2]], skipped=False)
        clipped, _ = mixed(gradients, skipped=False)
        assert all(map(torch.equal, clipped, expected))


def test_adagc_does_not_freeze_a_tensor_whose_first_gradients_are_zeros():
    rule, (first, *later) = Clipped("optim.clip_by=adagc"), drawn(120)
    rule([first[0], torch.zeros(7), first[2]])
    for gradients in later:
        clipped, _ = rule(gradients)
        assert norm(clipped[1]) > 0


@pytest.mark.parametrize(
    ("word", "share"), [("optim.clip=null", None), ("optim.clip=1e9", 0.0), ("optim.clip=1e-9", 1.0)]
)
def test_the_summary_holds_the_share_of_clipped_steps(tmp_path, word, share):
    summary = train(tiny(f"run_dir={tmp_path / 'run'}", word, "train.steps=8"))
    assert summary["clipped_share"] == share
    rows = [row.get("grad/clipped") for row in RunDir(tmp_path / "run").rows()]
    assert rows == [share] * 8


@pytest.fixture
def early(monkeypatch):
    """AdaGC and ZClip with fewer first steps and a lower threshold, so that short runs are clipped."""
    from stabrun.training import clipping

    monkeypatch.setattr(clipping, "ADAGC_WARMUP", 5)
    monkeypatch.setattr(clipping, "ZCLIP_WARMUP", 5)
    monkeypatch.setattr(clipping, "ZCLIP_Z", 0.5)
    monkeypatch.setattr(clipping, "ZCLIP_DECAY", 0.5)


@pytest.mark.parametrize("by", ["adagc", "zclip"])
def test_an_interrupted_run_is_the_whole_one(tmp_path, monkeypatch, early, by):
    words = (*RICH, f"optim.clip_by={by}", "optim.clip=null", "optim.lr=0.05")
    train(tiny(*words, f"run_dir={tmp_path / 'whole'}"))
    rows = list(RunDir(tmp_path / "whole").rows())
    assert 0 < sum(row["grad/clipped"] > 0 for row in rows) < len(rows)
    for at in (4, 19):
        config = tiny(*words, f"run_dir={tmp_path / str(at)}")
        assert train_interrupted(config, monkeypatch, at)["status"] == "interrupted"
        train(config)
        assert metrics(tmp_path / str(at)) == metrics(tmp_path / "whole")


@pytest.mark.parametrize("by", ["adagc", "zclip"])
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_an_outlier_changes_nothing_that_is_remembered(early, by, precision):
    words = f"optim.clip_by={by}", "train.recovery=skip", f"train.precision={precision}", "train.loss_scale=1"
    trainer = a_trainer(tiny(*words))
    for step in range(8):
        trainer.step(step).read()
    before = trainer.clipping.state()
    trainer.outliers.judge = lambda loss, norm: torch.ones(())
    trainer.step(8).read()
    assert trainer.clipping.state() == before
    trainer.outliers.judge = lambda loss, norm: torch.zeros(())
    trainer.step(9).read()
    assert trainer.clipping.state() != before


@pytest.mark.parametrize(
    ("by", "words"),
    [("adagc", ("train.steps=130", "optim.lr=1e-3")), ("zclip", ("train.steps=75", "optim.lr=3e-2"))],
)
def test_two_ranks_clip_as_one(tmp_path, by, words):
    """The runs are long enough to be clipped after the first steps of the rules."""
    found = {}
    for count in (1, 2):
        own = f"train.ranks={count}", f"run_dir={tmp_path / str(count)}"
        train(tiny(f"optim.clip_by={by}", "schedule=constant", "train.val_every=0", *words, *own))
        found[count] = list(RunDir(tmp_path / str(count)).rows())
    for key in ("train/loss", "grad/norm"):
        one, two = ([row[key] for row in found[count]] for count in (1, 2))
        assert two == pytest.approx(one, rel=1e-2)
    clipped = [[row["grad/clipped"] for row in found[count]] for count in (1, 2)]
    assert clipped[0] == pytest.approx(clipped[1], abs=1e-6)
    assert any(clipped[0])
