"""Overhead of a sweep, and speedup by a second worker. Run it on an idle machine.

    python scripts/bench_sweep.py throughput --pairs 3
    python scripts/bench_sweep.py overhead +experiment=quickstart

`throughput`: the same study of nano runs with one worker and with two (one thread each), alternating; runs per second
from the start of the first run to the end of the last. `overhead`: workers of a study with timers around each update,
each reading of statistics and each validation. Everything else counts as overhead: imports, start, W&B, record,
verdict, ledger.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from stabrun.record.study_dir import StudyDir
from stabrun.study.pool import threads_per_worker
from stabrun.study.question import planned

STUDY = (
    "schedule=constant",
    "train.steps=200",
    "train.val_every=0",
    "study.lrs=[1e-3,2e-3,3e-3,4e-3]",
    "study.seeds=3",
)


def swept(folder: Path, workers: int) -> float:
    """Runs per second of a study with this many workers, without their start."""
    words = (*STUDY, f"study.workers={workers}", f"study_dir={folder}")
    command = [sys.executable, "-m", "stabrun", "sweep", *words]
    subprocess.run(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, check=True, stdout=subprocess.DEVNULL)
    events = [run.events() for run in StudyDir(folder).recorded_runs()]
    began, ended = min(each[0]["time"] for each in events), max(each[-1]["time"] for each in events)
    return len(events) / (ended - began)


def throughput(pairs: int) -> None:
    ratios = []
    for number in range(pairs):
        with tempfile.TemporaryDirectory() as scratch:
            one, two = (swept(Path(scratch) / str(workers), workers) for workers in (1, 2))
        ratios.append(two / one)
        print(
            f"pair {number + 1}: {60 * one:.2f} and {60 * two:.2f} runs per minute, ratio {two / one:.3f}", flush=True
        )
    print(f"two workers / one: median {statistics.median(ratios):.3f} of {pairs} pairs, lowest {min(ratios):.3f}")


def overhead(words: list[str]) -> None:
    plan, _, config = planned(words)
    workers = config.study.workers
    with tempfile.TemporaryDirectory() as scratch:
        plan.save(Path(scratch))
        command = [sys.executable, __file__, "worker", scratch, str(time.time())]
        environment = os.environ | {"OMP_NUM_THREADS": str(threads_per_worker(workers))}
        processes = [
            subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) for _ in range(workers)
        ]
        reports = [json.loads(process.communicate()[0].splitlines()[-1]) for process in processes]
        runs = len(list(Path(scratch).glob("runs/*/summary.json")))
    total = sum(each["all"] for each in reports)
    for name in ("training", "imports", "W&B", "record", "verdict"):
        spent = sum(each.get(name, 0.0) for each in reports)
        print(f"{name:<9} {spent:8.1f} s  {100 * spent / total:5.1f} %")
    training = sum(each["training"] for each in reports)
    print(f"in all    {total:8.1f} s of {workers} workers for {runs} runs")
    print(f"not training: {100 * (1 - training / total):.1f} %")


def worker(directory: Path, began: float) -> None:
    """A worker of the study with timers. Prints the seconds spent since its start as JSON."""
    from stabrun.observe.probe import PendingRow
    from stabrun.record.run_dir import RunWriter
    from stabrun.study.worker import work
    from stabrun.training.tracker import Tracker
    from stabrun.training.trainer import Trainer
    from stabrun.verdict.judge import Judge

    spent = {"imports": time.time() - began}
    clocked = {
        "training": ((Trainer, "step"), (Trainer, "validate"), (PendingRow, "read")),
        "W&B": ((Tracker, "__init__"), (Tracker, "row"), (Tracker, "finish")),
        "record": ((RunWriter, "write"), (RunWriter, "sync")),
        "verdict": ((Judge, "add"), (Judge, "conclude")),
    }
    for name, methods in clocked.items():
        for owner, method in methods:
            setattr(owner, method, timed(getattr(owner, method), spent, name))
    work(directory)
    print(json.dumps(spent | {"all": time.time() - began}))


def timed(method: Callable[..., Any], spent: dict[str, float], name: str) -> Callable[..., Any]:
    def call(*args: Any, **options: Any) -> Any:
        began = time.perf_counter()
        try:
            return method(*args, **options)
        finally:
            spent[name] = spent.get(name, 0.0) + time.perf_counter() - began

    return call


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("throughput", "overhead", "worker"))
    parser.add_argument("words", nargs="*", help="overrides of the study; for a worker, its directory")
    parser.add_argument("--pairs", type=int, default=3)
    arguments = parser.parse_args()
    if arguments.what == "throughput":
        throughput(arguments.pairs)
    elif arguments.what == "overhead":
        overhead(arguments.words or ["+experiment=quickstart"])
    else:
        worker(Path(arguments.words[0]), float(arguments.words[1]))
