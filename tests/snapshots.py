"""Snapshots of studies that are made up."""

from helpers import TINY
from studies import asked

from stabrun.study.ledger import DONE, FAILED, PLANNED, RUNNING, Entry
from stabrun.study.snapshot import Snapshot

ENTRIES = {
    PLANNED: Entry(),
    RUNNING: Entry(frozenset({1})),
    DONE: Entry(frozenset({1}), done=True),
    FAILED: Entry({1, 2}, {1, 2}),
}


def a_plan(*words):
    """The plan of a study of two arms."""
    return asked(*TINY, "study.variants=[baseline,qk_norm]", *words)


def a_snapshot(plan, fates=(), running=()):
    """A study with the given verdict or status of cells, the others planned, and running attempts."""
    fates = dict(fates) | {attempt.cell.id: RUNNING for attempt in running}
    states = {cell: fate if (fate := fates.get(cell, PLANNED)) in ENTRIES else DONE for cell in plan.cells}
    summaries = {cell: {"verdict": fate} for cell, fate in fates.items() if fate not in ENTRIES}
    return Snapshot(plan, {cell: ENTRIES[state] for cell, state in states.items()}, summaries, list(running), {})


def timed(snapshot, times):
    """Give the finished runs 10 steps, in so many seconds."""
    for cell, seconds in times.items():
        snapshot.summaries[cell] |= {"steps": 10, "seconds": seconds}
    return snapshot
