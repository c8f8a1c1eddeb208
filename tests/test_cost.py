"""What a study costs, by formula."""

import pytest
from snapshots import a_plan

from stabrun.study.cost import cost_lines, costs


def test_costs_follow_the_formula():
    plan = a_plan("study.lrs=[1e-2,1e-1]", "study.seeds=2")
    first = next(cell for cell in plan.cells.values() if cell.arm == "qk_norm")
    rows = [{"run_id": first.id, "arm": "qk_norm", "steps": 30, "seconds": 6.0}]
    bounded, measured = costs(plan, rows, speed=1e6)
    tokens, weights = 30 * 4 * 16, 2 * 12 * 16 * 16 + 16 * plan.arms["baseline"].model.vocab_size
    assert (bounded.cells, bounded.tokens, bounded.rates) == (4, 4 * tokens, [0.01, 0.1])
    assert bounded.flops == bounded.tokens * (6 * weights + 12 * 2 * 16 * 16)
    assert bounded.seconds == pytest.approx(bounded.flops / 1e6)
    assert (measured.cells, measured.seconds) == (3, pytest.approx(3 * 6.0))
    assert [cost.seconds for cost in costs(plan, [], None)] == [None, None]


def test_times_on_a_gpu_are_unknown_before_a_run_is_finished(tmp_path):
    lines = list(cost_lines(a_plan("study.lrs=[1e-2]", "train.device=cuda"), [], tmp_path, workers=2))
    assert lines[-2].startswith("times are unknown until a run of each arm is finished")
    assert "workers" not in "".join(lines)


def test_a_search_costs_at_most_its_budget(tmp_path):
    plan = a_plan("study.strategy=frontier", "study.lr_range=[1e-2,1]", "study.max_runs=5")
    whole = 30 * 4 * 16
    ended = [{"run_id": "a", "arm": "qk_norm", "steps": 30, "seconds": 6.0}] * 2
    baseline, qk_norm = costs(plan, ended, speed=None)
    assert (baseline.cells, baseline.tokens, baseline.seconds) == (5, 5 * whole, None)
    assert (qk_norm.cells, qk_norm.seconds) == (3, pytest.approx(3 * 6.0))
    lines = list(cost_lines(plan, [], tmp_path, workers=2))
    assert lines[0].startswith("baseline: up to 5 cells to train, 9,600 tokens")
    assert lines[2].startswith("total: up to 10 cells, 19,200 tokens")
