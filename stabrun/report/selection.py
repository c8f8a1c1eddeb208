"""Which runs are shown in detail, for a study has more than anyone looks at."""

from stabrun.record.jsonl import number
from stabrun.report.source import Row
from stabrun.verdict.judge import CONVERGED, DIVERGED, RECOVERED

MOST = 30
BASELINE = "baseline"


def chosen(rows: list[Row]) -> list[Row]:
    """By arm the pair below, the best loss and the lowest rate that diverged: at most MOST, needed in this order.

    They come back in the order of arms and rates; of a single arm there is room for more.
    """
    arms = list(dict.fromkeys(row["arm"] for row in rows))
    picks = [pick(rows, arm) for pick in (first_beyond, highest_stable, best, lowest_diverged) for arm in arms]
    picks += rows[: MOST // 3] if len(arms) == 1 else []
    kept = list({row["run_id"]: row for row in picks if row is not None}.values())[:MOST]
    return sorted(kept, key=lambda row: (arms.index(row["arm"]), row["lr"], row["seed"]))


def pair(rows: list[Row]) -> tuple[Row | None, Row | None]:
    """A stable and a diverged run to stand side by side: of the baseline, or of the first arm that has both."""
    arms = sorted(dict.fromkeys(row["arm"] for row in rows), key=lambda arm: arm.split(" ")[0] != BASELINE)
    both = [(highest_stable(rows, arm), first_beyond(rows, arm)) for arm in arms]
    for found in both:
        if None not in found:
            return found
    stable = next((one for one, _ in both if one), None)
    return stable, next((other for _, other in both if other), None)


def stable(row: Row) -> bool:
    return row["verdict"] in (CONVERGED, RECOVERED)


def highest_stable(rows: list[Row], arm: str) -> Row | None:
    ends = [row for row in rows if row["arm"] == arm and stable(row)]
    return max(ends, key=lambda row: (row["lr"], -row["seed"]), default=None)


def lowest_diverged(rows: list[Row], arm: str, above: float = 0.0) -> Row | None:
    ends = [row for row in rows if row["arm"] == arm and row["verdict"] == DIVERGED and row["lr"] >= above]
    return min(ends, key=lambda row: (row["lr"], row["seed"]), default=None)


def first_beyond(rows: list[Row], arm: str) -> Row | None:
    """The lowest rate that diverged at or above the highest stable one, where there is such a one."""
    held = highest_stable(rows, arm)
    return (held and lowest_diverged(rows, arm, held["lr"])) or lowest_diverged(rows, arm)


def best(rows: list[Row], arm: str) -> Row | None:
    ends = [row for row in rows if row["arm"] == arm and stable(row)]
    return min(ends, key=lambda row: number(row["final_loss"]), default=None)
