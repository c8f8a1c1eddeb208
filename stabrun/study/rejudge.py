"""After a change of the rule: finished runs are judged again, and resumed if they should not have been stopped."""

from dataclasses import asdict

from stabrun.record.jsonl import jsonable
from stabrun.record.schema import COMPLETE, INTERRUPTED, STOPPED
from stabrun.study.ledger import DONE
from stabrun.study.plan import Plan
from stabrun.study.snapshot import SnapshotReader
from stabrun.text import warn
from stabrun.verdict.judge import RULE, Judge


def reopen_damaged(plan: Plan, reader: SnapshotReader) -> None:
    """Go on with each finished run whose `summary.json` is missing or damaged: from its last checkpoint, if any."""
    snapshot = reader.read(plan, attempts=False)
    for cell, entry in snapshot.entries.items():
        if entry.status == DONE and cell not in snapshot.summaries:
            file = reader.study.run(cell).summary_file
            warn(f"{file} is missing or damaged; the run goes on from its last checkpoint.")
            reader.ledger.reopen(cell, entry.attempt)


def rejudge(plan: Plan, reader: SnapshotReader) -> None:
    """Bring every finished run to the current rule.

    A run that an earlier rule stopped, and this one would not, continues from its checkpoint.
    """
    snapshot = reader.read(plan, attempts=False)
    for cell, summary in snapshot.summaries.items():
        if summary.get("rule") == RULE:
            continue
        run = reader.study.run(cell)
        judge = Judge.of(plan.config(plan.cells[cell]))
        for row in run.rows():
            judge.add(row)
        verdict = jsonable(asdict(judge.conclude()))
        verdict["last_healthy_checkpoint"] = run.healthy_checkpoint(verdict["last_healthy_step"])
        reopened = summary.get("status") == STOPPED and not judge.over and judge.certain is None
        run.write_summary(
            {**summary, **verdict, "status": INTERRUPTED if reopened else summary.get("status", COMPLETE)}
        )
        reader.forget(cell)
        if reopened:
            reader.ledger.reopen(cell, snapshot.entries[cell].attempt)
