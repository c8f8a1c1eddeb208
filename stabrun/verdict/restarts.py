"""Restarts: a schedule that begins again, or a loss that begins again from its first level."""

import numpy as np

from stabrun.verdict.chart import LEAST_ROWS, LEAST_WINDOW, Floats, trailing_medians

CHANGED = 0.1  # least change of a learning rate, down and up again, relative to the rate
NEAR = 0.25  # of the fall: a loss that begins again is as near to the first level, and later to the one before


def schedule_restarts(rates: Floats) -> list[int]:
    """Rows at which a learning rate `[n]` that was lowered is raised again. NaN where no rate is recorded."""
    found, highest, last = list[int](), -np.inf, np.inf
    for row in np.flatnonzero(np.isfinite(rates) & (np.diff(rates, prepend=np.nan) != 0)).tolist():
        rate = float(rates[row])
        if last < (1 - CHANGED) * highest and rate > (1 + CHANGED) * last:
            found.append(row)
            highest = rate
        highest, last = max(highest, rate), rate
    return found


def whole_restarts(losses: Floats) -> list[int]:
    """Rows at which finite losses `[n]` return to the first one and repeat its fall, down to the loss before."""
    found, lowest = list[int](), np.minimum.accumulate(losses)
    up = losses[1:] >= (1 - NEAR) * losses[:1] + NEAR * lowest[:-1]
    for row in (np.flatnonzero(up & (np.diff(losses) > 0)) + 1).tolist():
        before = float(np.median(losses[max(0, row - LEAST_WINDOW) : row]))
        half = int(np.argmax(losses[:row] < (losses[0] + before) / 2))
        rows = max(LEAST_ROWS, 2 * half)
        if half == 0 or row < (found[-1] if found else 0) + rows or row + rows > len(losses):
            continue
        first, again = losses[:rows], losses[row : row + rows]
        if again[0] - before < (1 - NEAR) * (first[0] - before):
            continue
        if np.median(np.abs(again - first)) > NEAR * np.median(np.abs(again - before)):
            continue
        if trailing_medians(losses[row:], LEAST_WINDOW).min() - before < NEAR * (first[0] - before):
            found.append(row)
    return found
