"""Spikes of a loss: their number, steps and heights. They do not affect the verdict."""

from collections.abc import Callable
from typing import Any

import numpy as np
from scipy.ndimage import median_filter

from stabrun.verdict.chart import Floats, noise, trailing_means

SIGMAS = 7.0  # standard deviations above the mean of the rows before, as in OLMo 2's score (arXiv 2501.00656)
BEFORE = 20  # rows before a row whose mean it is compared with
APART = 5  # rows between two spikes; closer ones count as one
LISTED = 100  # the highest are listed
SCORE_ROWS = 1000  # see `spike_score`
RATE_ROWS, RATE_RISE = 201, 0.1  # see `spike_rate`


def spikes(losses: Floats, step: Callable[[int], float]) -> dict[str, Any] | None:
    """The spikes of finite losses `[n]`; `step` gives the step of a row. None if there are too few rows.

    `count`; `list`: the highest in order of their step, each [step, height above the mean of the rows before]; `score`
    and `rate`: see `spike_score` and `spike_rate`.
    """
    if len(losses) <= 2 * BEFORE:
        return None
    before = trailing_means(losses, BEFORE)[:-1]
    height = losses[BEFORE:] - before
    high = np.flatnonzero(height > SIGMAS * noise(losses, 2 * BEFORE)[BEFORE - 1 : -1])
    groups = np.split(high, np.flatnonzero(np.diff(high) > APART) + 1) if len(high) else []
    peaks = [(int(group[0]) + BEFORE, float(height[group].max())) for group in groups]
    largest = sorted(sorted(peaks, key=lambda spike: -spike[1])[:LISTED])
    return {
        "count": len(peaks),
        "list": [[step(row), round(size, 6)] for row, size in largest],
        "score": spike_score(losses),
        "rate": spike_rate(losses),
    }


def spike_score(losses: Floats) -> float | None:
    """Percentage of rows at least 7 standard deviations above the mean of the 1000 before (OLMo 2, arXiv 2501.00656).

    None if the record is too short.
    """
    if len(losses) < 2 * SCORE_ROWS:
        return None
    centered = losses - np.median(losses)
    mean = trailing_means(centered, SCORE_ROWS)[:-1]
    variance = trailing_means(centered**2, SCORE_ROWS)[:-1] - mean**2
    return 100 * float(np.mean(centered[SCORE_ROWS:] >= mean + SIGMAS * np.sqrt(np.maximum(variance, 0.0))))


def spike_rate(losses: Floats) -> float | None:
    """Rows per 10,000 that are above the median of the last 201, including themselves, plus 0.1 (arXiv 2608.30320).

    None if the record is too short.
    """
    if len(losses) < RATE_ROWS:
        return None
    median = median_filter(losses, RATE_ROWS, mode="nearest", origin=RATE_ROWS // 2)
    return 1e4 * float(np.mean((losses > median + RATE_RISE)[RATE_ROWS - 1 :]))
