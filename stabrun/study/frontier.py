"""The stability frontier: at which learning rate do half of the seeds diverge? A Bayesian adaptive search; no torch.

A run at rate η diverges with probability λ/2 + (1 − λ)·Φ((log₂ η − μ)/s): μ is the threshold, s its spread over seeds,
both in octaves, and λ the lapse, the share of runs whose fate has nothing to do with the rate. The posterior over
(μ, s, λ) lies on a grid; the next run is where the entropy of μ is expected to fall most for each step of training
(QUEST+, Watson 2017, doi 10.1167/17.3.10, takes the entropy of all parameters: the same where s and λ are known).
"""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray
from scipy.special import ndtr, ndtri, xlogy

Floats = NDArray[np.float64]

STEP = 0.05  # octaves between thresholds on the grid
RATE_STEP = 0.1  # octaves between the rates that may be tried
MARGIN = 3.0  # octaves beyond the range in which a threshold is still thought possible
CENTRAL = 0.2  # of the range: standard deviation of the threshold about its middle, for a range is chosen around it
SPREADS = np.geomspace(0.1, 3.0, 10)
# Octaves, and the standard deviation of its logarithm: chosen on simulations, so that the interval holds what it says
# for true spreads from 0.3 to 1.2, and twelve runs are as precise as can be.
USUAL_SPREAD, DOUBT = 0.8, 1.0
LAPSES, LAPSE_WEIGHTS = np.array([0.0, 0.05]), np.array([0.7, 0.3])
LEVEL = 0.95  # of every interval
TAIL = (1 - LEVEL) / 2
DRAWS = 20_000


@dataclass(frozen=True)
class Interval:
    """A learning rate, or another number: the posterior's median, and the ends that hold it with LEVEL.

    What rests on the prior alone is None: what lies beyond the range searched, and, where no run diverged or none did
    not, all but one end. Where all of it lies beyond, the end of the range is the bound that is known: (None, high end,
    None) above, (None, None, low end) below.
    """

    median: float | None
    low: float | None
    high: float | None


@dataclass(frozen=True)
class Grid:
    """What is thought possible over the range of rates [low, high], and which rates may be tried."""

    low: float
    high: float
    spreads: tuple[float, ...] = tuple(SPREADS)
    lapses: tuple[float, ...] = tuple(LAPSES)

    @cached_property
    def rates(self) -> Floats:
        """log₂ of the rates that may be tried, `[rates]`."""
        return _steps(np.log2(self.low), np.log2(self.high), RATE_STEP)

    @cached_property
    def thresholds(self) -> Floats:
        """μ, `[thresholds]`, in octaves."""
        return _steps(np.log2(self.low) - MARGIN, np.log2(self.high) + MARGIN, STEP)

    @cached_property
    def cells(self) -> tuple[Floats, Floats, Floats]:
        """(μ, s, λ) of each cell of the grid, `[cells]` each."""
        mesh = np.meshgrid(self.thresholds, self.spreads, self.lapses, indexing="ij")
        thresholds, spreads, lapses = (axis.ravel() for axis in mesh)
        return thresholds, spreads, lapses

    @cached_property
    def prior(self) -> Floats:
        """Normal in the threshold about the range's middle, log-normal in the spread: `[cells]`."""
        thresholds, spreads, lapses = self.cells
        middle, width = np.log2(self.low * self.high) / 2, np.log2(self.high / self.low)
        distance = ((thresholds - middle) / (CENTRAL * width)) ** 2 + (np.log(spreads / USUAL_SPREAD) / DOUBT) ** 2
        weights = np.exp(-distance / 2) * np.interp(lapses, LAPSES, LAPSE_WEIGHTS)
        return weights / weights.sum()

    def diverges(self, rates: Floats) -> Floats:
        """Probability that a run at log₂ rates `[n]` diverges, were a cell the truth: `[n, cells]`."""
        thresholds, spreads, lapses = self.cells
        return lapses / 2 + (1 - lapses) * ndtr((rates[:, None] - thresholds) / spreads)

    @cached_property
    def outcomes(self) -> Floats:
        """Probability of a divergence at each rate that may be tried, `[rates, cells]`."""
        return self.diverges(self.rates)


class Frontier:
    """The posterior of one variant after some runs. Immutable: `after` gives the next."""

    def __init__(self, grid: Grid, posterior: Floats | None = None, ends: frozenset[bool] = frozenset()) -> None:
        self.grid = grid
        self.posterior = grid.prior if posterior is None else posterior
        self.ends = ends  # the outcomes that were seen

    @staticmethod
    def of(grid: Grid, runs: Iterable[tuple[float, bool]]) -> "Frontier":
        """After runs of (learning rate, whether it diverged), in any order."""
        seen = Frontier(grid)
        for rate, diverged in runs:
            seen = seen.after(rate, diverged)
        return seen

    def after(self, rate: float, diverged: bool) -> "Frontier":
        p = self.grid.diverges(np.array([np.log2(rate)]))[0]
        weights = self.posterior * (p if diverged else 1 - p)
        return Frontier(self.grid, weights / weights.sum(), self.ends | {diverged})

    def chances(self) -> Floats:
        """Probability that the next run diverges, at each rate that may be tried, `[rates]`."""
        return self.grid.outcomes @ self.posterior

    def threshold(self) -> Floats:
        """The posterior of μ alone, `[thresholds]`."""
        return self.posterior.reshape(len(self.grid.thresholds), -1).sum(axis=1)

    def entropies(self) -> Floats:
        """Expected entropy of μ after one more run, in nats, at each rate that may be tried, `[rates]`.

        With j the joint probability of an outcome and each μ, and P = Σ j that of the outcome, what is left of the
        entropy is −Σ j·log(j/P), summed over both outcomes.
        """
        shape = len(self.grid.rates), len(self.grid.thresholds), -1
        diverged = (self.grid.outcomes * self.posterior).reshape(shape).sum(axis=2)
        left = np.zeros(len(self.grid.rates))
        for joint in (diverged, np.maximum(0.0, self.threshold() - diverged)):
            whole = joint.sum(axis=1)
            left += xlogy(whole, whole) - xlogy(joint, joint).sum(axis=1)
        return left

    def next_rate(self, diverged_cost: float = 1.0) -> tuple[float, float]:
        """The rate whose run tells most for each step it is expected to take, and how much, in nats a whole run.

        `diverged_cost`: steps of a run that diverges, of those of a whole one.
        """
        now = -float(xlogy(self.threshold(), self.threshold()).sum())
        chance = self.chances()
        gains = (now - self.entropies()) / (chance * diverged_cost + (1 - chance))
        best = int(np.argmax(gains))
        return float(2.0 ** self.grid.rates[best]), float(gains[best])

    def expecting(self, pending: Iterable[float]) -> "Frontier":
        """As if the runs at these rates, which still go on, had ended as is more likely."""
        seen = self
        for rate in pending:
            chance = float(self.grid.diverges(np.array([np.log2(rate)]))[0] @ seen.posterior)
            seen = seen.after(rate, chance > 0.5)
        return seen

    def octaves_at(self, chance: float) -> Floats:
        """log₂ of the rate at which `chance` of the seeds diverge, were a cell the truth: `[cells]`."""
        thresholds, spreads, lapses = self.grid.cells
        share = np.clip((chance - lapses / 2) / (1 - lapses), 1e-3, 1 - 1e-3)  # a lapse may be more than the chance
        return thresholds + spreads * ndtri(share)

    def quantiles(self, values: Floats) -> Floats:
        """Median, lower and upper end of the posterior of what has these values over the grid's cells, `[3]`."""
        order = np.argsort(values)
        mass = np.cumsum(self.posterior[order])
        places = np.searchsorted(mass, [0.5, TAIL, 1 - TAIL])
        return values[order][np.minimum(places, len(order) - 1)]

    def spread(self) -> Interval:
        """s, in octaves."""
        return Interval(*map(float, self.quantiles(self.grid.cells[1])))

    def rate_at(self, chance: float) -> Interval:
        """The learning rate at which `chance` of the seeds diverge: lr50, lr10."""
        return self._within_range(self.quantiles(self.octaves_at(chance)))

    def _within_range(self, octaves: Floats) -> Interval:
        low, high = np.log2(self.grid.low), np.log2(self.grid.high)
        if octaves[1] >= high:
            return Interval(None, self.grid.high, None)
        if octaves[2] <= low:
            return Interval(None, None, self.grid.low)
        median, least, most = (float(2.0**end) if low <= end <= high else None for end in octaves)
        bounded_below, bounded_above = False in self.ends, True in self.ends
        return Interval(
            median if bounded_below and bounded_above else None,
            least if bounded_below else None,
            most if bounded_above else None,
        )

    def known_to(self, width: float) -> bool:
        """Whether lr50 is known to ± `width` octaves, or to lie beyond the range."""
        _, low, high = self.quantiles(self.octaves_at(0.5))
        beyond = low >= np.log2(self.grid.high) or high <= np.log2(self.grid.low)
        return bool(beyond or high - low <= 2 * width)


def ratio(one: Frontier, other: Frontier, chance: float = 0.5) -> Interval:
    """The ratio of two variants' rates at `chance`, from independent draws of both posteriors.

    What would rest on a rate beyond its range is None. Where all of one lies beyond, the bound is that of the range's
    end against the other's.
    """
    random = np.random.default_rng(0)
    drawn, rates = [], []
    for frontier in (one, other):
        cells = random.choice(len(frontier.posterior), DRAWS, p=frontier.posterior)
        jitter = random.uniform(-STEP / 2, STEP / 2, DRAWS)
        low, high = np.log2(frontier.grid.low), np.log2(frontier.grid.high)
        drawn.append(np.clip(frontier.octaves_at(chance)[cells] + jitter, low, high))
        rates.append(frontier.rate_at(chance))
    median, least, most = 2.0 ** np.quantile(drawn[0] - drawn[1], [0.5, TAIL, 1 - TAIL])
    above, below = rates
    return Interval(
        float(median) if above.median and below.median else None,
        float(least) if above.low and below.high else None,
        float(most) if above.high and below.low else None,
    )


def _steps(low: float, high: float, step: float) -> Floats:
    """Even steps from low to high, both included, of at most `step`."""
    return np.linspace(low, high, int(np.ceil((high - low) / step)) + 1)
