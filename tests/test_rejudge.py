"""A changed rule: runs judged by another one are judged again, and early stops that are no longer valid are undone."""

import pytest
from studies import a_plan

from stabrun.record.jsonl import read_checked, write_checked
from stabrun.study.ledger import DONE, PLANNED, Ledger
from stabrun.study.rejudge import rejudge
from stabrun.study.snapshot import SnapshotReader
from stabrun.study.worker import work
from stabrun.verdict.judge import RULE


@pytest.fixture
def study(tmp_path):
    plan = a_plan(tmp_path, "study.lrs=[1e-2,1e-1]", "study.seeds=1", "train.checkpoint_every=10")
    work(tmp_path)
    return plan, tmp_path


def changed(directory, cell, **facts):
    file = directory / "runs" / cell / "summary.json"
    summary = read_checked(file)
    write_checked(file, summary | facts)
    return summary


def statuses(plan, directory):
    return [entry.status for entry in Ledger(directory).entries(plan.cells).values()]


def test_a_verdict_by_another_rule_is_replaced(study):
    plan, directory = study
    one, other = plan.cells
    before = changed(directory, one, rule=RULE - 1, verdict="diverged", by_strictness={}, scar=7.0)
    changed(directory, other, verdict="diverged")
    rejudge(plan, SnapshotReader(directory))
    now, same = (read_checked(directory / "runs" / cell / "summary.json") for cell in (one, other))
    assert now == before
    assert same["verdict"] == "diverged", "a verdict by this rule is not touched"
    assert statuses(plan, directory) == [DONE, DONE]


def test_a_run_that_should_not_have_been_stopped_is_resumed_to_the_same_record(study):
    plan, directory = study
    one, _ = plan.cells
    run = directory / "runs" / one
    whole = (run / "metrics.jsonl").read_bytes()
    summary = read_checked(run / "summary.json")
    for folder in (run / "checkpoints").glob("step_*"):
        if folder.name > "step_00000010":
            for file in folder.iterdir():
                file.unlink()
            folder.rmdir()
    (run / "metrics.jsonl").write_bytes(b"".join(whole.splitlines(keepends=True)[:13]))
    lines = [line for line in (run / "events.jsonl").read_text().splitlines() if '"complete"' not in line]
    (run / "events.jsonl").write_text("".join(f"{line}\n" for line in lines[:2]))
    changed(directory, one, rule=RULE - 1, status="stopped", verdict="diverged", steps=13)
    rejudge(plan, SnapshotReader(directory))
    assert statuses(plan, directory) == [PLANNED, DONE]
    work(directory)
    assert statuses(plan, directory) == [DONE, DONE]
    assert (run / "metrics.jsonl").read_bytes() == whole
    now = read_checked(run / "summary.json")
    assert {key: now[key] for key in ("status", "verdict", "rule", "steps", "final_loss")} == {
        key: summary[key] for key in ("status", "verdict", "rule", "steps", "final_loss")
    }
    events = (run / "events.jsonl").read_text()
    assert events.count('"event": "start"') == 2
