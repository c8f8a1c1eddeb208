"""The verdict on a run: a fold over the rows of its record, the same during training, after a resume and afterwards.

This module does not import torch. The rule, its error rates and its limitations are documented in `docs/verdict.md`.
"""

import math
from array import array
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Self

import numpy as np

from stabrun.config import Config
from stabrun.record.jsonl import number
from stabrun.record.run_dir import RunDir
from stabrun.record.schema import Row
from stabrun.verdict.chart import LEAST_ROWS, Floats, trailing_medians, window_of
from stabrun.verdict.direction import FALLING, direction
from stabrun.verdict.overfit import overfit
from stabrun.verdict.rule import (
    CONVERGED,
    DIVERGED,
    RECOVERED,
    STANDARD,
    STRICTNESS,
    UNDECIDED,
    Curve,
    Decision,
    above_start,
    decide,
    went_nonfinite,
)
from stabrun.verdict.signals import LONGEST, Signals, alarms, first_nonfinite
from stabrun.verdict.spikes import spikes

RULE = 5
"""Version of the rule. It is incremented by any change that can alter a verdict."""

CAME_BACK = "came_back", "coming_back", "restarted"  # reasons of a run that has a scar
CERTAIN_ABOVE = 0.9  # of the rows so far above the first loss: such a run has not come back
CERTAIN_DONE = 0.5  # of the planned steps, at which this is looked at: an overshoot may last for long

Step = int | float  # a float if the clock is a fraction of an epoch


@dataclass(frozen=True)
class Verdict:
    """The verdict on a run as seen up to `horizon`, its last step.

    `direction` says whether the loss is rising, flat or falling there. `last_healthy_step` is the last step at which
    the level was at its lowest before the loss rose, or the horizon if it did not. From `certain_step` on, `diverged`
    cannot change. `scar` is the last level of a run that rose and did not diverge minus its lowest one, in units of
    the loss; `lost_steps` are the steps until it was back at the level from which it rose, or up to the horizon.
    `restarts` are the steps at which the schedule or the whole run began again; the verdict is on what follows.
    `signals` contains the first alarm of each signal: step, site, and lead over the loss in steps. `by_strictness` is
    the verdict at each strictness of the rule. `val_gap` is the last validation loss minus the last level of the
    training loss. `overfit` contains the fields of `Overfit`. `outliers_skipped` and `rewinds` count how often
    `train.recovery` was needed, None if it was not chosen.
    """

    verdict: str
    reason: str
    horizon: Step
    direction: str | None = None
    last_healthy_step: Step | None = None
    first_bad_step: Step | None = None
    first_bad_site: str | None = None
    certain_step: Step | None = None
    scar: float | None = None
    lost_steps: Step | None = None
    restarts: list[Step] = field(default_factory=list)
    init_loss: float | None = None
    best_loss: float | None = None
    final_loss: float | None = None
    signals: dict[str, Any] = field(default_factory=dict)
    spikes: dict[str, Any] | None = None
    best_val_loss: float | None = None
    val_gap: float | None = None
    overfit: dict[str, Any] | None = None
    outliers_skipped: int | None = None
    rewinds: int | None = None
    by_strictness: dict[str, str] = field(default_factory=dict)
    rule: int = RULE

    @property
    def stable(self) -> bool:
        return self.verdict in (CONVERGED, RECOVERED)


def going(curve: Curve, decision: Decision) -> str:
    """The direction in the last quarter of the rows, but not before a rise: the rise itself is told by its reason."""
    if decision.reason == "coming_back":
        return FALLING
    count = len(curve.losses)
    rows = max(LEAST_ROWS, count // 4)
    if decision.since is not None:
        rows = min(rows, max(LEAST_ROWS, count - decision.since))
    return direction(curve.losses[-rows:])


class Judge:
    """Takes the rows of a record in order (`add`); `verdict` and `conclude` return the verdict so far.

    `planned` is the number of steps of the whole run, if known. A divergence can only be certain before the end if the
    learning rate is `constant`: a lowered one can bring a run back.
    """

    def __init__(self, planned: int | None = None, constant: bool = False) -> None:
        self.planned, self.constant = planned, constant
        self.steps, self.losses, self.rates = array("d"), array("d"), array("d")
        self.validations: list[tuple[int, float]] = []  # (row, loss)
        self.signals = Signals()
        self.nonfinite: tuple[int, str, str | None] | None = None  # (row, reason, site) of the first such value
        self.outliers: int | None = None  # updates that were left out
        self.rewinds: int | None = None
        self.certain: int | None = None  # the row from which `diverged` is certain

    @classmethod
    def of(cls, config: Config) -> Self:
        """A judge of a run of stabrun."""
        return cls(config.train.steps, config.schedule.kind == "constant")

    @classmethod
    def of_record(cls, run: RunDir) -> Self:
        """A judge of the run in a directory, by its configuration or its `watch.json`; of any rows if it has neither.

        Raises UserError if the file is damaged.
        """
        if watched := run.watched():
            return cls(watched.planned, watched.constant)
        return cls.of(run.config()) if run.is_run() else cls()

    def add(self, row: Row) -> None:
        """Take a row. If its update was left out as that of an outlier, it is counted only: it tells about a batch."""
        self.rewinds = row.get("recovery/rewinds", self.rewinds)
        if "recovery/skipped" in row:
            self.outliers = (self.outliers or 0) + (row["recovery/skipped"] == 1)
            if row["recovery/skipped"] == 1:
                return
        loss, gradient = number(row["train/loss"]), number(row.get("grad/norm", 0.0))
        index, count = len(self.losses), len(self.losses) + 1
        self.steps.append(row["step"])
        self.losses.append(loss)
        self.rates.append(number(row.get("train/lr")))
        if "val/loss" in row:
            self.validations.append((index, number(row["val/loss"])))
        # A step that fp16 skipped because its loss scale was too high, or that a guard left out, is no divergence.
        overflow = row.get("scale/skipped") == 1 and number(row.get("scale/loss_scale", math.inf)) > 1
        if not overflow:
            self.signals.add(index, row)
        if self.nonfinite is None and not math.isfinite(loss):
            self.nonfinite = index, "nonfinite_loss", first_nonfinite(row, "norm/out/")
        elif self.nonfinite is None and not math.isfinite(gradient) and not overflow:
            self.nonfinite = index, "nonfinite_grad", first_nonfinite(row, "norm/grad/")
        elif self.nonfinite is None and not math.isfinite(number(row.get("val/loss", 0.0))):
            self.nonfinite = index, "nonfinite_val", None
        if self.constant and self.planned and count == round(CERTAIN_DONE * self.planned) and self._is_certain():
            self.certain = index

    def add_columns(
        self,
        steps: Floats,
        losses: Floats,
        rates: Floats,
        gradients: Floats,
        validations: Sequence[tuple[int, float]] = (),
    ) -> None:
        """Add rows `[n]` of a record without further statistics; NaN where no rate, −1 where no gradient is recorded.

        `validations` are (row, loss). The same as `add` row by row, in a fraction of the time.
        """
        first = len(self.losses)
        self.validations += [(first + row, loss) for row, loss in validations]
        for column, values in ((self.steps, steps), (self.losses, losses), (self.rates, rates)):
            column.extend(np.asarray(values, dtype=float).tolist())
        for row in np.flatnonzero(~(gradients < 0)).tolist():
            self.signals.add(first + row, {"grad/norm": float(gradients[row])})
        bad = np.flatnonzero(~(np.isfinite(losses) & np.isfinite(gradients)))
        if self.nonfinite is None and len(bad):
            row = int(bad[0])
            reason = "nonfinite_grad" if math.isfinite(losses[row]) else "nonfinite_loss"
            self.nonfinite = first + row, reason, None
        invalid = next((first + row for row, loss in validations if not math.isfinite(loss)), None)
        if invalid is not None and (self.nonfinite is None or invalid < self.nonfinite[0]):
            self.nonfinite = invalid, "nonfinite_val", None

    @property
    def over(self) -> bool:
        """Whether training cannot continue: a loss or a gradient is not finite."""
        return self.nonfinite is not None

    def step(self, row: int) -> Step:
        """The step of a row."""
        step = self.steps[row]
        return int(step) if step.is_integer() else step

    def curve(self) -> Curve:
        """What was recorded before the first loss that is not finite."""
        losses = np.array(self.losses)
        bad = np.flatnonzero(~np.isfinite(losses))
        count = int(bad[0]) if len(bad) else len(losses)
        validations = [(row, loss) for row, loss in self.validations if row < count]
        return Curve(losses[:count], np.array(self.rates[:count]), validations)

    @np.errstate(over="ignore", invalid="ignore")  # losses near the largest number
    def _is_certain(self) -> bool:
        """Whether the run was above its start almost from the beginning, for half of its steps, and is not falling."""
        curve = self.curve()
        return (
            not self.over
            and len(curve.losses) >= LEAST_ROWS
            and curve.above >= CERTAIN_ABOVE
            and above_start(curve, STRICTNESS[STANDARD]) is not None
            and direction(curve.losses[len(curve.losses) // 2 :]) != FALLING
        )

    def verdict(self, strictness: str = STANDARD) -> Verdict:
        """The verdict so far at one strictness, without the fields that `conclude` adds."""
        return self._verdict(self.curve(), strictness)[0]

    def conclude(self, running: bool = False) -> Verdict:
        """The verdict with the site that diverged first, signals, spikes and overfitting.

        A run that ended before its planned steps, and is not still `running`, is not called stable.
        """
        curve = self.curve()
        judged = {name: self._verdict(curve, name) for name in STRICTNESS}
        verdicts = {name: verdict if running else self._ended(verdict) for name, (verdict, _) in judged.items()}
        verdict, span = verdicts[STANDARD], judged[STANDARD][1]
        deviations = self.signals.deviations()
        signals = {
            name: {"step": self.step(row), "site": site, "lead": span and self.step(span[1]) - self.step(row)}
            for name, (row, site) in alarms(deviations, since=span[0] - LONGEST if span else 0).items()
        }
        return replace(
            verdict,
            first_bad_site=verdict.first_bad_site or (self.signals.first_site(deviations, *span) if span else None),
            signals=signals,
            spikes=spikes(curve.all_losses, self.step),
            outliers_skipped=self.outliers,
            rewinds=self.rewinds,
            by_strictness={name: verdict.verdict for name, verdict in verdicts.items()},
            **self._validated(curve, verdict.stable or verdict.reason == "interrupted"),
        )

    def _ended(self, verdict: Verdict) -> Verdict:
        """The verdict; `undecided` in place of a stable one if the run ended before its planned steps."""
        if self.planned is not None and verdict.stable and verdict.horizon + self._spacing() < self.planned:
            return replace(verdict, verdict=UNDECIDED, reason="interrupted")
        return verdict

    def _spacing(self) -> float:
        """Steps between the last two rows: 1, unless the loss is recorded every few steps."""
        return max(1.0, self.steps[-1] - self.steps[-2]) if len(self.steps) > 1 else 1.0

    def _validated(self, curve: Curve, stable: bool) -> dict[str, Any]:
        """The fields that validations determine; only a run that is stable so far can overfit."""
        window = window_of(len(self.losses))
        inside = [(row, loss) for row, loss in curve.all_validations if row >= window - 1]
        if not inside:
            return {}
        medians = trailing_medians(curve.all_losses, window)
        val, levels = [loss for _, loss in inside], [float(medians[row - window + 1]) for row, _ in inside]
        over = overfit([self.step(row) for row, _ in inside], val, levels, curve.start) if stable else None
        return {
            "best_val_loss": min(filter(math.isfinite, val), default=val[0]),
            "val_gap": val[-1] - levels[-1],
            "overfit": over and asdict(over),
        }

    def _decide(self, curve: Curve, strictness: str) -> Decision:
        """What the rule says, unless a value is not finite, or the divergence was certain before."""
        if self.nonfinite is not None:
            return went_nonfinite(curve, STRICTNESS[strictness], *self.nonfinite[:2])
        decision = decide(curve, STRICTNESS[strictness])
        if self.certain is not None and decision.verdict != DIVERGED:
            return Decision(DIVERGED, "above_start", self.certain - curve.origin)
        return decision

    @np.errstate(over="ignore", invalid="ignore")
    def _verdict(self, curve: Curve, strictness: str) -> tuple[Verdict, tuple[int, int] | None]:
        """The verdict, and the rows of the lowest level before the loss rose and of the rise."""
        decision, origin, count = self._decide(curve, strictness), curve.origin, len(self.losses)
        verdict = Verdict(decision.verdict, decision.reason, self.step(count - 1) if count else -1)
        if len(curve.losses):
            levels = curve.charts[0].levels
            verdict = replace(
                verdict,
                direction=going(curve, decision),
                restarts=[
                    self.step(row)
                    for row in sorted({*curve.begins, *(row + origin for row in curve.schedule_restarts)})
                ],
                init_loss=curve.start,
                best_loss=float(levels.min()),
                final_loss=float(self.losses[-1]) if self.over else float(levels[-1]),
            )
        if decision.since is None:
            return replace(verdict, last_healthy_step=verdict.horizon if verdict.stable else None), None
        since, low = origin + decision.since, origin + decision.low
        verdict = replace(verdict, first_bad_step=self.step(since), last_healthy_step=self.step(low) if since else None)
        if verdict.verdict == DIVERGED:
            certain, site = self.nonfinite[::2] if self.nonfinite else (self.certain, None)
            certain_step = None if certain is None else self.step(certain)
            verdict = replace(verdict, first_bad_site=site, certain_step=certain_step)
        elif verdict.reason in CAME_BACK and verdict.best_loss is not None and verdict.final_loss is not None:
            back = origin + curve.back(decision.since)
            lost = self.step(min(back, count - 1)) - self.step(since)
            verdict = replace(verdict, scar=verdict.final_loss - verdict.best_loss, lost_steps=lost)
        return verdict, (low, since)
