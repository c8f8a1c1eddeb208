"""Which way a loss is going: rank tests that no outlier and no unit affects.

By normal approximation, because importing scipy.stats would double the time that `stabrun judge` takes to start.
"""

import numpy as np

from stabrun.verdict.chart import Floats

RISING, FLAT, FALLING = "rising", "flat", "falling"
SIGNIFICANT = 3.0  # standard deviations of a test statistic; a flat loss with independent noise rarely exceeds them
BLOCK = 5  # rows whose lower quartile is one value, see `direction`


def direction(losses: Floats) -> str:
    """The direction of losses `[n]`: Spearman's rank correlation with their order.

    Tried on the rows, then on the lower quartiles of blocks of rows: where batches alternate between easy and hard
    ones, their difference hides the direction.
    """
    blocks = losses[len(losses) % BLOCK :].reshape(-1, BLOCK)
    for values in (losses, np.quantile(blocks, 0.25, axis=1) if len(blocks) else losses):
        trend = correlation(values) * max(0, len(values) - 1) ** 0.5
        if abs(trend) > SIGNIFICANT:
            return RISING if trend > 0 else FALLING
    return FLAT


def correlation(values: Floats) -> float:
    """Spearman's rank correlation of values `[n]` with their order; 0 if all are equal."""
    if len(values) < 2 or np.ptp(values) == 0:
        return 0.0
    return float(np.corrcoef(ranks(values), np.arange(len(values)))[0, 1])


def is_lower(first: Floats, last: Floats) -> bool:
    """Whether losses `last` are lower than the losses `first`, by the rank sum (Wilcoxon, Mann and Whitney)."""
    m, n = len(first), len(last)
    excess = float(ranks(np.concatenate([first, last]))[:m].sum()) - m * (m + n + 1) / 2
    return excess > SIGNIFICANT * (m * n * (m + n + 1) / 12) ** 0.5


def ranks(values: Floats) -> Floats:
    """The ranks of values `[n]` from 1 to n; equal ones share the mean of theirs."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[inverse]
