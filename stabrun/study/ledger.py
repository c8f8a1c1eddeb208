"""Which worker trains which cell: leases on a shared POSIX disk, with takeover from dead owners and fencing.

Files below a study directory:
- `ledger/<cell>.<attempt>.claim`: an attempt and its owner. It is created by a hard link, so that only one of several
  claimants succeeds, on NFS too. The owner writes its heartbeat (step and time) to `….beat`.
- `ledger/<cell>.<attempt>.failed`: why an attempt failed. `….left`: the attempt ended without a fault of its own.
- `runs/<cell>`: the finished run. An attempt trains in `attempts/<cell>.<attempt>` and is renamed to `runs/<cell>` when
  it is finished. The rename makes the result count, and succeeds only once.

An owner is dead if its process no longer exists on this machine, or if its heartbeat has not changed for the length of
a lease, measured by the observer's clock. Clocks of different machines are never compared.
"""

import json
import os
import re
import socket
import time
import uuid
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from stabrun.config import UserError
from stabrun.record.jsonl import checked, read_checked, write_atomic
from stabrun.record.study_dir import StudyDir

PLANNED, RUNNING, DONE, FAILED = "planned", "running", "done", "failed"
ATTEMPTS = 2  # consecutive failures, or deaths without progress, after which a cell is given up
DISK = "the disk failed: "  # begins the reason of an attempt that was left because of it
LEASE = 60.0  # seconds without a heartbeat
NAME = re.compile(r"([0-9a-f]+)\.(\d+)\.(claim|failed|left)")


@dataclass(frozen=True)
class Entry:
    """The state of a cell: the numbers of attempts that were claimed, that failed, and that were left."""

    claim: frozenset[int] = frozenset()
    failed: frozenset[int] = frozenset()
    left: frozenset[int] = frozenset()
    done: bool = False

    def having(self, kind: str, attempt: int) -> "Entry":
        """The entry with one more attempt that was claimed, that failed, or that was left."""
        return replace(self, **{kind: getattr(self, kind) | {attempt}})

    @cached_property
    def attempt(self) -> int:
        return max(self.claim, default=0)

    @cached_property
    def status(self) -> str:
        if self.done:
            return DONE
        if self.attempt and self.attempt not in self.failed | self.left:
            return RUNNING
        return FAILED if set(range(self.attempt, self.attempt - ATTEMPTS, -1)) <= self.failed else PLANNED


def this_process() -> dict[str, Any]:
    """Identifies this process, even if its process id is reused later."""
    pid = os.getpid()
    return {"host": socket.gethostname(), "pid": pid, "born": _start_time(pid), "id": uuid.uuid4().hex[:8]}


def has_ended(owner: dict[str, Any]) -> bool:
    """Whether an owner's process is known to have ended. False for owners on other machines.

    An owner that names no process is that of a damaged claim, as a power cut may leave it: its process has ended, too.
    """
    host, pid, born = (owner.get(name) for name in ("host", "pid", "born"))
    if not isinstance(host, str) or not isinstance(pid, int):
        return True
    return host == socket.gethostname() and born is not None and born != _start_time(pid)


def _start_time(pid: int) -> str | None:
    """When a process of this machine started, in clock ticks since boot. None if it has ended, or without /proc.

    A zombie process has ended.
    """
    try:
        state, *fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
        return None if state in "ZX" else fields[18]
    except (OSError, ValueError, IndexError):
        return None


def _names(directory: Path) -> list[str]:
    """The names in a directory; empty if it does not exist."""
    try:
        return os.listdir(directory)
    except (FileNotFoundError, NotADirectoryError):
        return []


def _object(path: Path) -> dict[str, Any]:
    """The object in a JSON file; empty if the file is missing or damaged."""
    try:
        return read_checked(path)
    except (OSError, UserError):
        return {}


class Ledger:
    """One process's view of a study's ledger. Its directories are made by the first claim: reading writes nothing."""

    def __init__(self, directory: Path, lease: float = LEASE, clock: Callable[[], float] = time.monotonic) -> None:
        self.study = StudyDir(directory)
        self.lease, self.clock, self.owner = lease, clock, this_process()
        # (cell, attempt) → the last heartbeat, and when it was first seen
        self.heartbeats: dict[tuple[str, int], tuple[Any, float]] = {}
        self._seen: frozenset[tuple[str, bool]] = frozenset()  # names of the last listings, and whether of `runs/`
        self._entries: dict[str, Entry] = {}  # that those names make

    def make(self) -> None:
        """Make the directories of the ledger if they do not exist."""
        for folder in (self.study.ledger, self.study.runs, self.study.attempts):
            folder.mkdir(parents=True, exist_ok=True)

    def entries(self, cells: Iterable[str]) -> dict[str, Entry]:
        """The current state of each cell, from two directory listings. Only names that are new are looked at."""
        listings = (self.study.ledger, False), (self.study.runs, True)
        names = frozenset((name, done) for folder, done in listings for name in _names(folder))
        if not names >= self._seen:  # an attempt is retried, or a run reopened
            self._seen, self._entries = frozenset(), {}
        for name, done in names - self._seen:
            match = None if done else NAME.fullmatch(name)
            if match:
                self._entries[match[1]] = self._entries.get(match[1], Entry()).having(match[3], int(match[2]))
            elif done:
                self._entries[name] = replace(self._entries.get(name, Entry()), done=True)
        self._seen, nothing = names, Entry()
        return {cell: self._entries.get(cell, nothing) for cell in cells}

    def claim(self, cell: str, entry: Entry) -> "Claim | None":
        """The next attempt at a cell that is planned or whose owner is dead; None if another process has it.

        A death counts as a failure if the attempt got no further than the previous one.
        """
        if entry.status == RUNNING:
            if self.is_alive(cell, entry.attempt):
                return None
            progressed = self.step(cell, entry.attempt) > self.step(cell, entry.attempt - 1)
            self.end(cell, entry.attempt, "left" if progressed else "failed", "its owner died")
            entry = entry.having("left" if progressed else "failed", entry.attempt)
        if entry.status != PLANNED:
            return None
        attempt = entry.attempt + 1
        self.make()
        scratch = self.study.ledger / f".{self.owner['id']}"
        with open(scratch, "w", encoding="utf-8") as file:
            file.write(json.dumps(checked(self.owner)) + "\n")
            file.flush()
            os.fsync(file.fileno())
        try:
            os.link(scratch, self.path(cell, attempt, "claim"))
        except FileExistsError:
            return None
        finally:
            scratch.unlink()
        return Claim(self, cell, attempt)

    def is_alive(self, cell: str, attempt: int) -> bool:
        """Whether the owner of an attempt still works on it, as far as can be known."""
        if has_ended(self.owner_of(cell, attempt)):
            return False
        heartbeat, now = self.heartbeat(cell, attempt), self.clock()
        last, since = self.heartbeats.setdefault((cell, attempt), (heartbeat, now))
        if heartbeat != last:
            self.heartbeats[cell, attempt] = (heartbeat, now)
            return True
        return now - since < self.lease

    def owner_of(self, cell: str, attempt: int) -> dict[str, Any]:
        """The process that claimed an attempt; empty if the claim is damaged."""
        return _object(self.path(cell, attempt, "claim"))

    def heartbeat(self, cell: str, attempt: int) -> dict[str, Any]:
        """The last heartbeat of an attempt, with its `step`; empty if there is none."""
        return _object(self.path(cell, attempt, "beat"))

    def reason(self, cell: str, attempt: int, kind: str = "failed") -> str:
        """Why an attempt failed, or was left."""
        return str(_object(self.path(cell, attempt, kind)).get("reason", "unknown reason"))

    def end(self, cell: str, attempt: int, kind: str, reason: str) -> None:
        """Record that an attempt ended: `kind` is `failed` or `left`."""
        write_atomic(self.path(cell, attempt, kind), json.dumps(checked({"reason": reason})) + "\n")

    def retry_failed(self, cells: Iterable[str]) -> None:
        """Forget the failures of the cells that are not done: they may be tried as often as new ones."""
        for cell, entry in self.entries(cells).items():
            for attempt in () if entry.done else entry.failed:
                self.path(cell, attempt, "failed").rename(self.path(cell, attempt, "left"))

    def reopen(self, cell: str, attempt: int) -> None:
        """Turn a finished run back into an attempt that was left, from which the next attempt resumes.

        One that no attempt is known of, as in a copy without its ledger, becomes the first.
        """
        if not attempt:
            attempt = 1
            self.make()
            write_atomic(self.path(cell, attempt, "claim"), json.dumps(checked(self.owner)) + "\n")
        self.end(cell, attempt, "left", "its end is no longer valid")
        os.rename(self.study.run(cell).path, self.study.attempt(cell, attempt).path)

    def step(self, cell: str, attempt: int) -> int:
        """The updates of an attempt by its last heartbeat; 0 if there is none."""
        step = self.heartbeat(cell, attempt).get("step", 0)
        return step if isinstance(step, int) else 0

    def path(self, cell: str, attempt: int, kind: str) -> Path:
        return self.study.ledger / f"{cell}.{attempt:04d}.{kind}"


@dataclass(frozen=True)
class Claim:
    """An attempt at a cell that this process owns until another process takes the cell over."""

    ledger: Ledger
    cell: str
    attempt: int

    @property
    def directory(self) -> Path:
        """Where the attempt trains."""
        return self.ledger.study.attempt(self.cell, self.attempt).path

    def heartbeat(self, step: int) -> bool:
        """Record that this attempt is alive and has done `step` updates. False if the cell has been taken over."""
        facts = {"step": step, "beat": time.time()}
        write_atomic(self.ledger.path(self.cell, self.attempt, "beat"), json.dumps(checked(facts)))
        return not self.is_lost()

    def is_lost(self) -> bool:
        """Whether a later attempt was claimed."""
        return self.ledger.path(self.cell, self.attempt + 1, "claim").exists()

    def finish(self) -> bool:
        """Make the attempt's directory the cell's run. False if the cell was taken over or is finished already."""
        if self.is_lost():
            return False
        run = self.ledger.study.run(self.cell).path
        try:
            os.rename(self.directory, run)
        except OSError:  # the target exists and is not empty
            if not run.is_dir():
                raise
            return False
        return True

    def end(self, kind: str, reason: str) -> None:
        """Record that the attempt `failed`, or was `left`, as after Ctrl-C."""
        self.ledger.end(self.cell, self.attempt, kind, reason)

    def previous(self) -> Path | None:
        """The directory of the latest earlier attempt that left one."""
        earlier = (self.ledger.study.attempt(self.cell, n).path for n in range(self.attempt - 1, 0, -1))
        return next((directory for directory in earlier if directory.is_dir()), None)
