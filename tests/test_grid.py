"""Statistics of a grid against the formula written out, and the coverage of their intervals."""

import math

import numpy as np
import pytest
from scipy.stats import bootstrap

from stabrun.study.grid import (
    LrCurve,
    best_loss,
    best_rate,
    estimate,
    gain,
    lr_sensitivity,
)

RATES = np.array([1e-3, 3e-3, 1e-2, 3e-2, 1e-1])


def test_sensitivity_is_the_formula_of_the_paper():
    """On the losses of an early baseline at nano, one seed, whose sensitivity was computed independently."""
    losses = [1.756, 1.690, 1.817, 2.227, 2.638, 2.850]
    curve = LrCurve(np.array([3e-3, 1e-2, 3e-2, 1e-1, 3e-1, 1.0]), np.array([losses]).T, np.array([6.0]))
    assert lr_sensitivity(curve.means()) == pytest.approx(0.473, abs=5e-4)
    assert (estimate(best_loss, curve)["value"], best_rate(curve)) == (1.690, 1e-2)


@pytest.mark.parametrize("lost", [math.nan, math.inf, 9.0])
def test_a_diverged_run_counts_as_its_initial_loss(lost):
    losses = np.array([[2.0, 2.2], [1.5, 1.7], [3.0, lost], [lost, lost], [lost, lost]])
    curve = LrCurve(RATES, losses, np.array([6.0, 5.0]))
    means = [2.1, 1.6, (3.0 + 5.0) / 2, 5.5, 5.5]
    assert estimate(lr_sensitivity, curve)["value"] == pytest.approx(sum(mean - 1.6 for mean in means) / 5)
    assert best_rate(curve) == 3e-3


def test_one_seed_has_no_interval():
    curve = LrCurve(RATES, np.array([[2.0], [1.5], [1.6], [2.0], [3.0]]), np.array([6.0]))
    found = estimate(lr_sensitivity, curve)
    assert (found["low"], found["high"]) == (None, None)
    assert estimate(gain, curve, curve)["value"] == 0


def noisy(seeds, random):
    """A curve of independent seeds: each shifts all of its losses by one amount, and each loss by another."""
    level = np.array([2.0, 1.6, 1.5, 1.9, 2.8])[:, None]
    common, own = random.normal(0, 0.1, seeds), random.normal(0, 0.02, (5, seeds))
    return LrCurve(RATES, level + common + own, np.full(seeds, 6.0))


def test_interval_is_scipys_percentile_bootstrap_over_seeds():
    curve = noisy(8, np.random.default_rng(3))
    ours = estimate(best_loss, curve)

    def statistic(chosen):
        chosen = chosen.astype(int)
        return best_loss(LrCurve(RATES, curve.losses[:, chosen], curve.initial_losses[chosen]).means())

    theirs = bootstrap(
        (np.arange(8),),
        statistic,
        vectorized=False,
        n_resamples=4000,
        method="percentile",
        rng=np.random.default_rng(1),
    ).confidence_interval
    assert ours["low"] == pytest.approx(theirs.low, abs=0.01)
    assert ours["high"] == pytest.approx(theirs.high, abs=0.01)


def test_a_gain_on_the_same_seeds_has_a_narrower_interval_than_a_loss():
    random = np.random.default_rng(0)
    baseline = noisy(6, random)
    better = LrCurve(RATES, baseline.losses - 0.05 + random.normal(0, 0.005, (5, 6)), baseline.initial_losses)
    gained, loss = estimate(gain, better, baseline), estimate(best_loss, baseline)
    assert gained["low"] < 0.05 < gained["high"]
    assert gained["low"] > 0
    assert gained["high"] - gained["low"] < 0.3 * (loss["high"] - loss["low"])


def test_coverage_of_the_intervals():
    """In 200 studies of ten seeds each. The percentile bootstrap is slightly too narrow for so few."""
    covered = 0
    for study in range(200):
        curve = noisy(10, np.random.default_rng(study))
        found = estimate(lambda means: means[2], curve)
        covered += found["low"] <= 1.5 <= found["high"]
    assert 0.86 <= covered / 200 <= 0.98
