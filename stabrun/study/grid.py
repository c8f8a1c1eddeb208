"""Statistics of a grid of learning rates: LR sensitivity, best rate and best loss, with intervals; no torch.

Losses are final training losses, `[rates, seeds]`, in nats. The k-th seed is the same for every rate and variant.
Intervals therefore come from a bootstrap over whole seeds. A statistic takes the mean losses by rate: `[rates]`, or
`[rates, draws]` for resampled seeds.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from stabrun.record.schema import Estimate
from stabrun.study.frontier import TAIL, Floats

DRAWS = 2000


@dataclass(frozen=True)
class LrCurve:
    """Loss by learning rate: `rates` `[rates]`, `losses` `[rates, seeds]`, `initial_losses` `[seeds]`."""

    rates: Floats
    losses: Floats
    initial_losses: Floats

    def capped(self) -> Floats:
        """min(ℓ, ℓ₀), `[rates, seeds]`: a loss above the initial one, or NaN, counts as the initial one."""
        return np.fmin(self.losses, self.initial_losses)

    def means(self) -> Floats:
        """Mean over seeds of the capped losses, `[rates]`."""
        return self.capped().mean(axis=1)


def lr_sensitivity(means: Floats) -> Floats:
    """Mean over rates of min(ℓ(η), ℓ₀) − ℓ*, with ℓ* the lowest over the rates (arXiv 2309.14322, section 2.2).

    ℓ(η) is the mean over seeds, each capped at its own ℓ₀.
    """
    return (means - means.min(axis=0)).mean(axis=0)


def best_loss(means: Floats) -> Floats:
    return means.min(axis=0)


def best_rate(curve: LrCurve) -> float:
    return float(curve.rates[curve.means().argmin()])


def gain(means: Floats, baseline: Floats) -> Floats:
    """The baseline's best loss minus the variant's, in nats."""
    return best_loss(baseline) - best_loss(means)


def estimate(statistic: Callable[..., Floats], *curves: LrCurve) -> Estimate:
    """A statistic of the curves' means over the seeds that all have, and its percentile interval.

    Each draw takes the same seeds of all curves.
    """
    seeds = min(len(curve.initial_losses) for curve in curves)
    losses = [curve.capped()[:, :seeds] for curve in curves]
    value = float(statistic(*(part.mean(axis=1) for part in losses)))
    if seeds < 2:
        return Estimate(value=value, low=None, high=None)
    draws = np.random.default_rng(0).integers(0, seeds, (DRAWS, seeds))
    resampled = statistic(*(part[:, draws].mean(axis=2) for part in losses))
    low, high = np.quantile(resampled, [TAIL, 1 - TAIL])
    return Estimate(value=value, low=float(low), high=float(high))
