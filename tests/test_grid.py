"""Statistics of a grid against the formula written out, and their intervals against scipy and the truth."""

import math

import numpy as np
import pytest
from scipy import stats

from stabrun.study.grid import LrCurve, best_loss, gain, lr_sensitivity

RATES = np.array([1e-3, 3e-3, 1e-2, 3e-2, 1e-1])


def test_sensitivity_is_the_formula_of_the_paper():
    """On the losses of an early baseline at nano, one seed, whose sensitivity was computed independently."""
    losses = [1.756, 1.690, 1.817, 2.227, 2.638, 2.850]
    curve = LrCurve(np.array([3e-3, 1e-2, 3e-2, 1e-1, 3e-1, 1.0]), np.array([losses]).T, np.array([6.0]))
    assert lr_sensitivity(curve)["value"] == pytest.approx(0.473, abs=5e-4)
    assert (best_loss(curve)["value"], curve.best_rate()) == (1.690, 1e-2)


@pytest.mark.parametrize("lost", [math.nan, math.inf, 9.0])
def test_a_diverged_run_counts_as_its_initial_loss(lost):
    losses = np.array([[2.0, 2.2], [1.5, 1.7], [3.0, lost], [lost, lost], [lost, lost]])
    curve = LrCurve(RATES, losses, np.array([6.0, 5.0]))
    means = [2.1, 1.6, (3.0 + 5.0) / 2, 5.5, 5.5]
    assert lr_sensitivity(curve)["value"] == pytest.approx(sum(mean - 1.6 for mean in means) / 5)
    assert curve.best_rate() == 3e-3


def test_one_seed_has_no_interval_and_one_rate_no_sensitivity():
    curve = LrCurve(RATES, np.array([[2.0], [1.5], [1.6], [2.0], [3.0]]), np.array([6.0]))
    for found in (best_loss(curve), lr_sensitivity(curve), gain(curve, curve)):
        assert (found["low"], found["high"]) == (None, None)
    assert gain(curve, curve)["value"] == 0
    one_rate = LrCurve(RATES[:1], np.array([[1.5, 1.6]]), np.array([6.0, 6.0]))
    assert lr_sensitivity(one_rate) is None
    assert best_loss(one_rate)["low"] < 1.55 < best_loss(one_rate)["high"]


def noisy(seeds, random, level=(2.0, 1.6, 1.5, 1.9, 2.8)):
    """A curve of independent seeds: each shifts all of its losses by one amount, and each loss by another."""
    common, own = random.normal(0, 0.1, seeds), random.normal(0, 0.02, (len(level), seeds))
    return LrCurve(RATES[: len(level)], np.array(level)[:, None] + common + own, np.full(seeds, 6.0))


def ends(found):
    return pytest.approx((found["low"], found["high"]))


def student(values):
    return stats.t.interval(0.95, len(values) - 1, np.mean(values), stats.sem(values))


@pytest.mark.parametrize("seeds", [2, 3, 8])
def test_with_a_clear_best_rate_intervals_are_students(seeds):
    random = np.random.default_rng(seeds)
    curve, baseline = noisy(seeds, random), noisy(seeds, random, (2.0, 1.7, 1.9, 2.0, 2.9))
    assert student(curve.losses[2]) == ends(best_loss(curve))
    assert student(baseline.losses[1] - curve.losses[2]) == ends(gain(curve, baseline))
    paired = stats.ttest_rel(baseline.losses[1], curve.losses[2]).confidence_interval()
    assert (paired.low, paired.high) == ends(gain(curve, baseline))
    above = curve.losses - curve.losses[2]
    error = max(stats.sem(above.mean(axis=0)), np.linalg.norm(stats.sem(above, axis=1)) / 5)
    assert stats.t.interval(0.95, seeds - 1, above.mean(), error) == ends(lr_sensitivity(curve))


def test_rates_that_may_be_the_best_widen_the_interval_on_the_side_of_the_selection():
    losses = np.array([[1.50, 1.60, 1.70], [1.49, 1.66, 1.72], [1.52, 1.60, 1.73], [3.0, 3.1, 3.4]])
    curve = LrCurve(RATES[:4], losses, np.full(3, 6.0))
    # The second rate is above the first by (-0.01, 0.06, 0.02): 0.023 on average, and the standard error is 0.020.
    assert (best_loss(curve)["low"], best_loss(curve)["high"]) == pytest.approx(student(losses[0]))
    losses[1, 0] = 1.47  # 0.017 and 0.026
    low, high = best_loss(curve)["low"], best_loss(curve)["high"]
    assert (low, high) == pytest.approx((student(losses[0])[0], student(losses[1])[1]))
    assert best_loss(curve)["value"] == pytest.approx(1.6)
    sensitivity, above = lr_sensitivity(curve), (losses - losses[1]).mean(axis=0)
    assert sensitivity["low"] <= student(above)[0]
    other = LrCurve(RATES[:4], losses + np.array([[0.1], [0.3], [0.3], [0.3]]), curve.initial_losses)
    gained = gain(curve, other)
    assert gained["low"] == pytest.approx(student(losses[0] + 0.1 - losses[1])[0])
    assert gained["high"] == pytest.approx(0.1)


def test_a_gain_counts_the_seeds_that_both_have():
    random = np.random.default_rng(0)
    curve, baseline = noisy(3, random), noisy(5, random)
    cut = LrCurve(RATES, baseline.losses[:, :3], baseline.initial_losses[:3])
    assert gain(curve, baseline) == gain(curve, cut)


def test_seeds_that_diverge_at_different_rates_do_not_cancel():
    losses = np.array([[1.5, 1.51], [1.7, 6.0], [6.0, 1.7]])
    found = lr_sensitivity(LrCurve(RATES[:3], losses, np.array([6.0, 6.0])))
    assert found["high"] - found["low"] > 4


def test_a_gain_on_the_same_seeds_has_a_narrower_interval_than_a_loss():
    random = np.random.default_rng(0)
    baseline = noisy(6, random)
    better = LrCurve(RATES, baseline.losses - 0.05 + random.normal(0, 0.005, (5, 6)), baseline.initial_losses)
    gained, loss = gain(better, baseline), best_loss(baseline)
    assert 0 < gained["low"] < 0.05 < gained["high"]
    assert gained["high"] - gained["low"] < 0.3 * (loss["high"] - loss["low"])


@pytest.mark.parametrize("level", [(2.0, 1.6, 1.5, 1.9, 2.8), (1.6, 1.5, 1.5, 1.5, 2.0)], ids=["sharp", "flat"])
@pytest.mark.parametrize("seeds", [2, 3, 5])
def test_coverage_of_the_intervals(seeds, level):
    """In 400 studies, so that 0.92 is three standard errors below the nominal 0.95."""
    random = np.random.default_rng(seeds)
    truths = {best_loss: 1.5, lr_sensitivity: np.mean(level) - 1.5}
    covered = dict.fromkeys(truths, 0)
    for _ in range(400):
        curve = noisy(seeds, random, level)
        for statistic, truth in truths.items():
            found = statistic(curve)
            covered[statistic] += found["low"] <= truth <= found["high"]
    assert all(count / 400 >= 0.92 for count in covered.values()), covered
