"""`stabrun sweep`: plan a study, start workers on this machine, show what comes, and end with its table."""

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from stabrun.config import MistakeError
from stabrun.model.describe import flops_per_token
from stabrun.observe.console import warn
from stabrun.observe.record import read_object
from stabrun.observe.tracker import track_study
from stabrun.study import answer, results
from stabrun.study.ledger import DONE, FAILED, PLANNED, RUNNING, Entry, Ledger
from stabrun.study.plan import FILE, GRID, Plan, extended, load, planned, planning
from stabrun.study.renew import renew
from stabrun.study.search import next_run

POLL = 0.3  # seconds between two looks at the ledger
GRACE = 60.0  # seconds that workers have to end after Ctrl-C
MARKS = {"converged": "c", "recovered": "r", "diverged": "D", "undecided": "?", RUNNING: ">", PLANNED: ".", FAILED: "!"}
LEGEND = "c converged, r recovered, D diverged, ? undecided, > running, . planned, ! failed; a mark a seed"


def sweep(conf: Path, overrides: list[str], dry_run: bool) -> int:
    """Plan or extend a study and train its cells. Returns the exit status: 1 where a cell could not be trained.

    Raises MistakeError before anything is made where the question cannot be asked.
    """
    asked, directory, config = planned(conf, overrides)
    if dry_run:
        print("\n".join(described(_with_what_is_there(asked, directory), directory)))
        return 0
    directory.mkdir(parents=True, exist_ok=True)
    with planning(directory):
        plan = _with_what_is_there(asked, directory)
        plan.save(directory)
        ledger = Ledger(directory)
        renew(plan, directory, ledger)
    ledger.forgive(plan.cells)
    cells = f"{len(plan.cells)} cells" if plan.strategy == GRID else f"up to {plan.max_runs} runs for each variant"
    print(f"{plan.name}: {cells}, {config.study.workers} workers → {directory}", flush=True)
    status = _supervise(directory, ledger, config.study.workers)
    plan = load(directory)
    facts = results.write(plan, directory)
    if config.tracker.name == "wandb" and status != 130:
        rows = [results.result(row) for row in results.finished(plan, directory)]
        track_study(config.tracker, directory, rows, facts)
    entries = ledger.entries(plan.cells)
    print("\n".join([*matrix(plan, directory, entries), LEGEND, "", *answer.lines(facts), "", f"records: {directory}"]))
    for cell, entry in entries.items():
        if entry.status == FAILED:
            place = plan.cells[cell]
            why = ledger.reason(cell, entry.attempt)
            warn(f"{place.arm} lr={place.lr:g} s{place.seed} ({cell}) could not be trained: {why}")
            status = status or 1
    if status == 130:
        print("interrupted; the same command goes on from there.")
    return status


def _with_what_is_there(asked: Plan, directory: Path) -> Plan:
    if (directory / FILE).exists():
        return extended(load(directory), asked)
    if directory.is_dir() and any(item.name != ".lock" for item in directory.iterdir()):
        raise MistakeError(f"study_dir={directory}: the folder is not empty and holds no study.")
    return asked


def _supervise(directory: Path, ledger: Ledger, count: int) -> int:
    """Keep `count` workers at work until no cell is left; 130 after Ctrl-C."""
    workers: list[subprocess.Popen[bytes]] = []
    plan = load(directory)
    told = {cell for cell, entry in ledger.entries(plan.cells).items() if entry.status == DONE}
    lives = count + 3 * len(plan.cells)  # a worker that dies before it has a cell must not be started for ever
    try:
        while True:
            plan = load(directory)
            entries = ledger.entries(plan.cells)
            if done := [cell for cell, entry in entries.items() if entry.status == DONE and cell not in told]:
                results.write(plan, directory)
                for cell in done:
                    print(said(plan, directory, cell, len(told) + 1), flush=True)
                    told.add(cell)
            workers = [worker for worker in workers if worker.poll() is None]
            if all(entry.status in (DONE, FAILED) for entry in entries.values()) and not more(plan, directory):
                return _ended(workers, 0)
            while len(workers) < count and lives > 0:
                workers.append(_worker(directory, count))
                lives -= 1
            if not workers:
                raise OSError(f"workers die before they train; see {directory}/worker.log")
            time.sleep(POLL)
    except KeyboardInterrupt:
        return _ended(workers, 130)


def more(plan: Plan, directory: Path) -> bool:
    """Whether a search whose runs have all ended needs another."""
    return next_run(plan, list(results.finished(plan, directory)), plan.cells) is not None


def _worker(directory: Path, count: int) -> "subprocess.Popen[bytes]":
    threads = str(max(1, (os.cpu_count() or 1) // count))
    command = [sys.executable, "-m", "stabrun.study.worker", str(directory)]
    with open(directory / "worker.log", "ab") as log:
        return subprocess.Popen(command, stdout=log, stderr=log, env={"OMP_NUM_THREADS": threads, **os.environ})


def _ended(workers: "list[subprocess.Popen[bytes]]", status: int) -> int:
    """Wait for the workers, which have nothing left to do, or are asked to stop after their step."""
    for worker in workers:
        if status:
            worker.terminate()
    for worker in workers:
        try:
            worker.wait(GRACE)
        except subprocess.TimeoutExpired:
            worker.kill()
    return status


def said(plan: Plan, directory: Path, cell: str, number: int) -> str:
    """`[3/20] qk_norm lr=0.1 s0: diverged (runaway), loss 2.955`."""
    place, facts = plan.cells[cell], read_object(directory / "runs" / cell / "summary.json")
    loss = facts["final_loss"]
    end = loss if isinstance(loss, str) or loss is None else f"{loss:.3f}"
    name = f"{place.arm} lr={place.lr:g} s{place.seed}"
    return f"[{number}/{len(plan.cells)}] {name}: {facts['verdict']} ({facts['reason']}), loss {end}"


def matrix(plan: Plan, directory: Path, entries: dict[str, Entry]) -> Iterator[str]:
    """Arm × learning rate, a mark a seed."""
    rates = sorted({cell.lr for cell in plan.cells.values()})
    verdicts = {row["run_id"]: row["verdict"] for row in results.finished(plan, directory)}
    marks = {cell: MARKS[verdicts.get(cell, entry.status)] for cell, entry in entries.items()}
    rows = [["lr", *(f"{rate:g}" for rate in rates)]]
    for arm in plan.arms:
        own = [cell for cell in plan.cells.values() if cell.arm == arm]
        rows.append([arm, *("".join(marks[c.id] for c in own if c.lr == rate) or "-" for rate in rates)])
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for row in rows:
        yield "  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip()


def described(plan: Plan, directory: Path) -> Iterator[str]:
    """What a study would train: its cells, and their tokens and FLOPs by arm."""
    done = {row["run_id"] for row in results.finished(plan, directory)}
    total, flops = 0, 0
    for arm, config in plan.arms.items():
        cells = [cell for cell in plan.cells.values() if cell.arm == arm and cell.id not in done]
        tokens = len(cells) * config.train.steps * config.train.batch_size * config.data.seq_len
        total, flops = total + tokens, flops + tokens * flops_per_token(config.model, config.data.seq_len)
        rates = ", ".join(f"{rate:g}" for rate in sorted({cell.lr for cell in cells}))
        yield f"{arm}: {len(cells)} cells to train, {tokens:,} tokens" + (f", lr {rates}" if rates else "")
    yield f"in all {len(plan.cells) - len(done)} of {len(plan.cells)} cells, {total:,} tokens, {flops:.3g} FLOPs"
    yield f"study: {directory}"
