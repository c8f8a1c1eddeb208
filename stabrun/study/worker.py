"""A worker: takes cells of a study from its ledger, trains each, and goes on until none is left."""

import itertools
import json
import shutil
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from stabrun.config import UserError
from stabrun.record.jsonl import write_atomic
from stabrun.record.schema import INTERRUPTED, Row, Summary
from stabrun.record.study_dir import StudyDir
from stabrun.study.ledger import DONE, FAILED, LEASE, PLANNED, RUNNING, Claim, Ledger
from stabrun.study.plan import Plan, load
from stabrun.study.pool import stop_file
from stabrun.study.results import finished
from stabrun.study.search import next_run
from stabrun.training.run import Stop, Watch, train

BEATS = 6  # in a lease
POLL = 0.5  # seconds between two looks, where all cells that are left have owners
COPIES = 5  # attempts at a copy, where the owner that lost the cell still writes


class LostError(Exception):
    """Another owner has taken the cell over."""


def work(directory: Path, lease: float = LEASE, stop: Stop | None = None) -> None:
    """Train the cells of the study in `directory` until each is done or given up, or `stop` is asked for.

    Raises KeyboardInterrupt when it was stopped and the cell at hand has its checkpoint and is given back.
    """
    ledger, stop = Ledger(directory, lease), stop or Stop()
    while claim := _next(ledger, directory, stop):
        attempt(load(directory, to_train=True), claim, stop)


def _next(ledger: Ledger, directory: Path, stop: Stop) -> Claim | None:
    """A cell for this worker, planned now where a search needs it; None where none is left.

    Waits while others are at work, for one of them may die, or end in a way that asks for more.
    """
    looked_at: list[str] | None = None
    while not stop.asked:
        plan = load(directory)
        entries = ledger.entries(plan.cells)
        left = [cell for cell, entry in entries.items() if entry.status in (PLANNED, RUNNING)]
        for cell in sorted(left, key=lambda cell: entries[cell].status == RUNNING):
            if claim := ledger.claim(cell, entries[cell]):
                return claim
        if left != looked_at:
            looked_at = left
            if grow(ledger, directory):
                continue
        if not left:
            return None
        time.sleep(POLL)
    return None


def grow(ledger: Ledger, directory: Path) -> bool:
    """Plan the run that a search needs next. False where it needs none now."""
    with StudyDir(directory).lock():
        plan = load(directory, to_train=True)
        entries = ledger.entries(plan.cells)
        ended = {cell for cell, entry in entries.items() if entry.status in (DONE, FAILED)}
        run = next_run(plan, list(finished(plan, directory)), ended)
        if run:
            plan.add(*run)
            plan.save(directory)
    return run is not None


def attempt(plan: Plan, claim: Claim, stop: Stop) -> Summary | None:
    """Train one cell, from where an earlier attempt came to; its summary, or None where it failed or was lost.

    What goes wrong ends in the ledger, and the worker goes on.
    """
    config = plan.config(plan.cells[claim.cell])
    try:
        _go_on_from_before(claim)
        with beating(claim) as watch:
            summary = train(config, claim.directory, watch, stop)
    except LostError:
        return None
    except KeyboardInterrupt:
        claim.leave("interrupted")
        raise
    except Exception as error:
        claim.directory.mkdir(exist_ok=True)
        if not isinstance(error, UserError):
            (claim.directory / "error.txt").write_text(traceback.format_exc())
        claim.fail(f"{type(error).__name__}: {error}")
        return None
    if summary["status"] == INTERRUPTED:
        claim.leave("interrupted")
        raise KeyboardInterrupt
    counted = claim.finish()
    for earlier in claim.ledger.attempts.glob(f"{claim.cell}.*"):
        shutil.rmtree(earlier, ignore_errors=True)
    return summary if counted else None


@contextmanager
def beating(claim: Claim) -> Iterator[Watch]:
    """Beat for the claim while the block runs; what is given watches the rows, and raises LostError once it is lost."""
    step, lost = 0, threading.Event()

    def beat() -> None:
        if not claim.beat(step):
            lost.set()

    def watch(row: Row) -> None:
        nonlocal step
        step = row["step"] + 1
        if lost.is_set():
            raise LostError

    try:
        with meanwhile(beat, claim.ledger.lease / BEATS):
            yield watch
    finally:
        claim.beat(step)


@contextmanager
def enrolled(ledger: Ledger, crew: str, number: int) -> Iterator[Stop]:
    """Beat as a launched crew's worker while the block runs; what is given is asked to stop where the crew is."""
    place, told, stop = Claim(ledger, crew, number), stop_file(ledger.folder.parent, crew), Stop()
    ledger.make()
    write_atomic(ledger.path(crew, number, "claim"), json.dumps(ledger.owner) + "\n")
    stop.asked = told.exists()
    seconds = itertools.count()

    def look() -> None:
        second = next(seconds)
        if second % round(ledger.lease / BEATS) == 0:
            place.beat(second)
        stop.asked = stop.asked or told.exists()

    try:
        with meanwhile(look, 1.0):
            yield stop
    finally:
        place.leave("it ended")


@contextmanager
def meanwhile(action: Callable[[], None], seconds: float) -> Iterator[None]:
    """Call `action` at once and then every so many seconds, from another thread, while the block runs."""
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


def _go_on_from_before(claim: Claim) -> None:
    """Copy what the attempt before left: record and checkpoint. Its owner may still write, where it was only paused."""
    before = claim.before()
    for _ in range(COPIES if before else 0):
        shutil.rmtree(claim.directory, ignore_errors=True)
        try:
            shutil.copytree(before or "", claim.directory, ignore=shutil.ignore_patterns("wandb", ".*", "error.txt"))
            return
        except (shutil.Error, OSError):
            time.sleep(0.1)
    shutil.rmtree(claim.directory, ignore_errors=True)


if __name__ == "__main__":
    import signal
    import sys

    # Ctrl-C in a terminal reaches the sweep as well, which ends its workers by SIGTERM: a second signal would have them
    # stop at once, without a checkpoint.
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        work(Path(sys.argv[1]))
    except KeyboardInterrupt:
        sys.exit(130)
