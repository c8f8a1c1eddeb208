"""After a change of the rule: finished runs are judged again, and resumed if they should not have been stopped."""

from dataclasses import asdict

from stabrun.record.jsonl import jsonable
from stabrun.record.schema import COMPLETE, INTERRUPTED, STOPPED
from stabrun.study.ledger import DONE, Ledger
from stabrun.study.plan import Plan
from stabrun.verdict.judge import RULE, Judge


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
