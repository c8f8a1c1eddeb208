"""JSON and JSON lines on disk: numbers that are not finite, incomplete lines, checksums, atomic replacement.

A line that stabrun writes ends with `"crc": N`, the CRC-32 of the bytes before it. A file that it writes as a whole has
the field `check`, the SHA-256 sum of its other fields as JSON with sorted keys, or begins with the comment `# check:
SUM`, the sum of the text below it. Content that does not fit its checksum is damaged. Earlier versions wrote none.
"""

import hashlib
import json
import math
import os
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, NamedTuple

from stabrun.config import UserError
from stabrun.record.disk import writing

DECODER = json.JSONDecoder()
TAIL = 1 << 16  # bytes read from the end of a file to find its last line
LONGEST = 1 << 24  # bytes of a line: a longer one is damaged, and is not kept in memory
LARGEST = 1 << 27  # bytes of a JSON file
LARGE = 2**1000  # an integer from there on is no number of a record: not all of them are floats
CRC, CHECK, CHECK_LINE = ', "crc": ', "check", "# check: "


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
    kind = type(value)
    return kind is float or (kind is int and abs(value) < LARGE) or (kind is str and value in ("nan", "inf", "-inf"))


def number(value: Any) -> float:
    """A recorded number as a float; NaN for a missing one."""
    return float("nan") if value is None else float(value)


def sealed(line: str) -> str:
    """The JSON of an object that is not empty, on one line, with its checksum."""
    return f"{line[:-1]}{CRC}{zlib.crc32(line[:-1].encode())}}}"


def parse_line(line: bytes) -> dict[str, Any] | None:
    """The object on a terminated line, without its checksum; None if there is none, or if it does not fit."""
    try:
        text = line.decode()
        value, end = DECODER.raw_decode(text) if text.endswith("\n") else (None, 0)
    except (ValueError, RecursionError):
        return None
    if not isinstance(value, dict) or text[end:].strip():
        return None
    if is_sealed(line):
        if line.rstrip(b"\r\n") != sealed(text.rpartition(CRC)[0] + "}").encode():
            return None
        del value["crc"]
    return value


def is_sealed(line: bytes) -> bool:
    return CRC.encode() in line


def read_lines(path: Path) -> Iterator[Line]:
    """Every line of a JSON-lines file; none if the file does not exist.

    Once a line had a checksum, the later ones must have one.
    """
    end, with_sums = 0, False
    try:
        file = open(path, "rb")
    except FileNotFoundError:
        return
    with file:
        while line := file.readline(LONGEST):
            end += len(line)
            if len(line) == LONGEST and line[-1:] != b"\n":
                last = line
                while last[-1:] != b"\n" and (last := file.readline(LONGEST)):
                    end += len(last)
                yield Line(None, last[-1:] == b"\n", end)
                continue
            value = parse_line(line)
            if value is not None and with_sums and not is_sealed(line):
                value = None
            with_sums = with_sums or (value is not None and is_sealed(line))
            yield Line(value, line.endswith(b"\n"), end)


def read_last(path: Path) -> dict[str, Any] | None:
    """The object on the last terminated line of a JSON-lines file; None if there is none. Reads the end only.

    Raises UserError if the line is damaged.
    """
    if not path.exists():
        return None
    with open(path, "rb") as file:
        size, reach = file.seek(0, os.SEEK_END), TAIL
        while True:
            start = max(0, size - reach)
            file.seek(start)
            lines = file.read(size - start).split(b"\n")  # the first may lack its beginning, the last its end
            terminated = lines[bool(start) : -1]
            if not terminated and not start:
                return None
            if terminated or reach > LONGEST:
                value = parse_line(terminated[-1] + b"\n") if terminated else None
                if value is None:
                    raise UserError(f"{path} is damaged: its last line is not as it was written.")
                return value
            reach *= 4


def append_line(path: Path, value: Any) -> None:
    """Add a line to a JSON-lines file; an incomplete last line, left by a kill, is terminated first."""
    with writing(path), open(path, "ab+") as file:
        end_last_line(file)
        file.write(sealed(dumps(value)).encode() + b"\n")


def end_last_line(file: IO[bytes]) -> None:
    """Terminate an incomplete last line of a file opened for appending and reading."""
    if file.tell() and os.pread(file.fileno(), 1, file.tell() - 1) != b"\n":
        file.write(b"\n")


def read_json(path: Path, way_on: str = "") -> dict[str, Any]:
    """The object in a JSON file. Raises UserError, which ends with `way_on`, if the file holds none."""
    try:
        value = json.loads(path.read_bytes()) if path.stat().st_size <= LARGEST else None
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        raise UserError(f"{path} is damaged: not a JSON object.{gap(way_on)}")
    return value


def gap(way_on: str) -> str:
    return f" {way_on}" if way_on else ""


def read_checked(path: Path, way_on: str = "") -> dict[str, Any]:
    """What `write_checked` wrote, or an earlier version without a checksum. Raises UserError if it is damaged."""
    value = read_json(path, way_on)
    if CHECK in value and value.pop(CHECK) != check_of(value):
        raise UserError(f"{path} is damaged: its content does not fit its checksum.{gap(way_on)}")
    return value


def write_checked(path: Path, value: dict[str, Any]) -> None:
    write_json(path, checked(value))


def checked(value: dict[str, Any]) -> dict[str, Any]:
    """An object with its checksum."""
    return value | {CHECK: check_of(value)}


def check_of(value: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def checked_text(text: str) -> str:
    """A text whose comments begin with `#`, after a line with its checksum: the end of a file is lost more often."""
    return f"{CHECK_LINE}{hashlib.sha256(text.encode()).hexdigest()}\n{text}"


def check_text(path: Path, way_on: str) -> None:
    """Raise UserError if a file that was written as a `checked_text` is damaged; one without a checksum is not."""
    content = path.read_bytes()
    if content.startswith(CHECK_LINE.encode()):
        text = content.partition(b"\n")[2].decode(errors="replace")
        if checked_text(text).encode() != content:
            raise UserError(f"{path} is damaged: its content does not fit its checksum. {way_on}")


def write_json(path: Path, value: Any) -> None:
    write_atomic(path, json.dumps(value, indent=1) + "\n")


def write_atomic(path: Path, content: str | bytes) -> None:
    """Replace a file in one step: readers see the old content or the new, and a full disk leaves the old."""
    scratch = path.with_name(f".{path.name}.{os.uname().nodename}.{os.getpid()}")
    try:
        scratch.unlink(missing_ok=True)  # of a process that died; a link there would lead elsewhere
        with writing(path), open(scratch, "xb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
        os.replace(scratch, path)
    finally:
        if scratch.exists():
            scratch.unlink()
