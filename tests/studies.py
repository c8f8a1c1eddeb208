"""Studies of tiny runs: by `stabrun sweep`, and with each cell trained by itself."""

import copy
import csv
import functools
import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import pytest
from helpers import TINY, run, stabrun

from stabrun.record.study_dir import StudyDir
from stabrun.study import results, sweep
from stabrun.study.ledger import Ledger
from stabrun.study.plan import Plan
from stabrun.study.pool import WorkerPool, stop_file
from stabrun.study.question import planned
from stabrun.study.snapshot import SnapshotReader
from stabrun.study.worker import registered, work
from stabrun.training.run import train

TIMINGS = ("seconds", "tokens_per_second", "mfu", "peak_memory_bytes")
QUESTION = (
    *TINY,
    "study.variants=[baseline,qk_norm]",
    "study.lrs=[1e-2,1e-1]",
    "study.seeds=2",
    "study.workers=2",
    "study_dir=study",
    "train.checkpoint_every=5",
)
ENDLESS = ("train.steps=100000", "train.checkpoint_every=0")  # for runs that a test always interrupts


@functools.cache
def _asked(overrides):
    return planned(list(overrides))[0]


def asked(*overrides):
    """The plan of a study of these overrides alone, composed once."""
    return copy.deepcopy(_asked(overrides))


def points(plan):
    """(arm, learning rate, seed) of each cell."""
    return sorted((cell.arm, cell.lr, cell.seed) for cell in plan.cells.values())


def a_plan(directory, *overrides):
    """The plan of a study of these overrides, saved in `directory`."""
    plan = asked(*TINY, *overrides)
    plan.save(directory)
    return plan


def write_results(plan, directory):
    """Write `results.csv` and `study.json` of a study directory. Returns the finished runs and the latter."""
    finished = SnapshotReader(directory).read(plan).rows
    return finished, results.write(plan, finished, StudyDir(directory))


def rows(directory):
    """The rows of `study/results.csv` without timings."""
    with open(directory / "study" / "results.csv", newline="") as file:
        return [{key: value for key, value in row.items() if key not in TIMINGS} for row in csv.DictReader(file)]


@dataclass
class Undisturbed:
    """A study whose cells this process trained one after another, without sweep, ledger or worker."""

    directory: Path
    plan: Plan

    @property
    def rows(self):
        return rows(self.directory)

    def record(self, cell):
        return StudyDir(self.directory / "study").run(cell).metrics.read_bytes()


def trained_alone(directory, *overrides):
    study = StudyDir(directory / "study")
    study.path.mkdir()
    plan = a_plan(study.path, *overrides)
    for cell in plan.cells.values():
        train(plan.config(cell), study.run(cell.id).path)
    write_results(plan, study.path)
    return Undisturbed(directory, plan)


class InProcess(WorkerPool):
    """A pool whose only worker is this process."""

    def alive(self):
        return 0

    def start(self, count):
        work(self.directory)

    def end(self, interrupt):
        pass


def sweep_here(monkeypatch, capsys, directory, *overrides):
    """Exit status, stdout and stderr of a sweep of QUESTION in this process, with one worker."""
    monkeypatch.setattr(sweep, "worker_pool", lambda overrides, sources, study, *counts: InProcess(study, 1))
    monkeypatch.chdir(directory)
    return run(capsys, "sweep", *QUESTION, *overrides)


def swept(directory, *overrides, env=()):
    """What a sweep of QUESTION printed. It must succeed."""
    done = stabrun("sweep", *QUESTION, *overrides, cwd=directory, env=env)
    log = StudyDir(directory / "study").worker_log
    assert done.returncode == 0, done.stderr + (log.read_text() if log.exists() else "")
    return done.stdout


@contextmanager
def running(*words, cwd, env=()):
    """A Python command in a session of its own. What is left of it is killed at the end."""
    command = [sys.executable, *map(str, words)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    process = subprocess.Popen(command, cwd=cwd, env=os.environ | dict(env), text=True, start_new_session=True, **pipes)
    try:
        yield process
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


def sweeping(directory, *overrides, env=()):
    """A running sweep of QUESTION."""
    return running("-m", "stabrun", "sweep", *QUESTION, *overrides, cwd=directory, env=env)


def ended(process):
    """Exit status and output of a sweep that is about to end."""
    out, err = process.communicate(timeout=300)
    assert "Traceback" not in err
    return process.returncode, out + err


def work_until_the_stop_file(directory, pool, ready):
    """Be a worker of a pool, which is told to stop once `ready()` is true. It must leave a checkpoint."""

    def stop_soon():
        wait_for(ready)
        stop_file(directory, pool).touch()

    thread = threading.Thread(target=stop_soon)
    thread.start()
    with registered(Ledger(directory), pool, 1) as stop, pytest.raises(KeyboardInterrupt):
        work(directory, stop=stop)
    thread.join()
    assert len(list(directory.glob("attempts/*/checkpoints/step_*/meta.json"))) == 1


def wait_for(condition):
    """Wait until `condition()` is true. Returns its value."""
    deadline = time.monotonic() + 120
    while not (value := condition()):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    return value


def recorded(study):
    """The records of attempts that have begun to train."""
    return list(StudyDir(study).attempts.glob("*/metrics.jsonl"))
