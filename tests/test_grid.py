"""Statistics of a grid against the formula written out, and the coverage of their intervals."""

import math

import numpy as np
import pytest
from scipy.stats import bootstrap

from stabrun.study.grid import Curve, best_loss, best_rate, estimate, gain, lowest, lr_sensitivity, sensitivity

RATES = np.array([1e-3, 3e-3, 1e-2, 3e-2, 1e-1])


def test_sensitivity_is_the_papers_formula():
    """On the losses of an early baseline at nano, one seed, whose sensitivity was reckoned apart from this code."""
    losses = [1.756, 1.690, 1.817, 2.227, 2.638, 2.850]
    curve = Curve(np.array([3e-3, 1e-2, 3e-2, 1e-1, 3e-1, 1.0]), np.array([losses]).T, np.array([6.0]))
    assert lr_sensitivity(curve.means()) == pytest.approx(0.473, abs=5e-4)
    assert (lowest(curve).value, best_rate(curve)) == (1.690, 1e-2)


@pytest.mark.parametrize("lost", [math.nan, math.inf, 9.0])
def test_a_lost_run_counts_as_the_first_loss(lost):
    losses = np.array([[2.0, 2.2], [1.5, 1.7], [3.0, lost], [lost, lost], [lost, lost]])
    curve = Curve(RATES, losses, np.array([6.0, 5.0]))
    means = [2.1, 1.6, (3.0 + 5.0) / 2, 5.5, 5.5]
    assert sensitivity(curve).value == pytest.approx(sum(mean - 1.6 for mean in means) / 5)
    assert best_rate(curve) == 3e-3


def test_one_seed_has_no_interval():
    curve = Curve(RATES, np.array([[2.0], [1.5], [1.6], [2.0], [3.0]]), np.array([6.0]))
    told = sensitivity(curve)
    assert (told.low, told.high) == (None, None)
    assert gain(curve, curve).value == 0


def noisy(seeds, random):
    """A curve of independent seeds: each moves all its losses alike, and each loss a little on its own."""
    level = np.array([2.0, 1.6, 1.5, 1.9, 2.8])[:, None]
    together, apart = random.normal(0, 0.1, seeds), random.normal(0, 0.02, (5, seeds))
    return Curve(RATES, level + together + apart, np.full(seeds, 6.0))


def test_interval_is_scipys_percentile_bootstrap_over_seeds():
    curve = noisy(8, np.random.default_rng(3))
    ours = lowest(curve)

    def statistic(chosen):
        chosen = chosen.astype(int)
        return best_loss(Curve(RATES, curve.losses[:, chosen], curve.firsts[chosen]).means())

    theirs = bootstrap(
        (np.arange(8),),
        statistic,
        vectorized=False,
        n_resamples=4000,
        method="percentile",
        rng=np.random.default_rng(1),
    ).confidence_interval
    assert ours.low == pytest.approx(theirs.low, abs=0.01)
    assert ours.high == pytest.approx(theirs.high, abs=0.01)


def test_a_gain_on_the_same_seeds_is_known_better_than_its_parts():
    random = np.random.default_rng(0)
    baseline = noisy(6, random)
    better = Curve(RATES, baseline.losses - 0.05 + random.normal(0, 0.005, (5, 6)), baseline.firsts)
    told, alone = gain(better, baseline), lowest(baseline)
    assert told.low < 0.05 < told.high
    assert told.low > 0
    assert told.high - told.low < 0.3 * (alone.high - alone.low)


def test_intervals_hold_the_truth_about_as_often_as_they_say():
    """Of 200 studies of ten seeds each: the percentile bootstrap is a little too narrow with so few."""
    held = 0
    for study in range(200):
        curve = noisy(10, np.random.default_rng(study))
        told = estimate(curve.means()[2], curve.drawn()[2], 10)
        held += told.low <= 1.5 <= told.high
    assert 0.86 <= held / 200 <= 0.98
