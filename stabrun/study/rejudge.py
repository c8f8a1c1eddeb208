"""After a change of the rule: finished runs are judged again, and resumed if they should not have been stopped."""

from dataclasses import asdict

from stabrun.config import UserError
from stabrun.record.jsonl import jsonable
from stabrun.record.run_dir import RunDir
from stabrun.record.schema import COMPLETE, INTERRUPTED, STOPPED, Summary
from stabrun.study.ledger import DONE, Ledger
from stabrun.study.plan import Plan
from stabrun.text import warn
from stabrun.verdict.judge import RULE, Judge


def reopen_damaged(plan: Plan, ledger: Ledger) -> None:
    """Go on with each finished run whose `summary.json` is missing or damaged: from its last checkpoint, if any."""
    for cell, entry in ledger.entries(plan.cells).items():
        run = ledger.study.run(cell)
        if entry.status == DONE and readable_summary(run) is None:
            warn(f"{run.summary_file} is missing or damaged; the run goes on from its last checkpoint.")
            ledger.reopen(cell, entry.attempt)


def readable_summary(run: RunDir) -> Summary | None:
    """The summary of a run; None if it is missing or damaged."""
    try:
        return run.summary()
    except UserError:
        return None


def rejudge(plan: Plan, ledger: Ledger) -> None:
    """Bring every finished run to the current rule.

    A run that an earlier rule stopped, and this one would not, continues from its checkpoint.
    """
    for cell, entry in ledger.entries(plan.cells).items():
        run = ledger.study.run(cell)
        summary = run.summary() if entry.status == DONE else None
        if summary is None or summary.get("rule") == RULE:
            continue
        judge = Judge.of(plan.config(plan.cells[cell]))
        for row in run.rows():
            judge.add(row)
        verdict = jsonable(asdict(judge.conclude()))
        verdict["last_healthy_checkpoint"] = run.healthy_checkpoint(verdict["last_healthy_step"])
        reopened = summary.get("status") == STOPPED and not judge.over and judge.certain is None
        run.write_summary(
            {**summary, **verdict, "status": INTERRUPTED if reopened else summary.get("status", COMPLETE)}
        )
        if reopened:
            ledger.reopen(cell, entry.attempt)
