"""Restarts: a schedule that begins again, or a loss that begins again from its first level."""

import numpy as np
from numpy.typing import NDArray

from stabrun.verdict.chart import LEAST_ROWS, LEAST_WINDOW, Floats, trailing_medians

Ints = NDArray[np.int64]
PART = 2_000_000  # losses that are compared at a time, to limit memory
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
    if len(losses) < 2 * LEAST_ROWS:
        return []
    lowest, found = np.minimum.accumulate(losses), list[int]()
    up = (losses[1:] >= (1 - NEAR) * losses[0] + NEAR * lowest[:-1]) & (np.diff(losses) > 0)
    candidates = np.flatnonzero(up) + 1
    candidates = candidates[candidates >= LEAST_ROWS]
    befores = trailing_medians(losses, LEAST_WINDOW)[candidates - LEAST_WINDOW]
    halves = np.searchsorted(-lowest, -(losses[0] + befores) / 2, side="right")  # first rows of less than half the fall
    jumped = losses[candidates] - befores >= (1 - NEAR) * (losses[0] - befores)
    rows = np.maximum(LEAST_ROWS, 2 * halves)
    possible = jumped & (halves > 0) & (halves < candidates) & (candidates + rows <= len(losses))
    candidates, befores, rows = candidates[possible], befores[possible], rows[possible]
    for each in np.flatnonzero(resembles(losses, candidates, befores, rows)).tolist():
        row, before = int(candidates[each]), befores[each]
        if row < (found[-1] if found else 0) + rows[each]:
            continue
        if trailing_medians(losses[row:], LEAST_WINDOW).min() - before < NEAR * (losses[0] - before):
            found.append(row)
    return found


def resembles(losses: Floats, candidates: Ints, befores: Floats, rows: Ints) -> NDArray[np.bool_]:
    """Whether the losses from each candidate row on are nearer to as many first ones than to the loss before.

    Candidates with the same number of rows are compared together: a loss that does not fall has one at every few rows.
    """
    near = np.zeros(len(candidates), dtype=bool)
    for count in np.unique(rows).tolist():
        same = np.flatnonzero(rows == count)
        windows = np.lib.stride_tricks.sliding_window_view(losses, count)
        for part in np.array_split(same, len(same) * count // PART + 1):
            again = windows[candidates[part]]
            to_first = np.median(np.abs(again - losses[:count]), axis=1)
            to_before = np.median(np.abs(again - befores[part][:, None]), axis=1)
            near[part] = to_first <= NEAR * to_before
    return near
