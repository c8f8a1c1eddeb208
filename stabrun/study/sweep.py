"""`stabrun sweep`: plan a study, keep workers at work on it, show the results as they come, and print a summary."""

import errno
import shutil
import sys
import time
from contextlib import suppress

from stabrun.composition import Sources
from stabrun.config import TrackerConfig
from stabrun.record.run_dir import naming, refuse_links
from stabrun.record.schema import StudySummary
from stabrun.record.study_dir import StudyDir
from stabrun.record.synced import OFFLINE, holds_all
from stabrun.study import results
from stabrun.study.dry_run import dry_run_lines
from stabrun.study.facts import summary_lines
from stabrun.study.launch import worker_pool
from stabrun.study.ledger import DISK
from stabrun.study.live_table import LEGEND, LiveTable, failure_messages, result_line, table
from stabrun.study.plan import GRID, Plan, extended, load
from stabrun.study.pool import NOT_COUNTED, WorkerPool, naming_disk
from stabrun.study.question import planned
from stabrun.study.rejudge import rejudge, reopen_damaged
from stabrun.study.search import next_run
from stabrun.study.snapshot import Snapshot, SnapshotReader
from stabrun.study.tracking import knows, track_study
from stabrun.text import shown, warn
from stabrun.training.offline import ROW, is_offline, write
from stabrun.training.tracker import WAIT
from stabrun.verdict.wording import too_short

POLL = 0.3  # seconds between two readings of the ledger
PAUSE = 20  # times as long as a reading of it, or a writing of the results, takes, until the next one at the earliest


def sweep(overrides: list[str], sources: Sources, dry_run: bool) -> int:
    """Plan or extend a study and train its cells. Returns the exit status: 1 if a cell could not be trained.

    Raises UserError, before anything is created, if the overrides are invalid.
    """
    asked, directory, config = planned(overrides, sources)
    pool = worker_pool(overrides, sources, directory, config.study.workers, config.train.ranks)
    study, reader = StudyDir(directory), SnapshotReader(directory)
    if dry_run:
        plan = _with_existing(asked, study)
        _warn_if_short(plan)
        print("\n".join(map(shown, dry_run_lines(plan, reader.read(plan).rows, directory, config.study))))
        return 0
    with naming("study_dir", directory):
        directory.mkdir(parents=True, exist_ok=True)
        refuse_links("study_dir", directory, "*", "runs/*", "attempts/*", "ledger/*")
    with study.lock():
        plan = _with_existing(asked, study)
        plan.save(directory)
        reopen_damaged(plan, reader)
        rejudge(plan, reader)
    _warn_if_short(plan)
    reader.ledger.retry_failed(plan.cells)
    cells = f"{len(plan.cells)} cells" if plan.strategy == GRID else f"up to {plan.max_runs} runs per arm"
    print(shown(f"{plan.name}: {cells}, {config.study.workers} workers → {directory}"), flush=True)
    status = _supervise(reader, pool)
    snapshot = reader.read()
    summary = results.write(snapshot.plan, snapshot.rows, study)
    marks = table(snapshot, shutil.get_terminal_size().columns)
    print("\n".join(map(shown, [*marks, LEGEND, "", *summary_lines(summary), "", f"records: {directory}"])))
    for message in failure_messages(snapshot):
        warn(message)
        status = status or 1
    if status == 130:
        print("interrupted; the same command resumes.")
    else:
        _track(config.tracker, snapshot, study, summary)
    return status


def _track(tracker: TrackerConfig, snapshot: Snapshot, study: StudyDir, summary: StudySummary) -> None:
    """Give W&B what it lacks of the study: offline, its runs too, which their workers have left to this process."""
    table = list(map(results.result, snapshot.rows))
    if is_offline(tracker):
        runs = all(holds_all(study.run(cell), OFFLINE) for cell in snapshot.summaries)
        if not runs or not knows(tracker, study.path, table, summary):
            sys.stdout.flush()  # the answer is there; W&B takes a moment
            write(study.path, WAIT + ROW * sum(row["steps"] for row in snapshot.rows))
    elif tracker.name == "wandb":
        track_study(tracker, study.path, table, summary)


def _with_existing(asked: Plan, study: StudyDir) -> Plan:
    """The plan asked for, with that of the directory if it holds a study. UserError if it holds anything else."""
    if study.is_study():
        return extended(load(study.path, to_train=True), asked)
    study.refuse_other_content()
    return asked


def _warn_if_short(plan: Plan) -> None:
    if warning := too_short(arm.train.steps for arm in plan.arms.values()):
        warn(warning)


def left_attempts(snapshot: Snapshot) -> set[tuple[str, int]]:
    """The cells whose last attempt was left, and its number."""
    return {(cell, entry.attempt) for cell, entry in snapshot.entries.items() if entry.attempt in entry.left}


def _supervise(reader: SnapshotReader, pool: WorkerPool) -> int:
    """Keep the pool at work until no cell is left. Returns 130 after Ctrl-C. Raises OSError if the disk is full."""
    first = reader.read(attempts=False)
    done, left, live_table = set(first.summaries), left_attempts(first), LiveTable(reader)
    written, write_at = len(done), 0.0  # runs in `results.csv`; when it may be written again
    try:
        while True:
            began = time.monotonic()
            snapshot = live_table.update()
            plan, looked = snapshot.plan, time.monotonic()
            for cell in [cell for cell in snapshot.summaries if cell not in done]:
                done.add(cell)
                line = result_line(plan.cells[cell], snapshot.summaries[cell], len(done), len(plan.cells))
                live_table.print_line(line)
            if len(done) > written and looked >= write_at:
                with naming_disk(reader.study.path):
                    results.write(plan, snapshot.rows, reader.study)
                now = time.monotonic()
                written, write_at = len(done), now + PAUSE * (now - looked)
            if len(snapshot.ended) == len(plan.cells) and next_run(plan, snapshot.rows, plan.cells) is None:
                pool.end(interrupt=False)
                return 0
            for attempt in left_attempts(snapshot) - left:
                left.add(attempt)
                reason = reader.ledger.reason(*attempt, "left")
                if reason.startswith(DISK):
                    raise OSError(errno.ENOSPC, f"{reason}; {NOT_COUNTED}", str(reader.study.path))
            pool.keep(sum(entry.attempt for entry in snapshot.entries.values()))
            time.sleep(max(POLL, PAUSE * (looked - began)))
    except KeyboardInterrupt:
        live_table.close()
        pool.end(interrupt=True)
        return 130
    except OSError:
        live_table.close()
        with suppress(OSError):
            pool.end(interrupt=True)
        raise
    finally:
        live_table.close()
