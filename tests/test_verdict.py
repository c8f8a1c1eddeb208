import math
import random
import subprocess
import sys

import numpy as np
import pytest
from conftest import tiny

from stabrun.observe.record import read_rows
from stabrun.observe.verdict import Judge, of_run, trailing_means
from stabrun.train.run import train


def judged(losses, **columns):
    judge = Judge()
    for step, loss in enumerate(losses):
        row = {"step": step, "train/loss": loss, "grad/norm": 1.0}
        judge.add(row | {key.replace("__", "/"): values[step] for key, values in columns.items()})
    return judge.verdict()


def falling(count, noise=0.03, seed=0):
    """5.5 nats falling to 2.5, with white noise."""
    source = random.Random(seed)
    return [2.5 + 3 * math.exp(-i / 40) + source.gauss(0, noise) for i in range(count)]


def rising(losses, start, by, over=40, until=None):
    """`losses` lifted from row `start` on, linearly over some rows, and back again at `until`."""
    lifted = list(losses)
    for i in range(start, until or len(losses)):
        lifted[i] += by * min(1.0, (i - start) / over)
    return lifted


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("noise", [0.0, 0.03, 0.1])
def test_a_falling_loss_converges(seed, noise):
    assert judged(falling(400, noise, seed)).verdict == "converged"


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("by", [0.3, 1.0, 5.0])
def test_a_loss_that_rises_and_stays_has_diverged(seed, by):
    verdict = judged(rising(falling(400, seed=seed), 200, by))
    assert (verdict.verdict, verdict.reason) == ("diverged", "runaway")
    assert 200 < verdict.first_bad_step < 260
    assert math.isfinite(verdict.final_loss)


def test_a_loss_that_comes_back_has_recovered():
    verdict = judged(rising(falling(400), 150, 1.0, until=250))
    assert verdict.verdict == "recovered"
    assert 150 < verdict.first_bad_step < 200
    assert verdict.scar == pytest.approx(verdict.final_loss - verdict.best_loss)


@pytest.mark.parametrize("bad", [math.nan, math.inf, "nan", "inf"])
def test_a_loss_that_is_not_finite_has_diverged(bad):
    losses = falling(100)
    losses[60] = bad
    verdict = judged(losses)
    assert (verdict.verdict, verdict.reason, verdict.first_bad_step) == ("diverged", "nonfinite_loss", 60)
    assert judged([bad]).verdict == "diverged"


def test_a_gradient_that_is_not_finite_has_diverged():
    judge = Judge()
    for step, loss in enumerate(falling(50)):
        judge.add({"step": step, "train/loss": loss, "grad/norm": "inf" if step == 40 else 1.0})
    assert (judge.verdict().reason, judge.verdict().first_bad_step) == ("nonfinite_grad", 40)
    assert judge.over


def test_first_site_that_is_not_finite_in_the_order_of_the_forward_pass():
    judge = Judge()
    row = {"norm/out/qkv": [1.0, "nan"], "norm/out/fc2": [1.0, "nan"], "norm/out/proj": [1.0, "inf"]}
    judge.add({"step": 0, "train/loss": "nan", "grad/norm": "nan", **row, "norm/out/head": ["nan"]})
    assert judge.verdict().first_bad_site == "layer_01/qkv"


def test_site_that_grew_most_is_named():
    losses = rising(falling(400), 200, 1.0)
    growth = [[1.0, 1.0 if i < 180 else 1.0 + (i - 180) / 10] for i in range(400)]
    verdict = judged(losses, norm__out__fc2=growth, norm__out__qkv=[[1.0, 1.0 + i / 400] for i in range(400)])
    assert verdict.first_bad_site == "layer_01/fc2"


def test_not_learning_is_not_diverging():
    verdict = judged([5.5 + random.Random(i).gauss(0, 0.01) for i in range(300)])
    assert (verdict.verdict, verdict.reason) == ("undecided", "no_learning")


def test_too_short_to_tell():
    assert judged(falling(30)).reason == "too_short"
    assert Judge().verdict().reason == "too_short"


def test_a_single_spike_decides_nothing():
    losses = falling(400)
    losses[200] += 1.5
    assert judged(losses).verdict == "converged"


def test_windows_are_those_of_the_contract():
    losses = falling(1000)
    verdict = judged(losses)
    means = [sum(losses[i : i + 50]) / 50 for i in range(951)]
    assert verdict.best_loss == pytest.approx(min(means))
    assert verdict.final_loss == pytest.approx(means[-1])
    assert trailing_means([1.0, 2.0, 3.0, 4.0], 2).tolist() == [1.5, 2.5, 3.5]


@pytest.mark.parametrize("window", [1, 2, 3, 20, 25, 31, 64, 100])
def test_means_are_those_of_numpy_and_survive_a_huge_value(window):
    values = np.array(falling(100))
    for spike in (None, 1e14, 1e20, 1e300):
        if spike:
            values[10] = spike
        expected = np.lib.stride_tricks.sliding_window_view(values, window).mean(-1)
        np.testing.assert_allclose(trailing_means(values, window), expected, rtol=1e-12)


def test_live_is_the_same_as_afterwards(tmp_path):
    summary = train(tiny(f"run_dir={tmp_path / 'run'}", "train.steps=60", "optim.lr=0.5", "schedule=constant"))
    judge = Judge()
    for row in read_rows(tmp_path / "run" / "metrics.jsonl"):
        judge.add(row)
    verdict = judge.verdict()
    for field in ("verdict", "reason", "first_bad_step", "first_bad_site", "final_loss", "best_loss"):
        assert summary[field] == getattr(verdict, field)


def test_a_run_cut_short_is_not_called_stable():
    verdict = judged(falling(400))
    assert of_run(verdict, 400) == verdict
    assert (of_run(verdict, 500).verdict, of_run(verdict, 500).reason) == ("undecided", "interrupted")
    gone = judged(rising(falling(400), 200, 1.0))
    assert of_run(gone, 500) == gone


def test_judging_needs_no_torch():
    ask = "import sys, stabrun.observe.verdict; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", ask]).returncode == 0
