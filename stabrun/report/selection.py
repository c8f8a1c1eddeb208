"""Which runs are shown in detail: a study has more than anyone looks at."""

from stabrun.record.jsonl import number
from stabrun.record.schema import Result
from stabrun.study.summary import BASELINE
from stabrun.verdict.judge import CONVERGED, DIVERGED, RECOVERED

MAX_RUNS = 30


def selected(rows: list[Result]) -> list[Result]:
    """At most MAX_RUNS runs, in the order of arms and learning rates.

    The runs to compare in detail; then of each arm, in this order of priority: the lowest diverged run above the
    highest stable one, the highest stable one, that of the lowest loss, and the lowest diverged one. A single arm has
    room for more.
    """
    arms = list(dict.fromkeys(row["arm"] for row in rows))
    picks: list[Result | None] = [*sides(rows)]
    picks += [pick(rows, arm) for pick in (first_beyond, highest_stable, best, lowest_diverged) for arm in arms]
    picks += rows[: MAX_RUNS // 3] if len(arms) == 1 else []
    kept = list({row["run_id"]: row for row in picks if row is not None}.values())[:MAX_RUNS]
    return sorted(kept, key=lambda row: (arms.index(row["arm"]), row["lr"], row["seed"]))


def stable_and_diverged(rows: list[Result]) -> tuple[Result | None, Result | None]:
    """A stable and a diverged run to compare, of the baseline or of the first arm that has both.

    The stable one is the converged run of the highest learning rate, or else the recovered one.
    """
    converged = [row for row in rows if row["verdict"] == CONVERGED]
    arms = sorted(dict.fromkeys(row["arm"] for row in rows), key=lambda arm: arm.split(" ")[0] != BASELINE)
    both = [(highest_stable(converged, arm) or highest_stable(rows, arm), first_beyond(rows, arm)) for arm in arms]
    for found in both:
        if None not in found:
            return found
    return next((run for run, _ in both if run), None), next((run for _, run in both if run), None)


def sides(rows: list[Result]) -> list[Result]:
    """The runs to compare in detail: a stable and a diverged one, or the only one of them."""
    return [row for row in stable_and_diverged(rows) if row] or rows[:1]


def rate(row: Result) -> float:
    """The learning rate; 0 if it is not known, as that of a watched run may be."""
    return row["lr"] or 0.0


def is_stable(row: Result) -> bool:
    return row["verdict"] in (CONVERGED, RECOVERED)


def highest_stable(rows: list[Result], arm: str) -> Result | None:
    runs = [row for row in rows if row["arm"] == arm and is_stable(row)]
    return max(runs, key=lambda row: (rate(row), -(row["seed"] or 0)), default=None)


def lowest_diverged(rows: list[Result], arm: str, above: float = 0.0) -> Result | None:
    runs = [row for row in rows if row["arm"] == arm and row["verdict"] == DIVERGED and rate(row) >= above]
    return min(runs, key=lambda row: (rate(row), row["seed"]), default=None)


def first_beyond(rows: list[Result], arm: str) -> Result | None:
    """The lowest diverged run at or above the rate of the highest stable one; else the lowest diverged run."""
    highest = highest_stable(rows, arm)
    return (highest and lowest_diverged(rows, arm, rate(highest))) or lowest_diverged(rows, arm)


def best(rows: list[Result], arm: str) -> Result | None:
    runs = [row for row in rows if row["arm"] == arm and is_stable(row)]
    return min(runs, key=lambda row: number(row["final_loss"]), default=None)
