"""Statistics of a grid of learning rates: LR sensitivity, best rate, best loss and gain, with intervals; no torch.

Losses are final training losses, `[rates, seeds]`, in nats. The k-th seed is the same for every rate and variant.
An interval covers the statistic of the expected losses, by Student's t over seeds. A rate at which every seed diverged,
or none, is taken as one where every further seed would, or none. Coverage: `scripts/interval_coverage.py`.
"""

from dataclasses import dataclass

import numpy as np
from scipy.special import stdtrit

from stabrun.record.schema import Estimate
from stabrun.study.frontier import TAIL, Floats


@dataclass(frozen=True)
class LrCurve:
    """Loss by learning rate: `rates` `[rates]`, `losses` `[rates, seeds]`, `initial_losses` `[seeds]`."""

    rates: Floats
    losses: Floats
    initial_losses: Floats

    def capped(self) -> Floats:
        """min(ℓ, ℓ₀), `[rates, seeds]`: a loss above the initial one, or NaN, counts as the initial one."""
        return np.fmin(self.losses, self.initial_losses)

    def best_rate(self) -> float:
        """The rate with the lowest mean over seeds of the capped losses."""
        return float(self.rates[self.capped().mean(axis=1).argmin()])

    def best_losses(self, seeds: int | None = None) -> tuple[Floats, Floats]:
        """Losses of the first `seeds` at the best rate, and at the worst of those that may be the best: `[seeds]` each.

        The best rate was chosen for its noise too, so that its mean tends to be below the lowest expected loss. A rate
        may be the best if its mean is above by at most one standard error of their difference (the rule of Breiman et
        al., Classification and Regression Trees, 1984, for the choice of a model).
        """
        losses = self.capped()[:, :seeds]
        chosen = losses[losses.mean(axis=1).argmin()]
        if len(chosen) < 2:
            return chosen, chosen
        above = losses - chosen
        candidates = losses[above.mean(axis=1) <= above.std(axis=1, ddof=1) / len(chosen) ** 0.5]
        return chosen, candidates[candidates.mean(axis=1).argmax()]


def best_loss(curve: LrCurve) -> Estimate:
    """The lowest over the rates of the mean loss, in nats."""
    best, worst = curve.best_losses()
    return estimate(best[None], best[None], worst[None])


def lr_sensitivity(curve: LrCurve) -> Estimate | None:
    """Mean over rates of min(ℓ(η), ℓ₀) − ℓ*, with ℓ* the lowest over the rates (arXiv 2309.14322, section 2.2).

    ℓ(η) is the mean over seeds, each capped at its own ℓ₀. None for a single rate.
    """
    if len(curve.rates) < 2:
        return None
    above_best, above_worst = (curve.capped() - losses for losses in curve.best_losses())
    return estimate(above_best, above_worst, above_best)


def gain(curve: LrCurve, baseline: LrCurve) -> Estimate:
    """The baseline's best loss minus the variant's, in nats, over the seeds that both have."""
    seeds = min(len(curve.initial_losses), len(baseline.initial_losses))
    (best, worst), (base_best, base_worst) = (one.best_losses(seeds) for one in (curve, baseline))
    return estimate((base_best - best)[None], (base_best - worst)[None], (base_worst - best)[None])


def estimate(value: Floats, lower: Floats, upper: Floats) -> Estimate:
    """The mean of `value`, from the low end of the interval of the mean of `lower` to the high end of that of `upper`.

    Each is `[parts, seeds]`. The three differ where the best rate is uncertain.
    """
    middle = float(value.mean())
    if value.shape[1] < 2:
        return Estimate(value=middle, low=None, high=None)
    return Estimate(value=middle, low=float(lower.mean()) - margin(lower), high=float(upper.mean()) + margin(upper))


def margin(parts: Floats) -> float:
    """Half the width of Student's interval over seeds of the mean of `parts` `[parts, seeds]`.

    The variance is at least that of independent parts. Otherwise two seeds that diverged at one rate each, but not the
    same one, would have nearly equal means and hence a tiny interval.
    """
    count, seeds = parts.shape
    variance = max(parts.mean(axis=0).var(ddof=1), parts.var(axis=1, ddof=1).sum() / count**2)
    return float(stdtrit(seeds - 1, 1 - TAIL) * (variance / seeds) ** 0.5)
