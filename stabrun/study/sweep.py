"""`stabrun sweep`: plan a study, keep workers at work on it, show what comes, and end with its answer."""

import shutil
import time
from pathlib import Path

from stabrun.composition import Sources
from stabrun.record.study_dir import StudyDir
from stabrun.study import results, summary
from stabrun.study.cost import described
from stabrun.study.launch import crew_of
from stabrun.study.ledger import DONE, FAILED, Ledger
from stabrun.study.live_table import LEGEND, LiveTable, given_up, said, table
from stabrun.study.plan import GRID, Latest, Plan, extended, load, planned
from stabrun.study.pool import WorkerPool
from stabrun.study.rejudge import renew
from stabrun.study.search import next_run
from stabrun.study.snapshot import SnapshotReader
from stabrun.study.tracking import track_study
from stabrun.text import warn

POLL = 0.3  # seconds between two looks at the ledger


def sweep(overrides: list[str], sources: Sources, dry_run: bool) -> int:
    """Plan or extend a study and train its cells. Returns the exit status: 1 where a cell could not be trained.

    Raises UserError before anything is made where the question cannot be asked.
    """
    asked, directory, config = planned(overrides, sources)
    crew = crew_of(overrides, sources, directory, config.study.workers)
    if dry_run:
        print("\n".join(described(_with_what_is_there(asked, directory), directory, config.study.workers)))
        return 0
    directory.mkdir(parents=True, exist_ok=True)
    with StudyDir(directory).lock():
        plan = _with_what_is_there(asked, directory)
        plan.save(directory)
        ledger = Ledger(directory)
        renew(plan, directory, ledger)
    ledger.forgive(plan.cells)
    cells = f"{len(plan.cells)} cells" if plan.strategy == GRID else f"up to {plan.max_runs} runs for each variant"
    print(f"{plan.name}: {cells}, {config.study.workers} workers → {directory}", flush=True)
    status = _supervise(directory, ledger, crew)
    plan = load(directory)
    facts = results.write(plan, directory)
    if config.tracker.name == "wandb" and status != 130:
        rows = [results.result(row) for row in results.finished(plan, directory)]
        track_study(config.tracker, directory, rows, {**facts})
    look = SnapshotReader(directory).look(plan)
    seen = table(look, shutil.get_terminal_size().columns)
    print("\n".join([*seen, LEGEND, "", *summary.lines({**facts}), "", f"records: {directory}"]))
    for sentence in given_up(look):
        warn(sentence)
        status = status or 1
    if status == 130:
        print("interrupted; the same command goes on from there.")
    return status


def _with_what_is_there(asked: Plan, directory: Path) -> Plan:
    study = StudyDir(directory)
    if study.is_study():
        return extended(load(directory, to_train=True), asked)
    study.refuse_other_content()
    return asked


def _supervise(directory: Path, ledger: Ledger, crew: WorkerPool) -> int:
    """Keep the crew at work until no cell is left; 130 after Ctrl-C."""
    latest, board = Latest(directory), LiveTable(directory)
    told = {cell for cell, entry in ledger.entries(latest.plan().cells).items() if entry.status == DONE}
    try:
        while True:
            plan = latest.plan()
            entries = ledger.entries(plan.cells)
            board.show(plan, entries)
            if done := [cell for cell, entry in entries.items() if entry.status == DONE and cell not in told]:
                results.write(plan, directory)
                for cell in done:
                    summary = StudyDir(directory).run(cell).summary() or {}
                    board.say(said(plan.cells[cell], summary, len(told) + 1, len(plan.cells)))
                    told.add(cell)
            if all(entry.status in (DONE, FAILED) for entry in entries.values()) and not _more(plan, directory):
                return crew.end(0)
            crew.keep(sum(entry.attempt for entry in entries.values()))
            time.sleep(POLL)
    except KeyboardInterrupt:
        board.close()
        return crew.end(130)
    finally:
        board.close()


def _more(plan: Plan, directory: Path) -> bool:
    """Whether a search whose runs have all ended needs another."""
    return next_run(plan, list(results.finished(plan, directory)), plan.cells) is not None
