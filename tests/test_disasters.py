"""Slow tests, run by `make disasters`: studies killed at thirty random moments, and a worker paused past its lease."""

import json
import os
import random
import signal
import time

import pytest
from clusters import pids
from studies import ended, recorded, rows, sweeping, swept, wait_for

from stabrun.study.ledger import LEASE

pytestmark = pytest.mark.slow


def completions(study):
    """How often each finished run was completed."""
    return [events.read_text().count('"event": "complete"') for events in study.glob("runs/*/events.jsonl")]


@pytest.mark.parametrize("moment", range(30))
def test_killed_at_a_random_moment(undisturbed, tmp_path, moment):
    """Of the sweep, one of its workers, or both. Orphaned workers train beside their successors."""
    dice = random.Random(moment)
    killed = ("sweep", "worker", "both")[moment % 3]
    with sweeping(tmp_path) as process:
        time.sleep(dice.uniform(0.5, 9.0))
        if killed != "sweep" and (workers := pids(process.pid, "stabrun.study.worker")):
            os.kill(dice.choice(workers), signal.SIGKILL)
        if killed == "worker":
            assert ended(process)[0] == 0
        else:
            process.kill()
            process.wait()
        swept(tmp_path)
    assert rows(tmp_path) == undisturbed.rows
    assert set(completions(tmp_path / "study")) == {1}, "no finished cell is trained again"


def test_a_worker_paused_past_its_lease(undisturbed, tmp_path):
    """One of two sweeps. What the worker trains after its pause no longer counts."""
    study = tmp_path / "study"
    with sweeping(tmp_path) as one, sweeping(tmp_path) as other:
        wait_for(lambda: recorded(study))
        claims = sorted((study / "ledger").glob("*.claim"))
        paused = json.loads(claims[0].read_text())["pid"]
        os.kill(paused, signal.SIGSTOP)
        time.sleep(LEASE + 15)
        os.kill(paused, signal.SIGCONT)
        assert [ended(process)[0] for process in (one, other)] == [0, 0]
    assert rows(tmp_path) == undisturbed.rows
    assert set(completions(study)) == {1}
    assert list((study / "ledger").glob("*.0002.claim")), "the cell of the paused worker was taken over"
