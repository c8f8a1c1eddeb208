"""Overhead of a sweep, speedup by a second worker, and bookkeeping of many cells. Run it on an idle machine.

    python scripts/bench_sweep.py throughput --pairs 3
    python scripts/bench_sweep.py overhead +experiment=quickstart
    python scripts/bench_sweep.py cells --cells 1000,10000

`throughput`: the same study of nano runs with one worker and with two (one thread each), alternating; runs per second
from the start of the first run to the end of the last. `overhead`: workers of a study with timers around each update,
each reading of statistics and each validation. Everything else counts as overhead: imports, start, W&B, record,
verdict, ledger. `cells`: what a study does beside training, on studies of so many cells, half of which have made-up
summaries: CPU seconds and peak memory of a process of its own for each task, and the exponent of the growth.
"""

import argparse
import json
import math
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import Any

from stabrun.record.jsonl import jsonable, write_checked
from stabrun.record.run_dir import RunDir
from stabrun.record.study_dir import StudyDir
from stabrun.study import results
from stabrun.study.ledger import PLANNED, Entry, Ledger
from stabrun.study.plan import Cell, load
from stabrun.study.pool import threads_per_worker
from stabrun.study.question import planned
from stabrun.study.snapshot import SnapshotReader
from stabrun.training.stop import Stop
from stabrun.verdict.judge import Judge, Verdict

ARMS, SEEDS = ("baseline", "qk_norm", "qk_norm_cap", "qkv_norm", "qk_fc_norm"), 20
TASKS = {
    "plan": "planning: sweep --dry-run",
    "finish": "made-up summaries of half the cells",
    "status": "a look: status",
    "answer": "an answer: results and summary",
    "look": "a further look of the sweep",
    "choice": "choosing a cell",
}
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
    for name in ("training", "imports", "W&B", "starts", "record", "verdict", "console", "checkpoints", "waiting"):
        spent = sum(each.get(name, 0.0) for each in reports)
        print(f"{name:<11} {spent:8.1f} s  {100 * spent / total:5.1f} %")
    training = sum(each["training"] for each in reports)
    print(f"in all      {total:8.1f} s of {workers} workers for {runs} runs")
    print(f"not training: {100 * (1 - training / total):.1f} %")


def worker(directory: Path, began: float) -> None:
    """A worker of the study with timers. Prints the seconds spent since its start as JSON."""
    from stabrun.observe.probe import PendingRow
    from stabrun.record.run_dir import RunWriter
    from stabrun.study import worker as module
    from stabrun.training.console import Console
    from stabrun.training.run import Run
    from stabrun.training.tracker import Tracker
    from stabrun.training.trainer import Trainer
    from stabrun.verdict.judge import Judge

    spent = {"imports": time.time() - began}
    clocked: dict[str, tuple[tuple[Any, str], ...]] = {
        "training": ((Trainer, "step"), (Trainer, "validate"), (PendingRow, "read")),
        "W&B": ((Tracker, "__init__"), (Tracker, "finish")),
        "record": ((RunWriter, "write"), (RunWriter, "sync")),
        "verdict": ((Judge, "add"), (Judge, "conclude")),
        "console": ((Console, "row"),),
        "checkpoints": ((Run, "save"),),
        "starts": ((Trainer, "__init__"), (Run, "__init__")),
        "waiting": ((module, "next_claim"),),  # for a cell, at the end of a study for the runs of others
    }
    for name, methods in clocked.items():
        for owner, method in methods:
            setattr(owner, method, timed(getattr(owner, method), spent, name))
    module.work(directory)
    print(json.dumps(spent | {"all": time.time() - began}))


def timed(method: Callable[..., Any], spent: dict[str, float], name: str) -> Callable[..., Any]:
    def call(*args: Any, **options: Any) -> Any:
        began = time.perf_counter()
        try:
            return method(*args, **options)
        finally:
            spent[name] = spent.get(name, 0.0) + time.perf_counter() - began

    return call


def cells(counts: list[int]) -> None:
    measured: dict[str, list[tuple[float, float]]] = {}
    for count in counts:
        with tempfile.TemporaryDirectory() as scratch:
            for task in TASKS:
                command = [sys.executable, __file__, "task", task, scratch, str(count)]
                done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
                measured.setdefault(task, []).append(tuple(json.loads(done.stdout.splitlines()[-1])))
    print(f"{'':<34}{''.join(f'{count:>12,} cells ' for count in counts)}  exponent")
    for task, found in measured.items():
        exponent = math.log(found[-1][0] / found[0][0]) / math.log(counts[-1] / counts[0])
        columns = "".join(f"{seconds:8.3f} s {memory:4.0f} MB" for seconds, memory in found)
        print(f"{TASKS[task]:<34}{columns}  {exponent:.2f}")


def task(name: str, directory: Path, count: int) -> None:
    """Do a task of `cells`. Prints its CPU seconds, and the peak of its memory in MB."""
    seconds = globals()[f"task_{name}"](StudyDir(directory), count)
    print(json.dumps([seconds, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024]))


def task_plan(study: StudyDir, count: int) -> float:
    """`stabrun sweep --dry-run` of the study, and saving its plan."""
    from stabrun.study.dry_run import dry_run_lines

    rates = ",".join(f"{1e-3 * 1.05**number:.4g}" for number in range(count // (len(ARMS) * SEEDS)))
    words = [f"study.variants=[{','.join(ARMS)}]", f"study.lrs=[{rates}]", f"study.seeds={SEEDS}", "study.gpu=h100"]
    plan, _, config = planned([*words, "train.device=cuda"])
    assert len(plan.cells) == count, len(plan.cells)
    assert list(dry_run_lines(plan, [], study.path, config.study))
    plan.save(study.path)
    return time.process_time()


def task_finish(study: StudyDir, count: int) -> float:
    """Half of the runs get a made-up summary, by the functions that a worker uses; no disk is waited for."""
    setattr(os, "fsync", lambda _: None)  # noqa: B010
    ledger = Ledger(study.path)
    for cell in list(load(study.path).cells.values())[::2]:
        finish(cell, ledger)
    return time.process_time()


def finish(cell: Cell, ledger: Ledger) -> None:
    claim = ledger.claim(cell.id, Entry())
    assert claim
    run = RunDir(claim.directory)
    run.path.mkdir()
    write_checked(run.summary_file, jsonable(made_up(cell)))
    claim.heartbeat(300)
    assert claim.finish()


def made_up(cell: Cell) -> dict[str, Any]:
    """The summary of a run of 300 steps that learned or, from a learning rate of 0.1 on, diverged."""
    ends = {"run_id": cell.id, "variant": cell.arm, "lr": cell.lr, "seed": cell.seed, "status": "complete"}
    verdict = asdict(judged(cell.lr > 0.1))
    return {**ends, **verdict, "val_loss": None, "steps": 300, "tokens": 307200, "seconds": 12.0}


@cache
def judged(diverges: bool) -> Verdict:
    judge = Judge(300, constant=True)
    for step in range(300):
        loss = 2 + 4 * math.exp(-0.01 * step) + (0.02 * (step - 100) if diverges and step > 100 else 0.0)
        judge.add({"step": step, "train/loss": loss, "grad/norm": 1.0})
    return judge.conclude()


def task_status(study: StudyDir, count: int) -> float:
    """`stabrun status`."""
    from stabrun.cli.main import dispatch

    assert dispatch(["status", str(study.path)]) == 0
    return time.process_time()


def task_answer(study: StudyDir, count: int) -> float:
    """`results.csv` and `study.json`, as at the end of a sweep."""
    snapshot = SnapshotReader(study.path).read()
    results.write(snapshot.plan, snapshot.rows, study)
    return time.process_time()


def task_look(study: StudyDir, count: int) -> float:
    """One more look of a sweep, on average over 10, before each of which a cell was finished."""
    reader, ledger, spent = SnapshotReader(study.path), Ledger(study.path), 0.0
    for cell in reader.read().cells(PLANNED)[:10]:
        finish(cell, ledger)
        began = time.process_time()
        snapshot = reader.read(attempts=False)
        assert cell.id in snapshot.summaries
        spent += time.process_time() - began
    return spent / 10


def task_choice(study: StudyDir, count: int) -> float:
    """A worker's choice of a cell, on average over 10."""
    from stabrun.study.worker import next_claim

    reader, stop = SnapshotReader(study.path), Stop()
    assert next_claim(reader, stop)
    began = time.process_time()
    for _ in range(10):
        assert next_claim(reader, stop)
    return (time.process_time() - began) / 10


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("throughput", "overhead", "cells", "worker", "task"))
    parser.add_argument("words", nargs="*", help="overrides of the study; for a worker, its directory")
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--cells", default="1000,10000")
    arguments = parser.parse_args()
    if arguments.what == "throughput":
        throughput(arguments.pairs)
    elif arguments.what == "overhead":
        overhead(arguments.words or ["+experiment=quickstart"])
    elif arguments.what == "cells":
        cells([int(count) for count in arguments.cells.split(",")])
    elif arguments.what == "task":
        task(arguments.words[0], Path(arguments.words[1]), int(arguments.words[2]))
    else:
        worker(Path(arguments.words[0]), float(arguments.words[1]))
