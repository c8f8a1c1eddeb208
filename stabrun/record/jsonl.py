"""The files of a run directory: `metrics.jsonl` is the truth, `events.jsonl` tells how it came about."""

import itertools
import json
import math
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from stabrun.config import UserError

DECODER = json.JSONDecoder()
TAIL = 1 << 16  # bytes at the end of a file in which its last row is looked for


def dumps(row: dict[str, Any]) -> str:
    """A row as one line of valid JSON."""
    try:
        return json.dumps(row, allow_nan=False)
    except ValueError:
        return json.dumps(jsonable(row), allow_nan=False)


def jsonable(value: Any) -> Any:
    """A value for JSON: numbers in it that are not finite become "nan", "inf" and "-inf"."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, dict):
        return {key: jsonable(item) for key, item in value.items()}
    return [jsonable(item) for item in value] if isinstance(value, list) else value


def is_number(value: Any) -> bool:
    """Whether `value` is a recorded number."""
    return (isinstance(value, (int, float)) and not isinstance(value, bool)) or value in ("nan", "inf", "-inf")


def number(value: Any) -> float:
    """A recorded number, "nan", "inf" and "-inf" included; NaN for what is missing."""
    return float("nan") if value is None else float(value)


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises UserError, naming the file, where it holds none."""
    try:
        value = json.loads(path.read_bytes())
    except ValueError:
        value = None
    if not isinstance(value, dict):
        raise UserError(f"{path} is damaged: it holds no JSON object.")
    return value


def read_rows(path: Path) -> Iterator[dict[str, Any]]:
    """The whole rows of a JSON-lines file, up to the first line that is none: the last may still be being written."""
    for _, row in _lines(path):
        yield row


def read_metrics(path: Path) -> Iterator[dict[str, Any]]:
    """The rows of `metrics.jsonl`; a last line that is still being written is left out.

    Raises UserError at a whole line that is no object, or has no step and no training loss.
    """
    end = 0
    for end, row in _lines(path):  # noqa: B007
        yield check_row(row, path)
    with open(path, "rb") as file:
        file.seek(end)
        if file.readline().endswith(b"\n"):
            raise UserError(f"{path} is damaged: the line at byte {end} is no JSON object.")


def check_row(row: dict[str, Any], path: Path) -> dict[str, Any]:
    """The row; UserError where it has no step or no training loss."""
    if not isinstance(row.get("step"), int) or abs(row["step"]) >= 2**53 or not is_number(row.get("train/loss")):
        raise UserError(f"{path}: step or train/loss is missing in the row {json.dumps(row)[:60]}.")
    for key in ("grad/norm", "train/lr"):
        if not is_number(row.get(key, 0.0)):
            raise UserError(f"{path}: {key} is no number at step {row['step']}.")
    return row


def last_row(path: Path) -> dict[str, Any] | None:
    """The last whole row of a JSON-lines file, from its end alone; None where there is none."""
    if not path.exists():
        return None
    with open(path, "rb") as file:
        size, reach = file.seek(0, os.SEEK_END), TAIL
        while True:
            start = max(0, size - reach)
            file.seek(start)
            lines = file.read(size - start).split(b"\n")  # the first may lack its beginning, the last its end
            whole = lines[bool(start) : -1]
            if whole or not start:
                return parse_line(whole[-1] + b"\n") if whole else None
            reach *= 4


def read_events(path: Path) -> list[dict[str, Any]]:
    """The events of `events.jsonl`; a line that a kill cut short is passed over."""
    if not path.exists():
        return []
    with open(path, "rb") as file:
        return [event for line in file if (event := parse_line(line)) is not None]


def _lines(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """(byte after the row, row) for each whole row, up to the first line that is none."""
    end = 0
    if not path.exists():
        return
    with open(path, "rb") as file:
        for line in file:
            row = parse_line(line)
            if row is None:
                return
            end += len(line)
            yield end, row


def parse_line(line: bytes) -> dict[str, Any] | None:
    """The object on a whole line, or None where it is none."""
    try:
        text = line.decode()
        row, end = DECODER.raw_decode(text) if text.endswith("\n") else (None, 0)
    except ValueError:
        return None
    return row if isinstance(row, dict) and not text[end:].strip() else None


class Record:
    """Writes a run's `metrics.jsonl` and `events.jsonl`."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.metrics = directory / "metrics.jsonl"
        self.file: IO[str] | None = None

    def cut(self, step: int) -> tuple[list[dict[str, Any]], int]:
        """Shorten the metrics to the rows 0 … `step` − 1, and return those and how many later ones went.

        Raises UserError, before anything is cut, where the file does not hold them.
        """
        lines = _lines(self.metrics)
        kept = list(itertools.islice(lines, step))
        rows, end = [row for _, row in kept], kept[-1][0] if kept else 0
        later = sum(1 for _ in lines)
        if [row["step"] for row in rows if is_number(row.get("train/loss")) and "step" in row] != list(range(step)):
            raise UserError(
                f"{self.metrics} does not hold the {step} steps of its checkpoint in order; "
                f"mend it, or remove {self.directory} to train anew."
            )
        if self.metrics.exists():
            os.truncate(self.metrics, end)
        return rows, later

    def write(self, row: dict[str, Any]) -> None:
        if self.file is None:
            self.file = open(self.metrics, "a", buffering=1)
        self.file.write(dumps(row) + "\n")

    def sync(self) -> None:
        """Wait until what was written is on disk, so that a checkpoint never runs ahead of its record."""
        if self.file is not None:
            self.file.flush()
            os.fsync(self.file.fileno())

    def event(self, kind: str, **facts: Any) -> None:
        """Add a line to `events.jsonl`: what happened, when (Unix seconds), and `facts`."""
        line = dumps({"event": kind, "time": round(time.time(), 3), **facts})
        with open(self.directory / "events.jsonl", "ab+") as file:
            if file.tell() and os.pread(file.fileno(), 1, file.tell() - 1) != b"\n":
                line = "\n" + line  # a kill cut the last line short
            file.write(line.encode() + b"\n")

    def close(self) -> None:
        if self.file is not None:
            self.file.close()
            self.file = None


def write_atomic(path: Path, text: str) -> None:
    """Replace a file at once: a reader sees the old text or the new one, and a full disk leaves the old."""
    scratch = path.with_name(f".{path.name}.{os.uname().nodename}.{os.getpid()}")
    try:
        scratch.write_text(text)
        os.replace(scratch, path)
    finally:
        scratch.unlink(missing_ok=True)
