"""`stabrun sweep`: plan a study, start workers on this machine, show what comes, and end with its table."""

import fcntl
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from stabrun.config import MistakeError
from stabrun.model.describe import flops_per_token
from stabrun.observe.console import warn
from stabrun.observe.record import read_object
from stabrun.study import results
from stabrun.study.crew import Crew
from stabrun.study.launch import crew_of
from stabrun.study.ledger import DONE, FAILED, PLANNED, RUNNING, Entry, Ledger
from stabrun.study.plan import FILE, GRID, Plan, extended, load, planned

POLL = 0.3  # seconds between two looks at the ledger
MARKS = {"converged": "c", "recovered": "r", "diverged": "D", "undecided": "?", RUNNING: ">", PLANNED: ".", FAILED: "!"}
LEGEND = "c converged, r recovered, D diverged, ? undecided, > running, . planned, ! failed; a mark a seed"


def sweep(conf: Path, overrides: list[str], dry_run: bool) -> int:
    """Plan or extend a study and train its cells. Returns the exit status: 1 where a cell could not be trained.

    Raises MistakeError before anything is made where the question cannot be asked.
    """
    asked, directory, config = planned(conf, overrides)
    if asked.strategy != GRID:
        raise MistakeError("study.strategy=frontier: the search is not there yet; a grid is, with study.lrs=[…].")
    crew = crew_of(conf, overrides, directory, config.study.workers)
    if dry_run:
        print("\n".join(described(_with_what_is_there(asked, directory), directory)))
        return 0
    directory.mkdir(parents=True, exist_ok=True)
    with _locked(directory):
        plan = _with_what_is_there(asked, directory)
        plan.save(directory)
    ledger = Ledger(directory)
    ledger.forgive(plan.cells)
    print(f"{plan.name}: {len(plan.cells)} cells, {config.study.workers} workers → {directory}", flush=True)
    status = _supervise(plan, directory, ledger, crew)
    results.write(plan, directory)
    entries = ledger.entries(plan.cells)
    print("\n".join([*matrix(plan, directory, entries), LEGEND, f"records: {directory}"]))
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


@contextmanager
def _locked(directory: Path) -> Iterator[None]:
    """One sweep at a time plans; the ledger needs no lock."""
    with open(directory / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _supervise(plan: Plan, directory: Path, ledger: Ledger, crew: Crew) -> int:
    """Keep the crew at work until no cell is left; 130 after Ctrl-C."""
    told = {cell for cell, entry in ledger.entries(plan.cells).items() if entry.status == DONE}
    try:
        while True:
            entries = ledger.entries(plan.cells)
            if done := [cell for cell, entry in entries.items() if entry.status == DONE and cell not in told]:
                results.write(plan, directory)
                for cell in done:
                    print(said(plan, directory, cell, len(told) + 1), flush=True)
                    told.add(cell)
            if all(entry.status in (DONE, FAILED) for entry in entries.values()):
                return crew.end(0)
            crew.keep(sum(entry.attempt for entry in entries.values()))
            time.sleep(POLL)
    except KeyboardInterrupt:
        return crew.end(130)


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
