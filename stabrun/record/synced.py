"""What W&B has of a run or a study: `wandb/sent.json`, beside W&B's own files, so that nothing is sent twice."""

import hashlib
import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from stabrun.config import TrackerConfig, UserError
from stabrun.record.jsonl import read_checked, write_checked
from stabrun.record.run_dir import RunDir
from stabrun.record.types import wrong_field

ONLINE, OFFLINE = "online", "offline"
FILE = "wandb/sent.json"  # not copied to the next attempt at a cell, whose offline run starts at the first row
SEND_AGAIN = "Delete it to send everything again."
BUFFER = 1 << 20


@dataclass(frozen=True)
class SyncState:
    """Where a directory was sent to, and what: the rows of steps below `steps`, and hashes.

    `sha256` is the hash of the record's first `size` bytes, which hold those rows.
    """

    mode: str
    entity: str | None
    project: str
    steps: int = 0
    size: int = 0
    sha256: str = hashlib.sha256().hexdigest()
    summary: str = ""
    figures: dict[str, str] = field(default_factory=dict)

    @staticmethod
    def load(directory: Path) -> "SyncState | None":
        """The saved state, if any. Raises UserError if it is damaged."""
        file = directory / FILE
        if not file.is_file():
            return None
        facts = read_checked(file, SEND_AGAIN)
        known = {item.name: facts[item.name] for item in fields(SyncState) if item.name in facts}  # of any version
        missing = [name for name in ("mode", "entity", "project") if name not in known]
        if wrong := missing[0] if missing else wrong_field(known, SyncState):
            raise UserError(f"{file} is damaged: {wrong} is {str(known.get(wrong))[:40]!r}. {SEND_AGAIN}")
        return SyncState(**known)

    @staticmethod
    def at(directory: Path, mode: str, tracker: TrackerConfig) -> "SyncState":
        """What the destination has: nothing if it is another one, or a server that never saw an offline run."""
        saved, empty = SyncState.load(directory), SyncState(mode, tracker.entity, tracker.project)
        if saved is None or (saved.entity, saved.project) != (empty.entity, empty.project):
            return empty
        return empty if (mode, saved.mode) == (ONLINE, OFFLINE) else saved

    def save(self, directory: Path) -> None:
        """Write the state. A mode that sends nothing, such as `disabled`, leaves no file."""
        if self.mode in (ONLINE, OFFLINE):
            (directory / FILE).parent.mkdir(exist_ok=True)
            write_checked(directory / FILE, asdict(self))


def holds_all(run: RunDir, mode: str) -> bool:
    """Whether W&B has all of a run's record and its summary, by the sizes and the hash that were noted."""
    try:
        state, summary = SyncState.load(run.path), run.summary()
    except UserError:  # of a damaged file, about which the upload has more to say
        return False
    if state is None or summary is None or (mode, state.mode) == (ONLINE, OFFLINE):
        return False
    size = run.metrics.stat().st_size if run.metrics.is_file() else 0
    return state.size == size and state.summary == digest(summary)


def forget(directory: Path) -> None:
    (directory / FILE).unlink(missing_ok=True)


def digest(value: Any) -> str:
    """A hash of plain data."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def file_digest(path: Path, size: int | None = None) -> str:
    """A hash of the first `size` bytes of a file, or of all of it. A missing file counts as empty."""
    total = hashlib.sha256()
    if path.is_file():
        left = path.stat().st_size if size is None else size
        with open(path, "rb") as file:
            while left > 0 and (part := file.read(min(BUFFER, left))):
                total.update(part)
                left -= len(part)
    return total.hexdigest()


def file_digests(files: Iterable[Path]) -> dict[str, str]:
    return {file.name: file_digest(file) for file in files}
