"""How much lr50 depends on the rule: on its strictness, and on how undecided and recovered runs count."""

from stabrun.record.schema import Interval, Summary
from stabrun.report.study_data import StudyData
from stabrun.report.tables import Column, Table, interval, interval_column, plain
from stabrun.study.facts import frontier_of, known_end
from stabrun.study.frontier import Frontier, ratio
from stabrun.study.plan import FRONTIER
from stabrun.study.search import frontier, parameter_grid, verdict_of
from stabrun.study.summary import LR50, QK_NORM, counterpart
from stabrun.verdict.judge import DIVERGED, RECOVERED, STANDARD, STRICTNESS, UNDECIDED

# Name, label, and verdict → whether its runs count as diverged: other ways to count than that of the verdicts.
COUNTED = (
    ("undecided_diverged", "undecided as diverged", {UNDECIDED: True}),
    ("undecided_stable", "undecided as stable", {UNDECIDED: False}),
    ("recovered_diverged", "recovered as diverged", {RECOVERED: True}),
)


def strictness(study: StudyData) -> Table | None:
    """One row per arm: lr50, its ratio to qk_norm's and its rank at each strictness, and as counted otherwise.

    None if the study has fewer than two arms with an lr50.
    """
    found = {level: {arm: frontier_of(one, level) for arm, one in study.arm_summaries.items()} for level in STRICTNESS}
    known = {
        level: {arm: end for arm, one in arms.items() if one and (end := known_end(one["lr50"]))}
        for level, arms in found.items()
    }
    if len(set().union(*known.values())) < 2:
        return None
    columns = [Column("variant", "variant"), *(Column(f"diverged_{name}", f"diverged, {name}") for name in STRICTNESS)]
    columns += [interval_column(f"lr50_{level}", f"lr50, {level}") for level in STRICTNESS]
    columns += [interval_column(f"lr50_{name}", f"lr50, {label}") for name, label, _ in COUNTED]
    columns += [interval_column(f"over_qk_norm_{level}", f"lr50 / {QK_NORM}'s, {level}") for level in STRICTNESS]
    columns += [interval_column(f"over_qk_norm_{name}", f"lr50 / {QK_NORM}'s, {label}") for name, label, _ in COUNTED]
    columns += [Column(f"rank_{level}", f"rank, {level}") for level in STRICTNESS]
    counted = [frontiers_if(study, assumed) for _, _, assumed in COUNTED]
    rows = []
    for arm in study.arm_summaries:
        own = summaries(study, arm)
        rows.append([
            plain(arm),
            *(plain(sum(verdict_of(row, level) == DIVERGED for row in own)) for level in STRICTNESS),
            *(interval(found[level][arm].get("lr50")) for level in STRICTNESS),
            *(interval(arms[arm].rate_at(LR50) if arm in arms else None) for arms in counted),
            *(interval(found[level][arm].get("over", {}).get(QK_NORM)) for level in STRICTNESS),
            *(interval(over(arms, arm, QK_NORM)) for arms in counted),
            *(plain(rank(known[level], arm)) for level in STRICTNESS),
        ])  # fmt: skip
    note = (
        "The same runs, judged at three strictnesses of the rule; and by the standard one, but undecided runs, which "
        "do not count otherwise, taken as diverged or as stable, or recovered runs, otherwise stable, as diverged. "
        "Rank: that of lr50, the highest first, or of its bound. An undecided run that learned nothing is stable."
    )
    return Table("strictness", "By strictness of the rule", columns, rows, note)


def rank(known: dict[str, float], arm: str) -> int | None:
    """Place of an arm among those with an lr50 or a bound of it, from 1 for the highest; None if it has neither."""
    return 1 + sum(other > known[arm] for other in known.values()) if arm in known else None


def summaries(study: StudyData, arm: str) -> list[Summary]:
    """The summaries of the finished runs of an arm, with the learning rates of their cells."""
    own = (row for row in study.rows if row["arm"] == arm and row["run_id"] in study.summaries)
    return [{**study.summaries[row["run_id"]], "lr": row["lr"]} for row in own]


def frontiers_if(study: StudyData, assumed: dict[str, bool]) -> dict[str, Frontier]:
    """The frontier of each arm with finished runs, if runs of these verdicts count as diverged, or as not."""
    grid, searched = parameter_grid(study.plan), study.plan.strategy == FRONTIER
    found = {}
    for arm, config in study.plan.arms.items():
        own = summaries(study, arm)
        if own and grid is not None:
            found[arm] = frontier(grid, own, STANDARD, config.train.steps if searched else None, assumed)
    return found


def over(frontiers: dict[str, Frontier], arm: str, variant: str) -> Interval | None:
    """lr50 of an arm divided by that of another variant at the same further axes; None without the latter."""
    other = counterpart(arm, variant)
    return ratio(frontiers[arm], frontiers[other]) if arm != other and {arm, other} <= frontiers.keys() else None
