"""JSON and JSON lines on disk: numbers that are not finite, incomplete lines, atomic replacement."""

import json
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from stabrun.config import UserError
from stabrun.record.disk import writing

DECODER = json.JSONDecoder()
TAIL = 1 << 16  # bytes read from the end of a file to find its last line


class Line(NamedTuple):
    """A line of a file: its JSON object (None if it is not one), whether it is terminated, and the byte after it."""

    value: dict[str, Any] | None
    terminated: bool
    end: int


def dumps(value: Any) -> str:
    """Valid JSON on one line."""
    try:
        return json.dumps(value, allow_nan=False)
    except ValueError:
        return json.dumps(jsonable(value), allow_nan=False)


def jsonable(value: Any) -> Any:
    """A value for JSON: numbers in it that are not finite become "nan", "inf" and "-inf"."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, dict):
        return {key: jsonable(item) for key, item in value.items()}
    return [jsonable(item) for item in value] if isinstance(value, list) else value


def is_number(value: Any) -> bool:
    """Whether `value` is a recorded number, "nan", "inf" and "-inf" included."""
    return (isinstance(value, (int, float)) and not isinstance(value, bool)) or value in ("nan", "inf", "-inf")


def number(value: Any) -> float:
    """A recorded number as a float; NaN for a missing one."""
    return float("nan") if value is None else float(value)


def parse_line(line: bytes) -> dict[str, Any] | None:
    """The object on a terminated line; None if there is none."""
    try:
        text = line.decode()
        value, end = DECODER.raw_decode(text) if text.endswith("\n") else (None, 0)
    except ValueError:
        return None
    return value if isinstance(value, dict) and not text[end:].strip() else None


def read_lines(path: Path) -> Iterator[Line]:
    """Every line of a JSON-lines file; none if the file does not exist."""
    end = 0
    try:
        file = open(path, "rb")
    except FileNotFoundError:
        return
    with file:
        for line in file:
            end += len(line)
            yield Line(parse_line(line), line.endswith(b"\n"), end)


def read_last(path: Path) -> dict[str, Any] | None:
    """The object on the last terminated line of a JSON-lines file; None if there is none. Reads the end only."""
    if not path.exists():
        return None
    with open(path, "rb") as file:
        size, reach = file.seek(0, os.SEEK_END), TAIL
        while True:
            start = max(0, size - reach)
            file.seek(start)
            lines = file.read(size - start).split(b"\n")  # the first may lack its beginning, the last its end
            terminated = lines[bool(start) : -1]
            if terminated or not start:
                return parse_line(terminated[-1] + b"\n") if terminated else None
            reach *= 4


def append_line(path: Path, value: Any) -> None:
    """Add a line to a JSON-lines file; an incomplete last line, left by a kill, is terminated first."""
    with writing(path), open(path, "ab+") as file:
        incomplete = file.tell() and os.pread(file.fileno(), 1, file.tell() - 1) != b"\n"
        file.write(b"\n" * bool(incomplete) + dumps(value).encode() + b"\n")


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises UserError if the file holds none."""
    try:
        value = json.loads(path.read_bytes())
    except ValueError:
        value = None
    if not isinstance(value, dict):
        raise UserError(f"{path} is damaged: not a JSON object.")
    return value


def write_json(path: Path, value: Any) -> None:
    write_atomic(path, json.dumps(value, indent=1) + "\n")


def write_atomic(path: Path, content: str | bytes) -> None:
    """Replace a file in one step: readers see the old content or the new, and a full disk leaves the old."""
    scratch = path.with_name(f".{path.name}.{os.uname().nodename}.{os.getpid()}")
    try:
        with writing(path):
            scratch.write_bytes(content.encode() if isinstance(content, str) else content)
        os.replace(scratch, path)
    finally:
        if scratch.exists():
            scratch.unlink()
