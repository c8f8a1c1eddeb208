"""Real clusters for tests, started by the scripts, and the processes of a study that runs on one."""

import importlib.util
import itertools
import json
import os
import shutil
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest
from studies import recorded

SCRIPTS = Path(__file__).parent.parent / "scripts"
LONG = ("train.steps=2500", "train.checkpoint_every=100")  # long enough to be disturbed

os.environ["PATH"] += ":/usr/sbin:/sbin"
needs_submitit = pytest.mark.skipif(not importlib.util.find_spec("submitit"), reason="stabrun[slurm] is not installed")
needs_ray = pytest.mark.skipif(not importlib.util.find_spec("ray"), reason="stabrun[ray] is not installed")
needs_slurm = pytest.mark.skipif(
    not all(map(shutil.which, ("munged", "slurmctld", "slurmd", "sbatch"))), reason="Slurm is not installed"
)


@contextmanager
def cluster(script, nodes, variable):
    """A running cluster. Yields the environment variables that locate it, and its process."""
    shell = f"env | grep ^{variable}; echo; cat"
    command = [sys.executable, SCRIPTS / script, str(nodes), "sh", "-c", shell]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        lines = itertools.takewhile(lambda line: line != "\n", process.stdout)
        environment = dict(line.rstrip("\n").split("=", 1) for line in lines)
        assert environment, f"{script} has ended"
        yield environment, process
    finally:
        process.stdin.close()
        assert process.wait(timeout=60) == 0
        process.stdout.close()


def training(study):
    """The process ids of the workers that train a cell of the study now."""
    attempts = [metrics.parent.name for metrics in recorded(study)]
    return [json.loads((study / "ledger" / f"{attempt}.claim").read_text())["pid"] for attempt in attempts]


def jobs(study):
    """The process ids of all workers that the launcher of the study's only sweep ever started."""
    (stop,) = (study / "ledger").glob("*.stop")
    return [json.loads(file.read_text())["pid"] for file in (study / "ledger").glob(f"{stop.stem}.*.claim")]


def pids(parent, pattern):
    """The children of a process whose command lines match."""
    found = subprocess.run(["pgrep", "-P", str(parent), "-f", pattern], capture_output=True, text=True)
    return [int(pid) for pid in found.stdout.split()]
