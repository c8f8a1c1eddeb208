"""The ledger with real processes: killed, stopped past their lease, and many at once."""

import itertools
import os
import signal
import subprocess
import sys
import time

import pytest

from stabrun.study.ledger import DONE, FAILED, PLANNED, RUNNING, Ledger

CELLS = [f"{i:012x}" for i in range(40)]

WORKER = """
import sys, time
from pathlib import Path
from stabrun.study.ledger import Ledger

ledger, cells, name = Ledger(Path(sys.argv[1])), sys.argv[3:], sys.argv[2]
for cell in cells:
    entry = ledger.entries([cell])[cell]
    if claim := ledger.claim(cell, entry):
        claim.directory.mkdir()
        (claim.directory / "by").write_text(name)
        claim.heartbeat(1)
        assert claim.finish()
        print(cell, flush=True)
"""

HOLDER = """
import sys, time
from pathlib import Path
from stabrun.study.ledger import Ledger

ledger, cell = Ledger(Path(sys.argv[1])), sys.argv[2]
claim = ledger.claim(cell, ledger.entries([cell])[cell])
claim.directory.mkdir()
(claim.directory / "by").write_text("the first")
step = 0
print("held", flush=True)
while True:
    step += 1
    ending = (Path(sys.argv[1]) / "end").exists()  # looked at first: the signal may stop the process anywhere
    mine = claim.heartbeat(step)
    if ending:
        print(mine, claim.finish(), flush=True)
        break
    time.sleep(0.02)
"""


def process(code, *words):
    return subprocess.Popen([sys.executable, "-c", code, *map(str, words)], stdout=subprocess.PIPE, text=True)


def status(ledger, cell=CELLS[0]):
    return ledger.entries([cell])[cell].status


def claimed(ledger, cell=CELLS[0]):
    return ledger.claim(cell, ledger.entries([cell])[cell])


def finished(claim, by):
    claim.directory.mkdir()
    (claim.directory / "by").write_text(by)
    return claim.finish()


def test_concurrent_workers_claim_each_cell_once(tmp_path):
    workers = [process(WORKER, tmp_path, name, *CELLS) for name in range(4)]
    claimed = [worker.communicate(timeout=60)[0].split() for worker in workers]
    assert [worker.returncode for worker in workers] == [0] * 4
    assert sorted(itertools.chain(*claimed)) == CELLS
    for name, cells in enumerate(claimed):
        assert all((tmp_path / "runs" / cell / "by").read_text() == str(name) for cell in cells)
    assert {entry.status for entry in Ledger(tmp_path).entries(CELLS).values()} == {DONE}


def test_a_killed_owner_is_dead_at_once(tmp_path):
    holder, ledger = process(HOLDER, tmp_path, CELLS[0]), Ledger(tmp_path)
    holder.stdout.readline()
    assert status(ledger) == RUNNING
    assert claimed(ledger) is None
    holder.kill()
    holder.wait()
    claim = claimed(ledger)
    assert claim.attempt == 2
    assert claim.previous() == tmp_path / "attempts" / f"{CELLS[0]}.0001"
    assert status(ledger) == RUNNING
    assert finished(claim, "the second")
    assert status(ledger) == DONE


def test_a_killed_owner_is_dead_before_its_parent_waits_for_it(tmp_path):
    holder, ledger = process(HOLDER, tmp_path, CELLS[0]), Ledger(tmp_path)
    holder.stdout.readline()
    assert claimed(ledger) is None
    holder.kill()
    deadline = time.monotonic() + 30
    while (claim := claimed(ledger)) is None:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert claim.attempt == 2
    holder.wait()


DAMAGED = "", "{", "[]", "null", "{}", '{"pid": 1}', '{"host": "here", "pid": "one"}', '{"host": 5, "pid": 1}'


@pytest.mark.parametrize("content", DAMAGED)
def test_a_damaged_claim_is_that_of_a_dead_owner(tmp_path, content):
    ledger, other = Ledger(tmp_path), Ledger(tmp_path)
    claim = claimed(ledger)
    claim.heartbeat(3)
    ledger.path(CELLS[0], 1, "claim").write_text(content)
    assert claimed(other).attempt == 2


@pytest.mark.parametrize("content", ["", "{", "[]", "null", '{"step": "x"}', '{"step": null}', '{"step": [1]}'])
def test_a_damaged_heartbeat_is_one_of_no_steps(tmp_path, content):
    ledger = Ledger(tmp_path)
    claimed(ledger)
    ledger.path(CELLS[0], 1, "beat").write_text(content)
    assert ledger.step(CELLS[0], 1) == 0
    assert claimed(Ledger(tmp_path)) is None  # its owner is alive


def test_reading_creates_nothing(tmp_path):
    assert Ledger(tmp_path / "study").entries(CELLS)[CELLS[0]].status == PLANNED
    assert list(tmp_path.iterdir()) == []


def test_a_paused_owner_loses_its_cell_and_its_late_result_is_refused(tmp_path):
    """SIGSTOP past the lease, then SIGCONT while the second owner works, or after it has finished."""
    for cell, early in zip(CELLS, (True, False), strict=False):
        (tmp_path / "end").unlink(missing_ok=True)
        holder, ledger = process(HOLDER, tmp_path, cell), Ledger(tmp_path, lease=0.3)
        try:
            holder.stdout.readline()
            holder.send_signal(signal.SIGSTOP)
            assert claimed(ledger, cell) is None
            deadline = time.monotonic() + 30
            while (claim := claimed(ledger, cell)) is None:
                assert time.monotonic() < deadline
                time.sleep(0.05)
            if early:
                assert finished(claim, "the second")
            (tmp_path / "end").touch()
            holder.send_signal(signal.SIGCONT)
            assert holder.communicate(timeout=30)[0].split() == ["False", "False"]
            if not early:
                assert finished(claim, "the second")
        finally:
            holder.kill()
        assert (tmp_path / "runs" / cell / "by").read_text() == "the second"


def test_an_owner_with_heartbeats_keeps_its_cell(tmp_path):
    clock = [0.0]
    holder, ledger = process(HOLDER, tmp_path, CELLS[0]), Ledger(tmp_path, lease=0.5, clock=lambda: clock[0])
    try:
        holder.stdout.readline()
        before = None
        for _ in range(5):
            while (now := ledger.heartbeat(CELLS[0], 1)) == before or not now:
                time.sleep(0.01)
            assert ledger.is_alive(CELLS[0], 1)
            before = now
            clock[0] += 100.0
    finally:
        holder.kill()


def test_a_cell_that_fails_twice_is_given_up_and_can_be_retried(tmp_path):
    ledger = Ledger(tmp_path)
    for attempt in (1, 2):
        assert status(ledger) == PLANNED
        claim = claimed(ledger)
        assert claim.attempt == attempt
        claim.end("failed", "it does not fit")
    assert status(ledger) == FAILED
    assert claimed(ledger) is None
    assert ledger.reason(CELLS[0], 2) == "it does not fit"
    ledger.retry_failed(CELLS)
    assert status(ledger) == PLANNED
    assert claimed(ledger).attempt == 3


@pytest.mark.parametrize(("steps", "expected"), [((0, 0), FAILED), ((10, 10, 10), FAILED), ((10, 20), PLANNED)])
def test_deaths_without_progress_count_as_failures(tmp_path, steps, expected):
    ledger = Ledger(tmp_path)
    for step in steps:
        other = Ledger(tmp_path)
        other.owner |= {"born": "0"}  # as of a process that has ended
        claim = claimed(other)
        if step:
            claim.heartbeat(step)
    claim = claimed(ledger)
    assert (claim is None) == (expected == FAILED)
    assert status(ledger) == (FAILED if expected == FAILED else RUNNING)


def test_giving_a_cell_back_is_not_a_failure(tmp_path):
    ledger = Ledger(tmp_path)
    for attempt in range(1, 6):
        claim = claimed(ledger)
        assert claim.attempt == attempt
        claim.end("left", "Ctrl-C")
    assert status(ledger) == PLANNED


def test_two_thousand_cells_are_listed_quickly(tmp_path):
    ledger, cells = Ledger(tmp_path), [f"{i:012x}" for i in range(2000)]
    for cell in cells[:300]:
        claimed(ledger, cell).heartbeat(1)
    began = time.monotonic()
    entries = ledger.entries(cells)
    print(f"{time.monotonic() - began:.3f} s")
    assert sum(entry.status == RUNNING for entry in entries.values()) == 300
    assert not [name for name in os.listdir(ledger.study.ledger) if name.startswith(".")]
