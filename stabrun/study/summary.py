"""The summary of a study, `study.json`: its settings, and what its finished runs show by arm."""

import math
from operator import itemgetter
from typing import Any, cast

import numpy as np

from stabrun.record.jsonl import number
from stabrun.record.schema import StudySummary, Summary
from stabrun.study.cost import tokens_per_run
from stabrun.study.frontier import Frontier, ratio
from stabrun.study.grid import LrCurve, best_loss, gain, lr_sensitivity
from stabrun.study.plan import FRONTIER, GRID, Plan
from stabrun.study.search import frontier, outcome, parameter_grid
from stabrun.verdict.judge import DIVERGED, RULE, STANDARD, STRICTNESS, UNDECIDED

BASELINE, QK_NORM = "baseline", "qk_norm"
LR10, LR50 = 0.1, 0.5  # share of seeds that diverge


def study_summary(plan: Plan, rows: list[Summary]) -> StudySummary:
    """What `study.json` holds. `rows`: the summaries of the finished runs, with their `arm`."""
    facts: dict[str, Any] = {
        "name": plan.name,
        "strategy": plan.strategy,
        "rule": RULE,
        "cells": len(plan.cells),
        "runs": len(rows),
        "tokens": sum(row["tokens"] for row in rows),
    }
    if plan.strategy == FRONTIER:
        facts |= {"lr_range": plan.lr_range, "width": plan.width, "grid": equivalent_grid(plan)}
    return cast(StudySummary, {**facts, "variants": by_arm(plan, rows)})


def equivalent_grid(plan: Plan) -> dict[str, int]:
    """Rates, runs and tokens of a grid with the resolution of a search: a rate every 2 × width octaves, all seeds."""
    rates = math.ceil(math.log2(plan.lr_range[1] / plan.lr_range[0]) / (2 * plan.width)) + 1
    runs = rates * len(plan.seeds)
    return {
        "rates": rates,
        "seeds": len(plan.seeds),
        "runs": runs * len(plan.arms),
        "tokens": runs * sum(map(tokens_per_run, plan.arms.values())),
    }


def by_arm(plan: Plan, rows: list[Summary]) -> dict[str, Any]:
    """The summary of each arm. Only a grid, with every seed at every rate, has LR sensitivity and best loss."""
    rows_of = {arm: [row for row in rows if row["arm"] == arm] for arm in plan.arms}
    grid = parameter_grid(plan)
    graded = {arm: plan.arms[arm].train.steps if plan.strategy == FRONTIER else None for arm in plan.arms}
    frontiers = {
        level: {arm: frontier(grid, own, level, graded[arm]) for arm, own in rows_of.items() if own}
        for level in STRICTNESS
        if grid is not None
    }
    summaries = {}
    for arm, own in rows_of.items():
        facts = {level: frontier_facts(arm, found) for level, found in frontiers.items()}
        summaries[arm] = observed(own) | {"frontier": facts}
        if plan.strategy == GRID:
            summaries[arm] |= lr_curve_facts(plan, arm, rows_of)
        else:
            summaries[arm]["enough"] = bool(own) and frontiers[STANDARD][arm].known_to(plan.width)
    return summaries


def observed(rows: list[Summary]) -> dict[str, Any]:
    """Runs and divergences at each learning rate, and the bracket between them."""
    verdicts: dict[float, list[str]] = {}
    for row in sorted(rows, key=itemgetter("lr")):
        verdicts.setdefault(row["lr"], []).append(row["verdict"])
    rates = list(verdicts)
    lowest = min((rate for rate in rates if DIVERGED in verdicts[rate]), default=None)
    stable = [rate for rate in rates if (lowest is None or rate < lowest) and set(verdicts[rate]) != {UNDECIDED}]
    return {
        "runs": [
            {"lr": rate, "runs": len(ends), "diverged": ends.count(DIVERGED), "undecided": ends.count(UNDECIDED)}
            for rate, ends in verdicts.items()
        ],
        "max_stable_lr": max(stable, default=None),
        "min_diverged_lr": lowest,
        "separated": separated(rows),
    }


def separated(rows: list[Summary]) -> bool:
    """Whether each rate that diverged is above each that did not. If so, the slope of the frontier is the prior's."""
    rates = {end: [row["lr"] for row in rows if outcome(row) is end] for end in (True, False)}
    return bool(rates[True] and rates[False] and min(rates[True]) > max(rates[False]))


def frontier_facts(arm: str, frontiers: dict[str, Frontier]) -> dict[str, Any] | None:
    """lr50 and lr10 of an arm, and its lr50 relative to the baseline's and qk_norm's at the same further axes."""
    if arm not in frontiers:
        return None
    own = frontiers[arm]
    others = {name: other for name in (BASELINE, QK_NORM) if (other := counterpart(arm, name)) != arm}
    return {
        "lr50": own.rate_at(LR50),
        "lr10": own.rate_at(LR10),
        "spread": own.spread(),
        "over": {name: ratio(own, frontiers[other]) for name, other in others.items() if other in frontiers},
    }


def counterpart(arm: str, variant: str) -> str:
    """The arm of another variant at the same setting of the further axes."""
    return " ".join([variant, *arm.split(" ")[1:]])


def lr_curve_facts(plan: Plan, arm: str, rows_of: dict[str, list[Summary]]) -> dict[str, Any]:
    """Statistics of an arm's losses by learning rate; empty until its grid is complete."""
    baseline_arm = counterpart(arm, BASELINE)
    curve, baseline = (lr_curve(plan, name, rows_of) for name in (arm, baseline_arm))
    if curve is None:
        return {}
    return {
        "lr_sensitivity": lr_sensitivity(curve),
        "best_lr": curve.best_rate(),
        "best_final_loss": best_loss(curve),
        "gain": gain(curve, baseline) if baseline and arm != baseline_arm else None,
    }


def lr_curve(plan: Plan, arm: str, rows_of: dict[str, list[Summary]]) -> LrCurve | None:
    """Loss by learning rate of an arm. None unless each of its rates has each of its seeds with known losses."""
    cells = plan.cells_of(arm) if arm in plan.arms else []
    rates, seeds = sorted({cell.lr for cell in cells}), sorted({cell.seed for cell in cells})
    known = (row for row in rows_of.get(arm, ()) if row["init_loss"] is not None and row["final_loss"] is not None)
    ends = {(row["lr"], row["seed"]): row for row in known}
    if not cells or any((rate, seed) not in ends for rate in rates for seed in seeds):
        return None
    losses = [[number(ends[rate, seed]["final_loss"]) for seed in seeds] for rate in rates]
    initial = [number(ends[rates[0], seed]["init_loss"]) for seed in seeds]
    return LrCurve(np.array(rates), np.array(losses), np.array(initial))
