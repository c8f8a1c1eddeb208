"""The next run of a search for made-up outcomes, and whole searches with two runs in progress at a time."""

import math
import random
from collections import Counter

import numpy as np
import pytest
from helpers import TINY
from scipy.stats import norm

from stabrun.config import UserError
from stabrun.study.frontier import Frontier
from stabrun.study.question import planned
from stabrun.study.search import clear, diverged_cost, frontier, next_run, outcome, parameter_grid
from stabrun.study.summary import study_summary

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
    ("verdict", "reason", "final", "expected"),
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
def test_outcome_of_a_run(verdict, reason, final, expected):
    row = {"verdict": "", "reason": reason, "by_strictness": {"strict": verdict}, "init_loss": 5.5, "final_loss": final}
    assert outcome(row, "strict") is expected


@pytest.mark.parametrize(
    ("facts", "strictness", "expected"),
    [
        ({"final_loss": 2.06}, "standard", True),  # above its lowest level by 0.017 of the 3.5 that were learned
        ({"final_loss": 2.08}, "standard", False),
        ({"final_loss": 2.06}, "strict", False),
        ({"final_loss": 2.13}, "lenient", True),
        ({"final_loss": 2.0, "verdict": "recovered"}, "standard", False),
        ({"verdict": "diverged", "first_bad_step": 199}, "standard", True),
        ({"verdict": "diverged", "first_bad_step": 200}, "standard", False),
        ({"verdict": "diverged", "first_bad_step": 20, "final_loss": "nan"}, "standard", True),
        ({"verdict": "diverged"}, "standard", None),
        ({"final_loss": None}, "standard", None),
        ({"final_loss": 5.5, "verdict": "undecided", "reason": "no_learning"}, "standard", None),
    ],
)
def test_an_outcome_is_clear_early_or_at_the_lowest_level(facts, strictness, expected):
    row = {"verdict": "converged", "reason": "", "init_loss": 5.5, "best_loss": 2.0, "final_loss": 2.0} | facts
    assert clear(row | {"by_strictness": {strictness: row["verdict"]}}, 400, strictness) is expected


def test_outcomes_of_a_search_are_graded_and_those_of_a_grid_are_not():
    plan = a_plan(arms=("baseline",))
    rows = [
        ended(plan.add("baseline", 0.5, 0), True) | {"first_bad_step": 3},
        ended(plan.add("baseline", 0.02, 1), False) | {"best_loss": 2.0},
    ]
    grid = parameter_grid(plan)
    graded, bits = (
        Frontier.of(grid, [(0.5, True, True), (0.02, False, True)]),
        Frontier.of(grid, [(0.5, True), (0.02, False)]),
    )
    assert (frontier(grid, rows, steps=30).posterior == graded.posterior).all()
    assert (frontier(grid, rows).posterior == bits.posterior).all()
    facts = study_summary(plan, rows)["variants"]["baseline"]["frontier"]["standard"]
    assert facts["lr50"] == graded.rate_at(0.5)
    cost = (0.5 + 1) / 2
    assert next_run(plan, rows, plan.cells) == ("baseline", graded.next_rate(cost)[0], 2)


def test_an_arm_that_cannot_be_known_with_what_is_left_is_given_up():
    """Outcomes that do not depend on the rate over three octaves: the spread is large."""
    plan = a_plan("study.max_runs=40", arms=("baseline",))
    rows = [ended(plan.add("baseline", 0.1 * 2 ** (seed % 7 / 2), seed), (seed // 7) % 2 == 0) for seed in range(28)]
    assert next_run(plan, rows, plan.cells) is None
    assert not study_summary(plan, rows)["variants"]["baseline"]["enough"]
    plan.max_runs = 1000
    assert next_run(plan, rows, plan.cells) is not None


def test_all_arms_begin_with_the_same_rate_and_seeds():
    plan, runs = a_plan(), []
    for _ in range(4):
        runs.append(next_run(plan, [], ended=()))
        plan.add(*runs[-1])
    assert runs[0][1:] == runs[1][1:]
    assert {run[0] for run in runs[:2]} == {"baseline", "qk_norm"}
    assert [run[2] for run in runs] == [0, 0, 1, 1]
    assert runs[2][1] != runs[0][1], "two concurrent runs of an arm have different rates"


def test_the_next_run_follows_the_formula():
    """For one arm: the posterior of ended runs, the expected outcomes of others, and the mean cost so far."""
    plan, grid = a_plan(arms=("baseline",)), parameter_grid(a_plan())
    high, low, running = plan.add("baseline", 0.5, 0), plan.add("baseline", 0.02, 1), plan.add("baseline", 0.1, 2)
    rows = [ended(high, True, steps=6), ended(low, False)]
    cost = (0.5 + 6 / 30) / 2
    assert diverged_cost(plan, "baseline", rows) == pytest.approx(cost)
    seen = Frontier.of(grid, [(0.5, True), (0.02, False)])
    p = float(grid.divergence_probability(np.array([math.log2(0.1)]))[0] @ seen.posterior)
    likely = seen.after(0.1, p > 0.5)
    assert next_run(plan, rows, {high.id, low.id}) == ("baseline", likely.next_rate(cost)[0], 3)
    assert running.id not in {row["run_id"] for row in rows}


def test_a_grid_is_not_searched_and_a_spent_budget_ends_a_search():
    grid, _, _ = planned([*TINY, "study.lrs=[1e-2,1e-1]"])
    assert next_run(grid, [], ()) is None
    plan = a_plan("study.max_runs=2", arms=("baseline",))
    plan.add(*next_run(plan, [], ()))
    plan.add(*next_run(plan, [], ()))
    assert next_run(plan, [], ()) is None


def test_the_rate_of_an_undecided_run_is_not_repeated_at_once():
    plan = a_plan(arms=("baseline",))
    cell = plan.add(*next_run(plan, [], ()))
    row = ended(cell, False) | {"reason": "rising", "by_strictness": dict.fromkeys(("standard",), "undecided")}
    _, rate, _ = next_run(plan, [row], {cell.id})
    assert rate != cell.lr
    assert frontier(parameter_grid(plan), [row]).posterior == pytest.approx(parameter_grid(plan).prior)


def test_a_whole_search_with_two_runs_in_progress():
    """Three arms whose edges are octaves apart, one of them beyond the range: all are found with few runs."""
    edges = {"baseline": -6.0, "qk_norm": -3.0, "fc_norm": 4.0}
    plan, dice = a_plan(arms=edges), random.Random(0)
    rows, running = [], []
    while True:
        while len(running) < 2 and (run := next_run(plan, rows, {row["run_id"] for row in rows})):
            running.append(plan.add(*run))
        if not running:
            break
        cell = running.pop(0)
        chance = norm.cdf((math.log2(cell.lr) - edges[cell.arm]) / 0.2)
        rows.append(ended(cell, dice.random() < chance))
    summary = study_summary(plan, rows)
    for arm, edge in edges.items():
        lr50 = summary["variants"][arm]["frontier"]["standard"]["lr50"]
        assert summary["variants"][arm]["enough"]
        if arm == "fc_norm":
            assert lr50 == {"median": None, "low": 3.0, "high": None}
        else:
            assert math.log2(lr50["low"]) <= edge <= math.log2(lr50["high"])
            assert math.log2(lr50["high"] / lr50["low"]) <= 0.5 + 1e-9
    over = summary["variants"]["qk_norm"]["frontier"]["standard"]["over"]["baseline"]
    assert over["low"] < 8 < over["high"]
    assert set(summary["variants"]["baseline"]["frontier"]["standard"]["over"]) == {"qk_norm"}
    counts = Counter(row["arm"] for row in rows)
    assert all(count < 40 for count in counts.values())
    for arm in edges:
        seeds = sorted(cell.seed for cell in plan.cells.values() if cell.arm == arm)
        assert seeds == list(range(counts[arm])), "the k-th run has the k-th seed"
    grid = summary["grid"]
    assert (grid["rates"], grid["seeds"], grid["runs"]) == (21, 3, 21 * 3 * 3)
    assert grid["tokens"] == grid["runs"] * 30 * 4 * 16
    assert summary["tokens"] == sum(row["tokens"] for row in rows)


def test_a_search_has_constant_rates_and_stops_early():
    plan = a_plan()
    assert {config.schedule.kind for config in plan.arms.values()} == {"constant"}
    assert all(config.train.stop_early for config in plan.arms.values())
    grid, _, _ = planned([*TINY, "study.lrs=[1e-2]"])
    assert not any(config.train.stop_early for config in grid.arms.values())


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("schedule=cosine", "schedule=cosine: a search keeps"),
        ("schedule.kind=constant,linear", "schedule.kind=constant,linear: a search keeps"),
        ("study.lr_range=[1,0.1]", "the lower first"),
        ("study.lr_range=[]", "must be two learning rates"),
        ("study.lrs=[0.1]", "a search chooses its own"),
    ],
)
def test_invalid_searches(word, message):
    with pytest.raises(UserError, match=message.replace("[", r"\[")):
        a_plan(word)
