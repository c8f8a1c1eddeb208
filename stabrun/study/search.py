"""The search for the frontier: which run a study needs next, given those that ended and those under way; no torch."""

from collections.abc import Container, Iterable

from stabrun.record.jsonl import number
from stabrun.record.schema import Row
from stabrun.study.frontier import Frontier, Grid
from stabrun.study.plan import FRONTIER, Plan
from stabrun.verdict.judge import DIVERGED, STANDARD, UNDECIDED

USUAL_COST = 0.5  # steps of a run that diverges, of those of a whole one, before any has: counts as one run

IDLE = 0.03  # of the first loss: as far above it may a run end that learned nothing and lost nothing


def outcome(row: Row, strictness: str = STANDARD) -> bool | None:
    """Whether a run diverged; None where its end tells nothing.

    That is one that is undecided, but for one that learned nothing and ended about where it began, as at a tiny rate.
    """
    verdict = row["by_strictness"].get(strictness, row["verdict"])
    if verdict == UNDECIDED:
        idle = row["reason"] == "no_learning" and number(row["final_loss"]) <= (1 + IDLE) * number(row["init_loss"])
        return False if idle else None
    return bool(verdict == DIVERGED)


def grid_of(plan: Plan) -> Grid | None:
    """What is thought possible over the rates of a study; None where it has but one."""
    rates = plan.lr_range or [cell.lr for cell in plan.cells.values()]
    return Grid(min(rates), max(rates)) if rates and min(rates) < max(rates) else None


def frontier(grid: Grid, rows: Iterable[Row], strictness: str = STANDARD) -> Frontier:
    """The frontier of the runs of one arm."""
    ends = ((row["lr"], outcome(row, strictness)) for row in rows)
    return Frontier.of(grid, ((rate, end) for rate, end in ends if end is not None))


def diverged_cost(plan: Plan, arm: str, rows: Iterable[Row]) -> float:
    """Steps of an arm's run that diverges, of those of a whole one, as seen so far."""
    whole = plan.arms[arm].train.steps
    shares = [row["steps"] / whole for row in rows if row["verdict"] == DIVERGED]
    return float((USUAL_COST + sum(shares)) / (1 + len(shares)))


def next_run(plan: Plan, rows: list[Row], ended: Container[str]) -> tuple[str, float, int] | None:
    """(arm, learning rate, seed) of the run that tells most for each step; None where no arm needs another now.

    An arm needs none when its lr50 is known to the width asked, would be if the runs under way ended as is likely, or
    its budget is spent. Its k-th run has the k-th seed, in every arm the same.
    """
    grid = grid_of(plan)
    if plan.strategy != FRONTIER or grid is None:
        return None
    best: tuple[float, tuple[str, float, int]] | None = None
    for arm in plan.arms:
        planned = [cell for cell in plan.cells.values() if cell.arm == arm]
        own = [row for row in rows if row["arm"] == arm]
        expected = frontier(grid, own).expecting(cell.lr for cell in planned if cell.id not in ended)
        if len(planned) >= plan.max_runs or expected.known_to(plan.width):
            continue
        untold = [row["lr"] for row in own if outcome(row) is None]  # the next run is better sent elsewhere
        rate, gain = expected.expecting(untold).next_rate(diverged_cost(plan, arm, own))
        if best is None or gain > best[0]:
            best = gain, (arm, rate, plan.seeds[0] + len(planned))
    return best and best[1]
