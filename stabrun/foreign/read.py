"""Records of other tools as rows for the verdict.

Known problems of such records are corrected or reported in `notes`: a loss of 0.0 with a NaN gradient norm is a
diverged step of Hugging Face's Trainer; NaN can mean "not recorded"; a step back is a resume, or a second run in the
same file.
"""

import csv
import itertools
from collections.abc import Iterable, Iterator
from pathlib import Path

from stabrun.config import UserError
from stabrun.foreign.columns import Cells, Columns, choose
from stabrun.foreign.formats import HEAD, file_format, text_format
from stabrun.foreign.points import points
from stabrun.foreign.runs import ForeignRun, Point, refuse_descending, split_runs
from stabrun.foreign.shapes import shape_of
from stabrun.foreign.source import Source

SAMPLE = 10_000  # rows that are searched for the names of columns
DESCENDING = 20  # first rows; if all their steps descend, the table is sorted in reverse


def read_foreign_runs(
    path: Path, step: str | None = None, loss: str | None = None, split: str | None = None
) -> list[ForeignRun]:
    """The runs in a file of another tool, in order. `step`, `loss` and `split` name columns that cannot be guessed.

    Raises UserError if the file has no loss, several possible ones, or unreadable numbers.
    """
    source = Source(path)
    try:
        rows, columns = prepared(path, rows_of(source), step, loss, split)
        runs = split_runs(ascending(path, points(source, rows, columns)))
        source.check()
    except (csv.Error, OverflowError, RecursionError) as error:
        raise UserError(f"{path}: cannot be read ({error}).") from error
    if not any(run.steps for run in runs):
        raise UserError(f"{path}: column {columns.loss or columns.validation} has no numbers.")
    for run in runs:
        for note in (*source.notes, *columns.notes):
            run.note(note)
    return runs


def prepared(
    path: Path, rows: Iterator[Cells], step: str | None, loss: str | None, split: str | None
) -> tuple[Iterable[Cells], Columns]:
    """The rows, with a number a column, and the columns to be read."""
    sample = list(itertools.islice(rows, SAMPLE))
    shape = shape_of(sample, loss)
    columns = choose(path, list(shape.rows(sample)), step, loss, split)
    columns.notes.extend(shape.notes(columns.loss))
    return shape.rows(itertools.chain(sample, rows)), columns


def rows_of(source: Source) -> Iterator[Cells]:
    """The rows of a file in any known format. Raises UserError if it is in none."""
    if known := file_format(source.path):
        return known.rows(source)
    head = list(itertools.islice((line for line in source.lines() if line.strip()), HEAD))
    if not head:
        raise UserError(f"{source.path}: {'its only line is incomplete' if source.notes else 'the file is empty'}.")
    text = text_format(head)
    if text is None:
        raise UserError(f"{source.path}: no loss column found; it is neither a table nor a log with losses.")
    source.notes.clear()
    return text.rows(source, source.lines(), head)


def ascending(path: Path, found: Iterator[Point]) -> Iterator[Point]:
    """The rows. Raises UserError if steps descend from the start."""
    begin = list(itertools.islice(found, DESCENDING))
    refuse_descending(path, [step for step, loss, *_ in begin if step is not None and loss is not None])
    return itertools.chain(begin, found)
