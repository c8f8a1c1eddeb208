"""Tables as text: CSV and its kin, tables in columns of blanks, Markdown, and numbers without a header."""

import csv
import itertools
import re
import statistics
from collections import Counter
from collections.abc import Callable, Iterable, Iterator

from stabrun.foreign import names
from stabrun.foreign.cells import filled, is_numeric, number
from stabrun.foreign.columns import Cells
from stabrun.foreign.source import Source

SIGNS = (";", "\t", ",")  # a comma comes last, because it may be a decimal comma
HEADER_WITHIN = 20  # lines that are searched for a header
ROWS_WITHIN = 20  # lines below a header that are searched for a row
RAGGED = 0.05  # share of short rows from which they are usual
PAIRED = re.compile(r"[:=]\s*[-+.]?\d")  # a name with its number: a line of a log, not a header
BARS = re.compile(r"[│┃║]")
RULE = re.compile(r"[\s|:+=\-─━═┄┼╪╫╋┿├┤┝┥╞╡╟╢┠┨└┘┌┐╔╗╚╝╘╛╒╕┬┴╤╧]+")
NUMBERS_WITHIN = 1000  # lines that decide whether a file is nothing but numbers
LEAST_NUMBERS = 3  # rows without a header; fewer do not tell a step from a loss
NEARLY = 0.9
BRACKETS = " []()"
NAN = float("nan")
EPOCHS_BEGIN = 1e9  # seconds since 1970 are above this; such a first column is a time
Split = Callable[[str], list[str]]


def by_sign(sign: str) -> Split:
    def split(line: str) -> list[str]:
        if '"' not in line:
            return line.split(sign)
        return next(csv.reader([line], delimiter=sign, skipinitialspace=True), [])

    return split


def by_blanks(line: str) -> list[str]:
    """Words; names of several words are understood if two blanks or more separate the columns."""
    line = line.strip().removeprefix("#").strip()
    wide = re.split(r"\s{2,}|\t", line)
    return wide if len(wide) > 1 and len(wide) * 2 > len(line.split()) else line.split()


def by_bars(line: str) -> list[str]:
    line = BARS.sub("|", line).strip()
    return [cell.strip() for cell in line.removeprefix("|").removesuffix("|").split("|")] if "|" in line else []


def header_at(head: list[str], split: Split) -> int | None:
    """The line of the header: names, with as many cells as a row of numbers below it."""
    for index, line in enumerate(head[:HEADER_WITHIN]):
        try:
            cells = split(line.lstrip("# "))
        except csv.Error:
            return None
        if any(map(PAIRED.search, cells)) or len(cells) < 2 or sum(map(filled, cells)) * 2 > len(cells):
            continue
        usual = any(map(names.role, cells))
        if split is by_blanks and any(map(filled, cells)):  # a sentence with numbers
            continue
        if not usual and (index or any(map(filled, cells))):
            continue
        below = [row for row in map(tolerant(split), head[index + 1 : index + 1 + ROWS_WITHIN]) if any(row)]
        if any(fits(cells, row) for row in below) or (usual and not below and not any(map(filled, cells))):
            return index
    return None


def tolerant(split: Split) -> Split:
    def cells(line: str) -> list[str]:
        try:
            return split(line)
        except csv.Error:
            return []

    return cells


def fits(header: list[str], row: list[str]) -> bool:
    """Whether a row has numbers below a header. Rows of pandas may have one cell more: the index."""
    return len(row) in (len(header), len(header) + 1) and any(map(filled, row)) and not set(row) & set(header) - {""}


def table(source: Source, lines: Iterable[str], head: list[str], split: Split) -> Iterator[Cells]:
    """The rows of a table with a header."""
    head = list(without_rules(head, split))
    at = header_at(head, split) or 0
    header = [name.strip() for name in split(head[at].lstrip("# "))]
    below = [tolerant(split)(line) for line in head[at + 1 :] if line.strip()]
    indexed = len(below) > 0 and all(len(row) == len(header) + 1 for row in below[:ROWS_WITHIN])
    if indexed:
        header = ["", *header]
    width = len(header)
    ragged = sum(len(row) < width for row in below) > RAGGED * len(below)
    first, text = header[0], ruled(split)  # other text may stand between the rows
    for row in map(split, itertools.islice(without_rules(lines, split), at + 1, None)):
        if len(row) == width and row[0].strip() != first and (not text or any(map(filled, row))):
            yield dict(zip(header, row, strict=True))
        elif [cell.strip() for cell in row] == header:
            yield {}  # another run was appended, with its header
        elif not any(map(filled, row)):
            continue
        elif len(row) == width or (ragged and len(row) < width) or (len(row) > width and not any(row[width:])):
            yield dict(zip(header, row, strict=False))
        else:
            source.skip(f": a row has {len(row)} cells instead of {width} ({','.join(row)[:40]}).")


def ruled(split: Split) -> bool:
    """Whether lines such as `|---|---|` may stand between the rows."""
    return split is by_bars or split is by_blanks


def without_rules(lines: Iterable[str], split: Split) -> Iterator[str]:
    """The lines that are not blank, and not only drawn."""
    if ruled(split):
        return (line for line in lines if not RULE.fullmatch(line) and line.strip())
    return (line for line in lines if line and not line.isspace())


COMMAS = {sign: by_sign(sign) for sign in SIGNS}


def split_of(head: list[str]) -> Split | None:
    """How the table that these lines begin with is divided into cells, if they begin with one."""
    begin = head[:HEADER_WITHIN]
    for sign, split in COMMAS.items():
        if any(sign in line for line in begin) and header_at(head, split) is not None:
            return split
    if any("|" in BARS.sub("|", line) for line in begin):
        rows = list(without_rules(head, by_bars))
        if header_at(rows, by_bars) is not None and any(map(RULE.fullmatch, head)):
            return by_bars
    rows = list(without_rules(head, by_blanks))
    found = header_at(rows, by_blanks)
    if found is not None and any(map(names.role, by_blanks(rows[found]))):
        return by_blanks
    return None


def numbers_split(head: list[str]) -> Split | None:
    """How lines of nothing but numbers are divided, if nearly all of these lines are such."""
    lines = [line for line in head[:NUMBERS_WITHIN] if not line.lstrip().startswith("#")]
    for split in (*COMMAS.values(), str.split):
        right = number_sample(lines, split)
        width = len(right[0]) if right else 0
        if (
            len(right) >= LEAST_NUMBERS
            and len(right) >= NEARLY * len(lines)
            and (width > 1 or (split == str.split and "." in "".join(lines)))
        ):
            return split
    return None


def number_sample(lines: list[str], split: Split) -> list[list[str]]:
    """The lines that are nothing but numbers, of the most common width."""
    stripped = (line.strip(BRACKETS) for line in lines)
    rows = [row for row in map(tolerant(split), stripped) if any(map(filled, row)) and all(map(is_numeric, row))]
    width = Counter(map(len, rows)).most_common(1)[0][0] if rows else 0
    return [row for row in rows if len(row) == width]


def number_rows(source: Source, lines: Iterable[str], head: list[str]) -> Iterator[Cells]:
    """The rows of a table without a header: step and loss, or a loss a line."""
    split = numbers_split(head) or str.split
    sample = number_sample(head[:NUMBERS_WITHIN], split)
    width = len(sample[0]) if sample else 1
    header = number_header(sample)
    for line in lines:
        row = tolerant(split)(line.strip(BRACKETS))
        if len(row) == width and all(map(is_numeric, row)):
            yield dict(zip(header, row, strict=True))
        elif row and line.strip() and not row[0].startswith("#"):
            source.skip(f": a row is not {width} number{'s' * (width > 1)} ({line.strip()[:40]}).")


def number_header(rows: list[list[str]]) -> list[str]:
    """Names for columns of numbers: an ascending one is the step, the next other one the loss; times are neither."""
    columns = [
        [NAN if (found := number(cell)) is None else found for cell in column] for column in zip(*rows, strict=True)
    ]
    header = [f"column {index + 1}" for index in range(len(columns))]
    rising = [i for i, column in enumerate(columns) if ascending(column)]
    times = [i for i in rising if statistics.median(columns[i]) > EPOCHS_BEGIN]
    clocks = [i for i in rising if i not in times]
    clock = next((i for i in clocks if whole(columns[i])), clocks[0] if clocks else None)
    if clock is not None and len(columns) > 1:
        header[clock] = "step" if whole(columns[clock]) else "epoch"
    rest = [i for i in range(len(columns)) if i not in times and (i != clock or len(columns) == 1)]
    if rest:
        header[next((i for i in rest if clock is None or i > clock), rest[0])] = "loss"
    return header


def ascending(values: list[float]) -> bool:
    """Whether nearly all of at least two numbers are above the one before."""
    up = sum(later > earlier for earlier, later in itertools.pairwise(values))
    return len(values) > 1 and up >= NEARLY * (len(values) - 1)


def whole(values: list[float]) -> bool:
    """Whether nearly all of these numbers are whole."""
    return sum(value.is_integer() for value in values) >= NEARLY * len(values)
