"""`results.csv`: the finished runs of a study, one row per run."""

from typing import Any, cast

from stabrun.record.jsonl import jsonable, write_atomic
from stabrun.record.schema import Result, StudySummary, Summary
from stabrun.record.study_dir import StudyDir
from stabrun.study.plan import Plan
from stabrun.study.summary import study_summary
from stabrun.text import csv_text
from stabrun.verdict.rule import STRICTNESS

COLUMNS = tuple(Result.__annotations__)


def write(plan: Plan, rows: list[Summary], study: StudyDir) -> StudySummary:
    """Write `results.csv` and `study.json` from the finished runs, and return the latter.

    Both files are replaced atomically. `rows` are the runs' summaries with their `arm`.
    """
    summary: StudySummary = jsonable(study_summary(plan, rows))
    write_atomic(study.results_file, csv_text([COLUMNS, *(result(row).values() for row in rows)]))
    study.write_summary(summary)
    return summary


def result(row: Summary) -> Result:
    """A run's summary, with its `arm`, as a row of `results.csv`."""
    flat: dict[str, Any] = {**row, **{level: row["by_strictness"].get(level) for level in STRICTNESS}}
    return cast(Result, {column: flat.get(column) for column in COLUMNS})
