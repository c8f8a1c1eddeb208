"""Who trains which cell: leases on a shared POSIX disk, taken over from the dead, with fences against the late.

Below a study's folder:
- `ledger/<cell>.<attempt>.claim`: an attempt and its owner. It appears by a hard link, so that one of two who want it
  gets it, on NFS too. The owner writes its step and the time into `….beat` now and then.
- `ledger/<cell>.<attempt>.failed`: why an attempt failed; `….left` where it ended without fault of its own.
- `runs/<cell>`: the finished run. An attempt trains in `attempts/<cell>.<attempt>` and is renamed to it: the rename is
  what makes a result count, and it can be done once.

An owner is dead when its process is gone from this machine, or its beat has not changed for a lease by the watcher's
own clock: clocks of several machines are never compared.
"""

import json
import os
import re
import socket
import time
import uuid
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from stabrun.record.jsonl import write_atomic
from stabrun.record.study_dir import StudyDir

PLANNED, RUNNING, DONE, FAILED = "planned", "running", "done", "failed"
ATTEMPTS = 2  # a cell that fails, or kills its worker, so often in a row without getting further is given up
LEASE = 60.0  # seconds without a beat
NAME = re.compile(r"([0-9a-f]+)\.(\d+)\.(claim|failed|left)")


@dataclass
class Entry:
    """What the ledger knows of a cell: which attempts were claimed, which of them failed, which were left."""

    claim: set[int] = field(default_factory=set)
    failed: set[int] = field(default_factory=set)
    left: set[int] = field(default_factory=set)
    done: bool = False

    @property
    def attempt(self) -> int:
        return max(self.claim, default=0)

    @property
    def status(self) -> str:
        if self.done:
            return DONE
        if self.attempt and self.attempt not in self.failed | self.left:
            return RUNNING
        return FAILED if set(range(self.attempt, self.attempt - ATTEMPTS, -1)) <= self.failed else PLANNED


def this_process() -> dict[str, Any]:
    """Names a process beyond the reuse of its number."""
    return {"host": socket.gethostname(), "pid": os.getpid(), "born": _born(os.getpid()), "id": uuid.uuid4().hex[:8]}


def gone(owner: dict[str, Any]) -> bool:
    """Whether an owner's process has ended, as far as this machine knows: False for those of another one."""
    return owner.get("host") == socket.gethostname() and owner.get("born") not in (None, _born(int(owner["pid"])))


def _born(pid: int) -> str | None:
    """When a process of this machine started, in clock ticks since the boot; None where there is none or no /proc.

    One that has ended and that its parent has not yet taken note of is none.
    """
    try:
        state, *facts = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
        return None if state in "ZX" else facts[18]
    except (OSError, ValueError, IndexError):
        return None


def _names(folder: Path) -> list[str]:
    """What a folder holds; nothing where there is none yet."""
    try:
        return os.listdir(folder)
    except FileNotFoundError:
        return []


class Ledger:
    """One process's view of a study's ledger. Its folders are made by the first claim: looking writes nothing."""

    def __init__(self, directory: Path, lease: float = LEASE, clock: Callable[[], float] = time.monotonic) -> None:
        self.study = study = StudyDir(directory)
        self.folder, self.runs, self.attempts = study.ledger, study.runs, study.attempts
        self.lease, self.clock, self.owner = lease, clock, this_process()
        self.seen: dict[tuple[str, int], tuple[str, float]] = {}  # the last beat of an attempt, and since when

    def make(self) -> None:
        """Make the ledger's folders, if they are not there."""
        for folder in (self.folder, self.runs, self.attempts):
            folder.mkdir(parents=True, exist_ok=True)

    def entries(self, cells: Iterable[str]) -> dict[str, Entry]:
        """What is known of each cell now, from two lists of names."""
        known = {cell: Entry() for cell in cells}
        for name in _names(self.folder):
            found = NAME.fullmatch(name)
            if found and found[1] in known:
                entry = known[found[1]]
                getattr(entry, found[3]).add(int(found[2]))
        for cell in _names(self.runs):
            if cell in known:
                known[cell].done = True
        return known

    def claim(self, cell: str, entry: Entry) -> "Claim | None":
        """The next attempt at a cell that is planned, or whose owner is dead; None where it is not to be had.

        A death counts as a failure where the attempt got no further than the one before it.
        """
        if entry.status == RUNNING:
            if self.alive(cell, entry.attempt):
                return None
            further = self._step(cell, entry.attempt) > self._step(cell, entry.attempt - 1)
            self.end(cell, entry.attempt, "left" if further else "failed", "its owner died")
            (entry.left if further else entry.failed).add(entry.attempt)
        if entry.status != PLANNED:
            return None
        attempt = entry.attempt + 1
        self.make()
        scratch = self.folder / f".{self.owner['id']}"
        scratch.write_text(json.dumps(self.owner) + "\n")
        try:
            os.link(scratch, self.path(cell, attempt, "claim"))
        except FileExistsError:
            return None
        finally:
            scratch.unlink()
        return Claim(self, cell, attempt)

    def alive(self, cell: str, attempt: int) -> bool:
        """Whether the owner of an attempt still works at it, as far as can be known."""
        if gone(self.owner_of(cell, attempt)):
            return False
        beat, now = self._beat(cell, attempt), self.clock()
        last, since = self.seen.setdefault((cell, attempt), (beat, now))
        if beat != last:
            self.seen[cell, attempt] = (beat, now)
            return True
        return now - since < self.lease

    def owner_of(self, cell: str, attempt: int) -> dict[str, Any]:
        owner: dict[str, Any] = json.loads(self.path(cell, attempt, "claim").read_text())
        return owner

    def progress(self, cell: str, attempt: int) -> dict[str, Any]:
        """What the owner of an attempt last said of it; empty where it has said nothing."""
        beat = self._beat(cell, attempt)
        return json.loads(beat) if beat else {}

    def end(self, cell: str, attempt: int, kind: str, reason: str) -> None:
        """Enter that an attempt failed, or was left."""
        write_atomic(self.path(cell, attempt, kind), json.dumps({"reason": reason}) + "\n")

    def reason(self, cell: str, attempt: int) -> str:
        """Why an attempt failed."""
        return str(json.loads(self.path(cell, attempt, "failed").read_text())["reason"])

    def forgive(self, cells: Iterable[str]) -> None:
        """Plan cells again that were given up, because somebody asks for them anew."""
        for cell, entry in self.entries(cells).items():
            if entry.status == FAILED:
                self.path(cell, entry.attempt, "failed").rename(self.path(cell, entry.attempt, "left"))

    def reopen(self, cell: str, attempt: int) -> None:
        """Make a finished run an attempt that was left, which the next one goes on from."""
        self.end(cell, attempt, "left", "its end no longer stands")
        os.rename(self.runs / cell, self.place(cell, attempt))

    def _step(self, cell: str, attempt: int) -> int:
        return int(self.progress(cell, attempt).get("step", 0))

    def _beat(self, cell: str, attempt: int) -> str:
        try:
            return self.path(cell, attempt, "beat").read_text()
        except FileNotFoundError:
            return ""

    def path(self, cell: str, attempt: int, kind: str) -> Path:
        return self.folder / f"{cell}.{attempt:04d}.{kind}"

    def place(self, cell: str, attempt: int) -> Path:
        """Where an attempt trains."""
        return self.study.attempt(cell, attempt).path


@dataclass(frozen=True)
class Claim:
    """An attempt at a cell that this process owns, as long as nobody took it over."""

    ledger: Ledger
    cell: str
    attempt: int

    @property
    def directory(self) -> Path:
        return self.ledger.place(self.cell, self.attempt)

    def beat(self, step: int) -> bool:
        """Say that this attempt is alive and has done `step` updates. False where another owner has taken it over."""
        write_atomic(self.ledger.path(self.cell, self.attempt, "beat"), json.dumps({"step": step, "beat": time.time()}))
        return not self.stale()

    def stale(self) -> bool:
        """Whether a later attempt was claimed."""
        return self.ledger.path(self.cell, self.attempt + 1, "claim").exists()

    def finish(self) -> bool:
        """Make the attempt's directory the cell's run. False where another attempt has done so before, or may now."""
        if self.stale():
            return False
        try:
            os.rename(self.directory, self.ledger.runs / self.cell)
        except OSError:  # it is there already, and not empty
            if not (self.ledger.runs / self.cell).is_dir():
                raise
            return False
        return True

    def fail(self, reason: str) -> None:
        self.ledger.end(self.cell, self.attempt, "failed", reason)

    def leave(self, reason: str) -> None:
        """Give the cell back, as Ctrl-C does."""
        self.ledger.end(self.cell, self.attempt, "left", reason)

    def before(self) -> Path | None:
        """The directory of the attempt that came last before this one and left anything to go on from."""
        earlier = (self.ledger.place(self.cell, n) for n in range(self.attempt - 1, 0, -1))
        return next((directory for directory in earlier if directory.is_dir()), None)
