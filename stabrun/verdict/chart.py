"""Control charts on a loss: its trailing level above the lowest level so far, in units of its own noise.

Nothing here knows nats: a loss that is scaled or shifted gives the same chart. Arrays are over rows of the record.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
LEAST_WINDOW, WINDOW_SHARE = 20, 0.05  # of best_loss and final_loss too: 5 % of the rows, at least 20
NORMAL_MAD = 1.4826  # standard deviation of a normal variable over its median absolute deviation
NORMAL_QUARTILE = 3.1383  # standard deviation of a normal variable over the lower quartile of its absolute deviation
NORMAL_MEAN = 1.2533  # and over its mean absolute deviation
LATER, LEAST_SHARE = 3.0, 0.1  # of what is learned after the first rows, and of all that is learned: see `first_level`
BACK = 0.5  # a rise is over when half of what raised the alarm is left
CREEPING = (
    2.0  # windows that a rise takes from half of the threshold to the whole: a step or a ramp takes less than one
)


@dataclass(frozen=True)
class Strictness:
    """How large a rise of the level must be: a share of what was learned so far, and a number of standard errors."""

    share: float
    sigmas: float


@dataclass(frozen=True)
class Level:
    """The chart: entry i of each array belongs to the window that ends at row `i + window − 1`."""

    window: int
    means: Floats
    floor: Floats  # the lowest mean so far
    init: float  # the loss before learning, in the measure of `first_level`
    noise: Floats  # standard deviation of a row's loss when the level stood at its floor
    error: Floats  # standard error of a window's mean there, its colour reckoned with
    threshold: Floats

    @property
    def excess(self) -> Floats:
        return self.means - self.floor

    def rises(self) -> list[tuple[int, int]]:
        """[first row, row after the last) of each stretch above the threshold, until half of it is left."""
        excess = self.excess
        mark = np.where(excess > self.threshold, 1, np.where(excess < BACK * self.threshold, 0, -1))
        told = np.maximum.accumulate(np.where(mark >= 0, np.arange(len(mark)), 0))
        up = mark[told] == 1
        edges = np.flatnonzero(np.diff(np.concatenate([[False], up, [False]])))
        ends = [edge + self.window - 1 for edge in edges.tolist()]
        return list(zip(ends[::2], ends[1::2], strict=True))

    def creeps(self, row: int) -> bool:
        """Whether the rise at `row` took longer from half of the threshold to the whole than any step would."""
        index = row - self.window + 1
        low = np.flatnonzero(self.excess[: index + 1] < BACK * self.threshold[: index + 1])
        return len(low) > 0 and index - int(low[-1]) > CREEPING * self.window

    def lowest_before(self, row: int) -> int:
        """The last row before `row` at which the level stood at its floor."""
        until = self.means[: row - self.window + 2]
        return int(np.flatnonzero(until <= self.floor[: len(until)])[-1]) + self.window - 1


def window_of(count: int) -> int:
    """Rows in a window of a record of `count`."""
    return max(LEAST_WINDOW, round(WINDOW_SHARE * count))


def level(losses: Floats, window: int, strictness: Strictness) -> Level:
    """The chart of finite losses `[n]`, n ≥ 2 × window.

    A rise counts when it exceeds a share of what was learned (the first loss less the floor) and so many standard
    errors. The error is taken from rows up to the floor, so that no later rise can hide itself in its own noise.
    """
    means = trailing_means(losses, window)
    floor = np.minimum.accumulate(means)
    init = first_level(losses, float(floor[-1]))
    at_floor = np.maximum.accumulate(np.where(means <= floor, np.arange(len(means)), 0))
    spread = noise(losses, 2 * window)[at_floor + window - 1]
    error = spread * colour(losses[: int(np.argmin(means)) + window], window) / window**0.5
    learned = np.maximum(0.0, init - floor)
    smallest = 1e-9 * float(np.abs(losses).max())  # below it a difference is rounding
    threshold = np.maximum(np.maximum(strictness.share * learned, strictness.sigmas * error), smallest)
    return Level(window, means, floor, init, spread, error, threshold)


@np.errstate(over="ignore", invalid="ignore")
def noise(losses: Floats, span: int) -> Floats:
    """Standard deviation of a series around its trend, over the `span` rows up to each row: `[n, …]` → `[n, …]`.

    From second differences, which no straight trend touches; the first values repeat the first that can be had.
    """
    jumps = np.abs(np.diff(losses, 2, axis=0)) * NORMAL_MEAN / 6**0.5
    trailing = trailing_means(jumps, min(span, len(jumps)))
    return np.concatenate([np.repeat(trailing[:1], len(losses) - len(trailing), axis=0), trailing])


def first_level(losses: Floats, floor: float) -> float:
    """The loss before learning: the median of five rows, or less where these lie far above all that follow.

    An initialisation that begins at hundreds of nats loses them in a few steps, and a share of those would hide any
    rise. So no more counts than what is learned after the first rows and a few times that, or a tenth of all.
    """
    first, early = float(np.median(losses[:5])), float(np.median(losses[LEAST_WINDOW : 2 * LEAST_WINDOW]))
    later = early + LATER * max(0.0, early - floor)
    return min(first, max(later, floor + LEAST_SHARE * (first - floor)))


def colour(losses: Floats, window: int) -> float:
    """How much larger the error of a window's mean is than white noise would make it: at least 1.

    The variance of a mean over white noise's, at a quarter and at half of a window, carried on to the whole: linearly,
    as that of noise with a long memory grows. `losses` end at the lowest level.
    """
    white = float(np.median(noise(losses, 2 * window)))
    half, quarter = (excess_variance(losses, white, window // parts) for parts in (2, 4))
    return max(1.0, half + 2 * max(0.0, half - quarter)) ** 0.5


def excess_variance(losses: Floats, white: float, width: int) -> float:
    """Variance of a mean of `width` rows over that of white noise of spread `white`; 1 where there are too few rows.

    Third differences of neighbouring means, which a bent trend hardly touches; their lower quartile, because a rise
    that came back disturbs eight widths of them.
    """
    if white == 0 or len(losses) < 6 * width:
        return 1.0
    means = trailing_means(losses, width)
    first, second, third, fourth = (means[start : len(means) - 3 * width + start] for start in np.arange(4) * width)
    differences = np.abs(fourth - 3 * third + 3 * second - first) / 20**0.5
    return float(NORMAL_QUARTILE * np.quantile(differences, 0.25) / white) ** 2 * width


@np.errstate(over="ignore", invalid="ignore")  # a sum of huge finite losses is infinite, and stands as such
def trailing_means(values: Floats, window: int) -> Floats:
    """Mean of each `window` values in a row: `[n, …]` → `[n − window + 1, …]`.

    A window is put together from sums over powers of two, which only add: a difference of cumulative sums would
    forget all that comes after one huge value.
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
