"""The verdict on a run: a fold over the rows of its record, the same during training, after a resume and afterwards.

This module does not import torch. The rule, its error rates and its limitations are documented in `docs/verdict.md`.
"""

import math
from array import array
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np

from stabrun.record.jsonl import number
from stabrun.record.schema import Row
from stabrun.verdict.chart import BACK, Floats, Level, Strictness, level, trailing_means, window_of
from stabrun.verdict.overfit import overfit
from stabrun.verdict.signals import LONGEST, Signals, alarms, first_nonfinite
from stabrun.verdict.spikes import spikes

RULE = 3
"""Version of the rule. It is incremented by any change that can alter a verdict."""

STRICTNESS = {
    "lenient": Strictness(share=0.1, sigmas=8.0),
    "standard": Strictness(share=0.03, sigmas=6.0),  # at nano, 3 % of what is learned is 0.1 nats
    "strict": Strictness(share=0.015, sigmas=5.0),
}
STANDARD, LENIENT = "standard", "lenient"
SLOW = 4  # windows in the window of the second chart, which detects slow rises that noise hides from the first
OVERSHOOT = 0.1  # a rise that ends before this share is learned belongs to the warmup
CERTAIN_SHARE = 0.75  # a rise that lasts for this share of all rows, at an unlowered learning rate, never came back
CERTAIN_WINDOWS = 5  # nor did one that lasts for this many windows above the loss before learning
UNLOWERED = 0.9  # of the highest learning rate so far; below it, a run may come back
CHECK_EVERY, CHECK_SHARE = 10, 0.05  # least rows between two checks for certainty, also as a share of the rows so far

CONVERGED, RECOVERED, DIVERGED, UNDECIDED = "converged", "recovered", "diverged", "undecided"


@dataclass(frozen=True)
class Verdict:
    """The verdict on a run as seen up to `horizon`, its last step.

    From `certain_step` on, `diverged` cannot change. `scar` is the last level of a recovered run minus its lowest one,
    in units of the loss. `signals` contains the first alarm of each signal: step, site, and lead over the loss in
    steps. `by_strictness` is the verdict at each strictness of the rule. `val_gap` is the last validation loss minus
    the last level of the training loss. `overfit` contains the fields of `Overfit`.
    """

    verdict: str
    reason: str
    horizon: int
    first_bad_step: int | None = None
    first_bad_site: str | None = None
    certain_step: int | None = None
    scar: float | None = None
    init_loss: float | None = None
    best_loss: float | None = None
    final_loss: float | None = None
    signals: dict[str, Any] = field(default_factory=dict)
    spikes: dict[str, Any] | None = None
    best_val_loss: float | None = None
    val_gap: float | None = None
    overfit: dict[str, Any] | None = None
    by_strictness: dict[str, str] = field(default_factory=dict)
    rule: int = RULE

    @property
    def stable(self) -> bool:
        return self.verdict in (CONVERGED, RECOVERED)


Span = tuple[int, int]  # the rows of the lowest level and of the alarm


class Judge:
    """Takes the rows of a record in order (`add`); `verdict` and `conclude` return the verdict so far."""

    def __init__(self) -> None:
        self.steps, self.losses, self.rates = array("q"), array("d"), array("d")
        self.validations: list[tuple[int, float]] = []  # (row, loss)
        self.signals = Signals()
        self.nonfinite: tuple[int, str, str | None] | None = None  # (row, reason, site) of the first such value
        self.certain: int | None = None  # the row from which `diverged` is certain
        self.next_check = 0

    def add(self, row: Row) -> None:
        loss, gradient = number(row["train/loss"]), number(row.get("grad/norm", 0.0))
        index, count = len(self.losses), len(self.losses) + 1
        self.steps.append(row["step"])
        self.losses.append(loss)
        self.rates.append(number(row.get("train/lr")))
        if "val/loss" in row:
            self.validations.append((index, number(row["val/loss"])))
        # A step that fp16 skipped because its loss scale was too high says nothing about the model.
        overflow = row.get("scale/skipped") == 1 and number(row.get("scale/loss_scale")) > 1
        if not overflow:
            self.signals.add(index, row)
        if self.nonfinite is None and not math.isfinite(loss):
            self.nonfinite = index, "nonfinite_loss", first_nonfinite(row, "norm/out/")
        elif self.nonfinite is None and not math.isfinite(gradient) and not overflow:
            self.nonfinite = index, "nonfinite_grad", first_nonfinite(row, "norm/grad/")
        if self.certain is None and self.nonfinite is None and count >= self.next_check:
            self.next_check = count + max(CHECK_EVERY, round(CHECK_SHARE * count))
            if self._is_certain():
                self.certain = index

    @property
    def over(self) -> bool:
        """Whether training cannot continue: a loss or gradient is not finite."""
        return self.nonfinite is not None

    def _is_certain(self) -> bool:
        count, window = len(self.losses), window_of(len(self.losses))
        if count < 2 * window:
            return False
        losses = np.asarray(self.losses)
        chart = level(losses, window, STRICTNESS[LENIENT])
        rises = chart.rises()
        if not rises or rises[-1][1] < count:
            return False
        start, rates = rises[-1][0], np.asarray(self.rates)
        if not (rates >= UNLOWERED * np.maximum.accumulate(rates))[start:].all():  # also if no rate is recorded
            return False
        above = chart.means[-CERTAIN_WINDOWS * window :] > chart.init + chart.threshold[-1]
        above_init = len(above) == CERTAIN_WINDOWS * window and bool(above.all())
        return above_init or count - start >= max(CERTAIN_SHARE * count, CERTAIN_WINDOWS * window)

    def verdict(self, strictness: str = STANDARD) -> Verdict:
        """The verdict so far at one strictness, without the fields that `conclude` adds."""
        return self._judge(STRICTNESS[strictness])[0]

    def conclude(self, planned: int | None = None) -> Verdict:
        """The verdict with the site that diverged first, signals, spikes and overfitting.

        A run that ended before its `planned` steps is not called stable.
        """
        judged = {name: self._judge(strictness) for name, strictness in STRICTNESS.items()}
        ended = {name: interrupted(verdict, planned) for name, (verdict, _) in judged.items()}
        verdict, span = ended[STANDARD], judged[STANDARD][1]
        deviations = self.signals.deviations()
        signals = {
            name: {"step": self.steps[row], "site": site, "lead": span and self.steps[span[1]] - self.steps[row]}
            for name, (row, site) in alarms(deviations, since=span[0] - LONGEST if span else 0).items()
        }
        return replace(
            verdict,
            first_bad_site=verdict.first_bad_site or (self.signals.first_site(deviations, *span) if span else None),
            signals=signals,
            spikes=spikes(self._finite(), self.steps),
            by_strictness={name: verdict.verdict for name, verdict in ended.items()},
            **self._validated(verdict.stable or verdict.reason == "interrupted"),
        )

    def _validated(self, stable: bool) -> dict[str, Any]:
        """The fields that validations determine; only a run that is stable so far can overfit."""
        losses, window = self._finite(), window_of(len(self.losses))
        inside = [(row, loss) for row, loss in self.validations if window - 1 <= row < len(losses)]
        if not inside:
            return {}
        means = trailing_means(losses, window)
        val, levels = [loss for _, loss in inside], [float(means[row - window + 1]) for row, _ in inside]
        steps, init = [self.steps[row] for row, _ in inside], float(np.median(losses[:5]))
        over = overfit(steps, val, levels, init) if stable else None
        return {"best_val_loss": min(val), "val_gap": val[-1] - levels[-1], "overfit": over and asdict(over)}

    def _finite(self) -> Floats:
        """The losses before the first that is not finite."""
        losses = np.asarray(self.losses)
        bad = np.flatnonzero(~np.isfinite(losses))
        return losses[: bad[0]] if len(bad) else losses

    def _judge(self, strictness: Strictness) -> tuple[Verdict, Span | None]:
        count, losses = len(self.losses), self._finite()
        window = window_of(count)
        verdict = Verdict(UNDECIDED, "too_short", self.steps[-1] if count else -1)
        if len(losses):
            means = trailing_means(losses, min(window, len(losses)))
            final = float(self.losses[-1]) if self.nonfinite else float(means[-1])
            verdict = replace(verdict, init_loss=float(losses[0]), best_loss=float(means.min()), final_loss=final)
        if self.nonfinite is not None:
            row, reason, site = self.nonfinite
            verdict = replace(verdict, verdict=DIVERGED, reason=reason, first_bad_site=site)
            span = max(0, row - window), row
            return replace(verdict, first_bad_step=self.steps[row], certain_step=self.steps[row]), span
        if count < 2 * window:
            return verdict, None
        return self._judge_charts(verdict, losses, window, strictness)

    def _judge_charts(
        self, verdict: Verdict, losses: Floats, window: int, strictness: Strictness
    ) -> tuple[Verdict, Span | None]:
        count = len(losses)

        def risen(name: str, reason: str, chart: Level, row: int) -> tuple[Verdict, Span]:
            certain = None if self.certain is None else self.steps[self.certain]
            dated = replace(verdict, first_bad_step=self.steps[row], certain_step=certain)
            return replace(dated, verdict=name, reason=reason), (chart.lowest_before(row), row)

        charts = [level(losses, window, strictness)]
        if count >= 4 * SLOW * window:
            charts.append(level(losses, SLOW * window, strictness))
        # A spike raises a long mean even after the loss is back, so the short one must be raised as well.
        lasting = [
            (chart, rises[-1][0])
            for chart in charts
            if (rises := chart.rises()) and rises[-1][1] == count and charts[0].excess[-1] > BACK * chart.threshold[-1]
        ]
        for chart, start in lasting:
            if count - start >= window or self.certain is not None:
                return risen(DIVERGED, "creep" if chart.creeps(start) else "runaway", chart, start)
        if lasting and not came_back(losses, lasting[0][0]):
            return replace(verdict, reason="rising"), None
        chart = charts[0]
        rises = [rise for rise in chart.rises() if not is_overshoot(chart, rise[0])]
        if self.certain is not None:
            return risen(DIVERGED, "runaway", chart, rises[0][0] if rises else self.certain)
        if not has_learned(chart, strictness):
            return replace(verdict, reason="no_learning"), None
        if rises:
            recovered, span = risen(RECOVERED, "came_back", chart, rises[0][0])
            return replace(recovered, scar=max(0.0, (verdict.final_loss or 0.0) - (verdict.best_loss or 0.0))), span
        return replace(verdict, verdict=CONVERGED, reason="fell"), None


def interrupted(verdict: Verdict, planned: int | None) -> Verdict:
    """The verdict; `undecided` in place of a stable one if the run ended before its `planned` steps."""
    if planned is not None and verdict.stable and verdict.horizon + 1 < planned:
        return replace(verdict, verdict=UNDECIDED, reason="interrupted")
    return verdict


def came_back(losses: Floats, chart: Level) -> bool:
    """Whether the median of the last half window is near the floor, while the mean still contains a spike."""
    return bool(np.median(losses[-(chart.window // 2) :]) - chart.floor[-1] < BACK * chart.threshold[-1])


def is_overshoot(chart: Level, row: int) -> bool:
    """Whether the rise at `row` came before the run had learned a share of OVERSHOOT: it belongs to the warmup."""
    index = row - chart.window + 1
    return bool(chart.init - chart.floor[index] < OVERSHOOT * (chart.init - chart.floor[-1]))


def has_learned(chart: Level, strictness: Strictness) -> bool:
    """Whether the lowest level is below the first one by more than noise explains."""
    spread = strictness.sigmas * float(chart.noise[int(np.argmin(chart.means))])
    low = float(chart.floor[-1])
    # The first loss is a median of five rows; the mean of the first window distinguishes a slower fall from noise.
    return chart.init - low > spread / 5**0.5 or float(chart.means[0]) - low > spread / chart.window**0.5
