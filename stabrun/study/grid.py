"""Statistics of a grid of learning rates: LR sensitivity, best rate and best loss, with intervals; no torch.

Losses are final training losses, `[rates, seeds]`, in nats. The k-th seed is the same for every rate and variant.
Intervals therefore come from a bootstrap over whole seeds. A statistic takes the mean losses by rate: `[rates]`, or
`[rates, draws]` for resampled seeds.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

DRAWS = 2000
LEVEL = 0.95  # of every interval


@dataclass(frozen=True)
class Estimate:
    """A number and the ends of its interval; None for a single seed, which gives no interval."""

    value: float
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class LrCurve:
    """Loss by learning rate: `rates` `[rates]`, `losses` `[rates, seeds]`, `initial_losses` `[seeds]`."""

    rates: Floats
    losses: Floats
    initial_losses: Floats

    def means(self, seeds: int | None = None) -> Floats:
        """Mean over seeds of min(ℓ, ℓ₀), `[rates]`: a loss above the initial one, or NaN, counts as the initial one."""
        return self._capped()[:, :seeds].mean(axis=1)

    def resampled_means(self, seeds: int | None = None) -> Floats:
        """The means with seeds resampled, `[rates, DRAWS]`; curves with equally many seeds share their draws."""
        capped = self._capped()[:, :seeds]
        count = capped.shape[1]
        return capped[:, np.random.default_rng(0).integers(0, count, (DRAWS, count))].mean(axis=2)

    def _capped(self) -> Floats:
        return np.fmin(self.losses, self.initial_losses)


def lr_sensitivity(means: Floats) -> Floats:
    """Mean over rates of min(ℓ(η), ℓ₀) − ℓ*, with ℓ* the lowest over the rates (arXiv 2309.14322, section 2.2).

    ℓ(η) is the mean over seeds, each capped at its own ℓ₀.
    """
    return (means - means.min(axis=0)).mean(axis=0)


def best_loss(means: Floats) -> Floats:
    return means.min(axis=0)


def best_rate(curve: LrCurve) -> float:
    return float(curve.rates[curve.means().argmin()])


def sensitivity_estimate(curve: LrCurve) -> Estimate:
    return estimate(lr_sensitivity(curve.means()), lr_sensitivity(curve.resampled_means()), len(curve.initial_losses))


def best_loss_estimate(curve: LrCurve) -> Estimate:
    return estimate(best_loss(curve.means()), best_loss(curve.resampled_means()), len(curve.initial_losses))


def gain_estimate(curve: LrCurve, baseline: LrCurve) -> Estimate:
    """The baseline's best loss minus the variant's, in nats, over the seeds of both; each draw uses the same seeds."""
    seeds = min(len(curve.initial_losses), len(baseline.initial_losses))
    value = best_loss(baseline.means(seeds)) - best_loss(curve.means(seeds))
    return estimate(value, best_loss(baseline.resampled_means(seeds)) - best_loss(curve.resampled_means(seeds)), seeds)


def estimate(value: Floats, resampled: Floats, seeds: int) -> Estimate:
    """The value and the percentile interval of its resampled values `[draws]`."""
    if seeds < 2:
        return Estimate(float(value))
    low, high = np.quantile(resampled, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Estimate(float(value), float(low), float(high))
