"""What a grid of learning rates says of a variant: LR sensitivity, the best rate and loss, with intervals; no torch.

Losses are final ones, `[rates, seeds]` in nats, of runs that went to their end; the k-th seed is the same everywhere,
so that whole seeds are drawn again for the intervals, over rates and variants alike. A statistic takes the mean losses
by rate, `[rates]` of one draw or `[rates, draws]` of many.
"""

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

    def means(self, seeds: int | None = None) -> Floats:
        """Mean over seeds of min(ℓ, ℓ₀), `[rates]`: one that ended above it, or in no number, counts as ℓ₀."""
        return self._capped()[:, :seeds].mean(axis=1)

    def drawn(self, seeds: int | None = None) -> Floats:
        """The means, seeds drawn again, `[rates, DRAWS]`; the same draws for every curve of as many seeds."""
        capped = self._capped()[:, :seeds]
        count = capped.shape[1]
        return capped[:, np.random.default_rng(0).integers(0, count, (DRAWS, count))].mean(axis=2)

    def _capped(self) -> Floats:
        return np.fmin(self.losses, self.firsts)


def lr_sensitivity(means: Floats) -> Floats:
    """Mean over the rates of min(ℓ(η), ℓ₀) − ℓ*, ℓ* the lowest over the rates (arXiv 2309.14322, section 2.2).

    ℓ(η) is the mean over seeds, each capped by its own ℓ₀.
    """
    return (means - means.min(axis=0)).mean(axis=0)


def best_loss(means: Floats) -> Floats:
    return means.min(axis=0)


def best_rate(curve: Curve) -> float:
    return float(curve.rates[curve.means().argmin()])


def sensitivity(curve: Curve) -> Estimate:
    return estimate(lr_sensitivity(curve.means()), lr_sensitivity(curve.drawn()), len(curve.firsts))


def lowest(curve: Curve) -> Estimate:
    """The best loss over the rates."""
    return estimate(best_loss(curve.means()), best_loss(curve.drawn()), len(curve.firsts))


def gain(curve: Curve, baseline: Curve) -> Estimate:
    """By how many nats the variant's best loss lies below the baseline's, on the seeds that both have.

    Each draw takes the same seeds of both.
    """
    count = min(len(curve.firsts), len(baseline.firsts))
    value = best_loss(baseline.means(count)) - best_loss(curve.means(count))
    return estimate(value, best_loss(baseline.drawn(count)) - best_loss(curve.drawn(count)), count)


def estimate(value: Floats, drawn: Floats, seeds: int) -> Estimate:
    """The value, and the percentile interval of what was drawn again."""
    if seeds < 2:
        return Estimate(float(value))
    low, high = np.quantile(drawn, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Estimate(float(value), float(low), float(high))
