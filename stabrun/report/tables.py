"""The tables of a report: as CSV with every digit, and as Markdown and LaTeX to read."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from stabrun.record.jsonl import number
from stabrun.record.metrics import BY_SITE, EVERY, METRICS, signals
from stabrun.record.schema import ArmSummary, Result, Summary
from stabrun.report.run_curves import Curves, spread
from stabrun.report.selection import is_stable
from stabrun.report.study_data import RUN, StudyData
from stabrun.study.facts import FACTS, GRID_FACTS, Fact, estimate_text, interval_text
from stabrun.study.results import COLUMNS
from stabrun.text import csv_text, rate_text, run_name
from stabrun.verdict.judge import CONVERGED, DIVERGED, RECOVERED, UNDECIDED

MISSING = "-"
RATIO_STEPS = 5
VERDICTS = CONVERGED, RECOVERED, DIVERGED, UNDECIDED
DIGITS = {"scar": 3, "val_perplexity": 2, "tokens_per_second": 0, "seconds": 0}
STUDY_COMPARISON = (
    "runs", "diverged", "lr50", "lr10", "max_stable_lr", "min_diverged_lr", "best_final_loss", "lr_sensitivity"
)  # fmt: skip
RUN_COMPARISON = (
    "lr", "seed", "verdict", "reason", "first_bad_step", "first_bad_site", "final_loss", "val_perplexity"
)  # fmt: skip


@dataclass(frozen=True)
class Column:
    """`parts`: suffixes of the columns of the CSV that it takes; an interval takes three."""

    key: str
    label: str
    parts: tuple[str, ...] = ("",)


@dataclass(frozen=True)
class TableCell:
    """The text to read, and the values with every digit, one for each part of the column."""

    text: str
    values: tuple[Any, ...]


@dataclass(frozen=True)
class Table:
    name: str
    title: str
    columns: Sequence[Column]
    rows: list[list[TableCell]]
    note: str = ""


def plain(value: Any) -> TableCell:
    """A word or a count; empty for None."""
    return TableCell("" if value is None else str(value), (value,))


def rate(value: float | None) -> TableCell:
    return TableCell(MISSING if value is None else rate_text(value), (value,))


def decimal(value: Any, digits: int = 3) -> TableCell:
    return TableCell(MISSING if value is None else f"{number(value):.{digits}f}", (value,))


def significant(value: float | None) -> TableCell:
    """Three significant digits."""
    return TableCell(MISSING if value is None else f"{value:.3g}", (value,))


def fact_column(fact: Fact, suffix: str = "", label: str = "") -> Column:
    parts = ("", "_low", "_high") if fact.middle else ("",)
    return Column(f"{fact.key}{suffix}", f"{label}{fact.label}", parts)


def fact_cell(fact: Fact, summary: ArmSummary | None) -> TableCell:
    """A fact about an arm; missing if the study does not have the arm."""
    if summary is None:
        return TableCell(MISSING, (None,) * (3 if fact.middle else 1))
    return TableCell(fact.text(summary), fact.values(summary))


def perplexity(summary: ArmSummary) -> Any:
    """exp of the best loss and of its interval."""
    loss = summary.get("best_final_loss")
    return loss and {end: None if value is None else exp(number(value)) for end, value in loss.items()}


def exp(loss: float) -> float:
    return math.exp(loss) if loss < 700 else math.inf


PERPLEXITY = Fact("best_perplexity", "perplexity at that LR", perplexity, estimate_text, "value")


def variants(study: StudyData) -> Table:
    """One row per arm: its part of `study.json`, and the lowest validation perplexity of its stable runs."""
    in_grid = any("best_lr" in summary for summary in study.arm_summaries.values())
    facts = [*FACTS, *((*GRID_FACTS, PERPLEXITY) if in_grid else ())]
    columns = [Column("variant", "variant"), *map(fact_column, facts)]
    columns.append(Column("val_perplexity", "lowest validation perplexity"))
    rows = [
        [plain(arm), *(fact_cell(fact, summary) for fact in facts), decimal(lowest_perplexity(study.rows, arm), 2)]
        for arm, summary in study.arm_summaries.items()
    ]
    note = (
        "Intervals: 95 %. lr50, lr10: learning rates at which half, a tenth of the seeds diverge. lenient, strict: the "
        "same runs judged at other strictnesses of the rule. Losses: training, in nats/token; perplexity: exp(loss). "
        "LR sensitivity needs at least two learning rates."
    )
    return Table("variants", "By variant", columns, rows, note)


def totals(study: StudyData) -> Table:
    """What the finished runs of a study took: one row. Hours are those of all workers together."""
    counts = [len(study.arm_summaries), len(study.rows), sum(row["tokens"] or 0 for row in study.rows)]
    hours = sum(row["seconds"] or 0.0 for row in study.rows) / 3600
    rules = sorted({row["rule"] for row in study.rows if row["rule"] is not None})
    cells = [*(TableCell(f"{count:,}", (count,)) for count in counts), decimal(hours, 1)]
    cells.append(plain(", ".join(map(str, rules))))
    labels = {
        "variants": "variants",
        "runs": "runs",
        "tokens": "tokens",
        "hours": "hours",
        "rule": "version of the rule",
    }
    columns = [Column(key, label) for key, label in labels.items()]
    return Table("totals", "The study", columns, [cells], "Hours from the start to the end of each run, added up.")


def outcomes(study: StudyData) -> Table:
    """One row per arm: what became of its runs, and how far above their lowest level the losses ended."""
    rows = []
    for arm in study.arm_summaries:
        own = [row for row in study.rows if row["arm"] == arm]
        of = {verdict: [row for row in own if row["verdict"] == verdict] for verdict in VERDICTS}
        lost = [row for row in of[DIVERGED] if number(row["final_loss"]) > number(row["init_loss"])]
        rises = [decimal(median(map(rise, found)) if found else None) for found in of.values()]
        rows.append([plain(arm), *(plain(len(found)) for found in of.values()), *rises, plain(len(lost))])
    columns = [Column("variant", "variant"), *(Column(verdict, verdict) for verdict in VERDICTS)]
    columns += [Column(f"rise_{verdict}", f"rise, {verdict}") for verdict in VERDICTS]
    columns.append(Column("above_first", "diverged runs that ended above their first loss"))
    note = "Rise: median over runs of the final loss minus the lowest, means over a window, in nats."
    return Table("outcomes", "What became of the runs", columns, rows, note)


def rise(row: Result) -> float:
    """Final loss minus lowest loss."""
    return number(row["final_loss"]) - number(row["best_loss"])


def interval(ends: Mapping[str, Any] | None) -> TableCell:
    """A median with its interval, or a bound."""
    values = tuple((ends or {}).get(end) for end in ("median", "low", "high"))
    return TableCell(interval_text(ends), values)


def interval_column(key: str, label: str) -> Column:
    return Column(key, label, ("", "_low", "_high"))


def lowest_perplexity(rows: list[Result], arm: str) -> float | None:
    values = [row["val_perplexity"] for row in rows if row["arm"] == arm and is_stable(row)]
    return min((value for value in values if isinstance(value, (int, float))), default=None)


def runs(study: StudyData) -> Table:
    """One row per run: the content of `results.csv`."""
    columns = [Column(column, column.replace("_", " ")) for column in COLUMNS]
    rows = [[result_cell(column, row.get(column)) for column in COLUMNS] for row in study.rows]
    return Table("runs", "By run", columns, rows, "The rows of results.csv, rounded. The CSV has every digit.")


def result_cell(column: str, value: Any) -> TableCell:
    if column == "lr":
        return rate(value)
    return decimal(value, DIGITS.get(column, 3)) if isinstance(value, float) else plain(value)


def leads(study: StudyData) -> Table:
    """One row per signal: its lead over the loss in diverged runs, and its false alarms in converged runs."""
    diverged, converged = (
        [study.run_summary(row["run_id"]) for row in study.rows if row["verdict"] == verdict]
        for verdict in (DIVERGED, CONVERGED)
    )
    rows = []
    for signal in signals():
        steps = [steps for summary in diverged if (steps := lead(summary, signal)) is not None]
        ends = [min(steps), median(steps), max(steps)] if steps else [None] * 3
        false_alarms = sum(signal in summary.get("signals", {}) for summary in converged)
        values = [signal.replace("_", " "), len(steps), sum(step > 0 for step in steps), *ends, false_alarms]
        rows.append([plain(f"{value:g}" if isinstance(value, float) else value) for value in values])
    columns = [
        Column("signal", "signal"),
        Column("alarms", f"alarms in {len(diverged)} diverged runs"),
        Column("before", "alarms before the loss"),
        Column("lead_lowest", "lowest lead (steps)"),
        Column("lead_median", "median lead (steps)"),
        Column("lead_highest", "highest lead (steps)"),
        Column("false_alarms", f"false alarms in {len(converged)} converged runs"),
    ]
    note = "Lead: steps from the first alarm of a signal to that of the loss; below 0 the loss was first."
    return Table("leads", "Lead of each signal over the loss", columns, rows, note)


def lead(summary: Summary, signal: str) -> float | None:
    """Steps from the first alarm of a signal to that of the loss; None if there was no alarm."""
    found = summary.get("signals", {}).get(signal)
    return found and found["lead"]


def comparison(studies: dict[str, StudyData]) -> Table:
    """Two studies or runs side by side, one row per arm. `studies` is by title."""
    arms = list(dict.fromkeys(arm for study in studies.values() for arm in study.plan.arms))
    columns, rows = [Column("variant", "variant")], [[plain(arm)] for arm in arms]
    facts = [fact for fact in (*FACTS, *GRID_FACTS) if fact.key in STUDY_COMPARISON]
    for letter, (title, study) in zip("ab", studies.items(), strict=True):
        if study.plan.strategy == RUN:
            columns += [Column(f"{key}_{letter}", f"{title}, {key.replace('_', ' ')}") for key in RUN_COMPARISON]
            run: dict[str, Any] = {row["arm"]: row for row in study.rows}
            cells = [[result_cell(key, run.get(arm, {}).get(key)) for key in RUN_COMPARISON] for arm in arms]
        else:
            columns += [fact_column(fact, f"_{letter}", f"{title}, ") for fact in facts]
            cells = [[fact_cell(fact, study.arm_summaries.get(arm)) for fact in facts] for arm in arms]
        rows = [row + more for row, more in zip(rows, cells, strict=True)]
    return Table("side_by_side", "By variant, side by side", columns, rows)


def norm_ratios(sides: list[Result], curves: Curves) -> Table | None:
    """Norms of a diverged run divided by those of a stable run, by site and layer, at a few common steps."""
    if len(sides) < 2 or any(row["run_id"] not in curves for row in sides):
        return None
    stable, diverged = (curves[row["run_id"]].series for row in sides)
    forward = [metric for metric in METRICS.values() if metric.shape == BY_SITE and metric.cadence == EVERY]
    keys = [key for metric in forward for key in metric.keys if key in stable and key in diverged]
    recorded = [set(series[key].steps) for series in (stable, diverged) for key in keys]
    common = sorted(set.intersection(*recorded)) if recorded else []
    if not common:
        return None
    steps = [common[place] for place in spread(len(common), RATIO_STEPS)]
    rows = []
    for key in keys:
        below, above = (dict(zip(series[key].steps, series[key].values, strict=True)) for series in (stable, diverged))
        for layer in range(len(below[steps[0]])):
            ratios = [significant(quotient(above[step][layer], below[step][layer])) for step in steps]
            rows.append([plain(key.split("/")[1]), plain(key.split("/")[2]), plain(layer), *ratios])
    columns = [Column("norm", "norm"), Column("site", "site"), Column("layer", "layer")]
    columns += [Column(f"step_{step}", f"step {step}") for step in steps]
    under, over = (f"{run_name(row['arm'], row['lr'], row['seed'])} ({row['verdict']})" for row in sides)
    return Table(
        "norm_ratios", "Norms: diverged / stable", columns, rows, f"Norms of {over} divided by those of {under}."
    )


def quotient(over: float, under: float) -> float | None:
    return over / under if under and math.isfinite(over) and math.isfinite(under) else None


def as_csv(table: Table) -> str:
    head = [column.key + part for column in table.columns for part in column.parts]
    return csv_text([head, *([value for cell in row for value in cell.values] for row in table.rows)])


MARKDOWN = str.maketrans({mark: f"\\{mark}" for mark in "\\`*_|[]"} | {"<": "&lt;", ">": "&gt;", "\n": " "})


def as_markdown(table: Table) -> str:
    rows = [[column.label for column in table.columns], *([cell.text for cell in row] for row in table.rows)]
    head, *body = ("| " + " | ".join(text.translate(MARKDOWN) for text in row) + " |\n" for row in rows)
    note = f"\n{table.note}\n" if table.note else ""
    return f"## {table.title}\n\n{head}{'|---' * len(table.columns)}|\n{''.join(body)}{note}"


LATEX = str.maketrans({
    "\\": r"\textbackslash{}", "&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_", "{": r"\{", "}": r"\}",
    "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "<": r"\textless{}", ">": r"\textgreater{}",
    "–": "--", "∞": r"$\infty$", "×": r"$\times$", "λ": r"$\lambda$", "−": r"$-$", "\n": " ",
})  # fmt: skip


def as_latex(table: Table) -> str:
    """A table for booktabs, with the title and the note as its caption."""
    rows = [[column.label for column in table.columns], *([cell.text for cell in row] for row in table.rows)]
    head, *body = (" & ".join(text.translate(LATEX) for text in row) + r" \\" for row in rows)
    caption = f"{table.title}. {table.note}".strip().translate(LATEX)
    return "\n".join([
        "% needs \\usepackage{booktabs,graphicx}",
        r"\begin{table}",
        r"\centering",
        rf"\caption{{{caption}}}",
        r"\resizebox{\linewidth}{!}{%",
        rf"\begin{{tabular}}{{l{'r' * (len(table.columns) - 1)}}}",
        r"\toprule", head, r"\midrule", *body, r"\bottomrule",
        r"\end{tabular}}", r"\end{table}", "",
    ])  # fmt: skip


FORMATS: dict[str, Callable[[Table], str]] = {"csv": as_csv, "md": as_markdown, "tex": as_latex}


def files(tables: list[Table]) -> Iterator[tuple[str, str]]:
    """Name and content of the files of each table."""
    for table in tables:
        for ending, write in FORMATS.items():
            yield f"{table.name}.{ending}", write(table)
