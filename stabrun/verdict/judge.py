"""The verdict on a run, computed row by row: the same during training, after a resume and from a record.

No torch here. The rule, its error rates and known limitations are documented in `docs/verdict.md`.
"""

import math
from array import array
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np

from stabrun.record.jsonl import number
from stabrun.verdict.chart import BACK, Floats, Level, Strictness, level, trailing_means, window_of
from stabrun.verdict.overfit import overfit
from stabrun.verdict.signals import LONGEST, Signals, alarms, first_nonfinite
from stabrun.verdict.spikes import spikes

RULE = 3
"""Version of the rule. Increased whenever the verdict on any record changes."""

STRICTNESS = {
    "lenient": Strictness(share=0.1, sigmas=8.0),
    "standard": Strictness(share=0.03, sigmas=6.0),  # at nano, 3 % of what is learned is 0.1 nats
    "strict": Strictness(share=0.015, sigmas=5.0),
}
STANDARD, LENIENT = "standard", "lenient"
SLOW = 4  # length of the second chart's window, in windows: detects a creep in more noise
OVERSHOOT = 0.1  # a rise that ends before this share is learned belongs to the warmup
CERTAIN_SHARE = 0.75  # a rise that lasted for this share of all rows never came back without a lower LR
CERTAIN_WINDOWS = 5  # nor did one that lasted this many windows above the initial loss
UNLOWERED = 0.9  # share of the highest learning rate so far; below it, a run may come back
CHECK_EVERY, CHECK_SHARE = 10, 0.05  # rows between checks for certainty: at least, and as a share of the rows so far

CONVERGED, RECOVERED, DIVERGED, UNDECIDED = "converged", "recovered", "diverged", "undecided"


@dataclass(frozen=True)
class Verdict:
    """The verdict on a run up to `horizon`, its last step.

    `certain_step`: the step from which `diverged` can no longer change. `scar`: last level of a recovered run minus its
    lowest level. `signals`: first alarm and lead of each signal. `by_strictness`: the verdict at each strictness.
    `val_gap`: last validation loss minus last level of the training loss. `overfit`: since when the validation loss
    rises while the training loss falls. Losses are in nats per token, or in the unit of the record.
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


class Judge:
    """Takes the rows of `metrics.jsonl` in order (`add`). `verdict` gives the verdict so far."""

    def __init__(self) -> None:
        self.steps, self.losses, self.rates = array("q"), array("d"), array("d")
        self.validations: list[tuple[int, float]] = []  # (row, loss)
        self.signals = Signals()
        self.broken: tuple[int, str, str | None] | None = None  # (row, reason, site) of the first non-finite
        self.certain: int | None = None  # the row from which `diverged` is certain
        self.next_check = 0

    def add(self, row: dict[str, Any]) -> None:
        loss, gradient = number(row["train/loss"]), number(row.get("grad/norm", 0.0))
        self.steps.append(row["step"])
        self.losses.append(loss)
        self.rates.append(number(row.get("train/lr")))
        if "val/loss" in row:
            self.validations.append((len(self.losses) - 1, number(row["val/loss"])))
        overflow = row.get("scale/skipped") == 1 and number(row.get("scale/loss_scale")) > 1
        if not overflow:  # an fp16 overflow of the loss scale: the step was skipped, which is no sign of divergence
            self.signals.add(len(self.losses) - 1, row)
        if self.broken is None and not math.isfinite(loss):
            self.broken = len(self.losses) - 1, "nonfinite_loss", first_nonfinite(row, "norm/out/")
        elif self.broken is None and not math.isfinite(gradient) and not overflow:
            self.broken = len(self.losses) - 1, "nonfinite_grad", first_nonfinite(row, "norm/grad/")
        count = len(self.losses)
        if self.certain is None and self.broken is None and count >= self.next_check:
            self.next_check = count + max(CHECK_EVERY, round(CHECK_SHARE * count))
            if self._is_certain():
                self.certain = count - 1

    @property
    def over(self) -> bool:
        """Whether training cannot continue: a loss or gradient is not finite."""
        return self.broken is not None

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
        lasting = count - start
        if not (rates >= UNLOWERED * np.maximum.accumulate(rates))[start:].all():  # also if none is recorded
            return False
        above = chart.means[-CERTAIN_WINDOWS * window :] > chart.init + chart.threshold[-1]
        blown = len(above) == CERTAIN_WINDOWS * window and bool(above.all())
        return blown or lasting >= max(CERTAIN_SHARE * count, CERTAIN_WINDOWS * window)

    def verdict(self, strictness: str = STANDARD) -> Verdict:
        """The verdict on the rows so far, at one strictness, without what `conclude` adds."""
        return self._judged(STRICTNESS[strictness])[0]

    def conclude(self, planned: int | None = None) -> Verdict:
        """The verdict with the site that broke first, the signals' alarms and the spikes.

        A run of `planned` steps that ended before them is not called stable.
        """
        judged = {name: self._judged(strictness) for name, strictness in STRICTNESS.items()}
        ended = {name: whole(verdict, planned) for name, (verdict, _) in judged.items()}
        verdict, span = ended[STANDARD], judged[STANDARD][1]
        deviations = self.signals.deviations()
        site = verdict.first_bad_site or (self.signals.first_site(deviations, *span) if span else None)
        told = {
            name: {"step": self.steps[row], "site": where, "lead": span and self.steps[span[1]] - self.steps[row]}
            for name, (row, where) in alarms(deviations, since=span[0] - LONGEST if span else 0).items()
        }
        known = replace(verdict, first_bad_site=site, signals=told, spikes=spikes(self._finite(), self.steps))
        known = replace(known, by_strictness={name: verdict.verdict for name, verdict in ended.items()})
        return replace(known, **self._validated(known.stable or known.reason == "interrupted"))

    def _validated(self, stable: bool) -> dict[str, Any]:
        """The fields computed from validations. Only a run that is stable so far can overfit."""
        losses, window = self._finite(), window_of(len(self.losses))
        seen = [(row, loss) for row, loss in self.validations if window - 1 <= row < len(losses)]
        if not seen:
            return {}
        means = trailing_means(losses, window)
        rows, val = [row for row, _ in seen], [loss for _, loss in seen]
        levels = [float(means[row - window + 1]) for row in rows]
        init = float(np.median(losses[:5]))
        found = overfit([self.steps[row] for row in rows], val, levels, init) if stable else None
        return {
            "best_val_loss": min(val),
            "val_gap": val[-1] - levels[-1],
            "overfit": None if found is None else asdict(found),
        }

    def _finite(self) -> Floats:
        """The losses before the first that is not finite."""
        losses = np.asarray(self.losses)
        bad = np.flatnonzero(~np.isfinite(losses))
        return losses[: bad[0]] if len(bad) else losses

    def _judged(self, strictness: Strictness) -> tuple[Verdict, tuple[int, int] | None]:
        """The verdict, and the rows of the lowest level and of the alarm, if any."""
        count, losses = len(self.losses), self._finite()
        window = window_of(count)
        known = Verdict(UNDECIDED, "too_short", self.steps[-1] if count else -1)
        if len(losses):
            means = trailing_means(losses, min(window, len(losses)))
            lost = float(self.losses[-1]) if self.broken else float(means[-1])
            known = replace(known, init_loss=float(losses[0]), best_loss=float(means.min()), final_loss=lost)
        if self.broken is not None:
            row, reason, site = self.broken
            step = self.steps[row]
            known = replace(known, verdict=DIVERGED, reason=reason, first_bad_step=step, certain_step=step)
            return replace(known, first_bad_site=site), (max(0, row - window), row)
        if count < 2 * window:
            return known, None
        return self._charted(known, losses, window, strictness)

    def _charted(
        self, known: Verdict, losses: Floats, window: int, strictness: Strictness
    ) -> tuple[Verdict, tuple[int, int] | None]:
        count = len(losses)

        def bad(verdict: str, reason: str, chart: Level, row: int) -> tuple[Verdict, tuple[int, int]]:
            certain = None if self.certain is None else self.steps[self.certain]
            said = replace(known, verdict=verdict, reason=reason, first_bad_step=self.steps[row], certain_step=certain)
            return said, (chart.lowest_before(row), row)

        charts = [level(losses, window, strictness)]
        if count >= 4 * SLOW * window:
            charts.append(level(losses, SLOW * window, strictness))
        # A spike raises a long mean long after the loss has come back, so the short level must be high too.
        standing = [
            (chart, rises[-1][0])
            for chart in charts
            if (rises := chart.rises()) and rises[-1][1] == count and charts[0].excess[-1] > BACK * chart.threshold[-1]
        ]
        for chart, start in standing:
            if count - start >= window or self.certain is not None:
                return bad(DIVERGED, "creep" if chart.creeps(start) else "runaway", chart, start)
        if standing and not back_at_last(losses, standing[0][0]):
            return replace(known, reason="rising"), None
        chart = charts[0]
        rises = [rise for rise in chart.rises() if not overshoot(chart, rise[0])]
        if self.certain is not None:
            return bad(DIVERGED, "runaway", chart, rises[0][0] if rises else self.certain)
        if not learned(chart, strictness):
            return replace(known, reason="no_learning"), None
        if rises:
            scar = max(0.0, (known.final_loss or 0.0) - (known.best_loss or 0.0))
            said, span = bad(RECOVERED, "came_back", chart, rises[0][0])
            return replace(said, scar=scar), span
        return replace(known, verdict=CONVERGED, reason="fell"), None


def whole(verdict: Verdict, planned: int | None) -> Verdict:
    """The verdict, or `interrupted` for a stable run that ended before its `planned` steps."""
    if planned is not None and verdict.stable and verdict.horizon + 1 < planned:
        return replace(verdict, verdict=UNDECIDED, reason="interrupted")
    return verdict


def back_at_last(losses: Floats, chart: Level) -> bool:
    """Whether the median of the last half window is near the floor. The mean may still contain a spike."""
    return bool(np.median(losses[-(chart.window // 2) :]) - chart.floor[-1] < BACK * chart.threshold[-1])


def overshoot(chart: Level, row: int) -> bool:
    """Whether the rise at `row` came before the run had learned much: an effect of the warmup."""
    index = row - chart.window + 1
    return bool(chart.init - chart.floor[index] < OVERSHOOT * (chart.init - chart.floor[-1]))


def learned(chart: Level, strictness: Strictness) -> bool:
    """Whether the lowest level is below the first one by more than noise explains."""
    spread = strictness.sigmas * float(chart.noise[int(np.argmin(chart.means))])
    low = float(chart.floor[-1])
    # The first loss is a median of five rows. The mean of the first window reveals a slower fall.
    return chart.init - low > spread / 5**0.5 or float(chart.means[0]) - low > spread / chart.window**0.5
