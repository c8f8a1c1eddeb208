"""Snapshots: the time left, by formula, and what is read again."""

import time

import pytest
from opens import opened
from snapshots import a_plan, a_snapshot, timed

from stabrun.study.cost import costs
from stabrun.study.ledger import Entry, Ledger
from stabrun.study.live_table import counts_text, table
from stabrun.study.snapshot import Attempt, SnapshotReader, seconds_left, seconds_per_step


def test_time_left_follows_the_formula():
    plan = a_plan("study.lrs=[1e-2,1e-1]", "study.seeds=3")  # 30 steps a run
    base, normed = ([cell for cell in plan.cells.values() if cell.arm == arm] for arm in plan.arms)
    running = [Attempt(base[3], 1, 12, 30, 5.0), Attempt(normed[0], 1, 20, 30, 4.0)]
    snapshot = a_snapshot(plan, {cell.id: "converged" for cell in base[:3]}, running)
    timed(snapshot, {base[0].id: 2.0, base[1].id: 3.0, base[2].id: 9.0})
    assert seconds_per_step(snapshot) == {"baseline": 0.3, "qk_norm": 0.25}, (
        "median of finished runs, else of running ones"
    )
    steps = 0.3 * (18 + 2 * 30) + 0.25 * (10 + 5 * 30)
    assert seconds_left(snapshot) == pytest.approx(steps / 2)
    assert counts_text(snapshot) == f"3 of 12 done, 2 running, ETA {steps / 2:.0f} s"


def test_time_left_of_the_last_runs_is_that_of_the_slowest():
    plan = a_plan("study.lrs=[1e-2]", "study.seeds=1")
    one, other = plan.cells.values()
    snapshot = a_snapshot(plan, running=[Attempt(one, 1, 29, 30, 1.0), Attempt(other, 1, 0, 30, 1.0)])
    assert seconds_left(snapshot) == pytest.approx(30.0)


def test_time_left_of_an_untimed_arm_is_estimated_from_flops():
    plan = a_plan("study.lrs=[1e-2]", "study.seeds=1", "model.n_layer=2,8", "study.variants=[baseline]")
    small, large = plan.cells.values()
    snapshot = timed(a_snapshot(plan, {small.id: "converged"}, [Attempt(large, 1, 0, 30)]), {small.id: 1.0})
    times = costs(plan, [], dict.fromkeys(plan.arms, "cpu"), {})
    assert seconds_left(snapshot) == pytest.approx(0.1 * times[1].flops / times[0].flops * 30)


def test_time_left_is_unknown_without_timings_or_workers_and_in_a_search():
    plan = a_plan("study.lrs=[1e-2]", "study.seeds=1")
    one, _ = plan.cells.values()
    assert seconds_left(a_snapshot(plan)) is None
    assert seconds_left(a_snapshot(plan, running=[Attempt(one, 1, 0, 30)])) is None
    assert seconds_left(a_snapshot(plan, running=[Attempt(one, 1, 5, 30, 2.0, owner_gone=True)])) is None
    known = a_snapshot(plan, running=[Attempt(one, 1, 5, 30, 2.0)])
    assert seconds_left(known) == pytest.approx((25 + 30) / 2.0)
    plan.strategy = "frontier"
    assert seconds_left(known) is None


def test_finished_runs_are_read_once(tmp_path):
    plan = a_plan("study.lrs=" + str([1e-3 * 1.05**k for k in range(100)]).replace(" ", ""), "study.seeds=10")
    assert len(plan.cells) == 2000
    for cell in plan.cells.values():
        (tmp_path / "runs" / cell.id).mkdir(parents=True)
        (tmp_path / "runs" / cell.id / "summary.json").write_text('{"verdict": "converged"}')
    reader = SnapshotReader(tmp_path)
    for _ in range(2):
        began = time.monotonic()
        snapshot = reader.read(plan)
        lines = table(snapshot, 80)
        print(f"{time.monotonic() - began:.3f} s")
        assert "".join(lines[1:]).count("c") >= 2000
        for cell in plan.cells:
            (tmp_path / "runs" / cell / "summary.json").unlink(missing_ok=True)


def test_a_plan_is_read_again_when_it_has_changed(tmp_path):
    plan = a_plan("study.lrs=[1e-2]")
    plan.save(tmp_path)
    reader = SnapshotReader(tmp_path)
    first = reader.plan()
    assert reader.plan() is first
    plan.add("baseline", 0.5, 0)
    plan.save(tmp_path)
    assert len(reader.plan().cells) == len(first.cells) + 1


def test_a_further_look_opens_only_what_is_new(tmp_path):
    """However many cells there are: one summary is opened for one more finished run."""
    plan = a_plan("study.lrs=" + str([1e-3 * 1.05**k for k in range(40)]).replace(" ", ""), "study.seeds=4")
    plan.save(tmp_path)
    ledger, (first, *others) = Ledger(tmp_path), plan.cells
    for cell in others:
        finished(ledger, cell)
    reader = SnapshotReader(tmp_path)
    with opened(tmp_path) as paths:
        assert len(reader.read().summaries) == len(others) > 300
    assert len(paths) == len(others) + 2, "the plan is read twice, for its checksum and its content"
    finished(ledger, first)
    with opened(tmp_path) as paths:
        assert len(reader.read().summaries) == len(plan.cells)
    assert paths == [reader.study.run(first).summary_file]
    with opened(tmp_path) as paths:
        reader.read()
    assert paths == []


def finished(ledger, cell):
    claim = ledger.claim(cell, Entry())
    claim.directory.mkdir()
    (claim.directory / "summary.json").write_text('{"verdict": "converged"}')
    claim.finish()
