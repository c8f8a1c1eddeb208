"""A study of six cells, and the scripts that start real clusters for it."""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
from helpers import TINY, stabrun

SCRIPTS = Path(__file__).parent.parent / "scripts"
QUESTION = (
    *TINY,
    "study.variants=[baseline,qk_norm]",
    "study.lrs=[1e-2,3e-2,1e-1]",
    "study.seeds=1",
    "study.workers=2",
    "train.checkpoint_every=5",
    "study_dir=study",
)
LONG = ("train.steps=2500", "train.checkpoint_every=100")  # time enough for a disaster

os.environ["PATH"] += ":/usr/sbin:/sbin"
submitit_there = pytest.mark.skipif(not importlib.util.find_spec("submitit"), reason="stabrun[slurm] is not installed")
ray_there = pytest.mark.skipif(not importlib.util.find_spec("ray"), reason="stabrun[ray] is not installed")
slurm_there = pytest.mark.skipif(
    not all(map(shutil.which, ("munged", "slurmctld", "slurmd", "sbatch"))), reason="Slurm is not installed"
)


@contextmanager
def cluster(script, nodes, variable):
    """Keep a cluster up; the environment that finds it, and its process."""
    shell = f"env | grep ^{variable}; echo; cat"
    command = [sys.executable, SCRIPTS / script, str(nodes), "sh", "-c", shell]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        found = dict(line.rstrip("\n").split("=", 1) for line in iter(process.stdout.readline, "\n") if line)
        yield found, process
    finally:
        process.stdin.close()
        assert process.wait(timeout=60) == 0
        process.stdout.close()


def swept(folder, *words, env=()):
    """A sweep to its end; what it printed."""
    done = stabrun("sweep", *QUESTION, *words, cwd=folder, env=env)
    log = folder / "study" / "worker.log"
    assert done.returncode == 0, done.stderr + (log.read_text() if log.exists() else "")
    return done.stdout


@contextmanager
def sweeping(folder, *words, env=()):
    """A sweep that goes on meanwhile."""
    command = [sys.executable, "-m", "stabrun", "sweep", *QUESTION, *words]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    process = subprocess.Popen(command, cwd=folder, env=os.environ | dict(env), text=True, **pipes)
    try:
        yield process
    finally:
        if process.poll() is None:
            process.kill()
        process.communicate()


def ended(process):
    """The status of a sweep that is about to end, with all it said where it failed."""
    out, err = process.communicate(timeout=300)
    assert "Traceback" not in err
    return process.returncode, out + err


def await_(what):
    """Wait until `what()` is true; its value."""
    deadline = time.monotonic() + 120
    while not (found := what()):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    return found


def training(folder):
    """The process ids of those that train a cell of the study now."""
    attempts = [item.parent.name for item in folder.glob("attempts/*/metrics.jsonl")]
    return [json.loads((folder / "ledger" / f"{attempt}.claim").read_text())["pid"] for attempt in attempts]


def crew_of_study(folder):
    """The process ids of all workers that a launcher ever started for the study: one sweep's."""
    (stop,) = (folder / "ledger").glob("*.stop")
    return [json.loads(file.read_text())["pid"] for file in (folder / "ledger").glob(f"{stop.stem}.*.claim")]


def pids(parent, pattern):
    """The children of a process whose command lines match."""
    found = subprocess.run(["pgrep", "-P", str(parent), "-f", pattern], capture_output=True, text=True)
    return [int(pid) for pid in found.stdout.split()]
