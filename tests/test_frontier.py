"""The search for the frontier on simulated outcomes, against questplus, and by formula."""

import itertools
import math

import numpy as np
import pytest
import questplus
from scipy.stats import norm

from stabrun.record.schema import Interval
from stabrun.study.frontier import GRADE_LAPSE, LEVEL, OFFSETS, TAIL, Frontier, ParameterGrid, ratio

LOW, OCTAVES = 2.0**-12, 10
GRID = ParameterGrid(LOW, LOW * 2**OCTAVES)
MIDDLE = -12 + OCTAVES / 2


NEXT_RATES = {}  # outcomes so far → next rate: most searches begin alike


def searched(threshold, spread, random, runs=12):
    """The posterior after a search of `runs` runs for `threshold` (log₂ of a rate)."""
    frontier, outcomes = Frontier(GRID), ()
    for _ in range(runs):
        if outcomes not in NEXT_RATES:
            NEXT_RATES[outcomes] = frontier.next_rate()[0]
        rate = NEXT_RATES[outcomes]
        z = (math.log2(rate) - threshold) / spread + random.normal()
        outcome = bool(z > 0), bool(z > 1.2 if z > 0 else z < -0.6)
        frontier, outcomes = frontier.after(rate, *outcome), (*outcomes, outcome)
    return frontier


def simulated(spread, shift, repetitions):
    """(RMSE in octaves, coverage of the interval), for thresholds from the prior or `shift` octaves from its mean."""
    errors, covered = [], 0
    for seed in range(repetitions):
        random = np.random.default_rng(seed)
        truth = MIDDLE + shift + (0.0 if shift else float(np.clip(random.normal(0, 2), -4.5, 4.5)))
        found = searched(truth, spread, random).rate_at(0.5)
        errors.append(math.log2(found["median"]) - truth)
        low, high = (math.log2(end) if end else end for end in (found["low"], found["high"]))
        covered += (low is None or low <= truth) and (high is None or truth <= high)
    return float(np.sqrt(np.mean(np.square(errors)))), covered / repetitions


SIMULATIONS = [
    (0.3, 0.0, 0.16),
    (0.6, 0.0, 0.26),
    (0.3, 3.0, 0.2),
    (0.6, 3.0, 0.32),
    (0.6, -3.0, 0.32),
    (1.2, 0.0, 0.6),
]


@pytest.mark.parametrize(("spread", "shift", "most"), SIMULATIONS)
@pytest.mark.parametrize(("repetitions", "slack"), [(30, 1.2), pytest.param(200, 1.0, marks=pytest.mark.slow)])
def test_error_and_coverage_of_twelve_runs(spread, shift, most, repetitions, slack):
    """For thresholds from the prior, and for a prior whose mean or spread is wrong.

    The RMSE of 30 errors has a standard deviation of 13 %: hence the slack.
    """
    error, coverage = simulated(spread, shift, repetitions)
    print(f"spread {spread}, {shift} octaves from the prior's mean: RMSE {error:.3f}, coverage {coverage:.3f}")
    assert coverage >= 0.92
    assert error <= slack * most


def test_rates_and_posterior_equal_those_of_questplus():
    """With one spread and one lapse, so that the threshold is the only unknown."""
    spread, lapse = 0.4, 0.02
    grid = ParameterGrid(2.0**-6, 2.0**-2, spreads=(spread,), lapses=(lapse,))
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


def test_posterior_is_bayes_in_any_order():
    runs = [(2.0**-5, True), (2.0**-8, False), (2.0**-6, True), (2.0**-7, False)]
    weights = GRID.prior.copy()
    for (rate, diverged), point in itertools.product(runs, range(0, len(weights), 997)):
        threshold, spread, lapse = (float(axis[point]) for axis in GRID.points)
        p = lapse / 2 + (1 - lapse) * norm.cdf((math.log2(rate) - threshold) / spread)
        weights[point] *= p if diverged else 1 - p
    one, other = Frontier.of(GRID, runs).posterior, Frontier.of(GRID, runs[::-1]).posterior
    np.testing.assert_allclose(one, other, rtol=1e-9, atol=1e-300)
    picked = weights[::997]
    np.testing.assert_allclose(one[::997] / one[::997].sum(), picked / picked.sum(), rtol=1e-9, atol=1e-300)


def grade_probabilities(z, lapse, calm, early):
    """Of (diverged, clear): an ordered probit with three thresholds, lapses, and arbitrary grades."""
    latent = {
        (False, True): norm.cdf(-calm - z),
        (False, False): norm.cdf(-z) - norm.cdf(-calm - z),
        (True, False): norm.cdf(z) - norm.cdf(z - early),
        (True, True): norm.cdf(z - early),
    }
    lapsed = {outcome: lapse / 4 + (1 - lapse) * p for outcome, p in latent.items()}
    return {
        (diverged, clear): (1 - GRADE_LAPSE) * p + GRADE_LAPSE / 2 * (p + lapsed[diverged, not clear])
        for (diverged, clear), p in lapsed.items()
    }


def test_posterior_of_graded_runs_by_brute_force():
    """All combinations of μ, s, λ and both offsets, one after another, on a small grid."""
    grid = ParameterGrid(2.0**-4, 2.0**-3, spreads=(0.3, 1.0), lapses=(0.0, 0.05))
    runs = [(2.0**-3, True, True), (2.0**-3.5, True, False), (2.0**-4, False, True), (2.0**-3.2, False, False)]
    expected = []
    for weight, threshold, spread, lapse in zip(grid.prior, *grid.points, strict=True):
        total = 0.0
        for calm, early in itertools.product(OFFSETS, OFFSETS):
            chances = (
                grade_probabilities((math.log2(rate) - threshold) / spread, lapse, calm, early)[diverged, clear]
                for rate, diverged, clear in runs
            )
            total += weight * math.prod(chances) / len(OFFSETS) ** 2
        expected.append(total)
    found = Frontier.of(grid, runs).posterior
    np.testing.assert_allclose(found, np.array(expected) / sum(expected), rtol=1e-7, atol=1e-14)
    np.testing.assert_allclose(Frontier.of(grid, runs[::-1]).posterior, found, rtol=1e-9, atol=1e-300)


def test_equal_outcomes_are_counted():
    run = (2.0**-6.5, False, False)
    one_by_one = Frontier(GRID)
    for _ in range(7):
        one_by_one = one_by_one.after(*run)
    np.testing.assert_allclose(Frontier.of(GRID, [run] * 7).posterior, one_by_one.posterior, rtol=1e-9, atol=1e-300)
    many = Frontier.of(GRID, [run] * 10_000 + [(2.0**-6.4, True, True)] * 10_000).rate_at(0.5)
    assert 2.0**-6.55 <= many["low"] <= many["high"] <= 2.0**-6.35


@pytest.mark.parametrize("rate", [2.0**-12, 2.0**-7, 2.0**-2])
def test_outcomes_with_and_without_grades_have_probabilities_that_add_up(rate):
    for diverged in (True, False):
        parts = [GRID.outcome_probability(rate, diverged, clear) for clear in (True, False)]
        whole = GRID.outcome_probability(rate, diverged, None)
        np.testing.assert_allclose(parts[0] + parts[1], np.broadcast_to(whole, parts[0].shape), atol=1e-15)
        assert min(map(np.min, parts)) >= 0
    both = [GRID.outcome_probability(rate, diverged, None) for diverged in (True, False)]
    np.testing.assert_allclose(both[0] + both[1], 1.0, atol=1e-15)


def test_grades_determine_the_spread_without_moving_the_threshold():
    """A steep edge in three thresholds instead of one; symmetric grades do not move it."""
    outcomes = {-1.0: (False, True), -0.3: (False, False), 0.3: (True, False), 1.0: (True, True)}
    runs = [(2.0 ** (MIDDLE + octaves), *outcome) for octaves, outcome in outcomes.items() for _ in range(3)]
    bits = Frontier.of(GRID, [run[:2] for run in runs])
    graded = Frontier.of(GRID, runs)
    assert graded.spread()["high"] < bits.spread()["high"]
    widths = [math.log2(found.rate_at(0.5)["high"] / found.rate_at(0.5)["low"]) for found in (graded, bits)]
    assert widths[0] < 0.8 * widths[1]
    assert math.log2(graded.rate_at(0.5)["median"]) == pytest.approx(MIDDLE, abs=0.1)


@pytest.mark.parametrize(("spread", "left", "expected"), [(0.5, 40, False), (0.5, 3, True), (2.0, 40, True)])
def test_a_width_is_out_of_reach_if_even_the_best_outcomes_would_not_give_it(spread, left, expected):
    """With a known spread, precisions add: that of μ now, and 1/s² for each further run."""
    grid = ParameterGrid(GRID.low, GRID.high, spreads=(spread,), lapses=(0.0,))
    frontier = Frontier.of(grid, [(2.0 ** (MIDDLE + octaves), octaves > 0) for octaves in (-0.6, -0.2, 0.2, 0.6)])
    weights = frontier.threshold()
    variance = weights @ (grid.thresholds - weights @ grid.thresholds) ** 2
    half = norm.ppf(1 - TAIL) / math.sqrt(1 / variance + left / spread**2)
    assert (half > 0.25) == expected
    assert frontier.out_of_reach(0.25, left) is expected


def test_expected_entropy_is_the_mean_over_both_outcomes():
    frontier = Frontier.of(GRID, [(2.0**-6, True), (2.0**-9, False)])
    for index in (0, 40, 75):
        rate = 2.0 ** GRID.rates[index]
        expected = 0.0
        for diverged in (True, False):
            p = frontier.divergence_probability()[index] if diverged else 1 - frontier.divergence_probability()[index]
            after = frontier.after(rate, diverged).threshold()
            expected -= p * sum(w * math.log(w) for w in after if w > 0)
        assert frontier.expected_entropy()[index] == pytest.approx(expected, rel=1e-9)


def test_rate_at_a_probability_follows_the_psychometric_function():
    """After many runs, lr50 and lr10 are where Φ is a half and a tenth."""
    grid = ParameterGrid(2.0**-12, 2.0**-2, spreads=(0.3,), lapses=(0.0,))
    known = Frontier.of(grid, [(2.0 ** (-6 + step / 10), step > 0) for step in range(-9, 10) for _ in range(20)])
    assert math.log2(known.rate_at(0.5)["median"]) == pytest.approx(-5.95, abs=0.06)
    gap = math.log2(known.rate_at(0.5)["median"] / known.rate_at(0.1)["median"])
    assert gap == pytest.approx(-0.3 * norm.ppf(0.1), abs=0.06)


@pytest.mark.parametrize(
    ("diverged", "bound"),
    [(False, Interval(median=None, low=GRID.high, high=None)), (True, Interval(median=None, low=None, high=GRID.low))],
)
def test_a_frontier_outside_the_range_is_a_bound(diverged, bound):
    frontier, runs = Frontier(GRID), 0
    while not frontier.known_to(0.25):
        frontier, runs = frontier.after(frontier.next_rate()[0], diverged), runs + 1
    assert frontier.rate_at(0.5) == bound
    assert runs < 15


@pytest.mark.parametrize("diverged", [True, False])
def test_equal_outcomes_give_one_bound(diverged):
    middle = 2.0**MIDDLE
    found = Frontier.of(GRID, [(middle, diverged)] * 2).rate_at(0.5)
    assert found["median"] is None
    assert (found["low"] is None, found["high"] is None) == (diverged, not diverged)
    assert Frontier(GRID).rate_at(0.5) == Interval(median=None, low=None, high=None)


def test_a_frontier_at_the_end_of_the_range_has_one_end():
    runs = [(GRID.high, seed % 2 == 0) for seed in range(10)] + [(GRID.high / 2, False)] * 10
    found = Frontier.of(GRID, runs).rate_at(0.5)
    assert GRID.high / 2 < found["low"] < GRID.high
    assert found["high"] is None
    assert Frontier(GRID).known_to(0.25) is False


@pytest.mark.parametrize("spread", [0.1, 0.3])
@pytest.mark.parametrize("searches", [15, pytest.param(40, marks=pytest.mark.slow)])
def test_a_search_ends_with_an_interval_of_the_width_asked(spread, searches):
    """± 0.25 octaves; and the intervals cover the truth."""
    covered, counts = 0, []
    for seed in range(searches):
        random = np.random.default_rng(seed)
        truth = MIDDLE + float(np.clip(random.normal(0, 2), -4, 4))
        frontier, count = Frontier(GRID), 0
        while not frontier.known_to(0.25) and count < 60:
            rate, _ = frontier.next_rate(diverged_cost=0.5)
            probability = norm.cdf((math.log2(rate) - truth) / spread)
            frontier, count = frontier.after(rate, random.random() < probability), count + 1
        found = frontier.rate_at(0.5)
        assert math.log2(found["high"] / found["low"]) <= 0.5 + 1e-9
        covered += math.log2(found["low"]) <= truth <= math.log2(found["high"])
        counts.append(count)
    assert covered >= 0.92 * searches
    assert np.median(counts) < 33  # a grid of eleven rates × three seeds, which is less precise


def test_cheap_divergences_raise_the_next_rate():
    frontier = Frontier.of(GRID, [(2.0**-7, False), (2.0**-6, True)])
    rates = [frontier.next_rate(diverged_cost=cost)[0] for cost in (1.0, 0.2)]
    assert rates[1] > rates[0]


def test_runs_in_progress_change_the_next_rate():
    frontier = Frontier.of(GRID, [(2.0**-7, False), (2.0**-6, True)])
    first, gain = frontier.next_rate()
    second, smaller = frontier.expecting([first]).next_rate()
    assert second != first
    assert 0 < smaller < gain


def test_information_is_the_expected_decrease_of_entropy():
    frontier = Frontier.of(GRID, [(2.0**-7, False)])
    rate, gain = frontier.next_rate()
    index = int(np.argmin(abs(GRID.rates - math.log2(rate))))
    now = -sum(weight * math.log(weight) for weight in frontier.threshold() if weight > 0)
    assert gain == pytest.approx(now - frontier.expected_entropy()[index])
    assert gain == pytest.approx(max(now - frontier.expected_entropy()))


def test_ratio_of_two_frontiers():
    grid = ParameterGrid(2.0**-12, 2.0**-2, spreads=(0.3,), lapses=(0.0,))

    def known(octave):
        runs = [(2.0 ** (octave + step / 10), step > 0) for step in range(-9, 10) for _ in range(20)]
        return Frontier.of(grid, runs)

    found = ratio(known(-5.0), known(-7.0))
    assert found["low"] < found["median"] < found["high"]
    assert found["median"] == pytest.approx(4.0, rel=0.03)
    # The variances of two independent normal errors add.
    one = known(-5.0).rate_at(0.5)
    assert math.log2(found["high"] / found["low"]) == pytest.approx(
        math.log2(one["high"] / one["low"]) * math.sqrt(2), rel=0.35
    )
    assert LEVEL == 0.95


def test_ratio_to_a_frontier_beyond_the_range_is_a_bound():
    known = Frontier.of(GRID, [(2.0 ** (-6 + step / 10), step > 0) for step in range(-9, 10) for _ in range(5)])
    beyond = Frontier.of(GRID, [(GRID.high, False)] * 12)
    found = ratio(beyond, known)
    assert (found["median"], found["high"]) == (None, None)
    assert found["low"] == pytest.approx(GRID.high / known.rate_at(0.5)["high"], rel=0.05)
    assert ratio(known, beyond) == Interval(median=None, low=None, high=pytest.approx(1 / found["low"], rel=0.05))
    assert ratio(beyond, beyond) == Interval(median=None, low=None, high=None)
