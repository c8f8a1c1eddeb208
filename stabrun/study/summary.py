"""What a study says so far: `study.json`, its question, and the answer by arm; and the same as a table to read."""

import math
from collections.abc import Callable, Iterator
from dataclasses import asdict
from typing import Any

import numpy as np

from stabrun.record.jsonl import number
from stabrun.record.schema import Row
from stabrun.study.frontier import Frontier, ratio
from stabrun.study.grid import Curve, best_rate, gain, lowest, sensitivity
from stabrun.study.plan import FRONTIER, GRID, Plan, tokens_of
from stabrun.study.search import frontier, grid_of, outcome
from stabrun.text import aligned, rate_text
from stabrun.verdict.judge import DIVERGED, RULE, STANDARD, STRICTNESS, UNDECIDED

BASELINE, QK_NORM = "baseline", "qk_norm"
SAFE, HALF = 0.1, 0.5  # shares of seeds that diverge at lr10 and lr50


def answer(plan: Plan, rows: list[Row]) -> dict[str, Any]:
    """What `study.json` holds, from the finished runs."""
    return {**question(plan, rows), "variants": by_arm(plan, rows)}


def question(plan: Plan, rows: list[Row]) -> dict[str, Any]:
    """What was asked, how far it is answered, and what it took; for a search beside what a grid would take."""
    facts: dict[str, Any] = {
        "name": plan.name,
        "strategy": plan.strategy,
        "rule": RULE,
        "cells": len(plan.cells),
        "runs": len(rows),
        "tokens": sum(row["tokens"] for row in rows),
    }
    if plan.strategy == FRONTIER:
        facts |= {"lr_range": plan.lr_range, "width": plan.width, "grid": like_grid(plan)}
    return facts


def like_grid(plan: Plan) -> dict[str, int]:
    """Rates, runs and tokens of a grid as fine as the width asked: a rate every 2 × width octaves, with all seeds."""
    rates = math.ceil(math.log2(plan.lr_range[1] / plan.lr_range[0]) / (2 * plan.width)) + 1
    runs = rates * len(plan.seeds)
    return {
        "rates": rates,
        "seeds": len(plan.seeds),
        "runs": runs * len(plan.arms),
        "tokens": runs * sum(tokens_of(config) for config in plan.arms.values()),
    }


def by_arm(plan: Plan, rows: list[Row]) -> dict[str, Any]:
    """Arm → what its runs say; `lr_sensitivity` and the best rate only of a grid, where each rate has each seed."""
    of_arm = {arm: [row for row in rows if row["arm"] == arm] for arm in plan.arms}
    frontiers = frontiers_of(plan, of_arm)
    return {
        arm: {
            **seen(of_arm[arm]),
            "frontier": {name: told(arm, found) for name, found in frontiers.items()},
            **(curve_facts(plan, arm, of_arm) if plan.strategy == GRID else {"enough": enough(plan, arm, frontiers)}),
        }
        for arm in plan.arms
    }


def seen(rows: list[Row]) -> dict[str, Any]:
    """Runs and divergences at each learning rate, and the bracket that they make."""
    rates = sorted({row["lr"] for row in rows})
    at = {rate: [row["verdict"] for row in rows if row["lr"] == rate] for rate in rates}
    first = min((rate for rate in rates if DIVERGED in at[rate]), default=None)
    stable = [rate for rate in rates if (first is None or rate < first) and set(at[rate]) != {UNDECIDED}]
    return {
        "runs": [
            {"lr": rate, "runs": len(ends), "diverged": ends.count(DIVERGED), "undecided": ends.count(UNDECIDED)}
            for rate, ends in at.items()
        ],
        "max_stable_lr": max(stable, default=None),
        "min_diverged_lr": first,
        "separated": separated(rows),
    }


def separated(rows: list[Row]) -> bool:
    """Whether each rate that diverged lies above each that did not: then the slope of the frontier is the prior's."""
    ends = {end: [row["lr"] for row in rows if outcome(row) is end] for end in (True, False)}
    return bool(ends[True] and ends[False] and min(ends[True]) > max(ends[False]))


def frontiers_of(plan: Plan, of_arm: dict[str, list[Row]]) -> dict[str, dict[str, Frontier]]:
    """Strictness → arm → what is known of its frontier; empty where the rates span no range, or nothing has ended."""
    grid = grid_of(plan)
    if grid is None:
        return {}
    return {name: {arm: frontier(grid, rows, name) for arm, rows in of_arm.items() if rows} for name in STRICTNESS}


def told(arm: str, frontiers: dict[str, Frontier]) -> dict[str, Any] | None:
    """lr50 and lr10 of an arm, and its lr50 over that of qk_norm and of the baseline at the same further axes."""
    if arm not in frontiers:
        return None
    own = frontiers[arm]
    others = {name: other for name in (BASELINE, QK_NORM) if (other := beside(arm, name)) != arm}
    return {
        "lr50": asdict(own.rate_at(HALF)),
        "lr10": asdict(own.rate_at(SAFE)),
        "spread": asdict(own.spread()),
        "over": {name: asdict(ratio(own, frontiers[other])) for name, other in others.items() if other in frontiers},
    }


def enough(plan: Plan, arm: str, frontiers: dict[str, dict[str, Frontier]]) -> bool:
    """Whether a search knows the arm's lr50 to the width asked, or that it lies beyond the range."""
    own = frontiers[STANDARD].get(arm)
    return own is not None and own.known_to(plan.width)


def beside(arm: str, variant: str) -> str:
    """The arm of another variant at the same setting of the further axes."""
    return " ".join([variant, *arm.split(" ")[1:]])


def curve_facts(plan: Plan, arm: str, of_arm: dict[str, list[Row]]) -> dict[str, Any]:
    """What the LR–loss curve of an arm says; empty until it is whole."""
    found = curve(plan, arm, of_arm)
    if found is None:
        return {}
    other = beside(arm, BASELINE)
    baseline = curve(plan, other, of_arm) if other != arm else None
    return {
        "lr_sensitivity": asdict(sensitivity(found)),
        "best_lr": best_rate(found),
        "best_final_loss": asdict(lowest(found)),
        "gain": asdict(gain(found, baseline)) if baseline else None,
    }


def curve(plan: Plan, arm: str, of_arm: dict[str, list[Row]]) -> Curve | None:
    """The LR–loss curve of an arm; None until each of its learning rates has each of its seeds."""
    cells = [cell for cell in plan.cells.values() if cell.arm == arm]
    rates, seeds = sorted({cell.lr for cell in cells}), sorted({cell.seed for cell in cells})
    ends = {(row["lr"], row["seed"]): row for row in of_arm.get(arm, ())}
    if not cells or any((rate, seed) not in ends for rate in rates for seed in seeds):
        return None
    losses = [[number(ends[rate, seed]["final_loss"]) for seed in seeds] for rate in rates]
    firsts = [number(ends[rates[0], seed]["init_loss"]) for seed in seeds]
    return Curve(np.array(rates), np.array(losses), np.array(firsts))


def lines(facts: dict[str, Any]) -> Iterator[str]:
    """The answer as a table, a line an arm; of a search what it took, beside what a grid as fine would take."""
    columns = GRID_COLUMNS if facts["strategy"] == GRID else SEARCH_COLUMNS
    table = [["", *columns]]
    for arm, told in facts["variants"].items():
        table.append([arm, *(say(told) for say in columns.values())])
    yield from aligned(table)
    yield "lr50: half of the seeds diverge; lr10: a tenth; in brackets 95 % intervals; > and <: bounds"
    if like := facts.get("grid"):
        grid = f"{like['rates']} learning rates × {like['seeds']} seeds"
        yield (
            f"{facts['runs']} runs, {facts['tokens']:,} tokens; a grid as fine ({grid}) takes {like['runs']} runs, "
            f"{like['tokens']:,} tokens"
        )


def rate_told(interval: dict[str, Any] | None) -> str:
    """`0.15 (0.13–0.18)`, or a bound: `> 3`."""
    if not interval:
        return "-"
    median, low, high = (interval[end] and f"{interval[end]:.2g}" for end in ("median", "low", "high"))
    ends = f"{low}–{high}" if low and high else f"> {low}" if low else f"< {high}" if high else ""
    return f"{median} ({ends})" if median and ends else median or ends or "?"


def estimate_told(estimate: dict[str, Any] | None) -> str:
    """`0.473 (0.450–0.490)`, or the value alone where one seed allows no interval."""
    if estimate is None:
        return "-"
    value, low, high = (estimate[end] for end in ("value", "low", "high"))
    return f"{value:.3f}" if low is None else f"{value:.3f} ({low:.3f}–{high:.3f})"


def at(strictness: str, *path: str) -> Callable[[dict[str, Any]], str]:
    """What says the rate at this path of an arm's frontier."""

    def say(told: dict[str, Any]) -> str:
        place = told["frontier"].get(strictness)
        for name in path:
            place = place and place.get(name)
        return rate_told(place)

    return say


def midpoint(place: dict[str, Any] | None) -> str:
    """The median alone of an arm's lr50, or its bound."""
    if place is None:
        return "-"
    lr50 = place["lr50"]
    return rate_told({"median": lr50["median"], "low": None, "high": None} if lr50["median"] else lr50)


def count(name: str) -> Callable[[dict[str, Any]], str]:
    return lambda told: str(sum(place[name] for place in told["runs"]))


SEARCH_COLUMNS: dict[str, Callable[[dict[str, Any]], str]] = {
    "runs": count("runs"),
    "diverged": count("diverged"),
    "lr50": at(STANDARD, "lr50"),
    "lr10": at(STANDARD, "lr10"),
    "/ baseline's": at(STANDARD, "over", BASELINE),
    "/ qk_norm's": at(STANDARD, "over", QK_NORM),
    "lenient, strict": lambda told: ", ".join(midpoint(told["frontier"].get(name)) for name in ("lenient", "strict")),
}
GRID_COLUMNS: dict[str, Callable[[dict[str, Any]], str]] = {
    "diverged": lambda told: f"{count('diverged')(told)} of {count('runs')(told)}",
    "lr50": at(STANDARD, "lr50"),
    "best loss": lambda told: estimate_told(told.get("best_final_loss")),
    "at lr": lambda told: rate_text(told["best_lr"]) if "best_lr" in told else "-",
    "gain": lambda told: estimate_told(told.get("gain")),
    "LR sensitivity": lambda told: estimate_told(told.get("lr_sensitivity")),
}
