"""JSON: a document, such as `trainer_state.json`, and JSON lines."""

import itertools
import re
from collections.abc import Iterable, Iterator
from typing import Any

from stabrun.config import UserError
from stabrun.foreign.cells import filled
from stabrun.foreign.columns import Cells
from stabrun.foreign.source import Source
from stabrun.foreign.tables import number_header, numbers_split
from stabrun.record.jsonl import DECODER

LINES_WITHIN = 50  # lines that decide whether a file is JSON lines
OPENED = re.compile(
    r"\s*(\{|\[)\s*(\{|\[)?\s*(\"|$)|\s*\[\s*[-\d.]+\s*,[-\w.,\s+]*(\]\s*)?$|\s*(\[\s*\[|\{\s*\}|\[\s*\])"
)


def parsed(text: str) -> Any:
    """The value of a JSON text, or None if it is not JSON."""
    try:
        value, end = DECODER.raw_decode(text)
    except ValueError:
        return None if text == text.strip() else parsed(text.strip())
    return value if end == len(text) or not text[end:].strip() else None


def begins_lines(head: list[str]) -> bool:
    """Whether these lines are JSON objects, one a line."""
    values = [parsed(line) if "{" in line else None for line in head[:LINES_WITHIN]]
    objects = sum(isinstance(value, dict) for value in values)
    if isinstance(values[0], dict) and "log_history" in values[0]:
        return False
    return len(head) > 1 and 2 * objects > len(values)


def begins_document(head: list[str]) -> bool:
    return OPENED.match(head[0]) is not None and numbers_split(head) is None  # `[1, 2.5]` on each line


def line_rows(source: Source, lines: Iterable[str], head: list[str]) -> Iterator[Cells]:
    """The rows of JSON lines."""
    for number, line in enumerate(lines, 1):
        if not line or line.isspace():
            continue
        row = parsed(line)
        if type(row) is dict:
            history = row.get("history")  # of a W&B run, as printed by `wandb leet inspect --json`
            yield flat(history["item"] if type(history) is dict and type(history.get("item")) is dict else row)
        elif row is None:
            if source.unterminated:
                source.skip_last()
            else:
                source.skip(f", line {number}: not JSON.")


def document_rows(source: Source, lines: Iterable[str], head: list[str]) -> Iterator[Cells]:
    """The rows of a JSON document, or of several ones in a file."""
    texts = list(lines)
    text, at = "\n".join(texts), 0
    while at < len(text):
        if text[at].isspace():
            at += 1
            continue
        try:
            value, at = DECODER.raw_decode(text, at)
        except ValueError as error:
            where = text.count("\n", 0, getattr(error, "pos", at)) + 1
            raise UserError(f"{source.path}, line {where}: not JSON.") from error
        yield from map(flat, rows_within(value))


def flat(row: Cells) -> Cells:
    """The row with the values of nested objects under names such as `train/loss`, next to the objects themselves."""
    if dict not in map(type, row.values()):
        return row
    found = dict(row)
    for name, value in row.items():
        if type(value) is dict:
            for inner, cell in flat(value).items():
                found.setdefault(f"{name}/{inner}", cell)
    return found


def rows_within(whole: Any) -> list[Cells]:
    """The rows of a value: Hugging Face's `log_history`, a list of rows, one row, or lists by column."""
    if isinstance(whole, dict):
        whole = whole.get("log_history", whole)
    if isinstance(whole, dict):
        columns = {name: value for name, value in flat(whole).items() if isinstance(value, list) and value}
        nested = [value for value in columns.values() if isinstance(value[0], dict)]
        if nested:  # the longest list of rows
            return [row for row in max(nested, key=len) if isinstance(row, dict)]
        return by_column(columns) if columns else [whole]
    if not isinstance(whole, list):
        return []
    if whole and all(isinstance(row, list) for row in whole):
        return by_position(whole)
    if len(whole) > 2 and all(map(filled, whole)) and any(isinstance(value, float) for value in whole):
        return [{"loss": value} for value in whole]
    return [row for row in whole if isinstance(row, dict)]


def by_column(columns: dict[str, list[Any]]) -> list[Cells]:
    """The rows of lists by column. Lists of another length than the longest of losses are left out."""
    pairs = {name: value for name, value in columns.items() if all(isinstance(cell, list) for cell in value)}
    if pairs:  # a list of [step, value] for each name
        return [
            {"step": row["step"], name: row["loss"]}
            for name, value in pairs.items() for row in by_position(value) if "step" in row and "loss" in row
        ]  # fmt: skip
    lengths = [len(value) for name, value in columns.items() if filled(value[0])] or [0]
    longest = max(lengths)
    full = {name: value for name, value in columns.items() if len(value) == longest}
    rows: list[Cells] = [dict(zip(full, values, strict=True)) for values in zip(*full.values(), strict=True)]
    for name, value in columns.items():  # a list that is shorter by a factor was recorded every so many rows
        every = longest // len(value) if longest and longest % len(value) == 0 else 0
        for index, cell in enumerate(value if every > 1 else ()):
            rows[(index + 1) * every - 1][name] = cell
    return rows


def by_position(whole: list[Any]) -> list[Cells]:
    """The rows of a list of lists of numbers, as exported from TensorBoard: [time, step, value]."""
    width = len(whole[0])
    rows = [row for row in whole if len(row) == width and all(map(filled, row))]
    header = number_header([[str(cell) for cell in row] for row in rows])
    return [dict(itertools.zip_longest(header, row)) for row in rows]
