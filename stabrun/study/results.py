"""What the finished runs of a study say: `results.csv`, a row a run, and `study.json`, the answer by arm."""

import csv
import io
from collections.abc import Iterable, Iterator
from pathlib import Path

from stabrun.record.jsonl import jsonable, write_atomic
from stabrun.record.schema import Row, StudySummary
from stabrun.record.study_dir import StudyDir
from stabrun.study.plan import Plan
from stabrun.study.summary import answer
from stabrun.verdict.judge import STRICTNESS

COLUMNS = (
    "run_id", "arm", "variant", "lr", "seed", "status", "verdict", "reason", *STRICTNESS, "horizon", "rule",
    "first_bad_step", "first_bad_site", "certain_step", "scar", "init_loss", "best_loss", "final_loss", "val_loss",
    "val_perplexity", "val_gap", "clipped_share", "skipped_steps", "steps", "tokens", "seconds", "tokens_per_second",
)  # fmt: skip


def finished(plan: Plan, directory: Path) -> Iterator[Row]:
    """The summary of each finished run, with its `arm`, in the order of the plan."""
    for cell in plan.cells.values():
        if summary := StudyDir(directory).run(cell.id).summary():
            yield {**summary, "arm": cell.arm, "lr": cell.lr, "seed": cell.seed}


def write(plan: Plan, directory: Path) -> StudySummary:
    """Make `results.csv` and `study.json` anew from the runs that are finished; a reader never sees half of one.

    Returns what `study.json` holds.
    """
    study, rows = StudyDir(directory), list(finished(plan, directory))
    told: StudySummary = jsonable(answer(plan, rows))
    write_atomic(study.results_file, as_csv(map(result, rows)))
    study.write_summary(told)
    return told


def result(row: Row) -> Row:
    """A summary as a row of `results.csv`."""
    flat = {**row, **row["by_strictness"]}
    return {column: flat.get(column) for column in COLUMNS}


def as_csv(rows: Iterable[Row]) -> str:
    """What a row leaves open is an empty cell."""
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()
