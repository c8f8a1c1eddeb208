"""What a changed rule makes stale: finished runs are judged anew, and reopened where their end no longer stands."""

import json
from dataclasses import asdict
from pathlib import Path

from stabrun.record.jsonl import jsonable, read_json, read_metrics, write_atomic
from stabrun.record.run_dir import INTERRUPTED, STOPPED
from stabrun.study.ledger import DONE, Ledger
from stabrun.study.plan import Plan
from stabrun.verdict.judge import RULE, Judge


def renew(plan: Plan, directory: Path, ledger: Ledger) -> None:
    """Bring every finished run under the rule in force.

    A run that an earlier rule stopped, and this one would not, goes on from its checkpoint.
    """
    for cell, entry in ledger.entries(plan.cells).items():
        run = directory / "runs" / cell
        if entry.status == DONE and (summary := read_json(run / "summary.json")).get("rule") != RULE:
            judge = Judge()
            for row in read_metrics(run / "metrics.jsonl"):
                judge.add(row)
            reopened = summary["status"] == STOPPED and not judge.over and judge.certain is None
            verdict = judge.conclude(plan.config(plan.cells[cell]).train.steps)
            renewed = {**summary, **asdict(verdict), "status": INTERRUPTED if reopened else summary["status"]}
            write_atomic(run / "summary.json", json.dumps(jsonable(renewed), indent=1) + "\n")
            if reopened:
                ledger.reopen(cell, entry.attempt)
