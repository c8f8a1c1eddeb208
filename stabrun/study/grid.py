"""What a grid of learning rates says of a variant: LR sensitivity, the best rate and loss, with intervals; no torch.

Losses are final ones, `[rates, seeds]` in nats, of runs that went to their end; the k-th seed is the same everywhere,
so that whole seeds are drawn again for the intervals, over rates and variants alike.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

DRAWS = 2000
LEVEL = 0.95  # of every interval


@dataclass(frozen=True)
class Estimate:
    """A number, and the ends of its interval; None where one seed allows none."""

    value: float
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class Curve:
    """A variant's LR–loss curve: `rates` `[rates]`, `losses` `[rates, seeds]`, `firsts` `[seeds]` before learning."""

    rates: Floats
    losses: Floats
    firsts: Floats

    def capped(self) -> Floats:
        """min(ℓ, ℓ₀), `[rates, seeds]`: a run that ended worse than it began, or in no number, counts as ℓ₀."""
        return np.fmin(self.losses, self.firsts)

    def seeds(self, chosen: NDArray[np.int64]) -> "Curve":
        return Curve(self.rates, self.losses[:, chosen], self.firsts[chosen])


def lr_sensitivity(curve: Curve) -> float:
    """Mean over the rates of min(ℓ(η), ℓ₀) − ℓ*, ℓ* the lowest over the rates (arXiv 2309.14322, section 2.2).

    ℓ(η) is the mean over seeds, each capped by its own ℓ₀.
    """
    losses = curve.capped().mean(axis=1)
    return float((losses - losses.min()).mean())


def best_loss(curve: Curve) -> float:
    return float(curve.capped().mean(axis=1).min())


def best_rate(curve: Curve) -> float:
    return float(curve.rates[curve.capped().mean(axis=1).argmin()])


def estimate(statistic: Callable[[Curve], float], curve: Curve) -> Estimate:
    """A statistic of a curve, with its interval by the bootstrap over whole seeds."""
    return _bootstrapped(lambda chosen: statistic(curve.seeds(chosen)), len(curve.firsts))


def gain(curve: Curve, baseline: Curve) -> Estimate:
    """By how many nats the variant's best loss lies below the baseline's, on the seeds that both have.

    Each draw takes the same seeds of both.
    """
    count = min(len(curve.firsts), len(baseline.firsts))
    return _bootstrapped(lambda chosen: best_loss(baseline.seeds(chosen)) - best_loss(curve.seeds(chosen)), count)


def _bootstrapped(statistic: Callable[[NDArray[np.int64]], float], seeds: int) -> Estimate:
    """The statistic of all seeds, and the percentile interval over seeds that are drawn again."""
    value = statistic(np.arange(seeds))
    if seeds < 2:
        return Estimate(value)
    random = np.random.default_rng(0)
    drawn = [statistic(random.integers(0, seeds, seeds)) for _ in range(DRAWS)]
    low, high = np.quantile(drawn, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Estimate(value, float(low), float(high))
