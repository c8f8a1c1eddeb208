"""The files of a run directory: `metrics.jsonl` is the truth, `events.jsonl` tells how it came about."""

import json
import math
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from stabrun.config import MistakeError


def dumps(row: dict[str, Any]) -> str:
    """A row as one line of valid JSON: numbers that are not finite become "nan", "inf" and "-inf"."""
    try:
        return json.dumps(row, allow_nan=False)
    except ValueError:
        return json.dumps(_named(row), allow_nan=False)


def _named(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, dict):
        return {key: _named(item) for key, item in value.items()}
    return [_named(item) for item in value] if isinstance(value, list) else value


def number(value: Any) -> float:
    """A recorded number, "nan", "inf" and "-inf" included; NaN for what is missing."""
    return float("nan") if value is None else float(value)


def read_rows(path: Path) -> Iterator[dict[str, Any]]:
    """The whole rows of a JSON-lines file; a last line that is still being written is left out."""
    for _, row in _lines(path):
        yield row


def _lines(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """(byte after the row, row) for each whole row, up to the first line that is none."""
    end = 0
    if not path.exists():
        return
    with open(path, "rb") as file:
        for line in file:
            try:
                row = json.loads(line) if line.endswith(b"\n") else None
            except ValueError:
                row = None
            if not isinstance(row, dict):
                return
            end += len(line)
            yield end, row


class Record:
    """Writes a run's `metrics.jsonl` and `events.jsonl`."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.metrics = directory / "metrics.jsonl"
        self.file: IO[str] | None = None

    def cut(self, step: int) -> list[dict[str, Any]]:
        """Shorten the metrics to the rows 0 … `step` − 1, and return those.

        Raises MistakeError, before anything is cut, where the file does not hold them.
        """
        end, rows = 0, list[dict[str, Any]]()
        for after, row in _lines(self.metrics):
            if len(rows) == step:
                break
            end = after
            rows.append(row)
        if [row.get("step") for row in rows] != list(range(step)):
            raise MistakeError(
                f"{self.metrics} does not hold the {step} steps of its checkpoint in order; "
                f"mend it, or remove {self.directory} to train anew."
            )
        if self.metrics.exists():
            os.truncate(self.metrics, end)
        return rows

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
        with open(self.directory / "events.jsonl", "a") as file:
            file.write(line + "\n")

    def close(self) -> None:
        if self.file is not None:
            self.file.close()
            self.file = None


def write_whole(path: Path, text: str) -> None:
    """Replace a file at once: a reader sees the old text or the new one, and a full disk leaves the old."""
    scratch = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        scratch.write_text(text)
        os.replace(scratch, path)
    finally:
        scratch.unlink(missing_ok=True)
