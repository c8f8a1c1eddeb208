"""Control charts of a loss: its trailing median relative to the lowest one so far, compared with its own noise.

No constant is in nats, so scaling the loss does not change the chart. Arrays are over rows of the record.
"""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import median_filter

Floats = NDArray[np.float64]
LEAST_WINDOW, WINDOW_SHARE = 5, 0.05  # 5 % of the rows, at least 5; also for best_loss and final_loss
LEAST_ROWS = 4 * LEAST_WINDOW  # of a record that has a verdict
NORMAL_MAD = 1.4826  # standard deviation of a normal variable over its median absolute deviation
NORMAL_QUARTILE = 3.1383  # standard deviation of a normal variable over the lower quartile of its absolute deviation
NORMAL_MEAN = 1.2533  # standard deviation of a normal variable over its mean absolute deviation
NORMAL_MEDIAN = 1.2533  # standard error of a median over that of a mean, of normal variables
LATER, LEAST_SHARE = 3.0, 0.1  # see `Level.learned`
NOISIER = 2.0  # times the noise at the floor; a loss with more noise than this is not excused by it
BACK = 0.5  # a rise ends below this share of the threshold
CREEPING = 2  # windows from half of the threshold to the threshold; a jump or a steep rise takes less


@dataclass(frozen=True)
class Strictness:
    """The minimum rise of the level: a share of what was learned so far, and a number of standard errors."""

    share: float
    sigmas: float


@dataclass(frozen=True)
class Level:
    """The chart of finite losses `[n]`, n ≥ window. Entry i of an array belongs to the window that ends at row
    `i + window − 1`. `start` is the loss before learning.
    """

    losses: Floats
    window: int
    start: float

    @cached_property
    def levels(self) -> Floats:
        """The median of each window."""
        return trailing_medians(self.losses, self.window)

    @cached_property
    def floor(self) -> Floats:
        """The lowest level so far."""
        return np.minimum.accumulate(self.levels)

    @property
    def excess(self) -> Floats:
        return self.levels - self.floor

    @cached_property
    def learned(self) -> Floats:
        """What was learned so far: the start minus the floor, limited.

        An initialization may start at hundreds of nats and lose them in a few steps. A share of those would hide any
        rise. They therefore count for at most LATER times what is left at the floor, or what was learned after the
        first window, whichever is more; but for at least LEAST_SHARE.
        """
        fall = np.maximum(0.0, self.start - self.floor)
        second = self.levels[min(self.window, len(self.levels) - 1)]
        left = np.maximum(np.abs(self.floor), second - self.floor)
        return np.maximum(LEAST_SHARE * fall, np.minimum(fall, LATER * left))

    @cached_property
    def spread(self) -> Floats:
        """Standard deviation of a row's loss around its trend, over the two windows up to each row."""
        jumps = NORMAL_MAD * np.abs(np.diff(self.losses, 2)) / 6**0.5
        trailing = trailing_medians(jumps, min(2 * self.window + 1, len(jumps)))
        digit = np.abs(np.diff(self.losses))  # of losses that were rounded: most jumps may be zero
        trailing = np.maximum(trailing, digit[digit > 0].min(initial=np.inf) / 12**0.5 if digit.any() else 0.0)
        return np.concatenate([np.full(len(self.levels) - len(trailing), trailing[0]), trailing])[-len(self.levels) :]

    @cached_property
    def error(self) -> Floats:
        """Standard error of the excess: of the median of a window now, and of one at the floor."""
        at_floor = np.maximum.accumulate(np.where(self.levels <= self.floor, np.arange(len(self.levels)), 0))
        then = self.spread[at_floor]
        both = np.hypot(np.minimum(self.spread, NOISIER * then), then)
        until_lowest = self.losses[: int(np.argmin(self.levels)) + self.window]
        return NORMAL_MEDIAN * both * autocorrelation_factor(until_lowest, self.window) / self.window**0.5

    def threshold(self, strictness: Strictness) -> Floats:
        """The excess above which the level has risen. Below 1e-9 of the largest loss are rounding errors."""
        smallest = 1e-9 * float(np.abs(self.losses).max())
        return np.maximum(np.maximum(strictness.share * self.learned, strictness.sigmas * self.error), smallest)

    def rises(self, strictness: Strictness) -> list[tuple[int, int]]:
        """[first row, row after the last) of each rise: from above the threshold until below BACK of it."""
        excess, threshold = self.excess, self.threshold(strictness)
        mark = np.where(excess > threshold, 1, np.where(excess < BACK * threshold, 0, -1))
        last_mark = np.maximum.accumulate(np.where(mark >= 0, np.arange(len(mark)), 0))
        up = mark[last_mark] == 1
        edges = np.flatnonzero(np.diff(np.concatenate([[False], up, [False]])))
        ends = [edge + self.window - 1 for edge in edges.tolist()]
        return list(zip(ends[::2], ends[1::2], strict=True))

    def creeps(self, row: int, strictness: Strictness) -> bool:
        """Whether the rise at `row` took more than CREEPING windows from half of the threshold to the threshold."""
        index = row - self.window + 1
        low = np.flatnonzero((self.excess < BACK * self.threshold(strictness))[: index + 1])
        return len(low) > 0 and index - int(low[-1]) > CREEPING * self.window

    def lowest_before(self, row: int) -> int:
        """The last row before `row` at which the level was at its floor."""
        until = max(1, row - self.window + 2)
        return int(np.flatnonzero(self.levels[:until] <= self.floor[:until])[-1]) + self.window - 1


def window_of(count: int) -> int:
    """Rows in a window of a record with `count` rows. The number is odd: its median is the loss of one row."""
    return max(LEAST_WINDOW, round(WINDOW_SHARE * count)) | 1


def trailing_medians(values: Floats, window: int) -> Floats:
    """Median of each `window` consecutive values: `[n]` → `[n − window + 1]`. Of an even number, the upper one."""
    return median_filter(values, window, mode="nearest", origin=(window - 1) // 2)[window - 1 :]


@np.errstate(over="ignore", invalid="ignore")
def noise(losses: Floats, span: int) -> Floats:
    """Standard deviation of a series around its trend, over the `span` rows up to each row: `[n, …]` → `[n, …]`.

    Computed from second differences, which are not affected by a linear trend. The first values repeat the first
    available one.
    """
    jumps = np.abs(np.diff(losses, 2, axis=0)) * NORMAL_MEAN / 6**0.5
    trailing = trailing_means(jumps, min(span, len(jumps)))
    return np.concatenate([np.repeat(trailing[:1], len(losses) - len(trailing), axis=0), trailing])


def autocorrelation_factor(losses: Floats, window: int) -> float:
    """Factor, at least 1, by which autocorrelation increases the standard error of a window's mean.

    The variance ratio at a quarter and at half of a window is extrapolated linearly to the whole window, as it grows
    for noise with a long correlation time. `losses` end at the lowest level.
    """
    white = float(np.median(noise(losses, 2 * window)))
    half, quarter = (excess_variance(losses, white, max(1, window // parts)) for parts in (2, 4))
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
