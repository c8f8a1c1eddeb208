"""How much lr50 depends on the rule: on its strictness, and on how undecided runs count."""

from typing import Any

from stabrun.record.schema import Interval
from stabrun.report.study_data import StudyData
from stabrun.report.tables import Column, Table, interval, interval_column, plain
from stabrun.study.facts import frontier_of
from stabrun.study.plan import FRONTIER
from stabrun.study.search import frontier, parameter_grid
from stabrun.study.summary import LR50, QK_NORM
from stabrun.verdict.judge import DIVERGED, STANDARD, STRICTNESS

UNDECIDED_AS = {"diverged": True, "stable": False}


def strictness(study: StudyData) -> Table | None:
    """One row per arm: lr50, its ratio to qk_norm's and its rank at each strictness, and with undecided runs counted.

    None if the study has fewer than two arms with an lr50.
    """
    found = {level: {arm: frontier_of(one, level) for arm, one in study.arm_summaries.items()} for level in STRICTNESS}
    middles = {
        level: {arm: one["lr50"]["median"] for arm, one in arms.items() if one and one["lr50"]["median"]}
        for level, arms in found.items()
    }
    if len(set().union(*middles.values())) < 2:
        return None
    columns = [Column("variant", "variant"), *(Column(f"diverged_{name}", f"diverged, {name}") for name in STRICTNESS)]
    columns += [interval_column(f"lr50_{level}", f"lr50, {level}") for level in STRICTNESS]
    columns += [interval_column(f"lr50_undecided_{word}", f"lr50, undecided as {word}") for word in UNDECIDED_AS]
    columns += [interval_column(f"over_qk_norm_{level}", f"lr50 / {QK_NORM}'s, {level}") for level in STRICTNESS]
    columns += [Column(f"rank_{level}", f"rank, {level}") for level in STRICTNESS]
    rows = []
    for arm in study.arm_summaries:
        own: list[dict[str, Any]] = [{**row} for row in study.rows if row["arm"] == arm]
        rows.append([
            plain(arm),
            *(plain(sum(row[level] == DIVERGED for row in own)) for level in STRICTNESS),
            *(interval(found[level][arm].get("lr50")) for level in STRICTNESS),
            *(interval(lr50_if(study, arm, diverged)) for diverged in UNDECIDED_AS.values()),
            *(interval(found[level][arm].get("over", {}).get(QK_NORM)) for level in STRICTNESS),
            *(plain(rank(middles[level], arm)) for level in STRICTNESS),
        ])  # fmt: skip
    note = (
        "The same runs, judged at three strictnesses of the rule; and by the standard one, but undecided runs, which "
        "do not count otherwise, taken as diverged or as stable. Rank: that of the median of lr50, the highest first."
    )
    return Table("strictness", "By strictness of the rule", columns, rows, note)


def rank(middles: dict[str, float], arm: str) -> int | None:
    """Place of an arm among those with an lr50, from 1 for the highest; None if it has none."""
    return 1 + sum(middle > middles[arm] for middle in middles.values()) if arm in middles else None


def lr50_if(study: StudyData, arm: str, diverged: bool) -> Interval | None:
    """lr50 of an arm if each of its undecided runs had diverged, or had not; None without a finished run."""
    grid, steps = parameter_grid(study.plan), study.plan.arms[arm].train.steps
    own = [study.summaries[row["run_id"]] for row in study.rows if row["arm"] == arm]
    if grid is None or not own:
        return None
    graded = steps if study.plan.strategy == FRONTIER else None
    return frontier(grid, own, STANDARD, graded, undecided=diverged).rate_at(LR50)
