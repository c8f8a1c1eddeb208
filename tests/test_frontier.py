"""The frontier's search on simulated outcomes, against an oracle, and by formula."""

import itertools
import math

import numpy as np
import pytest
import questplus
from scipy.stats import norm

from stabrun.study.frontier import LEVEL, Frontier, Grid, Interval, ratio

LOW, OCTAVES = 2.0**-12, 10
GRID = Grid(LOW, LOW * 2**OCTAVES)
MIDDLE = -12 + OCTAVES / 2


def searched(threshold, spread, random, runs=12, lapse=0.0):
    """A search of `runs` runs for `threshold` (log₂ of a rate); the frontier it ends with."""
    frontier = Frontier(GRID)
    for _ in range(runs):
        rate, _ = frontier.next_rate()
        chance = lapse / 2 + (1 - lapse) * norm.cdf((math.log2(rate) - threshold) / spread)
        frontier = frontier.after(rate, random.random() < chance)
    return frontier


def simulated(spread, away=0.0, repetitions=200, lapse=0.0):
    """(RMSE in octaves, coverage of the interval): thresholds as the prior has them, or `away` from its middle."""
    errors, held = [], 0
    for seed in range(repetitions):
        random = np.random.default_rng(seed)
        truth = MIDDLE + away + (0.0 if away else float(np.clip(random.normal(0, 2), -4.5, 4.5)))
        found = searched(truth, spread, random, lapse=lapse).rate_at(0.5)
        errors.append(math.log2(found.median) - truth)
        low, high = (math.log2(end) if end else end for end in (found.low, found.high))
        held += (low is None or low <= truth) and (high is None or truth <= high)
    return float(np.sqrt(np.mean(np.square(errors)))), held / repetitions


@pytest.mark.parametrize(("spread", "most"), [(0.3, 0.16), (0.6, 0.26)])
def test_twelve_runs_find_the_frontier_and_know_how_well(spread, most):
    error, coverage = simulated(spread)
    assert error <= most
    assert coverage >= 0.92


@pytest.mark.parametrize(
    ("spread", "away", "most"), [(0.3, 3.0, 0.2), (0.6, 3.0, 0.32), (0.6, -3.0, 0.32), (1.2, 0.0, 0.6)]
)
def test_a_wrong_prior_costs_precision_and_is_owned_up_to(spread, away, most):
    error, coverage = simulated(spread, away)
    print(f"spread {spread}, {away} octaves away: RMSE {error:.3f}, coverage {coverage:.3f}")
    assert coverage >= 0.92
    assert error <= most


def test_the_search_is_that_of_questplus_where_both_do_the_same():
    """One spread and one lapse, so that the threshold is all there is to learn; rates, posterior and choices."""
    spread, lapse = 0.4, 0.02
    grid = Grid(2.0**-6, 2.0**-2, spreads=(spread,), lapses=(lapse,))
    oracle = questplus.QuestPlus(
        stim_domain={"intensity": grid.rates},
        param_domain={
            "mean": grid.thresholds, "sd": [spread], "lower_asymptote": [lapse / 2], "lapse_rate": [lapse / 2],
        },
        outcome_domain={"response": ["Yes", "No"]},
        prior={"mean": grid.prior / grid.prior.sum()},
        func="norm_cdf",
        stim_scale="linear",
        stim_selection_method="min_entropy",
        param_estimation_method="mean",
    )  # fmt: skip
    ours, random = Frontier(grid), np.random.default_rng(0)
    for _ in range(15):
        rate, _ = ours.next_rate()
        theirs = float(np.asarray(oracle.next_stim["intensity"]))
        assert math.log2(rate) == pytest.approx(theirs, abs=1e-9)
        diverged = bool(random.random() < norm.cdf((theirs + 3.7) / spread))
        oracle.update(stim={"intensity": theirs}, outcome={"response": "Yes" if diverged else "No"})
        ours = ours.after(rate, diverged)
        np.testing.assert_allclose(ours.threshold(), np.asarray(oracle.posterior).ravel(), atol=1e-10)


def test_posterior_is_bayes_whatever_the_order():
    runs = [(2.0**-5, True), (2.0**-8, False), (2.0**-6, True), (2.0**-7, False)]
    weights = GRID.prior.copy()
    for (rate, diverged), cell in itertools.product(runs, range(0, len(weights), 997)):
        threshold, spread, lapse = (float(axis[cell]) for axis in GRID.cells)
        p = lapse / 2 + (1 - lapse) * norm.cdf((math.log2(rate) - threshold) / spread)
        weights[cell] *= p if diverged else 1 - p
    one, other = Frontier.of(GRID, runs).posterior, Frontier.of(GRID, runs[::-1]).posterior
    np.testing.assert_allclose(one, other, rtol=1e-9, atol=1e-300)
    picked = weights[::997]
    np.testing.assert_allclose(one[::997] / one[::997].sum(), picked / picked.sum(), rtol=1e-9, atol=1e-300)


def test_expected_entropy_is_that_of_both_outcomes_written_out():
    frontier = Frontier.of(GRID, [(2.0**-6, True), (2.0**-9, False)])
    for index in (0, 40, 75):
        rate = 2.0 ** GRID.rates[index]
        expected = 0.0
        for diverged in (True, False):
            p = frontier.chances()[index] if diverged else 1 - frontier.chances()[index]
            left = frontier.after(rate, diverged).threshold()
            expected -= p * sum(w * math.log(w) for w in left if w > 0)
        assert frontier.entropies()[index] == pytest.approx(expected, rel=1e-9)


def test_rates_at_a_chance_are_those_of_the_curve():
    """With the truth all but known, lr50 and lr10 are where Φ is a half and a tenth."""
    grid = Grid(2.0**-12, 2.0**-2, spreads=(0.3,), lapses=(0.0,))
    sure = Frontier.of(grid, [(2.0 ** (-6 + step / 10), step > 0) for step in range(-9, 10) for _ in range(20)])
    assert math.log2(sure.rate_at(0.5).median) == pytest.approx(-5.95, abs=0.06)
    gap = math.log2(sure.rate_at(0.5).median / sure.rate_at(0.1).median)
    assert gap == pytest.approx(-0.3 * norm.ppf(0.1), abs=0.06)


@pytest.mark.parametrize(
    ("diverged", "bound"), [(False, Interval(None, GRID.high, None)), (True, Interval(None, None, GRID.low))]
)
def test_a_frontier_outside_of_the_range_is_a_bound_and_known_to_be_one(diverged, bound):
    frontier, runs = Frontier(GRID), 0
    while not frontier.known_to(0.25):
        frontier, runs = frontier.after(frontier.next_rate()[0], diverged), runs + 1
    assert frontier.rate_at(0.5) == bound
    assert runs < 15


@pytest.mark.parametrize("diverged", [True, False])
def test_where_all_runs_end_alike_there_is_but_one_bound(diverged):
    middle = 2.0**MIDDLE
    found = Frontier.of(GRID, [(middle, diverged)] * 2).rate_at(0.5)
    assert found.median is None
    assert (found.low is None, found.high is None) == (diverged, not diverged)
    assert Frontier(GRID).rate_at(0.5) == Interval(None, None, None)


def test_a_frontier_at_the_end_of_the_range_has_one_end():
    runs = [(GRID.high, seed % 2 == 0) for seed in range(10)] + [(GRID.high / 2, False)] * 10
    found = Frontier.of(GRID, runs).rate_at(0.5)
    assert GRID.high / 2 < found.low < GRID.high
    assert found.high is None
    assert Frontier(GRID).known_to(0.25) is False


@pytest.mark.parametrize("spread", [0.1, 0.3])
def test_a_search_to_a_width_holds_it(spread):
    """Until lr50 is known to ± 0.25 octaves: the interval is as narrow as asked, and holds the truth."""
    held, counts = 0, []
    for seed in range(40):
        random = np.random.default_rng(seed)
        truth = MIDDLE + float(np.clip(random.normal(0, 2), -4, 4))
        frontier, count = Frontier(GRID), 0
        while not frontier.known_to(0.25) and count < 60:
            rate, _ = frontier.next_rate(diverged_cost=0.5)
            chance = norm.cdf((math.log2(rate) - truth) / spread)
            frontier, count = frontier.after(rate, random.random() < chance), count + 1
        found = frontier.rate_at(0.5)
        assert math.log2(found.high / found.low) <= 0.5 + 1e-9
        held += math.log2(found.low) <= truth <= math.log2(found.high)
        counts.append(count)
    assert held >= 0.92 * 40
    assert np.median(counts) < 33  # eleven rates × three seeds, which cannot tell as much


def test_a_cheap_divergence_is_sought_sooner():
    frontier = Frontier.of(GRID, [(2.0**-7, False), (2.0**-6, True)])
    rates = [frontier.next_rate(diverged_cost=cost)[0] for cost in (1.0, 0.2)]
    assert rates[1] > rates[0]


def test_pending_runs_send_the_next_one_elsewhere():
    frontier = Frontier.of(GRID, [(2.0**-7, False), (2.0**-6, True)])
    first, gain = frontier.next_rate()
    second, less = frontier.expecting([first]).next_rate()
    assert second != first
    assert 0 < less < gain


def test_what_a_run_tells_is_the_expected_loss_of_entropy():
    frontier = Frontier.of(GRID, [(2.0**-7, False)])
    rate, gain = frontier.next_rate()
    index = int(np.argmin(abs(GRID.rates - math.log2(rate))))
    left = frontier.threshold()
    now = -sum(weight * math.log(weight) for weight in left if weight > 0)
    assert gain == pytest.approx(now - frontier.entropies()[index])
    assert gain == pytest.approx(max(now - frontier.entropies()))


def test_ratio_of_two_frontiers():
    grid = Grid(2.0**-12, 2.0**-2, spreads=(0.3,), lapses=(0.0,))

    def known(octave):
        runs = [(2.0 ** (octave + step / 10), step > 0) for step in range(-9, 10) for _ in range(20)]
        return Frontier.of(grid, runs)

    told = ratio(known(-5.0), known(-7.0))
    assert told.low < told.median < told.high
    assert told.median == pytest.approx(4.0, rel=0.03)
    # Two independent normal errors: their variances add.
    one = known(-5.0).rate_at(0.5)
    assert math.log2(told.high / told.low) == pytest.approx(math.log2(one.high / one.low) * math.sqrt(2), rel=0.35)
    assert LEVEL == 0.95


def test_ratio_to_a_frontier_beyond_the_range_is_a_bound():
    known = Frontier.of(GRID, [(2.0 ** (-6 + step / 10), step > 0) for step in range(-9, 10) for _ in range(5)])
    beyond = Frontier.of(GRID, [(GRID.high, False)] * 12)
    told = ratio(beyond, known)
    assert (told.median, told.high) == (None, None)
    assert told.low == pytest.approx(GRID.high / known.rate_at(0.5).high, rel=0.05)
    assert ratio(known, beyond) == Interval(None, None, pytest.approx(1 / told.low, rel=0.05))
    assert ratio(beyond, beyond) == Interval(None, None, None)
