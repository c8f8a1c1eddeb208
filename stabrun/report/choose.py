"""Which runs are shown in detail, for a study has more than anyone looks at."""

from stabrun.observe.record import number
from stabrun.observe.verdict import CONVERGED, DIVERGED, RECOVERED
from stabrun.report.source import Row

MOST = 30
BASELINE = "baseline"


def chosen(rows: list[Row]) -> list[Row]:
    """By arm the lowest rate that diverged, the highest stable one, and the best loss: at most MOST, in this order.

    They come back in the order of arms and rates.
    """
    arms = list(dict.fromkeys(row["arm"] for row in rows))
    picks = [pick(rows, arm) for pick in (lowest_diverged, highest_stable, best) for arm in arms]
    kept = list({row["run_id"]: row for row in picks if row is not None}.values())[:MOST]
    others = [row for row in rows if row not in kept and len(arms) == 1]  # of a single arm there is room for more
    kept += others[: max(0, min(MOST // 3, MOST - len(kept)))]
    return sorted(kept, key=lambda row: (arms.index(row["arm"]), row["lr"], row["seed"]))


def pair(rows: list[Row]) -> tuple[Row | None, Row | None]:
    """A stable and a diverged run to stand side by side: of the baseline, or of the first arm that has both."""
    arms = sorted(dict.fromkeys(row["arm"] for row in rows), key=lambda arm: arm.split(" ")[0] != BASELINE)
    both = [(highest_stable(rows, arm), lowest_diverged(rows, arm)) for arm in arms]
    for found in both:
        if None not in found:
            return found
    stable = next((one for one, _ in both if one), None)
    return stable, next((other for _, other in both if other), None)


def stable(row: Row) -> bool:
    return row["verdict"] in (CONVERGED, RECOVERED)


def highest_stable(rows: list[Row], arm: str) -> Row | None:
    """Of the stable runs below the lowest rate that diverged, where there are such, the one with the highest rate."""
    ends = [row for row in rows if row["arm"] == arm and stable(row)]
    lost = lowest_diverged(rows, arm)
    below = [row for row in ends if lost and row["lr"] < lost["lr"]]
    return max(below or ends, key=lambda row: (row["lr"], -row["seed"]), default=None)


def lowest_diverged(rows: list[Row], arm: str) -> Row | None:
    ends = [row for row in rows if row["arm"] == arm and row["verdict"] == DIVERGED]
    return min(ends, key=lambda row: (row["lr"], row["seed"]), default=None)


def best(rows: list[Row], arm: str) -> Row | None:
    ends = [row for row in rows if row["arm"] == arm and stable(row)]
    return min(ends, key=lambda row: number(row["final_loss"]), default=None)
