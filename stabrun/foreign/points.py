"""Rows of a record, cell by cell, as numbers."""

from collections.abc import Callable, Iterable, Iterator
from typing import Any

from stabrun.foreign import epochs, names
from stabrun.foreign.cells import count, number
from stabrun.foreign.columns import Cells, Columns, side
from stabrun.foreign.runs import Point
from stabrun.foreign.source import Source

LARGEST_STEP = 2**53  # larger integers are not exact in floating point
NAN = float("nan")


class Unreadable(Exception):  # noqa: N818  not an error, unless there are many
    """A cell that is not what its column holds; its text is the end of a sentence about the row."""


def points(source: Source, rows: Iterable[Cells], columns: Columns) -> Iterator[Point]:
    """The rows that have a loss of either kind. A row that cannot be read is skipped and counted by `source`."""
    clock, gradient_name, rate_name = columns.clock, columns.gradient, columns.rate
    counted = 0
    counted_on = epochs.Counted()
    beside: Cells | None = None  # the last row without a loss: Lightning writes the learning rate on a row of its own
    plain = None not in (columns.loss, clock) and columns.split is columns.run is columns.epoch is None
    full = fast_path(columns) if plain else None
    for row in rows:
        if not row:  # a repeated header: another run was appended
            counted = 0
            continue
        if full is not None and (found := full(row)) is not None:
            source.good += 1
            yield found
            continue
        try:
            loss, held_out = losses(row, columns)
            if loss is None and held_out is None:
                beside = row
                continue
            if clock is None:
                step: float | None = float(counted) if loss is not None else None
                counted += loss is not None
            else:
                step = clock_of(row, columns, counted_on, loss is not None)
                if step is None:
                    loss = None
                    if held_out is None:
                        continue
        except Unreadable as why:
            source.skip(f": {why}.")
            continue
        source.good += 1
        gradient = optional(row, gradient_name, -1.0) if gradient_name else -1.0
        rate = optional(row, rate_name, NAN) if rate_name else NAN
        if beside is not None and loss is not None:
            if clock and row.get(clock) is not None and beside.get(clock) == row[clock]:
                gradient = optional(beside, gradient_name, -1.0) if gradient == -1.0 else gradient
                rate = optional(beside, rate_name, NAN) if rate != rate else rate  # NaN: not on this row
            beside = None
        run = f"{columns.run} = {row.get(columns.run)}" if columns.run else ""
        yield step, loss, gradient, rate, held_out, run
    if counted_on.restarted:
        source.note(epochs.NOTE)


def fast_path(columns: Columns) -> Callable[[Cells], Point | None]:
    """A function for the rows that have a step and a loss of their own, as most do; it returns None for the others."""
    loss_name, clock, whole = str(columns.loss), str(columns.clock), columns.whole
    gradient_name, rate_name, held_out_name = columns.gradient, columns.rate, columns.validation

    def full(row: Cells) -> Point | None:
        try:
            loss, step = number(row[loss_name]), count(row[clock])
            if loss is None or step is None or not -LARGEST_STEP < step < LARGEST_STEP or (whole and step % 1):
                return None
            gradient, rate, held_out = -1.0, NAN, None
            if gradient_name is not None:
                gradient = float(row[gradient_name])
            if rate_name is not None:
                rate = float(row[rate_name])
            if held_out_name is not None:
                held_out = number(row.get(held_out_name))
        except (KeyError, TypeError, ValueError):
            return None
        return step, loss, gradient, rate, held_out, ""

    return full


def losses(row: Cells, columns: Columns) -> tuple[float | None, float | None]:
    """The training loss and the loss on held-out data, each None if the row has none."""
    training = side(row, columns) if columns.split else True
    if training is None:
        return None, None
    if columns.loss is None:
        return cell(row, str(columns.validation), number), None
    value = row.get(columns.loss)
    loss = value if type(value) is float else cell(row, columns.loss, number)
    if not training:
        return None, loss
    if columns.validation is not None:
        return loss, cell(row, columns.validation, number) if columns.validation in row else None
    if loss is None and (late := late_validation(row)):  # it appears after the rows that were searched for names
        return None, cell(row, late, number)
    return loss, None


def clock_of(row: Cells, columns: Columns, counted_on: epochs.Counted, training: bool) -> float | None:
    """The clock of a row; None if it has none."""
    clock = str(columns.clock)
    step = cell(row, clock, count)
    if step is None:
        return next((found for name in columns.aliases if (found := cell(row, name, count)) is not None), None)
    if abs(step) >= LARGEST_STEP or (columns.whole and step != int(step)):
        raise Unreadable(f"{step:g} in column {clock} is not a step number")
    if columns.epoch is None:
        return step
    epoch = optional(row, columns.epoch, NAN)
    if columns.epoch_steps is None:
        return counted_on.count(step, epoch) if training else counted_on.base + step
    if epoch != epoch:  # NaN
        raise Unreadable(f"a row has no number in column {columns.epoch}")
    return step + (epoch - columns.first_epoch) * columns.epoch_steps


def cell(row: Cells, name: str, read: Callable[[Any], float | None]) -> float | None:
    """The number in a cell. Raises Unreadable."""
    try:
        return read(row.get(name))
    except ValueError:
        raise Unreadable(f"{row[name]!r} in column {name} is not a number") from None


def optional(row: Cells, name: str | None, absent: float) -> float:
    """The number in a column that the verdict can do without."""
    if name is None:
        return absent
    value = row.get(name)
    if type(value) is float:
        return value
    try:
        found = number(value)
    except (ValueError, OverflowError):
        return absent
    return absent if found is None else found


def late_validation(row: Cells) -> str | None:
    """The name of a loss on held-out data in a row."""
    return next((name for name in row if type(name) is str and names.is_validation(name)), None)
