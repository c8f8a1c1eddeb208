"""Rows of a foreign log that is still being written, as its lines are completed."""

import codecs
import itertools
import math
import os
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

from stabrun.config import UserError
from stabrun.foreign.columns import Columns, choose
from stabrun.foreign.formats import HEAD, Format, file_format, text_format
from stabrun.foreign.points import points
from stabrun.foreign.runs import Runs
from stabrun.foreign.shapes import Shape, shape_of
from stabrun.foreign.source import LONGEST, PROBE, TOO_LONG, Source, encoding_of, plain_text

POLL = 0.2  # seconds between two reads of a growing file
PIECE = 1 << 24  # bytes read at a time
LEAST = 5  # rows from which the columns are chosen
BREAK = re.compile(r"\r\n|\n|\r")


class Replaced(Exception):  # noqa: N818  not an error
    """The file was cut, or another one took its place."""


class Lines:
    """The complete lines of a growing file. Iterating ends when `enough()` is true and all lines were read."""

    def __init__(self, path: Path, enough: Callable[[], bool]) -> None:
        self.path, self.enough = path, enough
        self.handle: IO[bytes] | None = None
        self.decoder: codecs.IncrementalDecoder | None = None
        self.half = ""

    def written(self) -> list[str]:
        """The lines that were completed since the last call. Raises Replaced."""
        if self.handle is None:
            if not self.path.is_file():
                return []
            self.handle = open(self.path, "rb")
        data = self.handle.read(PIECE)
        if not data:
            if replaced(self.handle, self.path):
                self.handle.close()
                raise Replaced
            return []
        if self.decoder is None:
            self.decoder = codecs.getincrementaldecoder(encoding_of(self.path, data[:PROBE]))("replace")
        lines = BREAK.split(self.half + self.decoder.decode(data))
        self.half = lines.pop()
        if len(self.half) > LONGEST:
            raise UserError(f"{self.path}: {TOO_LONG}.")
        return [plain_text(line) for line in lines]

    def wait(self) -> bool:
        """Wait for more. False if there is enough."""
        if self.enough():
            return False
        time.sleep(POLL)
        return True

    def __iter__(self) -> Iterator[str]:
        while True:
            lines = self.written()
            yield from lines
            if not lines and not self.wait():
                return


def replaced(handle: IO[bytes], file: Path) -> bool:
    """Whether the open file is no longer the one with this name, or is now shorter than what was read."""
    try:
        now = os.stat(file)
    except FileNotFoundError:
        return True
    opened = os.fstat(handle.fileno())
    return (now.st_ino, now.st_dev) != (opened.st_ino, opened.st_dev) or now.st_size < handle.tell()


def followed(
    path: Path, enough: Callable[[], bool], step: str | None, loss: str | None, split: str | None
) -> Iterator[dict[str, Any] | None]:
    """Rows as in `metrics.jsonl` as they are completed. None if the rows so far are void: the file was replaced, steps
    went back, or another run started.
    """
    while True:
        try:
            yield from _rows(Lines(path, enough), step, loss, split)
            return
        except Replaced:
            yield None


def _rows(lines: Lines, step: str | None, loss: str | None, split: str | None) -> Iterator[dict[str, Any] | None]:
    head: list[str] = []
    while (begun := _begun(lines.path, head, step, loss, split)) is None:
        more = [line for line in lines.written() if line.strip()]
        if not more and not lines.wait():
            return
        head += more
    known, columns, shape = begun
    source = Source(lines.path)
    rows = known.rows(source, itertools.chain(head, lines), head[:HEAD])
    runs, told, changes = Runs(), 0, 0
    validation: float | None = None
    for step_found, loss_found, gradient, rate, held_out, _ in points(source, shape.rows(rows), columns):
        runs.add(step_found, loss_found, gradient, rate, None)
        validation = held_out if held_out is not None else validation
        if runs.changes != changes:
            changes, told = runs.changes, 0
            yield None
        run = runs.current
        for row in range(told, len(run.steps)):
            told = row + 1
            found = {"step": _whole(run.steps[row]), "train/loss": _known(run.losses[row], run.gradients[row])}
            if math.isfinite(run.rates[row]):
                found["train/lr"] = run.rates[row]
            if 0 <= run.gradients[row] < math.inf:
                found["grad/norm"] = run.gradients[row]
            if validation is not None:
                found["val/loss"], validation = validation, None
            yield found


def _begun(
    path: Path, head: list[str], step: str | None, loss: str | None, split: str | None
) -> tuple[Format, Columns, Shape] | None:
    """The format and the columns, once there are enough rows to tell. Raises UserError if the format cannot grow."""
    if not head:
        if path.is_file() and (other := file_format(path)):
            raise UserError(f"--follow {path}: a file of {other.name} cannot be followed; judge it without --follow.")
        return None
    known = text_format(head[:HEAD])
    if known is None:
        return None
    if not known.grows:
        raise UserError(f"--follow {path}: a JSON document cannot be followed; judge it without --follow.")
    try:
        rows = list(known.rows(Source(path), head, head[:HEAD]))
        shape = shape_of(rows, loss)
        columns = choose(path, list(shape.rows(rows)), step, loss, split)
    except UserError:
        if len(head) > HEAD:
            raise
        return None
    found = list(points(Source(path), shape.rows(rows), columns))
    losses = [loss for _, loss, *_ in found if loss is not None]
    enough = len(losses) >= LEAST or not all(map(math.isfinite, losses))
    return (known, columns, shape) if enough else None


def _whole(step: float) -> float:
    return int(step) if step == int(step) else step


def _known(loss: float, gradient: float) -> float:
    """The loss; NaN for one that a Trainer recorded as 0.0."""
    return math.nan if loss == 0.0 and math.isnan(gradient) else loss
