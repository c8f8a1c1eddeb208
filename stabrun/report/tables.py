"""The report's tables, and how they are written: CSV with every digit, Markdown and LaTeX as people read them."""

import csv
import io
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from stabrun.observe.record import number
from stabrun.observe.signals import SIGNALS
from stabrun.observe.text import rate_text
from stabrun.observe.verdict import CONVERGED, DIVERGED, STANDARD, STRICTNESS
from stabrun.report.choose import stable
from stabrun.report.source import Row, Source
from stabrun.study.answer import BASELINE, QK_NORM, estimate_told, rate_told
from stabrun.study.results import COLUMNS

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
    return Cell(rate_told(interval), three(interval, "median"))


def estimate(found: Row | None) -> Cell:
    return Cell(estimate_told(found), three(found, "value"))


def three(interval: Row | None, middle: str) -> tuple[Any, ...]:
    return tuple(interval[end] for end in (middle, "low", "high")) if interval else (None, None, None)


def perplexity(loss: Row | None) -> Cell:
    """exp of a loss and of its interval."""
    if loss is None:
        return estimate(None)
    raised = {end: None if value is None else exp(number(value)) for end, value in loss.items()}
    return Cell(estimate_told(raised).replace("inf", "∞"), three(raised, "value"))


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
    for signal in SIGNALS:
        false = sum(signal in summary.get("signals", {}) for summary in held)
        found = [lead for lead in (lead_of(summary, signal) for summary in lost) if lead is not None]
        ends = [min(found), median(found), max(found)] if found else [None] * 3
        counts = [len(found), sum(lead > 0 for lead in found)]
        rows.append([plain(value) for value in (signal.replace("_", " "), *counts, *ends, false)])
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


def lead_of(summary: Row, signal: str) -> int | None:
    found = summary.get("signals", {}).get(signal)
    return found.get("lead") if isinstance(found, dict) else None


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
