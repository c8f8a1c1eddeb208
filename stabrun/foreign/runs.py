"""Runs of a foreign record: rows in order, split at restarts, with validations, and corrected."""

import bisect
import itertools
import math
from array import array
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from stabrun.config import UserError

# A row: its clock (None if it has none), training loss, gradient norm (−1 if not recorded), learning rate (NaN if not
# recorded), loss on held-out data, and the name of its run where a table holds several.
Point = tuple[float | None, float | None, float, float, float | None, str]

HELD = "each loss repeats until the next one: repeated rows were skipped"
LEAST_DISTINCT = 20  # losses that are left; fewer say that the loss is constant
REPEATED = "steps repeat or go back: the later rows are used"
OUT_OF_PLACE = "rows out of order were skipped"
UNRECORDED = "rows without a recorded loss were skipped"


@dataclass
class ForeignRun:
    """Clock, losses, gradient norms (−1 if not recorded), learning rates (NaN if not recorded) of one run; the
    validations as (row, loss); and notes about corrections. `steps` holds integers, or floats if the clock does.
    """

    steps: "array[Any]" = field(default_factory=lambda: array("d"))
    losses: "array[float]" = field(default_factory=lambda: array("d"))
    gradients: "array[float]" = field(default_factory=lambda: array("d"))
    rates: "array[float]" = field(default_factory=lambda: array("d"))
    validations: list[tuple[int, float]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def rows(self) -> Iterator[dict[str, Any]]:
        """Rows as in `metrics.jsonl`."""
        validations = dict(self.validations)
        columns = zip(self.steps, self.losses, self.gradients, self.rates, strict=True)
        for index, (step, loss, gradient, rate) in enumerate(columns):
            row: dict[str, Any] = {"step": step, "train/loss": loss}
            if not gradient < 0:
                row["grad/norm"] = gradient
            if rate == rate:  # not NaN
                row["train/lr"] = rate
            if index in validations:
                row["val/loss"] = validations[index]
            yield row

    def note(self, text: str) -> None:
        if text not in self.notes:
            self.notes.append(text)


@dataclass
class Growing:
    """A run whose rows are still being read."""

    run: ForeignRun = field(default_factory=ForeignRun)
    validations: list[tuple[float | None, int, float]] = field(default_factory=list)  # (step, rows before, loss)

    def restart(self) -> "Growing":
        """The next run in the same file. Validations just before its first row belong to it."""
        last = self.run.steps[-1]
        rows = len(self.run.steps)
        moved: list[tuple[float | None, int, float]] = [
            (at, 0, loss) for at, before, loss in self.validations if before == rows and at is not None and at < last
        ]
        self.validations = [v for v in self.validations if not (v[1] == rows and v[0] is not None and v[0] < last)]
        return Growing(ForeignRun(), moved)

    def cut(self, rows: int) -> None:
        """Keep only the first `rows` rows, and the validations up to there."""
        run = self.run
        step = run.steps[rows]
        del run.steps[rows:], run.losses[rows:], run.gradients[rows:], run.rates[rows:]
        self.validations = [
            (at, min(before, rows), loss)
            for at, before, loss in self.validations
            if (before <= rows if at is None else at < step)
        ]

    def finished(self) -> ForeignRun:
        """The run with its validations, corrected."""
        run, kept = corrected(self.run)
        kept_before = np.concatenate(([0], np.cumsum(kept)))
        validations: dict[int, float] = {}
        for step, rows, loss in self.validations:
            after = int(kept_before[rows]) if step is None else bisect.bisect_right(run.steps, step)
            validations[max(0, after - 1)] = loss
        run.validations = sorted(validations.items()) if run.steps else []
        return run


class Runs:
    """Splits rows into runs as they come. A step back to the beginning starts another run; any other step back is a
    resume, which replaces the rows that it repeats. A single row that is out of place is left out.
    """

    def __init__(self) -> None:
        self.runs = [Growing()]
        self.current = self.runs[0].run
        self.held: tuple[float, float, float, float, float | None] | None = None  # a row that steps back
        self.changes = 0  # how often rows were replaced or another run started

    def add(self, step: float | None, loss: float | None, gradient: float, rate: float, held_out: float | None) -> None:
        """Take a row."""
        run = self.current
        if held_out is None and self.held is None and loss is not None and step is not None:  # the fast path
            steps = run.steps
            if not steps or step > steps[-1]:
                steps.append(step)
                run.losses.append(loss)
                run.gradients.append(gradient)
                run.rates.append(rate)
                return
        if loss is None or step is None:
            self._validate(step, held_out)
            return
        steps = self.current.steps
        if self.held is not None:
            held, self.held = self.held, None
            if step > steps[-1]:
                self.current.note(OUT_OF_PLACE)
            else:
                self._place(*held)
                steps = self.current.steps
        if steps and step < steps[-1]:
            self.held = step, loss, gradient, rate, held_out
        else:
            self._place(step, loss, gradient, rate, held_out)

    def _place(self, step: float, loss: float, gradient: float, rate: float, held_out: float | None) -> None:
        run = self.current
        steps = run.steps
        if steps and step <= steps[-1]:
            if step == steps[-1] and math.isnan(loss) and not math.isnan(gradient):
                run.note(UNRECORDED)
                self._validate(step, held_out)
                return
            self.changes += 1
            if step <= steps[0] and len(steps) > 1:
                self.runs.append(self.runs[-1].restart())
                run = self.current = self.runs[-1].run
            else:
                run.note(REPEATED)
                self.runs[-1].cut(bisect.bisect_left(steps, step))
        run.steps.append(step)
        run.losses.append(loss)
        run.gradients.append(gradient)
        run.rates.append(rate)
        if held_out is not None:
            self._validate(step, held_out)

    def _validate(self, step: float | None, loss: float | None) -> None:
        if loss is not None and loss == loss:  # not NaN
            self.runs[-1].validations.append((step, len(self.current.steps), loss))

    def finished(self) -> list[ForeignRun]:
        if self.held is not None:
            self.current.note(OUT_OF_PLACE)
        runs = [growing.finished() for growing in self.runs]
        if len(runs) > 1:
            for number, run in enumerate(runs, 1):
                run.note(f"run {number} of {len(runs)} in one file")
        return runs


def split_runs(points: Iterable[Point]) -> list[ForeignRun]:
    """The runs of these rows, each corrected. Rows of different `run` columns are kept apart."""
    groups: dict[str, Runs] = {"": Runs()}
    group = groups[""]
    name = ""
    for step, loss, gradient, rate, validation, run in points:
        if run != name:
            name = run
            group = groups.setdefault(run, Runs())
        group.add(step, loss, gradient, rate, validation)
    found = []
    for name, group in groups.items():
        for run_found in group.finished():
            if name:
                run_found.note(name)
            if run_found.steps or len(groups) == 1:
                found.append(run_found)
    return found


def corrected(run: ForeignRun) -> tuple[ForeignRun, np.ndarray]:
    """The run without rows whose loss was not recorded, and with NaN for losses that a Trainer recorded as 0.0; and
    which rows were kept.
    """
    losses, gradients = np.array(run.losses), np.array(run.gradients)
    last_finite = np.flatnonzero(np.isfinite(losses) & (losses != 0.0))[-1:]
    early = ~np.isfinite(gradients) & (np.arange(len(losses)) < (last_finite[0] if len(last_finite) else 0))
    if early.any():  # loss scale search, or norms that are logged at intervals: the run continued
        gradients[early] = -1.0
        run.note("non-finite gradient norms before finite losses were skipped")
    dead = np.isnan(gradients)
    hidden = (losses == 0.0) & dead
    if hidden.any():
        losses[hidden] = np.nan
        run.note("a loss of 0.0 with a NaN gradient norm is read as NaN")
    unknown, last = np.isnan(losses), np.flatnonzero(np.isfinite(losses))[-1:]
    before = unknown & (np.arange(len(losses)) < (last[0] if len(last) else 0))
    if before.any() and not (dead & unknown & ~before).any():
        before = unknown  # if NaN meant "not recorded" before, it also does at the end
    if before.any():
        run.note(UNRECORDED)
    before |= repeated(losses, before)
    if (before & ~unknown).any():
        run.note(HELD)
    steps = np.array(run.steps)[~before]
    integral = bool((steps == np.floor(steps)).all())
    found = ForeignRun(
        array("q", steps.astype(np.int64).tobytes()) if integral else array("d", steps.tobytes()),
        array("d", losses[~before].tobytes()),
        array("d", gradients[~before].tobytes()),
        array("d", np.array(run.rates)[~before].tobytes()),
        [],
        run.notes,
    )
    return found, ~before


def repeated(losses: np.ndarray, skipped: np.ndarray) -> np.ndarray:
    """Which of the losses that are not `skipped` repeat the one before, if most do: a tool that logs a loss more often
    than it computes one.
    """
    kept = np.flatnonzero(~skipped)
    same = kept[1:][losses[kept[1:]] == losses[kept[:-1]]]
    found = np.zeros(len(losses), dtype=bool)
    if len(kept) - len(same) >= LEAST_DISTINCT and 2 * len(same) > len(kept):
        found[same] = True
    return found


def refuse_descending(path: Any, steps: list[float]) -> None:
    """Raise UserError if these first steps of a record descend."""
    if len(steps) > 2 and all(later < step for step, later in itertools.pairwise(steps)):
        raise UserError(f"{path}: steps descend; sort the rows so that the first step comes first.")
