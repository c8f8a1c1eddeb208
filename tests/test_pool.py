"""Worker pools: which workers count as alive, when restarts end, and which GPU a worker gets."""

import os
import signal
import subprocess
import sys

import pytest
from studies import ENDLESS, a_plan, recorded, work_until_the_stop_file

from stabrun.study.ledger import PLANNED, Ledger
from stabrun.study.pool import SPARE, Batch, LauncherPool, LocalPool, WorkerPool, gpu_names, gpus
from stabrun.study.worker import registered, work

LISTED = """\
GPU 0: NVIDIA H100 80GB HBM3 (UUID: GPU-1b2c3d4e-0000-1111-2222-333344445555)
GPU 1: NVIDIA H100 80GB HBM3 (UUID: GPU-9b2c3d4e-0000-1111-2222-333344445555)
"""


class Failing(WorkerPool):
    """Workers that end at once."""

    started = 0

    def alive(self):
        return 0

    def start(self, count):
        self.started += count

    def end(self, interrupt):
        pass


def test_workers_that_end_before_they_train_are_restarted_a_few_times(tmp_path):
    pool = Failing(tmp_path, 2)
    for _ in range(3):
        pool.keep(attempts=0)
    assert pool.started == 2 + SPARE
    with pytest.raises(ChildProcessError):
        pool.keep(attempts=0)
    pool.keep(attempts=1)
    assert pool.started == 2 + SPARE + 2, "after an attempt began"


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
def test_gpus_that_workers_share(visible, listed, shared):
    assert gpus(visible, listed) == shared


def test_gpus_are_listed_by_name_without_their_parts():
    part = "  MIG 1g.10gb     Device  0: (UUID: MIG-4c6a0b7d-0000-1111-2222-333344445555)\n"
    assert gpu_names(LISTED + part) == ["NVIDIA H100 80GB HBM3"] * 2
    assert gpu_names("No devices were found\n") == []


def test_each_local_worker_has_its_own_gpu(tmp_path, monkeypatch):
    pool, given = LocalPool(tmp_path, 3), []
    pool.gpus = ["a", "b"]
    monkeypatch.setattr(pool, "process", lambda module, **env: given.append(env["CUDA_VISIBLE_DEVICES"]))
    pool.start(3)
    assert given == ["a", "b", "a"]


def sleeper():
    """A process that waits, in place of a launcher's."""
    return subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)


def test_a_launcher_pool_counts_its_waiting_and_running_jobs(tmp_path):
    pool, ledger = LauncherPool(tmp_path, 3, []), Ledger(tmp_path)
    assert pool.alive() == 0
    launcher = sleeper()
    try:
        pool.batches.append(Batch(1, 3, launcher))
        assert pool.alive() == 3, "all wait in the queue"
        with registered(ledger, pool.id, 1), registered(ledger, "feedbeef", 2):
            assert pool.alive() == 3
            launcher.communicate()
            assert pool.alive() == 1, "waiting jobs ended with the launcher; the other job is not of this pool"
    finally:
        launcher.communicate()
    assert pool.alive() == 0


def test_a_launched_worker_that_dies_is_not_alive(tmp_path):
    pool = LauncherPool(tmp_path, 1, [])
    code = (
        "from pathlib import Path\n"
        "from stabrun.study.worker import Ledger, registered\n"
        f"with registered(Ledger(Path({str(tmp_path)!r})), {pool.id!r}, 1): print('there', flush=True); input()"
    )
    worker = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    launcher = sleeper()
    try:
        worker.stdout.readline()
        pool.batches.append(Batch(1, 1, launcher))
        assert pool.alive() == 1
        os.kill(worker.pid, signal.SIGKILL)
        worker.communicate()
        assert pool.alive() == 0
    finally:
        worker.kill()
        worker.communicate()
        launcher.communicate()


def test_the_stop_file_stops_a_worker_after_its_step(tmp_path):
    plan = a_plan(tmp_path, "study.variants=[baseline]", "study.lrs=[1e-2]", "study.seeds=1", *ENDLESS)
    work_until_the_stop_file(tmp_path, "cafe", lambda: recorded(tmp_path))
    with registered(Ledger(tmp_path), "cafe", 2) as stop:
        work(tmp_path, stop=stop)
    (entry,) = Ledger(tmp_path).entries(plan.cells).values()
    assert (entry.status, entry.attempt) == (PLANNED, 1), "a worker that starts later takes no cell"
