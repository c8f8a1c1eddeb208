"""The slow ones, by `make disasters`: studies killed at thirty random moments, and an owner paused past its lease."""

import json
import os
import random
import signal
import subprocess
import time

import pytest
from studies import rows, started, swept

from stabrun.study.ledger import LEASE

pytestmark = pytest.mark.slow


def workers_of(process):
    """The workers that a sweep has started."""
    found = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True)
    return [int(pid) for pid in found.stdout.split()]


def ended(cell_dir):
    return (cell_dir / "events.jsonl").read_text().count('"event": "complete"')


@pytest.mark.parametrize("moment", range(30))
def test_killed_at_a_random_moment_the_same_command_completes(alone, tmp_path, moment):
    """The sweep, one of its workers, or both: a worker's own orphans and successors train beside each other."""
    dice = random.Random(moment)
    process = started(tmp_path)
    time.sleep(dice.uniform(0.5, 9.0))
    whom = ("sweep", "worker", "both")[moment % 3]
    if whom != "sweep" and (workers := workers_of(process)):
        os.kill(dice.choice(workers), signal.SIGKILL)
    if whom != "worker":
        process.kill()
    _, err = process.communicate(timeout=120)
    if whom == "worker":
        assert process.returncode == 0, err
    last = swept(tmp_path)
    assert last.returncode == 0, last.stderr
    assert rows(tmp_path) == alone
    assert {ended(cell) for cell in (tmp_path / "study" / "runs").iterdir()} == {1}, "no finished cell runs again"


def test_a_worker_paused_past_its_lease_spoils_nothing(alone, tmp_path):
    """Of two sweeps of one study; what it goes on to train after its pause is no longer its own."""
    sweeps = [started(tmp_path), started(tmp_path)]
    deadline = time.monotonic() + 60
    while not list(tmp_path.glob("study/attempts/*/metrics.jsonl")):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    claims = sorted((tmp_path / "study" / "ledger").glob("*.claim"))
    paused = json.loads(claims[0].read_text())["pid"]
    os.kill(paused, signal.SIGSTOP)
    time.sleep(LEASE + 15)
    os.kill(paused, signal.SIGCONT)
    for process in sweeps:
        _, err = process.communicate(timeout=120)
        assert process.returncode == 0, err
    assert rows(tmp_path) == alone
    assert {ended(cell) for cell in (tmp_path / "study" / "runs").iterdir()} == {1}
    assert list((tmp_path / "study" / "ledger").glob("*.0002.claim")), "the paused one's cell was taken over"
