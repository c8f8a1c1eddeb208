"""Control charts of a loss: its trailing mean relative to the lowest one so far, compared with its own noise.

No constant is in nats, so scaling or shifting the loss does not change the chart. Arrays are over rows of the record.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
LEAST_WINDOW, WINDOW_SHARE = 20, 0.05  # 5 % of the rows, at least 20; also for best_loss and final_loss
NORMAL_MAD = 1.4826  # standard deviation of a normal variable over its median absolute deviation
NORMAL_QUARTILE = 3.1383  # standard deviation of a normal variable over the lower quartile of its absolute deviation
NORMAL_MEAN = 1.2533  # standard deviation of a normal variable over its mean absolute deviation
LATER, LEAST_SHARE = 3.0, 0.1  # see `first_level`
BACK = 0.5  # a rise ends below this share of the threshold
CREEPING = 2.0  # windows from half of the threshold to the threshold; a step or a ramp takes less than one


@dataclass(frozen=True)
class Strictness:
    """The minimum rise of the level: a share of what was learned so far, and a number of standard errors."""

    share: float
    sigmas: float


@dataclass(frozen=True)
class Level:
    """A chart. Entry i of each array belongs to the window that ends at row `i + window − 1`."""

    window: int
    means: Floats
    floor: Floats  # the lowest mean so far
    init: float  # the loss before learning, from `first_level`
    noise: Floats  # standard deviation of a row's loss, when the level was last at its floor
    error: Floats  # standard error of a window's mean there, corrected for autocorrelation
    threshold: Floats

    @property
    def excess(self) -> Floats:
        return self.means - self.floor

    def rises(self) -> list[tuple[int, int]]:
        """[first row, row after the last) of each rise: from above the threshold until below BACK of it."""
        excess = self.excess
        mark = np.where(excess > self.threshold, 1, np.where(excess < BACK * self.threshold, 0, -1))
        last_mark = np.maximum.accumulate(np.where(mark >= 0, np.arange(len(mark)), 0))
        up = mark[last_mark] == 1
        edges = np.flatnonzero(np.diff(np.concatenate([[False], up, [False]])))
        ends = [edge + self.window - 1 for edge in edges.tolist()]
        return list(zip(ends[::2], ends[1::2], strict=True))

    def creeps(self, row: int) -> bool:
        """Whether the rise at `row` took more than CREEPING windows from half of the threshold to the threshold."""
        index = row - self.window + 1
        low = np.flatnonzero(self.excess[: index + 1] < BACK * self.threshold[: index + 1])
        return len(low) > 0 and index - int(low[-1]) > CREEPING * self.window

    def lowest_before(self, row: int) -> int:
        """The last row before `row` at which the level was at its floor."""
        until = self.means[: row - self.window + 2]
        return int(np.flatnonzero(until <= self.floor[: len(until)])[-1]) + self.window - 1


def window_of(count: int) -> int:
    """Rows in a window of a record with `count` rows."""
    return max(LEAST_WINDOW, round(WINDOW_SHARE * count))


def level(losses: Floats, window: int, strictness: Strictness) -> Level:
    """The chart of finite losses `[n]`, n ≥ 2 × window.

    A rise counts if it exceeds a share of what was learned (the first loss minus the floor) and a number of standard
    errors. The error is estimated from rows up to the floor, so that a later rise does not inflate it.
    """
    means = trailing_means(losses, window)
    floor = np.minimum.accumulate(means)
    init = first_level(losses, float(floor[-1]))
    at_floor = np.maximum.accumulate(np.where(means <= floor, np.arange(len(means)), 0))
    spread = noise(losses, 2 * window)[at_floor + window - 1]
    error = spread * autocorrelation_factor(losses[: int(np.argmin(means)) + window], window) / window**0.5
    learned = np.maximum(0.0, init - floor)
    smallest = 1e-9 * float(np.abs(losses).max())  # smaller differences are rounding errors
    threshold = np.maximum(np.maximum(strictness.share * learned, strictness.sigmas * error), smallest)
    return Level(window, means, floor, init, spread, error, threshold)


@np.errstate(over="ignore", invalid="ignore")
def noise(losses: Floats, span: int) -> Floats:
    """Standard deviation of a series around its trend, over the `span` rows up to each row: `[n, …]` → `[n, …]`.

    Computed from second differences, which are not affected by a linear trend. The first values repeat the first
    available one.
    """
    jumps = np.abs(np.diff(losses, 2, axis=0)) * NORMAL_MEAN / 6**0.5
    trailing = trailing_means(jumps, min(span, len(jumps)))
    return np.concatenate([np.repeat(trailing[:1], len(losses) - len(trailing), axis=0), trailing])


def first_level(losses: Floats, floor: float) -> float:
    """The loss before learning: the median of five rows, or less if these are far above all later ones.

    An initialization may start at hundreds of nats and lose them in a few steps. A share of those would hide any rise.
    The result is therefore at most the early level (rows 20 to 40) plus LATER times what is learned after it, but at
    least LEAST_SHARE of the whole fall above the floor.
    """
    first, early = float(np.median(losses[:5])), float(np.median(losses[LEAST_WINDOW : 2 * LEAST_WINDOW]))
    later = early + LATER * max(0.0, early - floor)
    return min(first, max(later, floor + LEAST_SHARE * (first - floor)))


def autocorrelation_factor(losses: Floats, window: int) -> float:
    """Factor, at least 1, by which autocorrelation increases the standard error of a window's mean.

    The variance ratio at a quarter and at half of a window is extrapolated linearly to the whole window, as it grows
    for noise with a long correlation time. `losses` end at the lowest level.
    """
    white = float(np.median(noise(losses, 2 * window)))
    half, quarter = (excess_variance(losses, white, window // parts) for parts in (2, 4))
    return max(1.0, half + 2 * max(0.0, half - quarter)) ** 0.5


def excess_variance(losses: Floats, white: float, width: int) -> float:
    """Variance of a mean of `width` rows relative to white noise of standard deviation `white`; 1 if rows are too few.

    Computed from third differences of neighboring means, which a curved trend hardly affects. The lower quartile is
    used, because a rise that came back disturbs eight widths of them.
    """
    if white == 0 or len(losses) < 6 * width:
        return 1.0
    means = trailing_means(losses, width)
    first, second, third, fourth = (means[start : len(means) - 3 * width + start] for start in np.arange(4) * width)
    differences = np.abs(fourth - 3 * third + 3 * second - first) / 20**0.5
    return float(NORMAL_QUARTILE * np.quantile(differences, 0.25) / white) ** 2 * width


@np.errstate(over="ignore", invalid="ignore")  # a sum of huge losses may be infinite
def trailing_means(values: Floats, window: int) -> Floats:
    """Mean of each `window` consecutive values: `[n, …]` → `[n − window + 1, …]`.

    Windows are composed of sums over powers of two. A difference of cumulative sums would lose all precision after one
    huge value.
    """
    count = len(values) - window + 1
    sums, width, start = np.asarray(values, dtype=float), 1, 0
    total = np.zeros_like(sums[:count])
    while width <= window:
        if window & width:
            total += sums[start : start + count]
            start += width
        sums = sums[:-width] + sums[width:]
        width *= 2
    return total / window
