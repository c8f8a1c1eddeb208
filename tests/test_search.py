"""Which run a search plans next, on made-up outcomes; whole searches with two runs under way at a time."""

import math
import random
from collections import Counter

import numpy as np
import pytest
from helpers import TINY
from scipy.stats import norm

from stabrun.config import UserError
from stabrun.study.frontier import Frontier
from stabrun.study.plan import planned
from stabrun.study.search import diverged_cost, frontier, grid_of, next_run, outcome
from stabrun.study.summary import answer

RANGE = (3e-3, 3.0)


def a_plan(*words, arms=("baseline", "qk_norm")):
    asked = f"study.variants=[{','.join(arms)}]", "study.strategy=frontier", f"study.lr_range=[{RANGE[0]},{RANGE[1]}]"
    return planned([*TINY, *asked, *words])[0]


def ended(cell, diverged, steps=30):
    """The summary of a run, with its arm."""
    verdict = "diverged" if diverged else "converged"
    return {
        "run_id": cell.id, "arm": cell.arm, "lr": cell.lr, "seed": cell.seed, "verdict": verdict, "reason": "",
        "by_strictness": dict.fromkeys(("lenient", "standard", "strict"), verdict), "steps": steps, "tokens": steps,
        "init_loss": 5.5, "final_loss": 2.0,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("verdict", "reason", "final", "said"),
    [
        ("diverged", "runaway", 3.0, True),
        ("converged", "fell", 2.0, False),
        ("recovered", "came_back", 2.0, False),
        ("undecided", "rising", 3.0, None),
        ("undecided", "too_short", 3.0, None),
        ("undecided", "no_learning", 5.55, False),
        ("undecided", "no_learning", 6.5, None),
        ("undecided", "no_learning", "nan", None),
    ],
)
def test_what_an_end_says(verdict, reason, final, said):
    row = {"reason": reason, "by_strictness": {"strict": verdict}, "init_loss": 5.5, "final_loss": final}
    assert outcome(row, "strict") is said


def test_the_first_run_of_each_arm_is_the_same_and_the_seeds_too():
    plan, places = a_plan(), []
    for _ in range(4):
        places.append(next_run(plan, [], ended=()))
        plan.add(*places[-1])
    assert places[0][1:] == places[1][1:]
    assert {place[0] for place in places[:2]} == {"baseline", "qk_norm"}
    assert [place[2] for place in places] == [0, 0, 1, 1]
    assert places[2][1] != places[0][1], "two runs of an arm at once are not sent to the same rate"


def test_the_next_run_is_that_of_the_formula():
    """Of one arm: the posterior of what ended, the expected end of what has not, and the cost seen so far."""
    plan, grid = a_plan(arms=("baseline",)), grid_of(a_plan())
    high, low, open_ = plan.add("baseline", 0.5, 0), plan.add("baseline", 0.02, 1), plan.add("baseline", 0.1, 2)
    rows = [ended(high, True, steps=6), ended(low, False)]
    cost = (0.5 + 6 / 30) / 2
    assert diverged_cost(plan, "baseline", rows) == pytest.approx(cost)
    seen = Frontier.of(grid, [(0.5, True), (0.02, False)])
    chance = float(grid.diverges(np.array([math.log2(0.1)]))[0] @ seen.posterior)
    likely = seen.after(0.1, chance > 0.5)
    assert next_run(plan, rows, {high.id, low.id}) == ("baseline", likely.next_rate(cost)[0], 3)
    assert open_.id not in {row["run_id"] for row in rows}


def test_a_grid_needs_no_search_and_a_spent_budget_ends_one():
    grid, _, _ = planned([*TINY, "study.lrs=[1e-2,1e-1]"])
    assert next_run(grid, [], ()) is None
    plan = a_plan("study.max_runs=2", arms=("baseline",))
    plan.add(*next_run(plan, [], ()))
    plan.add(*next_run(plan, [], ()))
    assert next_run(plan, [], ()) is None


def test_a_run_that_tells_nothing_is_not_tried_again_at_once():
    plan = a_plan(arms=("baseline",))
    cell = plan.add(*next_run(plan, [], ()))
    row = ended(cell, False) | {"reason": "rising", "by_strictness": dict.fromkeys(("standard",), "undecided")}
    _, rate, _ = next_run(plan, [row], {cell.id})
    assert rate != cell.lr
    assert (frontier(grid_of(plan), [row]).posterior == grid_of(plan).prior).all()


def test_a_whole_search_with_two_runs_under_way():
    """Five arms whose edges lie octaves apart, one of them beyond the range: known, with few runs, and as asked."""
    edges = {"baseline": -6.0, "qk_norm": -3.0, "qkv_norm": 0.5, "qk_norm_cap": -4.5, "fc_norm": 4.0}
    plan, dice = a_plan(arms=edges), random.Random(0)
    rows, going = [], []
    while True:
        while len(going) < 2 and (run := next_run(plan, rows, {row["run_id"] for row in rows})):
            going.append(plan.add(*run))
        if not going:
            break
        cell = going.pop(0)
        chance = norm.cdf((math.log2(cell.lr) - edges[cell.arm]) / 0.2)
        rows.append(ended(cell, dice.random() < chance))
    told = answer(plan, rows)
    for arm, edge in edges.items():
        lr50 = told["variants"][arm]["frontier"]["standard"]["lr50"]
        assert told["variants"][arm]["enough"]
        if arm == "fc_norm":
            assert lr50 == {"median": None, "low": 3.0, "high": None}
        else:
            assert math.log2(lr50["low"]) <= edge <= math.log2(lr50["high"])
            assert math.log2(lr50["high"] / lr50["low"]) <= 0.5 + 1e-9
    over = told["variants"]["qk_norm"]["frontier"]["standard"]["over"]["baseline"]
    assert over["low"] < 8 < over["high"]
    assert set(told["variants"]["baseline"]["frontier"]["standard"]["over"]) == {"qk_norm"}
    counts = Counter(row["arm"] for row in rows)
    assert all(count < 40 for count in counts.values())
    for arm in edges:
        seeds = sorted(cell.seed for cell in plan.cells.values() if cell.arm == arm)
        assert seeds == list(range(counts[arm])), "the k-th run has the k-th seed"
    like = told["grid"]
    assert (like["rates"], like["seeds"], like["runs"]) == (21, 3, 21 * 3 * 5)
    assert like["tokens"] == like["runs"] * 30 * 4 * 16
    assert told["tokens"] == sum(row["tokens"] for row in rows)


def test_the_plan_of_a_search_holds_its_rate_and_may_stop_early():
    plan = a_plan()
    assert {config.schedule.kind for config in plan.arms.values()} == {"constant"}
    assert all(config.train.stop_early for config in plan.arms.values())
    grid, _, _ = planned([*TINY, "study.lrs=[1e-2]"])
    assert not any(config.train.stop_early for config in grid.arms.values())


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("schedule=cosine", "schedule=cosine: a search holds"),
        ("schedule.kind=constant,linear", "schedule.kind=constant,linear: a search holds"),
        ("study.lr_range=[1,0.1]", "the lower first"),
        ("study.lr_range=[]", "it must be two learning rates"),
        ("study.lrs=[0.1]", "a search chooses its own"),
    ],
)
def test_searches_that_cannot_be_asked(word, said):
    with pytest.raises(UserError, match=said.replace("[", r"\[")):
        a_plan(word)
