"""A changed rule: what was judged by another one is judged anew, and a stop that no longer stands is undone."""

import json

import pytest
from helpers import TINY

from stabrun.study.ledger import DONE, PLANNED, Ledger
from stabrun.study.plan import planned
from stabrun.study.rejudge import renew
from stabrun.study.worker import work
from stabrun.verdict.judge import RULE


@pytest.fixture
def study(tmp_path):
    plan, _, _ = planned([*TINY, "study.lrs=[1e-2,1e-1]", "study.seeds=1", "train.checkpoint_every=10"])
    plan.save(tmp_path)
    work(tmp_path)
    return plan, tmp_path


def changed(directory, cell, **facts):
    file = directory / "runs" / cell / "summary.json"
    summary = json.loads(file.read_text())
    file.write_text(json.dumps(summary | facts))
    return summary


def statuses(plan, directory):
    return [entry.status for entry in Ledger(directory).entries(plan.cells).values()]


def test_a_verdict_of_another_rule_is_given_anew(study):
    plan, directory = study
    one, other = plan.cells
    before = changed(directory, one, rule=RULE - 1, verdict="diverged", by_strictness={}, scar=7.0)
    changed(directory, other, verdict="diverged")
    renew(plan, directory, Ledger(directory))
    now, same = (json.loads((directory / "runs" / cell / "summary.json").read_text()) for cell in (one, other))
    assert now == before
    assert same["verdict"] == "diverged", "what this rule has judged is left alone"
    assert statuses(plan, directory) == [DONE, DONE]


def test_a_stop_that_no_longer_stands_goes_on_to_the_same_record(study):
    plan, directory = study
    one, _ = plan.cells
    run = directory / "runs" / one
    whole = (run / "metrics.jsonl").read_bytes()
    summary = json.loads((run / "summary.json").read_text())
    for folder in (run / "checkpoints").glob("step_*"):
        if folder.name > "step_00000010":
            for file in folder.iterdir():
                file.unlink()
            folder.rmdir()
    (run / "metrics.jsonl").write_bytes(b"".join(whole.splitlines(keepends=True)[:13]))
    changed(directory, one, rule=RULE - 1, status="stopped", verdict="diverged")
    renew(plan, directory, Ledger(directory))
    assert statuses(plan, directory) == [PLANNED, DONE]
    work(directory)
    assert statuses(plan, directory) == [DONE, DONE]
    assert (run / "metrics.jsonl").read_bytes() == whole
    now = json.loads((run / "summary.json").read_text())
    assert {key: now[key] for key in ("status", "verdict", "rule", "steps", "final_loss")} == {
        key: summary[key] for key in ("status", "verdict", "rule", "steps", "final_loss")
    }
    events = (run / "events.jsonl").read_text()
    assert events.count('"event": "start"') == 2
