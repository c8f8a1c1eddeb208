"""What W&B has been sent of a run or a study: `wandb/sent.json`, beside W&B's own files, so that nothing goes twice."""

import hashlib
import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from stabrun.config import TrackerConfig, UserError
from stabrun.record.jsonl import read_json, write_atomic

ONLINE, OFFLINE = "online", "offline"
FILE = "wandb/sent.json"  # a study's next attempt at a cell copies no `wandb/`: it begins anew, as its offline run does
BLOCK = 1 << 20


@dataclass(frozen=True)
class Sent:
    """How it went and where to: rows of steps below `steps`, in the record's first `size` bytes, of hash `sha256`."""

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
    """What was noted; UserError where the note is damaged."""
    file = directory / FILE
    if not file.is_file():
        return None
    try:
        return Sent(**read_json(file))
    except TypeError as error:
        raise UserError(f"{file} is damaged; without it everything is sent again.") from error


def known(directory: Path, mode: str, tracker: TrackerConfig) -> Sent:
    """What W&B has of a folder, there where it is to be sent. What only an offline run holds, no server has seen."""
    before, here = recall(directory), Sent(mode, tracker.entity, tracker.project)
    if before is None or (before.entity, before.project) != (here.entity, here.project):
        return here
    return here if (mode, before.mode) == (ONLINE, OFFLINE) else before


def digest(value: Any) -> str:
    """A hash of plain data."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def file_digest(path: Path, size: int | None = None) -> str:
    """A hash of the first `size` bytes of a file, or of all; of none where there is no file."""
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
