import math
import random

import pytest
from helpers import configured

from stabrun.training.run import train
from stabrun.verdict.judge import Judge
from stabrun.verdict.overfit import overfit


def curves(rise, since=200, count=400, every=20, train_rise=0.0):
    """Steps, validation losses and training levels: both fall by 3 nats, then validation rises by `rise` in all."""
    steps = list(range(every - 1, count, every))
    fall = [2.0 + 3 * math.exp(-step / 30) for step in steps]
    later = [max(0.0, (step - since) / (count - since)) for step in steps]
    return steps, [f + rise * share for f, share in zip(fall, later, strict=True)], [
        f - 0.3 * share + train_rise * share for f, share in zip(fall, later, strict=True)
    ]  # fmt: skip


def test_a_rise_of_validation_alone_is_overfitting():
    steps, val, level = curves(0.5)
    found = overfit(steps, val, level, init=5.0)
    assert found.best_step == steps[val.index(min(val))]
    assert found.rise == pytest.approx(val[-1] - min(val))
    over = [step for step, loss in zip(steps, val, strict=True) if loss > min(val) + 0.03 * (5.0 - min(val))]
    assert found.step == min(step for step in over if step > found.best_step)


@pytest.mark.parametrize(
    ("rise", "train_rise"),
    [(0.0, 0.0), (0.05, 0.0), (0.5, 1.0)],
    ids=["none", "less than 3 % of what was learned", "the training loss rises too"],
)
def test_anything_else_is_none(rise, train_rise):
    steps, val, level = curves(rise, train_rise=train_rise)
    assert overfit(steps, val, level, init=5.0) is None


def test_one_validation_decides_nothing():
    steps, val, level = curves(0.0)
    val[-1] += 1.0
    assert overfit(steps, val, level, init=5.0) is None
    val[5] += 1.0
    assert overfit(steps, val, level, init=5.0) is None


def test_a_run_that_learned_nothing_does_not_overfit():
    assert overfit([10, 20, 30], [5.5451, 5.5452, 5.5453], [5.545, 5.5449, 5.5449], init=5.545) is None
    judge = Judge()
    for step in range(200):
        row = {"step": step, "train/loss": 5.5 + random.Random(step).gauss(0, 0.01)}
        judge.add(row | ({"val/loss": 5.5 + 1e-5 * (step % 30)} if step % 20 == 19 else {}))
    verdict = judge.conclude()
    assert (verdict.reason, verdict.overfit) == ("no_learning", None)


@pytest.mark.parametrize("scale", [0.01, 100.0])
def test_scale_changes_nothing(scale):
    steps, val, level = curves(0.5)
    scaled = overfit(steps, [scale * loss for loss in val], [scale * loss for loss in level], init=5.0 * scale)
    assert scaled.step == overfit(steps, val, level, init=5.0).step


def test_a_diverged_run_does_not_overfit():
    judge = Judge()
    for step in range(400):
        loss = 2.0 + 3 * math.exp(-step / 30) + (1.0 if step > 250 else 0.0)
        judge.add({"step": step, "train/loss": loss} | ({"val/loss": loss + 0.1} if step % 20 == 19 else {}))
    verdict = judge.conclude()
    assert (verdict.verdict, verdict.overfit) == ("diverged", None)
    assert verdict.val_gap == pytest.approx(0.1, abs=0.01)


def test_dropout_closes_the_gap_of_a_run_that_overfits(tmp_path):
    (tmp_path / "text.txt").write_text("".join(f"{i * i * 7919 % 10007} and {i}\n" for i in range(120)))
    words = "data=local", f"data.path={tmp_path / 'text.txt'}", "train.steps=240", "train.val_every=20", "tracker=none"
    small = "model.n_layer=2", "data.seq_len=16", "train.threads=1", "data.val_fraction=0.2"
    without, with_it = (
        train(configured(*words, *small, f"model.dropout={p}", f"run_dir={tmp_path / str(p)}")) for p in (0.0, 0.4)
    )
    assert without["verdict"] == "converged"
    assert without["overfit"]["step"] > without["overfit"]["best_step"]
    assert with_it["val_gap"] < 0.7 * without["val_gap"]
    assert with_it["val_loss"] < without["val_loss"]
