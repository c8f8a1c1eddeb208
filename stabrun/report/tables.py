"""The report's tables, and how they are written: CSV with every digit, Markdown and LaTeX as people read them."""

import csv
import io
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from stabrun.record.jsonl import number
from stabrun.record.metrics import BLOCK_SITES, signals
from stabrun.report.run_curves import Trace
from stabrun.report.selection import stable
from stabrun.report.source import RUN, Row, Source
from stabrun.study.facts import estimate_text, interval_text
from stabrun.study.results import COLUMNS
from stabrun.study.summary import BASELINE, QK_NORM
from stabrun.text import rate_text, run_name
from stabrun.verdict.judge import CONVERGED, DIVERGED, STANDARD, STRICTNESS

ENDS = "", "low", "high"  # an interval takes three columns of a CSV


@dataclass(frozen=True)
class Column:
    """`parts` names the columns of the CSV that a column as people read it takes."""

    key: str
    label: str
    parts: tuple[str, ...] = ("",)

    @property
    def names(self) -> list[str]:
        return [f"{self.key}_{part}" if part else self.key for part in self.parts]


@dataclass(frozen=True)
class Cell:
    """A cell as people read it, and its values with every digit."""

    text: str
    values: tuple[Any, ...]


@dataclass(frozen=True)
class Table:
    """`note` says what must be known to read it."""

    name: str
    title: str
    columns: Sequence[Column]
    rows: list[list[Cell]]
    note: str = ""


def plain(value: Any) -> Cell:
    """A word, a count, or nothing."""
    return Cell("" if value is None else str(value), (value,))


def rate(value: float | None) -> Cell:
    return Cell("–" if value is None else rate_text(value), (value,))


def decimal(value: Any, digits: int = 3) -> Cell:
    if value is None:
        return Cell("–", (None,))
    shown = number(value)
    return Cell(f"{shown:.{digits}f}" if math.isfinite(shown) else str(value), (value,))


def rates(interval: Row | None) -> Cell:
    """A learning rate or a ratio with its interval, as `stabrun sweep` prints it."""
    return Cell(interval_text(interval), three(interval, "median"))


def estimate(found: Row | None) -> Cell:
    return Cell(estimate_text(found), three(found, "value"))


def three(interval: Row | None, middle: str) -> tuple[Any, ...]:
    return tuple(interval[end] for end in (middle, "low", "high")) if interval else (None, None, None)


def perplexity(loss: Row | None) -> Cell:
    """exp of a loss and of its interval."""
    if loss is None:
        return estimate(None)
    raised = {end: None if value is None else exp(number(value)) for end, value in loss.items()}
    return Cell(estimate_text(raised).replace("inf", "∞"), three(raised, "value"))


def exp(loss: float) -> float:
    return math.exp(loss) if loss < 700 else math.inf


def frontier(strictness: str, *path: str) -> Callable[[Row], Cell]:
    """The cell of the interval at this path of an arm's frontier."""

    def cell(told: Row) -> Cell:
        place = told["frontier"].get(strictness)
        for name in path:
            place = place and place.get(name)
        return rates(place)

    return cell


def total(name: str) -> Callable[[Row], Cell]:
    return lambda told: plain(sum(place[name] for place in told["runs"]))


def of_rule(name: str, strictness: str) -> tuple[Column, Callable[[Row], Cell]]:
    """The column of lr50 or lr10 at a strictness of the rule."""
    usual = strictness == STANDARD
    column = Column(name if usual else f"{name}_{strictness}", name if usual else f"{name}, {strictness}", ENDS)
    return column, frontier(strictness, name)


OF_VARIANT: list[tuple[Column, Callable[[Row], Cell]]] = [
    (Column("runs", "runs"), total("runs")),
    (Column("diverged", "diverged"), total("diverged")),
    (Column("undecided", "undecided"), total("undecided")),
    *(of_rule(name, level) for name in ("lr50", "lr10") for level in sorted(STRICTNESS, key=STANDARD.__ne__)),
    (Column("over_baseline", "lr50 / baseline's", ENDS), frontier(STANDARD, "over", BASELINE)),
    (Column("over_qk_norm", "lr50 / qk_norm's", ENDS), frontier(STANDARD, "over", QK_NORM)),
    (Column("max_stable_lr", "highest stable"), lambda told: rate(told["max_stable_lr"])),
    (Column("min_diverged_lr", "lowest diverged"), lambda told: rate(told["min_diverged_lr"])),
]
OF_GRID: list[tuple[Column, Callable[[Row], Cell]]] = [
    (Column("best_final_loss", "lowest loss", ENDS), lambda told: estimate(told.get("best_final_loss"))),
    (Column("best_lr", "at LR"), lambda told: rate(told.get("best_lr"))),
    (Column("best_perplexity", "perplexity there", ENDS), lambda told: perplexity(told.get("best_final_loss"))),
    (Column("gain", "gain over baseline", ENDS), lambda told: estimate(told.get("gain"))),
    (Column("lr_sensitivity", "LR sensitivity", ENDS), lambda told: estimate(told.get("lr_sensitivity"))),
]


def variants(source: Source) -> Table:
    """A row an arm: what `study.json` says, and the lowest validation perplexity of its stable runs."""
    kinds = OF_VARIANT + (OF_GRID if any("best_lr" in told for told in source.variants.values()) else [])
    columns = [Column("variant", "variant"), *(column for column, _ in kinds)]
    columns.append(Column("val_perplexity", "lowest validation perplexity"))
    rows = [
        [plain(arm), *(cell(told) for _, cell in kinds), decimal(lowest_perplexity(source.rows, arm), 2)]
        for arm, told in source.variants.items()
    ]
    note = (
        "Intervals are 95 %. lr50: half of the seeds diverge; lr10: a tenth. lenient and strict: the same runs judged "
        "by the two other strictnesses of the rule. Losses in nats a token, training; perplexity is exp(loss)."
    )
    return Table("variants", "By variant", columns, rows, note)


def lowest_perplexity(rows: list[Row], arm: str) -> float | None:
    seen = [row["val_perplexity"] for row in rows if row["arm"] == arm and stable(row)]
    return min((value for value in seen if isinstance(value, (int, float))), default=None)


DIGITS = {"scar": 3, "val_perplexity": 2, "tokens_per_second": 0, "seconds": 0}


def runs(source: Source) -> Table:
    """A row a run: what `results.csv` holds."""
    return Table(
        "runs",
        "By run",
        [Column(column, column.replace("_", " ")) for column in COLUMNS],
        [[result_cell(column, row.get(column)) for column in COLUMNS] for row in source.rows],
        "The rows of results.csv, rounded; its CSV has every digit.",
    )


def result_cell(column: str, value: Any) -> Cell:
    if column == "lr":
        return rate(value)
    return decimal(value, DIGITS.get(column, 3)) if isinstance(value, float) else plain(value)


def leads(source: Source) -> Table:
    """A row a signal: its lead over the loss in diverged runs, and how often it gave an alarm in converged ones."""
    lost = [source.summary(row["run_id"]) for row in source.rows if row["verdict"] == DIVERGED]
    held = [source.summary(row["run_id"]) for row in source.rows if row["verdict"] == CONVERGED]
    rows = []
    for signal in signals():
        false = sum(signal in summary.get("signals", {}) for summary in held)
        found = [lead for lead in (lead_of(summary, signal) for summary in lost) if lead is not None]
        ends = [min(found), median(found), max(found)] if found else [None] * 3
        counts = [len(found), sum(lead > 0 for lead in found)]
        rows.append([whole_number(value) for value in (signal.replace("_", " "), *counts, *ends, false)])
    columns = [
        Column("signal", "signal"),
        Column("alarms", f"alarms in {len(lost)} diverged runs"),
        Column("before", "of these before the loss"),
        Column("lead_lowest", "lowest lead, steps"),
        Column("lead_median", "median lead, steps"),
        Column("lead_highest", "highest lead, steps"),
        Column("false_alarms", f"false alarms in {len(held)} converged runs"),
    ]
    note = "The lead counts steps from a signal's first alarm to the loss's: below 0 the loss was first."
    return Table("leads", "Which signal broke away before the loss", columns, rows, note)


def by_study(sources: dict[str, Source]) -> Table:
    """A row an arm: lr50, bracket and lowest loss of each study, or the verdict of each run, side by side."""
    arms = list(dict.fromkeys(arm for source in sources.values() for arm in source.arms))
    columns, rows = [Column("variant", "variant")], [[plain(arm)] for arm in arms]
    for letter, (label, source) in zip("ab", sources.items(), strict=True):
        kinds = [kind for kind in OF_VARIANT + OF_GRID if kind[0].key in SIDE_BY_SIDE] if source.strategy != RUN else []
        columns += [Column(f"{column.key}_{letter}", f"{label}, {column.label}", column.parts) for column, _ in kinds]
        for arm, row in zip(arms, rows, strict=True):
            told = source.variants.get(arm)
            row += [cell(told) if told else Cell("–", (None,) * len(column.parts)) for column, cell in kinds]
        if source.strategy == RUN:
            facts = (
                "lr",
                "seed",
                "verdict",
                "reason",
                "first_bad_step",
                "first_bad_site",
                "final_loss",
                "val_perplexity",
            )
            columns += [Column(f"{key}_{letter}", f"{label}, {key.replace('_', ' ')}") for key in facts]
            for arm, row in zip(arms, rows, strict=True):
                own = source.rows[0] if arm in source.arms else {}
                row += [result_cell(key, own[key]) if own else plain(None) for key in facts]
    return Table("side_by_side", "By variant, side by side", columns, rows)


SIDE_BY_SIDE = (
    "runs",
    "diverged",
    "lr50",
    "lr10",
    "max_stable_lr",
    "min_diverged_lr",
    "best_final_loss",
    "lr_sensitivity",
)
RATIO_STEPS = 5


def ratios(sides: list[Row], traces: dict[str, Trace]) -> Table | None:
    """How many times the stable run's norms the diverged run's are, by site and layer at a few common steps."""
    if len(sides) < 2 or any(row["run_id"] not in traces for row in sides):
        return None
    held, lost = (traces[row["run_id"]].curves for row in sides)
    names = [f"norm/{kind}/{site}" for kind in ("out", "in", "weight") for site in BLOCK_SITES]
    both = [name for name in names if name in held and name in lost]
    common = (
        sorted(set.intersection(*(set(curves[name].steps) for curves in (held, lost) for name in both))) if both else []
    )
    if not common:
        return None
    steps = [common[round(place * (len(common) - 1) / (RATIO_STEPS - 1))] for place in range(RATIO_STEPS)]
    steps = list(dict.fromkeys(steps))
    rows = []
    for name in both:
        at = [dict(zip(curves[name].steps, curves[name].values, strict=True)) for curves in (held, lost)]
        for layer in range(len(at[0][steps[0]])):
            found = [quotient(at[1][step][layer], at[0][step][layer]) for step in steps]
            rows.append([plain(name.split("/")[1]), plain(name.split("/")[2]), plain(layer), *map(significant, found)])
    columns = [Column("norm", "norm"), Column("site", "site"), Column("layer", "layer")]
    columns += [Column(f"step_{step}", f"step {step}") for step in steps]
    told = [run_name(row["arm"], row["lr"], row["seed"]) for row in sides]
    note = f"Norms of {told[1]} ({sides[1]['verdict']}) over those of {told[0]} ({sides[0]['verdict']})."
    return Table("norm_ratios", "Norms: diverged over stable", columns, rows, note)


def quotient(over: float, under: float) -> float | None:
    return over / under if under and math.isfinite(over) and math.isfinite(under) else None


def significant(value: float | None) -> Cell:
    """Three digits."""
    return Cell("–" if value is None else f"{value:.3g}", (value,))


def lead_of(summary: Row, signal: str) -> int | None:
    found = summary.get("signals", {}).get(signal)
    return found.get("lead") if isinstance(found, dict) else None


def whole_number(value: Any) -> Cell:
    """A median of whole numbers may end in .5."""
    return Cell(f"{value:g}", (value,)) if isinstance(value, float) else plain(value)


def as_csv(table: Table) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([name for column in table.columns for name in column.names])
    writer.writerows([value for cell in row for value in cell.values] for row in table.rows)
    return text.getvalue()


def as_markdown(table: Table) -> str:
    def line(cells: list[str]) -> str:
        return "| " + " | ".join(markdown_text(cell) for cell in cells) + " |\n"

    body = "".join(line([cell.text for cell in row]) for row in table.rows)
    head = line([column.label for column in table.columns])
    note = f"\n{table.note}\n" if table.note else ""
    return f"## {table.title}\n\n{head}{'|---' * len(table.columns)}|\n{body}{note}"


def markdown_text(text: str) -> str:
    for mark in "\\`*_|<>[]":
        text = text.replace(mark, f"\\{mark}") if mark not in "<>" else text.replace(mark, f"&{'lg'[mark == '>']}t;")
    return text.replace("\n", " ")


LATEX = {
    "\\": r"\textbackslash{}", "&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_", "{": r"\{", "}": r"\}",
    "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "<": r"\textless{}", ">": r"\textgreater{}",
    "–": "--", "∞": r"$\infty$", "×": r"$\times$", "λ": r"$\lambda$", "−": r"$-$", "\n": " ",
}  # fmt: skip


def latex_text(text: str) -> str:
    return "".join(LATEX.get(mark, mark) for mark in text)


def as_latex(table: Table) -> str:
    """A table for booktabs; the title is its caption."""
    lines = [" & ".join(latex_text(cell.text) for cell in row) + r" \\" for row in table.rows]
    head = " & ".join(latex_text(column.label) for column in table.columns) + r" \\"
    note = f" {table.note}" if table.note else ""
    return "\n".join([
        "% needs \\usepackage{booktabs,graphicx}",
        r"\begin{table}",
        r"\centering",
        rf"\caption{{{latex_text(table.title + '.' + note)}}}",
        r"\resizebox{\linewidth}{!}{%",
        rf"\begin{{tabular}}{{l{'r' * (len(table.columns) - 1)}}}",
        r"\toprule", head, r"\midrule", *lines, r"\bottomrule",
        r"\end{tabular}}", r"\end{table}", "",
    ])  # fmt: skip


FORMATS: dict[str, Callable[[Table], str]] = {"csv": as_csv, "md": as_markdown, "tex": as_latex}


def files(tables: list[Table]) -> Iterator[tuple[str, str]]:
    """(name, text) of each table in each format."""
    for table in tables:
        for ending, written in FORMATS.items():
            yield f"{table.name}.{ending}", written(table)
