"""Facts about arms as columns of tables: described once, for the terminal, the report and the dashboard."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, cast

from stabrun.record.schema import ArmSummary, StudySummary
from stabrun.study.plan import FRONTIER, GRID
from stabrun.study.summary import BASELINE, QK_NORM
from stabrun.text import aligned, rate_text
from stabrun.verdict.judge import STANDARD, STRICTNESS


def end_texts(
    interval: Mapping[str, Any], form: Callable[[float], str], middle: str = "median"
) -> tuple[str | None, ...]:
    """The middle, the low and the high end as text; None for those that are unknown."""
    return tuple(None if interval[end] is None else form(interval[end]) for end in (middle, "low", "high"))


def known_end(ends: Mapping[str, Any]) -> float | None:
    """The median of an interval, or the bound that is known."""
    end: float | None = ends["median"] or ends["low"] or ends["high"]
    return end


def interval_text(interval: Mapping[str, Any] | None, middle: str = "median", digits: str = ".2g") -> str:
    """`0.15 (0.13–0.18)`, `0.01 (-0.02 to 0.05)`, or a bound: `> 3`."""
    if not interval:
        return "-"
    median, low, high = end_texts(interval, lambda end: format(end, digits), middle)
    dash = " to " if low and low.startswith("-") else "–"
    ends = f"{low}{dash}{high}" if low and high else f"> {low}" if low else f"< {high}" if high else ""
    return f"{median} ({ends})" if median and ends else median or ends or "?"


def estimate_text(estimate: Mapping[str, Any] | None) -> str:
    """`0.473 (0.450–0.490)`; a single seed has no interval."""
    return interval_text(estimate, "value", ".3f")


def strictness_text(frontiers: dict[str, Any]) -> str:
    """`0.068, 0.064`: the median of lr50, or its bound, by the lenient and the strict rule."""
    intervals = [(frontiers.get(strictness) or {}).get("lr50") for strictness in ("lenient", "strict")]
    return ", ".join(interval_text(i | {"low": None, "high": None} if i and i["median"] else i) for i in intervals)


def optional_rate_text(rate: float | None) -> str:
    return "-" if rate is None else rate_text(rate)


@dataclass(frozen=True)
class Fact:
    """A column of tables by arm. `read` takes the value from an arm's summary, `format` makes it text.

    `middle` is the name of the middle of an interval, whose ends are `low` and `high`; None for a single value.
    """

    key: str
    label: str
    read: Callable[[ArmSummary], Any]
    format: Callable[[Any], str] = str
    middle: str | None = None

    def text(self, arm: ArmSummary) -> str:
        return self.format(self.read(arm))

    def values(self, arm: ArmSummary) -> tuple[Any, ...]:
        """The value with all digits; of an interval: middle, low and high end."""
        value = self.read(arm)
        if self.middle is None:
            return (value,)
        return tuple(value and value[end] for end in (self.middle, "low", "high"))


def total(name: str) -> Callable[[ArmSummary], int]:
    return lambda arm: sum(cast(dict[str, Any], point)[name] for point in arm["runs"])


def frontier_of(arm: ArmSummary, strictness: str) -> Mapping[str, Any]:
    """The frontier of an arm; empty if it is unknown."""
    return arm["frontier"].get(strictness) or {}


def lr50_over(arm: ArmSummary, variant: str) -> Any:
    """lr50 of an arm divided by that of another variant; None if it is unknown."""
    return frontier_of(arm, STANDARD).get("over", {}).get(variant)


def of_rule(name: str, strictness: str) -> Fact:
    """lr50 or lr10 at one strictness of the rule."""
    key, label = (name, name) if strictness == STANDARD else (f"{name}_{strictness}", f"{name}, {strictness}")
    return Fact(key, label, lambda arm: frontier_of(arm, strictness).get(name), interval_text, "median")


LEVELS = sorted(STRICTNESS, key=STANDARD.__ne__)  # the standard one first
FACTS = (
    Fact("runs", "runs", total("runs")),
    Fact("diverged", "diverged", total("diverged")),
    Fact("undecided", "undecided", total("undecided")),
    *(of_rule(name, strictness) for name in ("lr50", "lr10") for strictness in LEVELS),
    Fact("over_baseline", "lr50 / baseline's", lambda arm: lr50_over(arm, BASELINE), interval_text, "median"),
    Fact("over_qk_norm", "lr50 / qk_norm's", lambda arm: lr50_over(arm, QK_NORM), interval_text, "median"),
    Fact("max_stable_lr", "no divergence up to LR", lambda arm: arm["max_stable_lr"], optional_rate_text),
    Fact("min_diverged_lr", "lowest diverged LR", lambda arm: arm["min_diverged_lr"], optional_rate_text),
)
GRID_FACTS = (
    Fact("best_final_loss", "best loss", lambda arm: arm.get("best_final_loss"), estimate_text, "value"),
    Fact("best_lr", "at LR", lambda arm: arm.get("best_lr"), optional_rate_text),
    Fact("gain", "gain over baseline", lambda arm: arm.get("gain"), estimate_text, "value"),
    Fact("lr_sensitivity", "LR sensitivity", lambda arm: arm.get("lr_sensitivity"), estimate_text, "value"),
)
BY_STRICTNESS = Fact("lr50_by_strictness", "lenient, strict", lambda arm: arm["frontier"], strictness_text)
SHORT_TABLE = {
    GRID: ("runs", "diverged", "lr50", *(fact.key for fact in GRID_FACTS)),
    FRONTIER: ("runs", "diverged", "lr50", "lr10", "over_baseline", "over_qk_norm", BY_STRICTNESS.key),
}


def short_table(summary: StudySummary) -> list[list[str]]:
    """The most important facts, a header and one row per arm."""
    shown = SHORT_TABLE[summary["strategy"]]
    facts = [fact for fact in (*FACTS, *GRID_FACTS, BY_STRICTNESS) if fact.key in shown]
    rows = [[arm, *(fact.text(found) for fact in facts)] for arm, found in summary["variants"].items()]
    return [["variant", *(fact.label for fact in facts)], *rows]


def summary_lines(summary: StudySummary) -> Iterator[str]:
    """The short table, and what a search took compared to a grid of the same resolution."""
    yield from aligned(short_table(summary))
    yield "lr50, lr10: half, a tenth of the seeds diverge; in parentheses 95 % intervals; > and <: bounds"
    if any(arm.get("lr_sensitivity", ...) is None for arm in summary["variants"].values()):
        yield "LR sensitivity needs at least two learning rates"
    if grid := summary.get("grid"):
        yield (
            f"{summary['runs']} runs, {summary['tokens']:,} tokens; a grid of the same resolution "
            f"({grid['rates']} learning rates × {grid['seeds']} seeds): {grid['runs']} runs, {grid['tokens']:,} tokens"
        )
