"""The stability frontier: the learning rate at which half of the seeds diverge, by Bayesian adaptive search; no torch.

A run at learning rate η diverges with probability λ/2 + (1 − λ)·Φ(z), z = (log₂ η − μ)/s. μ is the threshold and s its
spread over seeds, both in octaves; the lapse λ is the share of runs whose outcome does not depend on the learning rate.

A run may have a grade as well: whether its outcome is clear. Grades follow an ordered probit with the same z: a run is
clearly stable with probability λ/4 + (1 − λ)·Φ(−z − a), and clearly diverged with probability λ/4 + (1 − λ)·Φ(z − b).
The distances a and b of these two thresholds from μ, in units of s, are unknown: they have independent flat priors on
`OFFSETS`. Because μ is defined by divergence alone, and a and b are free, grades say little about μ that divergences do
not; but they share s, which a few outcomes of two kinds hardly determine. A share GRADE_LAPSE of grades is arbitrary.

The posterior over (μ, s, λ, a, b) is computed on a grid of parameters. For given (μ, s, λ), stable runs concern only a
and diverged runs only b, so that the likelihood is a product of two sums. The next run is the one with the largest
expected decrease of the entropy of μ per training step, by its outcome without its grade. QUEST+ (Watson 2017, doi
10.1167/17.3.10) uses the entropy of all parameters, which is the same if s and λ are known.
"""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray
from scipy.special import logsumexp, ndtr, ndtri, xlogy

from stabrun.record.schema import Interval

Floats = NDArray[np.float64]

STEP = 0.05  # octaves between thresholds of the parameter grid
RATE_STEP = 0.1  # octaves between candidate learning rates
MARGIN = 3.0  # octaves beyond the range in which thresholds have prior probability
CENTRAL = 0.2  # prior standard deviation of the threshold about the middle of the range, as a share of its width
SPREADS = np.geomspace(0.1, 3.0, 10)
# Median of the prior of s, in octaves, and standard deviation of log s: chosen on simulations, such that intervals have
# their nominal coverage for true spreads from 0.3 to 1.2 (scripts/search_simulation.py).
PRIOR_SPREAD, PRIOR_SPREAD_SD = 1.2, 1.0
LAPSES, LAPSE_WEIGHTS = np.array([0.0, 0.05]), np.array([0.7, 0.3])
OFFSETS = np.array([0.25, 0.5, 1.0, 2.0, 4.0])  # of a clearly stable and a clearly diverged run from μ, in units of s
GRADE_LAPSE = 0.05
LEVEL = 0.95  # of every interval
TAIL = (1 - LEVEL) / 2
DRAWS = 20_000
TINY = 1e-30  # instead of zero in a denominator


@dataclass(frozen=True)
class ParameterGrid:
    """The parameters (μ, s, λ) considered for the range of learning rates [low, high], and the candidate rates."""

    low: float
    high: float
    spreads: tuple[float, ...] = tuple(SPREADS)
    lapses: tuple[float, ...] = tuple(LAPSES)

    @cached_property
    def rates(self) -> Floats:
        """log₂ of the candidate learning rates, `[rates]`."""
        return _steps(np.log2(self.low), np.log2(self.high), RATE_STEP)

    @cached_property
    def thresholds(self) -> Floats:
        """μ in octaves, `[thresholds]`."""
        return _steps(np.log2(self.low) - MARGIN, np.log2(self.high) + MARGIN, STEP)

    @cached_property
    def points(self) -> tuple[Floats, Floats, Floats]:
        """(μ, s, λ) of each point of the grid, `[points]` each."""
        mesh = np.meshgrid(self.thresholds, self.spreads, self.lapses, indexing="ij")
        thresholds, spreads, lapses = (axis.ravel() for axis in mesh)
        return thresholds, spreads, lapses

    @cached_property
    def prior(self) -> Floats:
        """Normal in the threshold about the middle of the range, log-normal in the spread: `[points]`."""
        thresholds, spreads, lapses = self.points
        middle, width = np.log2(self.low * self.high) / 2, np.log2(self.high / self.low)
        z_threshold = (thresholds - middle) / (CENTRAL * width)
        z_spread = np.log(spreads / PRIOR_SPREAD) / PRIOR_SPREAD_SD
        weights = np.exp(-(z_threshold**2 + z_spread**2) / 2) * np.interp(lapses, LAPSES, LAPSE_WEIGHTS)
        return weights / weights.sum()

    def divergence_probability(self, rates: Floats) -> Floats:
        """Probability that a run at log₂ rates `[n]` diverges, given each point: `[n, points]`."""
        thresholds, spreads, lapses = self.points
        return lapses / 2 + (1 - lapses) * ndtr((rates[:, None] - thresholds) / spreads)

    def outcome_probability(self, rate: float, diverged: bool, clear: bool | None) -> Floats:
        """Probability of an outcome at a learning rate, given each point and offset: `[points, offsets]`.

        If it has no grade (`clear` is None), it does not depend on the offset: `[points, 1]`.
        """
        thresholds, spreads, lapses = (axis[:, None] for axis in self.points)
        sign = 1 if diverged else -1
        z = sign * (np.log2(rate) - thresholds) / spreads
        either = lapses / 2 + (1 - lapses) * ndtr(z)
        if clear is None:
            return either
        clearly = lapses / 4 + (1 - lapses) * ndtr(z - OFFSETS)
        right = clearly if clear else either - clearly
        return (1 - GRADE_LAPSE) * right + GRADE_LAPSE / 2 * either

    @cached_property
    def candidates(self) -> Floats:
        """Probability that a run at each candidate rate diverges, given each point: `[rates, points]`."""
        return self.divergence_probability(self.rates)


class Frontier:
    """The posterior of one variant. Immutable: `after` returns the posterior after one more run."""

    def __init__(
        self,
        grid: ParameterGrid,
        likelihoods: tuple[Floats, Floats] | None = None,
        outcomes: frozenset[bool] = frozenset(),
    ) -> None:
        self.grid = grid
        # Log, of the stable and the diverged runs: [points, offsets].
        self.likelihoods = likelihoods or (np.zeros((len(grid.prior), len(OFFSETS))),) * 2
        self.outcomes = outcomes  # those observed

    @staticmethod
    def of(grid: ParameterGrid, runs: Iterable[tuple[float, bool] | tuple[float, bool, bool | None]]) -> "Frontier":
        """The posterior after runs of (learning rate, whether it diverged, whether clearly so), in any order."""
        frontier = Frontier(grid)
        for run, count in Counter(runs).items():
            frontier = frontier.after(*run, count=count)
        return frontier

    def after(self, rate: float, diverged: bool, clear: bool | None = None, *, count: int = 1) -> "Frontier":
        """After `count` runs with the same outcome. `clear`: whether it is clear; None if that is not known."""
        stable, unstable = self.likelihoods
        with np.errstate(divide="ignore"):  # log 0
            more = count * np.log(self.grid.outcome_probability(rate, diverged, clear))
        likelihoods = (stable, unstable + more) if diverged else (stable + more, unstable)
        return Frontier(self.grid, likelihoods, self.outcomes | {diverged})

    @cached_property
    def posterior(self) -> Floats:
        """Of (μ, s, λ): `[points]`."""
        logs = np.log(self.grid.prior) + sum(logsumexp(each, axis=1) for each in self.likelihoods)
        weights = np.exp(logs - logs.max())
        return weights / weights.sum()

    def divergence_probability(self) -> Floats:
        """Probability that the next run diverges, at each candidate rate, `[rates]`."""
        return self.grid.candidates @ self.posterior

    def threshold(self) -> Floats:
        """The marginal posterior of μ, `[thresholds]`."""
        return self.posterior.reshape(len(self.grid.thresholds), -1).sum(axis=1)

    def expected_entropy(self) -> Floats:
        """Expected entropy of μ after one more run, in nats, at each candidate rate, `[rates]`.

        With j the joint probability of an outcome and each μ, and P = Σ j that of the outcome, it is −Σ j·log(j/P),
        summed over both outcomes.
        """
        shape = len(self.grid.rates), len(self.grid.thresholds), -1
        diverged = (self.grid.candidates * self.posterior).reshape(shape).sum(axis=2)
        entropy = np.zeros(len(self.grid.rates))
        for joint in (diverged, np.maximum(0.0, self.threshold() - diverged)):
            total = joint.sum(axis=1)
            entropy += xlogy(total, total) - xlogy(joint, joint).sum(axis=1)
        return entropy

    def next_rate(self, diverged_cost: float = 1.0) -> tuple[float, float]:
        """The candidate rate with the largest expected information per training step, and that information.

        The information is in nats per complete run. `diverged_cost`: steps of a run that diverges, relative to those of
        a complete run.
        """
        now = -float(xlogy(self.threshold(), self.threshold()).sum())
        p = self.divergence_probability()
        gains = (now - self.expected_entropy()) / (p * diverged_cost + (1 - p))
        best = int(np.argmax(gains))
        return float(2.0 ** self.grid.rates[best]), float(gains[best])

    def expecting(self, pending: Iterable[float]) -> "Frontier":
        """The posterior as if each run in progress at these rates had its more probable outcome."""
        frontier = self
        for rate in pending:
            p = float(self.grid.divergence_probability(np.array([np.log2(rate)]))[0] @ frontier.posterior)
            frontier = frontier.after(rate, p > 0.5)
        return frontier

    def octaves_at(self, probability: float) -> Floats:
        """log₂ of the rate at which this share of the seeds diverges, given each point: `[points]`."""
        thresholds, spreads, lapses = self.grid.points
        share = np.clip((probability - lapses / 2) / (1 - lapses), 1e-3, 1 - 1e-3)  # λ/2 may exceed the probability
        return thresholds + spreads * ndtri(share)

    def quantiles(self, values: Floats) -> Floats:
        """Median, lower and upper end of the posterior of a quantity with these values at the points: `[3]`."""
        order = np.argsort(values)
        mass = np.cumsum(self.posterior[order])
        indices = np.searchsorted(mass, [0.5, TAIL, 1 - TAIL])
        return values[order][np.minimum(indices, len(order) - 1)]

    def spread(self) -> Interval:
        """s, in octaves."""
        median, low, high = map(float, self.quantiles(self.grid.points[1]))
        return Interval(median=median, low=low, high=high)

    def rate_at(self, probability: float) -> Interval:
        """The learning rate at which this share of the seeds diverges: 0.5 for lr50, 0.1 for lr10.

        What would depend on the prior alone is None: whatever lies beyond the range searched and, unless both outcomes
        were observed, the median and the end on the side without observations. If the whole interval lies beyond the
        range, the end of the range is the bound: the low end above it, the high end below it.
        """
        octaves = self.quantiles(self.octaves_at(probability))
        low, high = np.log2(self.grid.low), np.log2(self.grid.high)
        if octaves[1] >= high:
            return Interval(median=None, low=self.grid.high, high=None)
        if octaves[2] <= low:
            return Interval(median=None, low=None, high=self.grid.low)
        median, lower, upper = (float(2.0**end) if low <= end <= high else None for end in octaves)
        bounded_below, bounded_above = False in self.outcomes, True in self.outcomes
        return Interval(
            median=median if bounded_below and bounded_above else None,
            low=lower if bounded_below else None,
            high=upper if bounded_above else None,
        )

    def known_to(self, width: float) -> bool:
        """Whether lr50 is known to ± `width` octaves, or known to lie beyond the range."""
        _, low, high = self.quantiles(self.octaves_at(0.5))
        beyond = low >= np.log2(self.grid.high) or high <= np.log2(self.grid.low)
        return bool(beyond or high - low <= 2 * width)

    def out_of_reach(self, width: float, runs: int) -> bool:
        """Whether this many more runs would certainly not give lr50 to ± `width` octaves.

        A run determines μ to ± s at best. Certain: with a probability of 1 − TAIL over the posterior of s.
        """
        joint = self.posterior.reshape(len(self.grid.thresholds), len(self.grid.spreads), -1).sum(axis=2)
        share = np.maximum(joint.sum(axis=0), TINY)
        mean = self.grid.thresholds @ joint / share
        variance = np.maximum(((self.grid.thresholds[:, None] - mean) ** 2 * joint).sum(axis=0) / share, TINY)
        best = 1 / (1 / variance + runs / np.square(self.grid.spreads))
        return bool(share[-ndtri(TAIL) * np.sqrt(best) <= width].sum() < TAIL)


def ratio(one: Frontier, other: Frontier) -> Interval:
    """The ratio of two variants' lr50, from independent draws of both posteriors.

    Ends that depend on a rate beyond its range are None. If one rate is only bounded, so is the ratio.
    """
    random = np.random.default_rng(0)
    draws, rates = [], []
    for frontier in (one, other):
        points = random.choice(len(frontier.posterior), DRAWS, p=frontier.posterior)
        jitter = random.uniform(-STEP / 2, STEP / 2, DRAWS)
        low, high = np.log2(frontier.grid.low), np.log2(frontier.grid.high)
        draws.append(np.clip(frontier.octaves_at(0.5)[points] + jitter, low, high))
        rates.append(frontier.rate_at(0.5))
    median, lower, upper = 2.0 ** np.quantile(draws[0] - draws[1], [0.5, TAIL, 1 - TAIL])
    numerator, denominator = rates
    return Interval(
        median=float(median) if numerator["median"] and denominator["median"] else None,
        low=float(lower) if numerator["low"] and denominator["high"] else None,
        high=float(upper) if numerator["high"] and denominator["low"] else None,
    )


def _steps(low: float, high: float, step: float) -> Floats:
    """Equally spaced values from low to high inclusive, at most `step` apart."""
    return np.linspace(low, high, int(np.ceil((high - low) / step)) + 1)
