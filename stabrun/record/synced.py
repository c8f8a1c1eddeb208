"""What was sent to W&B from a run or study: `wandb/sent.json`. It prevents sending data twice."""

import hashlib
import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from stabrun.config import TrackerConfig, UserError
from stabrun.record.jsonl import read_json, write_atomic

ONLINE, OFFLINE = "online", "offline"
FILE = "wandb/sent.json"  # not copied to the next attempt at a cell, which starts a new offline run
BLOCK = 1 << 20


@dataclass(frozen=True)
class Sent:
    """What was sent and where: the rows of steps below `steps`, in the first `size` bytes of the record."""

    mode: str
    entity: str | None
    project: str
    steps: int = 0
    size: int = 0
    sha256: str = hashlib.sha256().hexdigest()
    summary: str = ""
    figures: dict[str, str] = field(default_factory=dict)


def note(directory: Path, sent: Sent) -> None:
    (directory / FILE).parent.mkdir(exist_ok=True)
    write_atomic(directory / FILE, json.dumps(asdict(sent), indent=1) + "\n")


def forget(directory: Path) -> None:
    (directory / FILE).unlink(missing_ok=True)


def recall(directory: Path) -> Sent | None:
    """Read `sent.json`. Raises UserError if it is damaged."""
    file = directory / FILE
    if not file.is_file():
        return None
    try:
        return Sent(**read_json(file))
    except TypeError as error:
        raise UserError(f"{file} is damaged. Delete it to send everything again.") from error


def known(directory: Path, mode: str, tracker: TrackerConfig) -> Sent:
    """What the destination already has of a directory. Data in offline runs has not reached a server."""
    before, here = recall(directory), Sent(mode, tracker.entity, tracker.project)
    if before is None or (before.entity, before.project) != (here.entity, here.project):
        return here
    return here if (mode, before.mode) == (ONLINE, OFFLINE) else before


def digest(value: Any) -> str:
    """A hash of plain data."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def file_digest(path: Path, size: int | None = None) -> str:
    """A hash of the first `size` bytes of a file, by default all. A missing file counts as empty."""
    found = hashlib.sha256()
    if path.is_file():
        left = path.stat().st_size if size is None else size
        with open(path, "rb") as file:
            while left > 0 and (block := file.read(min(BLOCK, left))):
                found.update(block)
                left -= len(block)
    return found.hexdigest()


def digests(files: Iterable[Path]) -> dict[str, str]:
    return {file.name: file_digest(file) for file in files}
