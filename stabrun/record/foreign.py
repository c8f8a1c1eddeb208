"""Records of other tools as rows for the verdict: JSON lines, CSV, `trainer_state.json`, plain logs.

Known problems of such records are corrected or reported in `notes`: a loss of 0.0 with a NaN gradient norm is a
diverged step of Hugging Face's Trainer; NaN can mean "not recorded"; a step back is a resume, or a second run in the
same file.
"""

import bisect
import csv
import itertools
import math
import re
from array import array
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from stabrun.config import UserError
from stabrun.record.jsonl import DECODER

STEPS = ("step", "_step", "global_step", "trainer/global_step", "train/global_step", "iteration", "iter")
LOSSES = ("train/loss", "loss", "train_loss", "train/cross_entropy_loss", "train/ce_loss", "training_loss", "lm_loss")
EVALUATIONS = ("eval_loss", "eval/loss", "val_loss", "val/loss", "validation_loss")
GRADIENTS = ("grad/norm", "grad_norm", "train/grad_norm", "gradient_norm", "optim/total_grad_norm")
LARGEST_STEP = 2**53  # larger integers are not exact in floating point
DESCENDING = 20  # first rows; if all their steps descend, the table is sorted in reverse
NAMED_WITHIN = 10_000  # rows that are searched for column names
LOG_WITHIN = 200  # lines that are searched to distinguish a log from a table
MISSING = (None, "", "-", "null", "None", "NA", "N/A")
NUMBER = r"([-+]?(?:\d+\.?\d*(?:[eE][-+]?\d+)?|\.\d+|nan|inf(?:inity)?))"
COUNT = r"(\d{1,3}(?:,\d{3})+\b|\d+)"
LOG_STEP = re.compile(
    rf"\b(?:global_?)?(?:step|iter(?:ation)?)\b['\"]?\W{{0,12}}{COUNT}|\b(?P<tqdm>\d+)/\d+ \[", re.IGNORECASE
)
LOG_LOSS = re.compile(
    rf"\b(val|eval|validation|test|dev)?[ _/]?(?:train(?:ing)?[ _/])?(?<!-)loss\b['\"]?[^\w+-]{{0,12}}{NUMBER}",
    re.IGNORECASE,
)
LOG_GRADIENT = re.compile(rf"\bgrad(?:ient)?[ _/]?norm\b['\"]?[^\w+-]{{0,3}}{NUMBER}", re.IGNORECASE)


@dataclass
class ForeignRun:
    """Steps, losses and gradient norms (−1 if not recorded) of one run, and notes about corrections."""

    steps: "array[int]" = field(default_factory=lambda: array("q"))
    losses: "array[float]" = field(default_factory=lambda: array("d"))
    gradients: "array[float]" = field(default_factory=lambda: array("d"))
    notes: list[str] = field(default_factory=list)

    def rows(self) -> Iterator[dict[str, Any]]:
        """Rows as in `metrics.jsonl`."""
        for step, loss, gradient in zip(self.steps, self.losses, self.gradients, strict=True):
            if gradient < 0:
                yield {"step": step, "train/loss": loss}
            else:
                yield {"step": step, "train/loss": loss, "grad/norm": gradient}

    def cut(self, rows: int) -> None:
        """Keep only the first `rows` rows."""
        del self.steps[rows:], self.losses[rows:], self.gradients[rows:]

    def note(self, text: str) -> None:
        if text not in self.notes:
            self.notes.append(text)


def read_foreign_runs(path: Path, step: str | None = None, loss: str | None = None) -> list[ForeignRun]:
    """The runs in a foreign file, in order. `step` and `loss` name columns that cannot be guessed.

    Raises UserError if the file has no loss, several possible ones, or unreadable numbers.
    """
    try:
        names = _columns(path, _rows(path), step, loss)
        half = list[bool]()
        runs = [corrected(run) for run in split_runs(ascending(path, numbers(path, _rows(path, half), names)))]
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text.") from error
    except (csv.Error, OverflowError, RecursionError) as error:
        raise UserError(f"{path}: cannot be read ({error}).") from error
    if not any(run.steps for run in runs):
        raise UserError(f"{path}: column {names['loss']} has no numbers.")
    for run in runs:
        if half:
            run.note("the last line is incomplete and was skipped")
        if names["loss"] in EVALUATIONS:
            run.note(f"only evaluations are recorded ({names['loss']})")
        if names["step"] is None:
            run.note("no step column: rows are counted")
    return runs


def parsed_json(text: str) -> Any:
    """The value of a JSON text, or None if it is not JSON."""
    try:
        value, end = DECODER.raw_decode(text.lstrip())
    except ValueError:
        return None
    return None if text.lstrip()[end:].strip() else value


def lines(path: Path) -> Iterator[str]:
    """The lines of a UTF-8 file, with or without a byte-order mark."""
    with open(path, encoding="utf-8-sig", newline="") as file:
        yield from file


def _rows(path: Path, half: list[bool] | None = None) -> Iterator[dict[str, Any]]:
    """The rows of the file by column name. An incomplete last JSON line appends an entry to `half`."""
    first = next((line for line in lines(path) if line.strip()), None)
    if first is None:
        raise UserError(f"{path}: the file is empty.")
    if first.lstrip()[0] in "[{":
        alone = parsed_json(first)
        if (
            isinstance(alone, dict)
            and "log_history" not in alone
            and any(map(str.strip, itertools.islice(lines(path), 1, 9)))
        ):
            return _json_lines(path, half)
        whole = parsed_json(path.read_text(encoding="utf-8-sig"))
        if whole is not None:
            return iter(_history(whole))
        return _log(path) if alone is None and LOG_LOSS.search(first) else _json_lines(path, half)
    delimiter = _delimiter(first)
    if delimiter and not any(map(is_log, itertools.islice(lines(path), LOG_WITHIN))):
        return csv.DictReader(lines(path), delimiter=delimiter)
    return _log(path)


def is_log(line: str) -> bool:
    return LOG_STEP.search(line) is not None and LOG_LOSS.search(line) is not None


def _history(whole: Any) -> list[dict[str, Any]]:
    """The rows of a JSON document: Hugging Face's `log_history`, a list of rows, one row, or lists by column."""
    if isinstance(whole, dict):
        whole = whole.get("log_history", whole)
    if isinstance(whole, dict):
        columns = {name: values for name, values in whole.items() if isinstance(values, list)}
        if not columns:
            return [whole]
        return [dict(zip(columns, values, strict=False)) for values in zip(*columns.values(), strict=False)]
    return [row for row in whole if isinstance(row, dict)] if isinstance(whole, list) else []


def _json_lines(path: Path, half: list[bool] | None) -> Iterator[dict[str, Any]]:
    for count, line in enumerate(lines(path), 1):
        if not line.strip():
            continue
        row = parsed_json(line)
        if row is None and line.endswith("\n"):
            raise UserError(f"{path}, line {count}: not JSON.")
        if isinstance(row, dict):
            history = row.get("history")  # of a W&B run, as printed by `wandb leet inspect --json`
            yield history["item"] if isinstance(history, dict) and isinstance(history.get("item"), dict) else row
        elif row is None and half is not None:
            half.append(True)


def _delimiter(line: str) -> str | None:
    """The delimiter of a header line. A comma comes last, because it may be a decimal comma."""
    return next((sign for sign in (";", "\t", ",") if sign in line), None)


def _log(path: Path) -> Iterator[dict[str, Any]]:
    """Rows of a plain log: lines with a step and a training loss."""
    for line in lines(path):
        step = LOG_STEP.search(line)
        if step is None:
            continue
        row: dict[str, Any] = {"step": step["tqdm"] or step[1].replace(",", "")}
        for found in LOG_LOSS.finditer(line):
            row.setdefault("eval_loss" if found[1] else "loss", found[2])
        if norm := LOG_GRADIENT.search(line):
            row["grad_norm"] = norm[1]
        if len(row) > 1:
            yield row


def _columns(path: Path, rows: Iterator[dict[str, Any]], step: str | None, loss: str | None) -> dict[str, str | None]:
    """The columns of step, loss and gradient norm: as given, or by their usual names."""
    columns = list(dict.fromkeys(name for row in itertools.islice(rows, NAMED_WITHIN) for name in row if name))
    for flag, name in (("--step", step), ("--loss", loss)):
        if name is not None and name not in columns:
            raise UserError(f"{flag} {name}: {path} has no such column. Columns: {', '.join(columns[:20]) or 'none'}.")
    loss = loss or _guessed(path, columns, LOSSES) or _guessed(path, columns, EVALUATIONS)
    if loss is None:
        hint = f"choose a column with --loss: {', '.join(columns[:20])}" if columns else "it has no columns"
        raise UserError(f"{path}: no loss column found; {hint}.")
    step = step or _guessed(path, columns, STEPS)
    return {"step": step, "loss": loss, "gradient": _guessed(path, columns, GRADIENTS)}


def _guessed(path: Path, columns: list[str], usual: Iterable[str]) -> str | None:
    """The column with one of the `usual` names, or W&B's `run - name`. Raises UserError if there are several."""
    plain = {name: name.strip().lower() for name in columns if not name.endswith(("__MIN", "__MAX"))}
    for wanted in usual:
        found = [name for name, low in plain.items() if low == wanted or low.endswith(f" - {wanted}")]
        if len(found) > 1:
            raise UserError(f"{path}: several columns match; choose one, such as --loss '{found[0]}'.")
        if found:
            return found[0]
    return None


def numbers(
    path: Path, rows: Iterable[dict[str, Any]], names: dict[str, str | None]
) -> Iterator[tuple[int, float, float]]:
    """(step, loss, gradient norm) of each row that has a step and a loss."""
    for index, row in enumerate(rows):
        loss = _number(path, names["loss"], row.get(names["loss"] or ""))
        step = float(index) if names["step"] is None else _number(path, names["step"], row.get(names["step"]))
        if loss is None or step is None or not math.isfinite(step):
            continue
        if abs(step) >= LARGEST_STEP or step != int(step):
            raise UserError(f"{path}: {step:g} in column {names['step']} is not a step number.")
        gradient = _number(path, names["gradient"], row.get(names["gradient"] or ""))
        yield int(step), loss, -1.0 if gradient is None else gradient


def _number(path: Path, name: str | None, value: Any) -> float | None:
    """The number in a cell; None if it is empty. Decimal commas are supported."""
    if type(value) is float:
        return value
    if isinstance(value, bool):
        raise UserError(f"{path}: {value} in column {name} is not a number.")
    if isinstance(value, str):
        value = value.strip()
    if value in MISSING:
        return None
    try:
        return float(value.replace(",", ".") if isinstance(value, str) else value)
    except (TypeError, ValueError) as error:
        raise UserError(f"{path}: {value!r} in column {name} is not a number.") from error


def ascending(path: Path, rows: Iterator[tuple[int, float, float]]) -> Iterator[tuple[int, float, float]]:
    """The rows. Raises UserError if steps descend from the start."""
    begin = list(itertools.islice(rows, DESCENDING))
    if len(begin) > 2 and all(later < step for (step, _, _), (later, _, _) in itertools.pairwise(begin)):
        raise UserError(f"{path}: steps descend; sort the rows so that the first step comes first.")
    return itertools.chain(begin, rows)


def split_runs(rows: Iterable[tuple[int, float, float]]) -> list[ForeignRun]:
    """Split rows into runs. A step back to the beginning starts another run; any other step back is a resume, which
    replaces the rows that it repeats.
    """
    runs = [ForeignRun()]
    for step, loss, gradient in rows:
        run = runs[-1]
        if run.steps and step == run.steps[-1] and math.isnan(loss) and not math.isnan(gradient):
            run.note("rows without a recorded loss were skipped")
            continue
        if run.steps and step <= run.steps[-1]:
            if step <= run.steps[0] and len(run.steps) > 1:
                run = ForeignRun()
                runs.append(run)
            else:
                run.note("steps repeat or go back: the later rows are used")
                run.cut(bisect.bisect_left(run.steps, step))
        run.steps.append(step)
        run.losses.append(loss)
        run.gradients.append(gradient)
    if len(runs) > 1:
        for number, run in enumerate(runs, 1):
            run.note(f"run {number} of {len(runs)} in one file")
    return runs


def corrected(run: ForeignRun) -> ForeignRun:
    """The run without rows whose loss was not recorded, and with NaN for losses that a Trainer recorded as 0.0."""
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
        run.note("rows without a recorded loss were skipped")
    steps = np.array(run.steps, dtype=np.int64)
    return ForeignRun(
        array("q", steps[~before]), array("d", losses[~before]), array("d", gradients[~before]), run.notes
    )
