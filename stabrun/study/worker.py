"""A worker: takes cells of a study from its ledger and trains them, one after another, until none is left."""

import json
import shutil
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path

from stabrun.config import UserError
from stabrun.record.disk import REMEDIES
from stabrun.record.jsonl import checked, write_atomic
from stabrun.record.schema import INTERRUPTED, Row
from stabrun.study.ledger import DISK, LEASE, PLANNED, RUNNING, Claim, Ledger
from stabrun.study.plan import Plan
from stabrun.study.pool import stop_file
from stabrun.study.search import next_run
from stabrun.study.snapshot import SnapshotReader
from stabrun.text import masked, write_any_text
from stabrun.training.run import Watch, train
from stabrun.training.stop import WARNINGS, Stop, interrupt

HEARTBEATS = 6  # per lease
POLL = 0.5  # seconds between two readings of the ledger while all cells that are left have owners
COPIES = 5  # tries to copy an earlier attempt whose owner still writes


class LostError(Exception):
    """Another owner has taken the cell over."""


def work(directory: Path, lease: float = LEASE, stop: Stop | None = None) -> None:
    """Train the cells of the study in `directory` until each is done or given up, or until `stop` is asked for.

    Raises KeyboardInterrupt if it was stopped, after the current cell was checkpointed and given back.
    """
    reader, stop = SnapshotReader(directory, to_train=True), stop or Stop()
    reader.ledger.lease = lease
    while claim := next_claim(reader, stop):
        train_cell(reader.plan(), claim, stop)


def next_claim(reader: SnapshotReader, stop: Stop) -> Claim | None:
    """A cell for this worker, planned now if a search needs it. None if none is left.

    Waits while others are at work, because one of them may die, or its result may require another run.
    """
    last_seen: list[str] | None = None
    while not stop.asked:
        entries = reader.ledger.entries(reader.plan().cells)
        left = [cell for cell, entry in entries.items() if entry.status in (PLANNED, RUNNING)]
        for cell in sorted(left, key=lambda cell: entries[cell].status == RUNNING):
            if claim := reader.ledger.claim(cell, entries[cell]):
                return claim
        if left != last_seen:
            last_seen = left
            if plan_next(reader):
                continue
        if not left:
            return None
        time.sleep(POLL)
    return None


def plan_next(reader: SnapshotReader) -> bool:
    """Plan the run that a search needs next. False if it needs none now."""
    with reader.study.lock():
        snapshot = reader.read(attempts=False)
        run = next_run(snapshot.plan, snapshot.rows, snapshot.ended)
        if run:
            plan = replace(snapshot.plan, cells=dict(snapshot.plan.cells))
            plan.add(*run)
            plan.save(reader.study.path)
    return run is not None


def train_cell(plan: Plan, claim: Claim, stop: Stop) -> None:
    """Train one cell, from the checkpoint of an earlier attempt if there is one.

    An error is recorded in the ledger, and the worker continues, as it does if the cell was lost. Raises OSError if
    the disk is full or broken, which is no fault of the cell.
    """
    config = plan.config(plan.cells[claim.cell])
    try:
        _copy_previous(claim)
        with heartbeats(claim) as watch:
            summary = train(config, claim.directory, watch, stop)
    except LostError:
        return
    except KeyboardInterrupt:
        claim.end("left", "interrupted")
        raise
    except Exception as error:
        if isinstance(error, OSError) and error.errno in REMEDIES:
            with suppress(OSError):
                claim.end("left", f"{DISK}{error.filename or claim.directory}: {error.strerror}")
            raise
        claim.directory.mkdir(exist_ok=True)
        if not isinstance(error, UserError):
            (claim.directory / "error.txt").write_text(masked(traceback.format_exc()), encoding="utf-8")
        claim.end("failed", masked(f"{type(error).__name__}: {error}"))
        return
    if summary["status"] == INTERRUPTED:
        claim.end("left", "interrupted")
        raise KeyboardInterrupt
    claim.finish()
    for earlier in claim.ledger.study.attempts.glob(f"{claim.cell}.*"):
        shutil.rmtree(earlier, ignore_errors=True)


@contextmanager
def heartbeats(claim: Claim) -> Iterator[Watch]:
    """Write heartbeats while the block runs. Yields a watch of the rows that raises LostError if the cell is lost."""
    step, lost = 0, threading.Event()

    def heartbeat() -> None:
        with suppress(OSError):  # of a full disk: the run itself fails, or goes on once there is space
            if not claim.heartbeat(step):
                lost.set()

    def watch(row: Row) -> None:
        nonlocal step
        step = row["step"] + 1
        if lost.is_set():
            raise LostError

    try:
        with repeatedly(heartbeat, claim.ledger.lease / HEARTBEATS):
            yield watch
    finally:
        heartbeat()


@contextmanager
def registered(ledger: Ledger, pool: str, number: int) -> Iterator[Stop]:
    """Register as a worker of a launched pool while the block runs. Yields a stop that follows the pool's stop file."""
    claim, file, stop = Claim(ledger, pool, number), stop_file(ledger.study.path, pool), Stop()
    ledger.make()
    write_atomic(ledger.path(pool, number, "claim"), json.dumps(checked(ledger.owner)) + "\n")
    stop.asked = file.exists()

    def follow() -> None:
        stop.asked = stop.asked or file.exists()

    try:
        with heartbeats(claim), repeatedly(follow, 1.0):
            yield stop
    finally:
        claim.end("left", "it ended")


@contextmanager
def repeatedly(action: Callable[[], None], seconds: float) -> Iterator[None]:
    """Call `action` now and at this interval, in another thread, while the block runs."""
    over = threading.Event()

    def repeat() -> None:
        while not over.is_set():
            action()
            over.wait(seconds)

    thread = threading.Thread(target=repeat, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def _copy_previous(claim: Claim) -> None:
    """Copy record and checkpoints of the previous attempt, whose owner, if it was only paused, may still write."""
    previous = claim.previous()
    for _ in range(COPIES if previous else 0):
        shutil.rmtree(claim.directory, ignore_errors=True)
        try:
            shutil.copytree(previous or "", claim.directory, ignore=shutil.ignore_patterns("wandb", ".*", "error.txt"))
            return
        except (shutil.Error, OSError):
            time.sleep(0.1)
    shutil.rmtree(claim.directory, ignore_errors=True)


if __name__ == "__main__":
    import signal
    import sys

    # Ctrl-C in a terminal, and a warning of Slurm, reach the sweep as well, which ends its workers by SIGTERM: a second
    # Ctrl-C would stop them at once, without a checkpoint.
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, *WARNINGS})
    signal.signal(signal.SIGTERM, interrupt)
    for stream in (sys.stdout, sys.stderr):
        write_any_text(stream)
    try:
        work(Path(sys.argv[1]))
    except KeyboardInterrupt:
        sys.exit(130)
    except OSError as error:
        if error.errno not in REMEDIES:
            raise
        sys.exit(f"{error.filename}: {error.strerror}")
