"""`results.csv`: the finished runs of a study, one row per run."""

import csv
import io
from collections.abc import Iterable
from typing import Any, cast

from stabrun.record.jsonl import jsonable, write_atomic
from stabrun.record.schema import Result, StudySummary, Summary
from stabrun.record.study_dir import StudyDir
from stabrun.study.plan import Plan
from stabrun.study.summary import study_summary

COLUMNS = tuple(Result.__annotations__)


def write(plan: Plan, rows: list[Summary], study: StudyDir) -> StudySummary:
    """Write `results.csv` and `study.json` from the finished runs, and return the latter.

    Both files are replaced atomically. `rows` are the runs' summaries with their `arm`.
    """
    summary: StudySummary = jsonable(study_summary(plan, rows))
    write_atomic(study.results_file, as_csv(map(result, rows)))
    study.write_summary(summary)
    return summary


def result(row: Summary) -> Result:
    """A run's summary, with its `arm`, as a row of `results.csv`."""
    flat: dict[str, Any] = {**row, **row["by_strictness"]}
    return cast(Result, {column: flat.get(column) for column in COLUMNS})


def as_csv(rows: Iterable[Result]) -> str:
    """CSV; None is an empty field."""
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()
