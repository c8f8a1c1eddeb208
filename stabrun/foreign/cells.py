"""The number in a cell of a table or a log."""

import math
import re
from typing import Any

MISSING = frozenset(("", "-", "--", "null", "none", "na", "n/a", "<na>", "#n/a", "no log", "nil", "?", "—"))
WRAPPED = re.compile(r"(?:[A-Za-z_][\w.]*)?[(\[]\s*([-+]?[\d.]+(?:[eE][-+]?\d+)?|nan|[-+]?inf)\s*(?:,.*)?[)\]]")
GROUPED = re.compile(r"[-+]?\d{1,3}(?:,\d{3})+")
FRACTION = re.compile(r"\s*(\d+)\s*/\s*\d+\s*")


def number(value: Any) -> float | None:
    """The number in a cell, None if it is empty. Decimal commas, `tensor(2.5)` and quotes are understood.

    Raises ValueError if the cell holds something else.
    """
    kind = type(value)
    if kind is float or value is None:
        return value
    if kind is str:
        if not value:
            return None
        try:
            if "_" not in value:
                return float(value)
        except ValueError:
            pass
        return _spelled(value)
    if kind is int:
        return float(value)
    if kind is list and len(value) == 1:
        return number(value[0])
    raise ValueError(value)


def _spelled(text: str) -> float | None:
    """The number in a text that is not written as Python would write it."""
    text = text.strip().strip("'\"").strip().replace("\u2212", "-")
    if text.lower() in MISSING:
        return None
    if found := WRAPPED.fullmatch(text):
        text = found[1]
    if "_" in text:
        raise ValueError(text)
    if "," in text:
        if "." in text:  # both: the last one is the decimal point
            group = "," if text.rindex(",") < text.rindex(".") else "."
            text = text.replace(group, "")
        if text.count(",") > 1:
            raise ValueError(text)
        text = text.replace(",", ".")
    return float(text)


def count(value: Any) -> float | None:
    """The number in a cell of a clock: `1,000` is a thousand, and `3/1000` is 3. Infinite and NaN clocks are none."""
    if type(value) is str:
        if value.isdecimal():
            return float(value)
        if "," in value and GROUPED.fullmatch(value.strip()):
            value = value.replace(",", "")
        elif "/" in value and (found := FRACTION.fullmatch(value)):
            value = found[1]
    found_number = number(value)
    return found_number if found_number is None or math.isfinite(found_number) else None


def is_numeric(value: Any) -> bool:
    """Whether a cell holds a number or is empty."""
    try:
        number(value)
    except ValueError:
        return False
    return True


def filled(value: Any) -> bool:
    """Whether a cell holds a number."""
    try:
        return number(value) is not None
    except (ValueError, OverflowError):
        return False
