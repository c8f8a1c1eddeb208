"""What a changed rule makes stale: finished runs are judged anew, and reopened where their end no longer stands."""

from dataclasses import asdict
from pathlib import Path

from stabrun.record.jsonl import jsonable
from stabrun.record.schema import INTERRUPTED, STOPPED
from stabrun.record.study_dir import StudyDir
from stabrun.study.ledger import DONE, Ledger
from stabrun.study.plan import Plan
from stabrun.verdict.judge import RULE, Judge


def renew(plan: Plan, directory: Path, ledger: Ledger) -> None:
    """Bring every finished run under the rule in force.

    A run that an earlier rule stopped, and this one would not, goes on from its checkpoint.
    """
    for cell, entry in ledger.entries(plan.cells).items():
        run = StudyDir(directory).run(cell)
        summary = run.summary() if entry.status == DONE and run.metrics.is_file() else None
        if summary and summary.get("rule") != RULE:
            judge = Judge()
            for row in run.rows():
                judge.add(row)
            reopened = summary.get("status") == STOPPED and not judge.over and judge.certain is None
            verdict = judge.conclude(plan.config(plan.cells[cell]).train.steps)
            renewed = {**summary, **asdict(verdict), "status": INTERRUPTED if reopened else summary.get("status")}
            run.write_summary(jsonable(renewed))
            if reopened:
                ledger.reopen(cell, entry.attempt)
