"""Crews: who is counted as at work, when those that die are given up, and which GPU a worker gets."""

import os
import signal
import subprocess
import sys
import threading
import time

import pytest
from helpers import TINY

from stabrun.study.ledger import PLANNED, Ledger
from stabrun.study.plan import planned
from stabrun.study.pool import SPARE, Batch, LauncherPool, LocalPool, WorkerPool, gpus, stop_file
from stabrun.study.worker import enrolled, work

LISTED = """\
GPU 0: NVIDIA H100 80GB HBM3 (UUID: GPU-1b2c3d4e-0000-1111-2222-333344445555)
GPU 1: NVIDIA H100 80GB HBM3 (UUID: GPU-9b2c3d4e-0000-1111-2222-333344445555)
"""


class Doomed(WorkerPool):
    """Workers that die at once."""

    started = 0

    def at_work(self):
        return 0

    def start(self, missing):
        self.started += missing

    def end(self, status):
        return status


def test_workers_that_die_are_started_again_until_it_is_known_that_none_gets_to_work(tmp_path):
    crew = Doomed(tmp_path, 2)
    for _ in range(3):
        crew.keep(begun=0)
    assert crew.started == 2 + SPARE
    with pytest.raises(ChildProcessError):
        crew.keep(begun=0)
    crew.keep(begun=1)
    assert crew.started == 2 + SPARE + 2, "one of them had begun a cell"


@pytest.mark.parametrize(
    ("visible", "listed", "shared"),
    [
        (None, "", []),
        (None, LISTED, ["GPU-1b2c3d4e-0000-1111-2222-333344445555", "GPU-9b2c3d4e-0000-1111-2222-333344445555"]),
        (None, "No devices were found\n", []),
        ("2, 3", LISTED, ["2", "3"]),
        ("", LISTED, []),
    ],
)
def test_gpus_to_share_out(visible, listed, shared):
    assert gpus(visible, listed) == shared


def test_each_local_worker_has_a_gpu_of_its_own(tmp_path, monkeypatch):
    crew, given = LocalPool(tmp_path, 3), []
    crew.gpus = ["a", "b"]
    monkeypatch.setattr(crew, "process", lambda module, **env: given.append(env["CUDA_VISIBLE_DEVICES"]))
    crew.start(3)
    assert given == ["a", "b", "a"]


def sleeper():
    """A process that stays, in place of a launcher's."""
    return subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)


def test_a_launched_crew_counts_who_waits_who_works_and_nobody_else(tmp_path):
    crew, ledger = LauncherPool(tmp_path, 3, []), Ledger(tmp_path)
    assert crew.at_work() == 0
    launch = sleeper()
    try:
        crew.batches.append(Batch(1, 3, launch))
        assert crew.at_work() == 3, "all wait in the queue"
        with enrolled(ledger, crew.id, 1), enrolled(ledger, "feedbeef", 2):
            assert crew.at_work() == 3
            launch.communicate()
            assert crew.at_work() == 1, "what waited went with the launcher, and the other crew's is not ours"
    finally:
        launch.communicate()
    assert crew.at_work() == 0


def test_a_launched_worker_that_dies_is_missed(tmp_path):
    crew = LauncherPool(tmp_path, 1, [])
    Ledger(tmp_path)
    code = (
        "from pathlib import Path; from stabrun.study.ledger import Ledger; from stabrun.study.worker import enrolled\n"
        f"with enrolled(Ledger(Path({str(tmp_path)!r})), {crew.id!r}, 1): print('there', flush=True); input()"
    )
    worker = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    launch = sleeper()
    try:
        worker.stdout.readline()
        crew.batches.append(Batch(1, 1, launch))
        assert crew.at_work() == 1
        os.kill(worker.pid, signal.SIGKILL)
        worker.communicate()
        assert crew.at_work() == 0
    finally:
        worker.kill()
        worker.communicate()
        launch.communicate()


def test_the_stop_file_has_a_worker_leave_its_cell_with_a_checkpoint(tmp_path):
    words = ("study.variants=[baseline]", "study.lrs=[1e-2]", "study.seeds=1", "train.steps=20000")
    plan, _, _ = planned([*TINY, *words, "train.checkpoint_every=0"])
    plan.save(tmp_path)

    def tell():
        deadline = time.monotonic() + 60
        while not list(tmp_path.glob("attempts/*/metrics.jsonl")) and time.monotonic() < deadline:
            time.sleep(0.01)
        stop_file(tmp_path, "cafe").touch()

    thread = threading.Thread(target=tell)
    thread.start()
    with enrolled(Ledger(tmp_path), "cafe", 1) as stop, pytest.raises(KeyboardInterrupt):
        work(tmp_path, stop=stop)
    thread.join()
    assert len(list(tmp_path.glob("attempts/*/checkpoints/step_*/meta.json"))) == 1
    with enrolled(Ledger(tmp_path), "cafe", 2) as stop:
        work(tmp_path, stop=stop)
    (entry,) = Ledger(tmp_path).entries(plan.cells).values()
    assert (entry.status, entry.attempt) == (PLANNED, 1), "one that starts later takes no cell"
