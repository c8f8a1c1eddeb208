"""The rule: what became of a loss, by where it stands and which way it goes. `docs/verdict.md` explains it.

Rows are counted from 0. Every function is pure; the record is folded in `judge.py`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import numpy as np

from stabrun.verdict.chart import BACK, LEAST_ROWS, NORMAL_MAD, Floats, Level, Strictness, window_of
from stabrun.verdict.direction import FALLING, RISING, SIGNIFICANT, direction, is_lower
from stabrun.verdict.restarts import schedule_restarts, whole_restarts

CONVERGED, RECOVERED, DIVERGED, UNDECIDED = "converged", "recovered", "diverged", "undecided"
STRICTNESS = {
    "lenient": Strictness(share=0.1, sigmas=5.5),
    "standard": Strictness(share=0.05, sigmas=4.5),
    "strict": Strictness(share=0.025, sigmas=3.5),
}
STANDARD, STRICT = "standard", "strict"
SLOW = 4  # windows in the window of the second chart, which detects slow rises that noise hides from the first
TWICE = 2.0  # times the first loss, from which on a loss is compared with its start on a logarithmic scale
ABOVE = 1 / 3  # of the rows above the first loss: such a run has at best recovered
OVERSHOOT = 0.1  # a rise that ends before this share is learned belongs to the warmup
RETURNING = 0.2  # of the rise that was left: a run that lost this share in the last half of its rise is coming back
VALIDATED = 3  # validations that show a direction of their own


@dataclass(frozen=True)
class Decision:
    """A verdict and its reason; the row at which the loss rose, and the last one at its lowest level before."""

    verdict: str
    reason: str
    since: int | None = None
    low: int = 0


@dataclass(frozen=True)
class Curve:
    """Finite losses `[n]` and learning rates `[n]` (NaN if not recorded), and validations: (row, loss).

    If several runs follow each other, only the last is judged, and zeros at the beginning are not: `origin` is the
    first row that is judged, from which other rows are counted.
    """

    all_losses: Floats
    rates: Floats
    all_validations: Sequence[tuple[int, float]] = ()

    @cached_property
    def begins(self) -> list[int]:
        return whole_restarts(self.all_losses)

    @cached_property
    def origin(self) -> int:
        return max((row for row in self.begins if len(self.all_losses) - row >= LEAST_ROWS), default=self.zeros)

    @cached_property
    def zeros(self) -> int:
        """Rows of zero at the beginning, unless all are: no loss, or one that does not start from ignorance."""
        return int(np.argmax(self.all_losses != 0)) if len(self.all_losses) else 0

    @cached_property
    def schedule_restarts(self) -> list[int]:
        return schedule_restarts(self.rates[self.origin :])

    @property
    def losses(self) -> Floats:
        return self.all_losses[self.origin :]

    @property
    def validations(self) -> list[tuple[int, float]]:
        return [(row - self.origin, loss) for row, loss in self.all_validations if row >= self.origin]

    @property
    def start(self) -> float:
        """The loss before learning."""
        return float(self.losses[0])

    @cached_property
    def charts(self) -> list[Level]:
        """The chart, and a slower one if there are enough rows."""
        count = len(self.losses)
        window = min(window_of(count), count)
        windows = [window, SLOW * window | 1] if count >= 2 * SLOW * window else [window]
        return [Level(self.losses, each, self.start) for each in windows]

    @property
    def level(self) -> float:
        """The last level."""
        return float(self.charts[0].levels[-1])

    @cached_property
    def above(self) -> float:
        """Share of the rows above the start."""
        return float(np.mean(self.losses > self.start))

    def lasting_rises(self, strictness: Strictness) -> list[tuple[Level, int]]:
        """The charts in which the level has risen and not come back, with the first row of the rise.

        The slow chart is still raised when the loss is back, so the short one must be raised as well.
        """
        now, found = self.charts[0].excess[-1], list[tuple[Level, int]]()
        for chart in self.charts:
            rises = chart.rises(strictness)
            if rises and rises[-1][1] == len(self.losses) and now > BACK * chart.threshold(strictness)[-1]:
                found.append((chart, rises[-1][0]))
        return found

    @cached_property
    def lasting(self) -> tuple[int, int] | None:
        """(first row, last row at the lowest level before) of the rise that lasts, by the strictest chart."""
        risen = [(start, chart.lowest_before(start)) for chart, start in self.lasting_rises(STRICTNESS[STRICT])]
        return min(risen, default=None)

    @cached_property
    def excuse(self) -> str | None:
        """Why the rise that lasts is not a divergence.

        `coming_back`: the loss falls in the last half of the rise, or since the highest level of one that is shorter
        than four windows, by a share of what was left of it. `restarted`: the schedule began again as the loss rose,
        and the loss does not rise further. Neither excuses a run that is above its start, or was for long.
        """
        if self.lasting is None or self.above > ABOVE or self.level > self.start:
            return None
        since, low = self.lasting
        chart, count = self.charts[0], len(self.losses)
        if count - since < 4 * chart.window:
            highest = int(np.argmax(chart.levels[max(0, since - chart.window + 1) :]))
            begin = max(since, since + highest - chart.window // 2)
        else:
            begin = (since + count) // 2
        level = chart.levels[min(begin, len(chart.levels) - 1)]  # of the window that begins there
        fallen = level - self.level > RETURNING * (level - chart.floor[-1])
        if fallen and direction(self.losses[begin:]) == FALLING:
            return "coming_back"
        restarted = any(low - chart.window < row <= since for row in self.schedule_restarts)
        return "restarted" if restarted and direction(self.losses[since:]) != RISING else None

    def objective_changed(self, since: int, low: int) -> bool:
        """Whether the validation loss fell from row `low` to the end, though the training loss rose at row `since`."""
        later = [loss for row, loss in self.validations if row >= low]
        before = [loss for row, loss in self.validations if row < since]
        return len(later) >= VALIDATED and later[-1] == min(later) and later[-1] < min(before or later[:1])

    @cached_property
    def rising(self) -> bool:
        """Whether a run that has not learned gets worse: by its losses, or by each validation."""
        losses = [loss for _, loss in self.validations]
        worse = len(losses) >= VALIDATED and all(later > loss for loss, later in pairwise(losses))
        return worse or direction(self.losses) == RISING

    def back(self, since: int) -> int:
        """The row at which the level is back at its lowest before row `since`; the number of rows if it is not."""
        chart = self.charts[0]
        index = max(0, since - chart.window + 1)
        before = chart.floor[index - 1] if index else self.losses[: max(1, since)].min()
        found = np.flatnonzero(chart.levels[index:] <= before)
        return index + int(found[0]) + chart.window - 1 if len(found) else len(self.losses)


def decide(curve: Curve, strictness: Strictness) -> Decision:
    """The verdict on a curve, with rows counted from its origin."""
    if len(curve.losses) < LEAST_ROWS:
        return Decision(UNDECIDED, "too_short")
    chart = curve.charts[0]
    if (since := above_start(curve, strictness)) is not None:
        low = max(0, since - 1)
        if curve.objective_changed(since, low):
            return Decision(UNDECIDED, "objective_changed", since, low)
        around_zero = curve.zeros or min(curve.start, chart.floor[-1]) <= 0  # of a policy: its start says nothing
        verdict, reason = (UNDECIDED, "around_zero") if around_zero else (DIVERGED, "above_start")
        return Decision(verdict, reason, since, low)
    if lasting := curve.lasting_rises(strictness):
        return risen(curve, strictness, lasting)
    if not has_learned(chart, strictness):
        return Decision(UNDECIDED, "rising" if curve.rising else "no_learning")
    if climbed(chart, strictness):
        return Decision(UNDECIDED, "rising")
    rises = [start for start, _ in chart.rises(strictness) if not is_overshoot(chart, start)]
    if curve.above > ABOVE:
        if chart.start - chart.floor[-1] < strictness.share * abs(chart.start):
            return Decision(UNDECIDED, "no_learning")
        since = int(np.argmax(chart.losses > chart.start))
        return Decision(RECOVERED, "came_back", since, since - 1)
    if rises:
        return Decision(RECOVERED, "came_back", rises[0], chart.lowest_before(rises[0]))
    return Decision(CONVERGED, "fell")


def risen(curve: Curve, strictness: Strictness, lasting: list[tuple[Level, int]]) -> Decision:
    """The verdict on a curve whose level is above its lowest one at the end."""
    count, window = len(curve.losses), curve.charts[0].window
    chart, since = next((each for each in lasting if count - each[1] >= window), lasting[0])
    low = chart.lowest_before(since)
    if not has_learned(curve.charts[0], strictness) and not far_above(chart):
        return Decision(UNDECIDED, "rising" if curve.rising else "no_learning", since, low)
    if curve.objective_changed(*(curve.lasting or (since, low))):
        return Decision(UNDECIDED, "objective_changed", since, low)
    if curve.excuse:
        return Decision(UNDECIDED, curve.excuse, since, low)
    if count - since < window:
        return Decision(UNDECIDED, "rising", since, low)
    return Decision(DIVERGED, "creep" if chart.creeps(since, strictness) else "runaway", since, low)


def went_nonfinite(curve: Curve, strictness: Strictness, row: int, reason: str) -> Decision:
    """The divergence of a curve with a value that is not finite at `row`. It began where the losses before rose."""
    decision, losses, row = decide(curve, strictness), curve.losses, row - curve.origin
    if decision.verdict != RECOVERED and decision.since is not None and decision.since < row:
        return Decision(DIVERGED, reason, decision.since, decision.low)
    if len(losses) and losses[-1] > curve.start:
        since = int(np.flatnonzero(losses <= curve.start)[-1]) + 1
        return Decision(DIVERGED, reason, since, since - 1)
    return Decision(DIVERGED, reason, row, max(0, row - 1))


def above_start(curve: Curve, strictness: Strictness) -> int | None:
    """The first row above the start for good, if the level is above it in the whole second half, and clearly so."""
    chart = curve.charts[0]
    if not (chart.levels[-(len(chart.losses) // 2) :] > chart.start).all() or not clearly_above(chart, strictness):
        return None
    low = np.flatnonzero(chart.levels <= chart.start)
    return int(low[-1]) + chart.window if len(low) else int(np.argmax(chart.losses > chart.start))


def clearly_above(chart: Level, strictness: Strictness) -> bool:
    """Whether the last level is above the start, the loss of one row, by more than the noise of rows explains.

    Or so on a logarithmic scale: far above its start, a loss is noisier in proportion.
    """
    level, start, second = chart.levels[-1], chart.start, chart.losses[len(chart.losses) // 2 :]
    least = max(SIGNIFICANT * spread(second), strictness.sigmas * float(chart.error[-1]))
    if level - start > least or min(start, second.min()) <= 0:
        return bool(level - start > least)
    return bool(np.log(level / start) > max(np.log(TWICE), SIGNIFICANT * spread(np.log(second))))


def far_above(chart: Level) -> bool:
    """Whether the last level is above the start by more than the noise of a row before the rise explains."""
    return bool(chart.levels[-1] - chart.start > SIGNIFICANT * chart.spread[int(np.argmin(chart.levels))])


def spread(losses: Floats) -> float:
    """Standard deviation of losses `[n]` around their median, by their median absolute deviation."""
    return NORMAL_MAD * float(np.median(np.abs(losses - np.median(losses))))


def climbed(chart: Level, strictness: Strictness) -> bool:
    """Whether the loss rose since its lowest level by the least share, though noise hides this from the charts."""
    if chart.excess[-1] <= strictness.share * chart.learned[-1]:
        return False
    return direction(chart.losses[int(np.argmin(chart.levels)) :]) == RISING


def is_overshoot(chart: Level, row: int) -> bool:
    """Whether the rise at `row` came before the run had learned a share of OVERSHOOT: it belongs to the warmup."""
    fall = chart.start - chart.floor
    return bool(fall[row - chart.window + 1] < OVERSHOOT * fall[-1])


def has_learned(chart: Level, strictness: Strictness) -> bool:
    """Whether the loss fell by more than noise explains: from its first row, its first level or its first quarter."""
    losses, low = chart.losses, int(np.argmin(chart.levels))
    first, last = losses[: len(losses) // 4], losses[len(losses) // 2 :]
    return bool(
        chart.start - chart.floor[-1] > SIGNIFICANT * np.hypot(chart.spread[0], chart.spread[low])
        or chart.levels[0] - chart.floor[-1] > strictness.sigmas * chart.error[low]
        or is_lower(first, last)
        or is_lower(first[: chart.window], last)
    )
