"""The results in words: one sentence per variant, and what is still missing."""

from collections.abc import Iterator

from stabrun.record.schema import ArmSummary, Estimate, Interval
from stabrun.report.study_data import RUN, StudyData
from stabrun.study.facts import end_texts
from stabrun.study.ledger import DONE, FAILED, PLANNED, RUNNING
from stabrun.study.plan import GRID
from stabrun.study.summary import BASELINE
from stabrun.text import rate_text
from stabrun.verdict.judge import DIVERGED, STANDARD, UNDECIDED
from stabrun.verdict.wording import verdict_line


def results(study: StudyData) -> Iterator[tuple[str, str]]:
    """(arm, sentence): `lr50 = 0.61 (95 % interval 0.24 to 1.07), 9.6 times the baseline's (3.0 to 22); …`."""
    if study.plan.strategy == RUN:
        for row in study.rows:
            known = [("learning rate", None if row["lr"] is None else rate_text(row["lr"])), ("seed", row["seed"])]
            facts = ", ".join(f"{name} {value}" for name, value in known if value is not None)
            yield row["arm"], f"{facts}{': ' * bool(facts)}{verdict_line(row)}."
    for arm, summary in study.arm_summaries.items():
        yield arm, "; ".join(clauses(summary, one_seed(study))) + "."


def clauses(summary: ArmSummary, single_seed: bool) -> Iterator[str]:
    """The parts of an arm's sentence."""
    if not sum(point["runs"] for point in summary["runs"]):
        yield "no finished runs"
        return
    if frontier := summary["frontier"].get(STANDARD):
        yield lr50_text(frontier["lr50"]) + ratio_text(frontier["over"].get(BASELINE))
    yield bracket_text(summary)
    if "best_final_loss" in summary:
        loss = estimate(summary["best_final_loss"], single_seed)
        yield f"lowest loss {loss} at learning rate {rate_text(summary['best_lr'])}"


def lr50_text(lr50: Interval) -> str:
    """lr50 with its interval, or the bound that is known."""
    median, low, high = end_texts(lr50, rate_text)
    if median is None:
        return f"lr50 > {low}" if low else f"lr50 < {high}" if high else "lr50 unknown"
    if low is None and high is None:
        return f"lr50 = {median} (95 % interval wider than the search range)"
    return f"lr50 = {median} (95 % interval {low or 'below the search range'} to {high or 'above the search range'})"


def ratio_text(ratio: Interval | None) -> str:
    """`, 9.6 times the baseline's (3.0 to 22)`; empty if there is no baseline, or nothing is known."""
    if ratio is None:
        return ""
    median, low, high = end_texts(ratio, two_digits)
    if median is None:
        bound = f"more than {low}" if low else f"less than {high}" if high else ""
        return f", {bound} times the baseline's" if bound else ""
    ends = (
        f" ({low} to {high})" if low and high else f" (at least {low})" if low else f" (at most {high})" if high else ""
    )
    return f", {median} times the baseline's{ends}"


def two_digits(ratio: float) -> str:
    """0.14, 3.0, 22."""
    return f"{ratio:.0f}" if ratio >= 9.95 else f"{ratio:.1f}" if ratio >= 0.995 else f"{ratio:.2g}"


def bracket_text(summary: ArmSummary) -> str:
    """The highest rate below which no run diverged, and the lowest with a diverged run."""
    stable, diverged = summary["max_stable_lr"], summary["min_diverged_lr"]
    if diverged is None:
        return "all runs undecided" if stable is None else f"no run diverged up to {rate_text(stable)}"
    if stable is None:
        return f"lowest diverged learning rate {rate_text(diverged)}, none stable below it"
    return f"stable up to {rate_text(stable)}, lowest diverged learning rate {rate_text(diverged)}"


def estimate(found: Estimate, single_seed: bool) -> str:
    value, low, high = found["value"], found["low"], found["high"]
    if low is None or high is None:
        return f"{value:.3f}" + " (one seed: no interval)" * single_seed
    return f"{value:.3f} (95 % interval {low:.3f} to {high:.3f})"


def one_seed(study: StudyData) -> bool:
    """Whether a grid has a single seed, so that losses have no intervals."""
    return study.plan.strategy == GRID and len({row["seed"] for row in study.rows}) == 1


def state(study: StudyData) -> Iterator[str]:
    """How far a study or run is, what failed, and what its runs cannot show."""
    done, total = study.counts[DONE], sum(study.counts.values())
    if study.plan.strategy == RUN:
        if not done:
            yield f"The run is not finished ({study.rows[0]['steps']} steps so far); its verdict may change."
        return
    others = ", ".join(
        f"{study.counts[status]} {status}" for status in (RUNNING, PLANNED, FAILED) if study.counts[status]
    )
    if study.partial or others:
        details = f" ({others})" if others else ""
        search = "; the search continues" if study.partial and study.plan.strategy != GRID else ""
        start = "Partial: " if study.partial else ""
        yield f"{start}{done} of {total} planned runs are finished{details}{search}."
    verdicts = [row["verdict"] for row in study.rows]
    if not verdicts:
        failed = study.counts[FAILED] and not study.partial
        yield f"{'All runs failed' if failed else 'No run is finished yet'}: there is nothing to draw."
        return
    if len(verdicts) == 1:
        yield "One run is finished: there is nothing to compare yet."
    elif set(verdicts) == {DIVERGED}:
        yield "All finished runs diverged: there is no stable run to compare them to."
    elif set(verdicts) == {UNDECIDED}:
        yield "All finished runs are undecided."
    elif DIVERGED not in verdicts:
        yield "No finished run diverged: there is no diverged run to compare the stable ones to."
    if one_seed(study):
        yield "One seed: losses have no intervals, and the share of diverged seeds is 0 or 1."
