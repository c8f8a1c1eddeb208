"""The answer in words: a sentence a variant, and what is missing yet."""

from collections.abc import Iterator
from typing import Any

from stabrun.report.source import RUN, Source
from stabrun.study.ledger import DONE, FAILED, PLANNED, RUNNING
from stabrun.study.plan import GRID
from stabrun.study.summary import BASELINE
from stabrun.text import rate_text
from stabrun.verdict.judge import DIVERGED, STANDARD, UNDECIDED


def answers(source: Source) -> Iterator[tuple[str, str]]:
    """(arm, sentence): `half of the seeds diverge at a learning rate of 0.61 (95 % interval 0.24 to 1.07), …`."""
    if source.strategy == RUN:
        for row in source.rows:
            yield row["arm"], run_told(row)
        return
    for arm, told in source.variants.items():
        yield arm, "; ".join(clauses(told, one_seed(source))) + "."


def clauses(told: dict[str, Any], alone: bool) -> Iterator[str]:
    """What an arm's part of `study.json` says."""
    runs = sum(place["runs"] for place in told["runs"])
    if not runs:
        yield "no run has ended yet"
        return
    known = told["frontier"].get(STANDARD)
    yield half(known["lr50"], alone) + over(known["over"].get(BASELINE)) if known else bracket(told)
    if known:
        yield bracket(told)
    if "best_final_loss" in told:
        yield f"its lowest loss is {interval(told['best_final_loss'], alone)}, at {rate_text(told['best_lr'])}"


def half(lr50: dict[str, Any], alone: bool) -> str:
    """Where half of the seeds diverge, or the bound that is known."""
    median, low, high = (lr50[end] for end in ("median", "low", "high"))
    if median is None:
        if low is not None:
            return f"half of the seeds diverge at a learning rate above {rate_text(low)}: only this bound is known"
        if high is not None:
            return f"half of the seeds diverge at a learning rate below {rate_text(high)}: only this bound is known"
        return "at which learning rate half of the seeds diverge is not known"
    said = f"half of the seeds diverge at a learning rate of {rate_text(median)}"
    if low is not None and high is not None:
        ends = f"95 % interval {rate_text(low)} to {rate_text(high)}"
    elif low is not None:
        ends = f"95 % interval from {rate_text(low)} to beyond the range searched"
    elif high is not None:
        ends = f"95 % interval from below the range searched to {rate_text(high)}"
    else:
        ends = "its interval is wider than the range searched"
    return f"{said} ({ends}{', of one seed a rate' if alone else ''})"


def over(ratio: dict[str, Any] | None) -> str:
    """`, 9.6 times the baseline's (3.0 to 22)`; empty where there is no baseline, or nothing is known."""
    if ratio is None:
        return ""
    median, low, high = (ratio[end] for end in ("median", "low", "high"))
    if median is None:
        bound = f"more than {times(low)}" if low is not None else f"less than {times(high)}" if high is not None else ""
        return f", {bound} times the baseline's" if bound else ""
    if low is not None and high is not None:
        return f", {times(median)} times the baseline's ({times(low)} to {times(high)})"
    bound = f" (at least {times(low)})" if low is not None else f" (at most {times(high)})" if high is not None else ""
    return f", {times(median)} times the baseline's{bound}"


def times(ratio: float) -> str:
    """Two digits: 0.14, 3.0, 22."""
    return f"{ratio:.0f}" if ratio >= 9.95 else f"{ratio:.1f}" if ratio >= 0.995 else f"{ratio:.2g}"


def bracket(told: dict[str, Any]) -> str:
    """What was seen: the highest rate below which nothing diverged, and the lowest that diverged."""
    stable, lost = told["max_stable_lr"], told["min_diverged_lr"]
    if all(place["undecided"] == place["runs"] for place in told["runs"]):
        return "each of its runs is undecided"
    if lost is None:
        return f"none of its runs diverged, up to {rate_text(stable)}"
    if stable is None:
        return f"nothing was stable below {rate_text(lost)}, the lowest rate that diverged"
    return f"seen stable up to {rate_text(stable)}, the lowest rate that diverged is {rate_text(lost)}"


def interval(estimate: dict[str, Any], alone: bool) -> str:
    value, low, high = (estimate[end] for end in ("value", "low", "high"))
    if low is None:
        return f"{value:.3f}" + (" (one seed: no interval)" if alone else "")
    return f"{value:.3f} (95 % interval {low:.3f} to {high:.3f})"


def one_seed(source: Source) -> bool:
    """Whether a grid has a single seed, so that nothing about losses has an interval."""
    return source.strategy == GRID and len({row["seed"] for row in source.rows}) == 1


def run_told(row: dict[str, Any]) -> str:
    """`diverged (runaway) at step 59, first in layer_00/fc2; loss 5.958 → 2.763 → 2.955`, with rate and seed."""
    from stabrun.verdict.wording import verdict_line

    return f"learning rate {rate_text(row['lr'])}, seed {row['seed']}: {verdict_line(row)}."


def state(source: Source) -> Iterator[str]:
    """How far a study or run is, what failed, and what its runs cannot say."""
    done, total = source.counts[DONE], sum(source.counts.values())
    if source.strategy == RUN:
        if not done:
            yield f"The run is not over ({source.rows[0]['steps']} steps so far): what follows is the verdict so far."
        return
    rest = [f"{source.counts[status]} {status}" for status in (RUNNING, PLANNED, FAILED) if source.counts[status]]
    if source.partial:
        more = ", and the search goes on" if source.strategy != GRID else ""
        yield f"This study is partial: {done} of {total} planned runs are finished" + (
            f" ({', '.join(rest)}){more}." if rest else f"{more}."
        )
    elif rest:
        yield f"{done} of {total} runs are finished ({', '.join(rest)})."
    if not source.rows:
        yield (
            "No run was finished: each one that was tried failed, so that there is nothing to draw."
            if source.failed and not source.partial
            else "No run is finished yet: there is nothing to draw."
        )
        return
    ends = [row["verdict"] for row in source.rows]
    if len(ends) == 1:
        yield "One run is finished: nothing can be compared yet."
    elif set(ends) == {DIVERGED}:
        yield "Every finished run diverged: there is no stable run to show beside them."
    elif set(ends) == {UNDECIDED}:
        yield "Every finished run is undecided."
    elif DIVERGED not in ends:
        yield "No finished run diverged: there is no diverged run to show beside the stable ones."
    if one_seed(source):
        yield "There is one seed: no loss has an interval, and a share of diverged seeds is 0 or 1."
