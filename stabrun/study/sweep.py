"""`stabrun sweep`: plan a study, start workers on this machine, show what comes, and end with its table."""

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

from stabrun.config import MistakeError
from stabrun.observe.console import warn
from stabrun.observe.record import read_object
from stabrun.observe.tracker import track_study
from stabrun.study import answer, results
from stabrun.study.board import LEGEND, Board, given_up, said, table
from stabrun.study.cost import described, threads_each
from stabrun.study.ledger import DONE, FAILED, Ledger
from stabrun.study.look import Looker
from stabrun.study.plan import FILE, GRID, Plan, extended, load, planned, planning
from stabrun.study.renew import renew
from stabrun.study.search import next_run

POLL = 0.3  # seconds between two looks at the ledger
GRACE = 60.0  # seconds that workers have to end after Ctrl-C


def sweep(conf: Path, overrides: list[str], dry_run: bool) -> int:
    """Plan or extend a study and train its cells. Returns the exit status: 1 where a cell could not be trained.

    Raises MistakeError before anything is made where the question cannot be asked.
    """
    asked, directory, config = planned(conf, overrides)
    if dry_run:
        print("\n".join(described(_with_what_is_there(asked, directory), directory, config.study.workers)))
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
    look = Looker(directory).look(plan)
    seen = table(look, shutil.get_terminal_size().columns)
    print("\n".join([*seen, LEGEND, "", *answer.lines(facts), "", f"records: {directory}"]))
    for sentence in given_up(look):
        warn(sentence)
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
    board = Board(directory)
    try:
        while True:
            plan = load(directory)
            entries = ledger.entries(plan.cells)
            board.show(plan, entries)
            if done := [cell for cell, entry in entries.items() if entry.status == DONE and cell not in told]:
                results.write(plan, directory)
                for cell in done:
                    summary = read_object(directory / "runs" / cell / "summary.json")
                    board.say(said(plan.cells[cell], summary, len(told) + 1, len(plan.cells)))
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
        board.close()
        return _ended(workers, 130)
    finally:
        board.close()


def more(plan: Plan, directory: Path) -> bool:
    """Whether a search whose runs have all ended needs another."""
    return next_run(plan, list(results.finished(plan, directory)), plan.cells) is not None


def _worker(directory: Path, count: int) -> "subprocess.Popen[bytes]":
    threads = str(threads_each(count))
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
