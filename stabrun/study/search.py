"""Adaptive search for the frontier: the next run of a study, given those that ended and those in progress; no torch."""

from collections.abc import Container, Iterable, Mapping
from operator import itemgetter
from types import MappingProxyType

from stabrun.record.jsonl import number
from stabrun.record.schema import Summary
from stabrun.study.frontier import Frontier, ParameterGrid
from stabrun.study.plan import FRONTIER, Plan
from stabrun.verdict.judge import CONVERGED, DIVERGED, STANDARD, STRICTNESS, UNDECIDED

PRIOR_COST = 0.5  # steps of a diverged run relative to a complete one, before any was seen; weighs as much as one run
LEAST_RUNS = 12  # of an arm, before the search gives it up because its budget is not enough
CALM = 0.4  # of the share of the rule: a run whose loss ended less above its lowest level is clearly stable
EARLY = 0.5  # of the steps: a run that diverged before is clearly diverged
IDLE = 0.03  # how far above its initial loss, relative to it, a run that learned nothing may end


def verdict_of(row: Summary, strictness: str) -> str:
    return row["by_strictness"].get(strictness, row["verdict"])


def outcome(row: Summary, strictness: str = STANDARD) -> bool | None:
    """Whether a run diverged. None if it is undecided, which carries no information.

    An undecided run that learned nothing and ended near its initial loss, as at a tiny learning rate, did not diverge.
    """
    verdict = verdict_of(row, strictness)
    if verdict == UNDECIDED:
        idle = row["reason"] == "no_learning" and number(row["final_loss"]) <= (1 + IDLE) * number(row["init_loss"])
        return False if idle else None
    return bool(verdict == DIVERGED)


def clear(row: Summary, steps: int, strictness: str = STANDARD) -> bool | None:
    """Whether the outcome of a run is clear. None if it is undecided, or if the summary does not tell.

    It is if a run of `steps` steps diverged before EARLY of them, or if its loss never rose and ended at its lowest
    level: above it by less than CALM times the least rise of the rule.
    """
    verdict = verdict_of(row, strictness)
    since, initial, best, final = (row.get(key) for key in ("first_bad_step", "init_loss", "best_loss", "final_loss"))
    if verdict == DIVERGED:
        return None if since is None else number(since) < EARLY * steps
    if verdict == UNDECIDED or initial is None or best is None or final is None:
        return None
    rise, learned = number(final) - number(best), number(initial) - number(best)
    return bool(verdict == CONVERGED and rise < CALM * STRICTNESS[strictness].share * learned)


def parameter_grid(plan: Plan) -> ParameterGrid | None:
    """The parameter grid over the learning rates of a study. None if there is only one rate."""
    rates = plan.lr_range or [cell.lr for cell in plan.cells.values()]
    return ParameterGrid(min(rates), max(rates)) if rates and min(rates) < max(rates) else None


def frontier(
    grid: ParameterGrid,
    rows: Iterable[Summary],
    strictness: str = STANDARD,
    steps: int | None = None,
    assumed: Mapping[str, bool] = MappingProxyType({}),
) -> Frontier:
    """The frontier of the runs of one arm. With `steps`, those of each run, outcomes are graded.

    Grades are those of a search: with a learning rate that decays, a loss comes back to its lowest level at the end.
    `assumed`: verdict → whether its runs count as diverged, instead of the outcome that the verdict has otherwise. An
    undecided run that has an outcome keeps it.
    """

    def counted(row: Summary) -> bool | None:
        verdict, diverged = verdict_of(row, strictness), outcome(row, strictness)
        return diverged if verdict == UNDECIDED and diverged is not None else assumed.get(verdict, diverged)

    outcomes = ((row, counted(row)) for row in rows)
    return Frontier.of(
        grid,
        (
            (row["lr"], diverged, clear(row, steps, strictness) if steps else None)
            for row, diverged in outcomes
            if diverged is not None
        ),
    )


def diverged_cost(plan: Plan, arm: str, rows: Iterable[Summary]) -> float:
    """Mean steps of an arm's diverged runs, relative to a complete run."""
    steps = plan.arms[arm].train.steps
    shares = [row["steps"] / steps for row in rows if row["verdict"] == DIVERGED]
    return float((PRIOR_COST + sum(shares)) / (1 + len(shares)))


def next_run(plan: Plan, rows: list[Summary], ended: Container[str]) -> tuple[str, float, int] | None:
    """(arm, learning rate, seed) of the run with the largest information per step. None if no arm needs one now.

    An arm needs none if its lr50 is known to the width asked for, if it would be after the probable outcomes of the
    runs in progress, if its budget is spent, or if what is left of it would certainly not be enough. The k-th run of
    each arm has the k-th seed.
    """
    grid = parameter_grid(plan)
    if plan.strategy != FRONTIER or grid is None:
        return None
    options = list[tuple[float, tuple[str, float, int]]]()
    for arm in plan.arms:
        cells, own = plan.cells_of(arm), [row for row in rows if row["arm"] == arm]
        seen = frontier(grid, own, steps=plan.arms[arm].train.steps)
        expected = seen.expecting(cell.lr for cell in cells if cell.id not in ended)
        left = plan.max_runs - len(cells)
        hopeless = len(own) >= LEAST_RUNS and expected.out_of_reach(plan.width, left)
        if left <= 0 or hopeless or expected.known_to(plan.width):
            continue
        undecided = [row["lr"] for row in own if outcome(row) is None]  # avoid these rates in the next run
        rate, gain = expected.expecting(undecided).next_rate(diverged_cost(plan, arm, own))
        options.append((gain, (arm, rate, plan.seeds[0] + len(cells))))
    return max(options, key=itemgetter(0))[1] if options else None
