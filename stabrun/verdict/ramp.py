"""What a learning-rate ramp shows: the rate from which on its loss stays above its lowest level, as a guess at lr50.

The rule was frozen before its error was measured: see `docs/ramp.md`. Rows are counted from 0.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Self

import numpy as np

from stabrun.record.jsonl import number
from stabrun.record.schema import Row
from stabrun.verdict.chart import LEAST_ROWS, Floats, Level, trailing_medians, window_of
from stabrun.verdict.rule import STRICTNESS, has_learned
from stabrun.verdict.signals import Signals, first_nonfinite

RISE = STRICTNESS["lenient"]
FOUND, NONFINITE, NO_RISE, NO_LEARNING, TOO_SHORT = "rise", "nonfinite_loss", "no_rise", "no_learning", "too_short"
OFFSET, SPREAD = -0.07, 0.73  # octaves: mean and standard deviation of edge minus lr50, see docs/ramp.md
REACH = 2.5  # standard deviations to each end of the range for a search: that of its prior is a fifth of the range
FAR = 10.0  # times the first loss; how far a diverged loss is beyond that says nothing


@dataclass(frozen=True)
class Edge:
    """The edge of a ramp: log₂ of its rate, and its row; None if there is none. `reason` says why, in either case."""

    reason: str
    octaves: float | None = None
    row: int | None = None

    @property
    def rate(self) -> float | None:
        return None if self.octaves is None else float(2.0**self.octaves)

    @property
    def lr50(self) -> float | None:
        """The learning rate at which half of the seeds would diverge, by the mean offset of `docs/ramp.md`."""
        return None if self.octaves is None else float(2.0 ** (self.octaves - OFFSET))

    @property
    def lr_range(self) -> tuple[float, float] | None:
        """The range of a search whose prior has the mean and the standard deviation of that guess."""
        half = REACH * SPREAD
        return None if self.lr50 is None else (self.lr50 / 2**half, self.lr50 * 2**half)


@dataclass(frozen=True)
class Ramp:
    """Learning rates `[n]`, ascending, and losses `[n]` of a run; what follows a loss that is not finite is ignored."""

    rates: Floats
    losses: Floats

    @classmethod
    def of_rows(cls, rows: Sequence[Row]) -> Self:
        """The ramp that these rows of `metrics.jsonl` record."""
        rates, losses = ([number(row[key]) for row in rows] for key in ("train/lr", "train/loss"))
        return cls(np.array(rates), np.array(losses))

    @cached_property
    def finite(self) -> Floats:
        """The losses before the first that is not finite."""
        bad = np.flatnonzero(~np.isfinite(self.losses))
        return self.losses[: bad[0]] if len(bad) else self.losses

    @cached_property
    def window(self) -> int:
        return min(window_of(len(self.losses)), len(self.finite))

    @cached_property
    def levels(self) -> Floats:
        """The smoothed loss, `[rows with one]`: the median of a window, around row `i + window // 2`."""
        return trailing_medians(self.finite, self.window)

    @property
    def level_rates(self) -> Floats:
        """The rate in the middle of the window of each level."""
        return self.rates[self.window // 2 :][: len(self.levels)]

    @property
    def lowest(self) -> tuple[float, float] | None:
        """Rate and level where the smoothed loss is lowest; None without a finite loss."""
        if not len(self.finite):
            return None
        at = int(np.argmin(self.levels))
        return float(self.level_rates[at]), float(self.levels[at])

    @cached_property
    @np.errstate(over="ignore", invalid="ignore")  # losses near the largest number
    def edge(self) -> Edge:
        """Where the loss leaves its lowest level for good, or else the first loss that is not finite.

        It has left it in the middle of the first window from which on each level is above the lowest one before it by
        RISE: by a share of what was learned, and by a number of standard errors.
        """
        count, broke = len(self.finite), len(self.finite) < len(self.losses)
        if count < LEAST_ROWS:
            return Edge(NO_LEARNING if broke else TOO_SHORT)
        first = float(self.finite[0])
        chart = Level(np.minimum(self.finite, first + FAR * abs(first)), self.window, first)
        if not has_learned(chart, RISE):
            return Edge(NO_LEARNING)
        low = np.flatnonzero(chart.excess <= chart.threshold(RISE))
        if low[-1] + 1 < len(chart.levels):
            return self.at(FOUND, int(low[-1]) + 1 + self.window // 2)
        return self.at(NONFINITE, count) if broke else Edge(NO_RISE)

    def at(self, reason: str, row: int) -> Edge:
        return Edge(reason, float(np.log2(self.rates[row])), row)


def first_site(rows: Sequence[Row], ramp: Ramp) -> str | None:
    """The site that broke away first: of those whose output left its trend between the lowest level and the edge, the
    one that deviated most, as in the verdict on a run. None if there is none, no edge, or no outputs are recorded.
    """
    edge, signals = ramp.edge, Signals()
    if edge.row is None:
        return None
    for row, values in enumerate(rows):
        signals.add(row, values)
    low = int(np.argmin(ramp.levels)) + ramp.window // 2
    site = signals.first_site(signals.deviations(), low, edge.row + ramp.window // 2)
    return site or first_nonfinite(rows[edge.row], "norm/out/")
