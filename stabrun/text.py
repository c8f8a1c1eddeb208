"""Numbers and tables as people read them, and tables as CSV."""

import codecs
import csv
import io
import os
import re
import sys
from collections.abc import Iterable, Iterator
from typing import Any, TextIO

GAP = 2  # spaces between columns
SECRET = re.compile(
    r"KEY|TOKEN|SECRET|PASS|CRED|AUTH|COOKIE|BEARER|WEBHOOK|PRIVATE|SIGNATURE|(?:^|_)(?:PAT|JWT|SAS|DSN)(?:_|$)|_PWD$",
    re.IGNORECASE,
)  # in the name of an environment variable
LEAST_SECRET = 8  # characters: the value of a shorter one may be any word
PASSWORD = re.compile(r"://[^/\s]*@")  # user and password in an address


def shown(text: str) -> str:
    """A text whose control characters are escapes, as `\\x1b` and `\\u202e`: a terminal does not obey it."""
    return text if text.isprintable() else "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


SPELLED = {
    "→": "->", "–": "-", "—": "-", "×": "x", "…": "...", "≤": "<=", "≥": ">=", "±": "+-", "−": "-", "━": "=", "─": "-",
    **dict(zip("▁▂▃▄▅▆▇█", "_.,-~=+#", strict=True)),
}  # fmt: skip
"""Characters of the output → how they are written in an encoding without them."""


def spell(error: UnicodeError) -> tuple[str, int]:
    """What is written for characters that the encoding of a stream lacks: see SPELLED, else an escape."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    text = error.object[error.start : error.end]
    return "".join(SPELLED.get(c) or c.encode("ascii", "backslashreplace").decode() for c in text), error.end


def write_any_text(stream: TextIO) -> None:
    """Let a stream of any encoding take any text."""
    codecs.register_error("stabrun", spell)
    if isinstance(stream, io.TextIOWrapper):
        stream.reconfigure(errors="stabrun")


def rate_text(lr: float) -> str:
    """A learning rate to three digits: 3e-2 and 1.5e-3 below 0.1; 0.15, 0.4, 1 and 2.5 from there on."""
    mantissa, exponent = f"{lr:.2e}".split("e")
    if -1 <= int(exponent) <= 5:
        return f"{float(f'{lr:.3g}'):g}"
    return f"{float(mantissa):g}e{int(exponent)}"


def run_name(arm: str, lr: float | None, seed: int | None) -> str:
    """`qk_norm_cap lr=3e-2 s1`; without what is not known of a run."""
    parts = [shown(arm), None if lr is None else f"lr={rate_text(lr)}", None if seed is None else f"s{seed}"]
    return " ".join(part for part in parts if part)


def count_text(count: int) -> str:
    """A large number to two digits: `0.21M`, `830M`, `1.5B`."""
    rounded = float(f"{count:.2g}")
    return f"{rounded / 1e9:g}B" if rounded >= 1e9 else f"{rounded / 1e6:g}M"


def duration_text(seconds: float) -> str:
    """`0.2 s`, `85 s`, `4 min`, `2 h 5 min`, `3 days 4 h`, `29 days`."""
    if seconds < 119.5:
        return f"{seconds:.1g} s" if seconds < 0.95 else f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    if minutes < 60:
        return f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    if hours < 48:
        return f"{hours} h {minutes} min" if minutes else f"{hours} h"
    days, hours = divmod(hours, 24)
    if days >= 10:
        return f"{round(seconds / 86400):,} days"
    return f"{days} days {hours} h" if hours else f"{days} days"


def hours_text(seconds: float) -> str:
    """Time of a device, which adds up: `12 s`, `4 min`, `2.1 h`, `1,230.5 h`."""
    return duration_text(seconds) if seconds < 3600 else f"{seconds / 3600:,.1f} h"


def aligned(rows: Iterable[list[str]]) -> Iterator[str]:
    """Rows of cells, all of one number, as lines of columns; control characters are shown as escapes."""
    rows = [[shown(text) for text in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        yield (" " * GAP).join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip()


def csv_text(rows: Iterable[Iterable[Any]]) -> str:
    """Rows of values as CSV; None is an empty field."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    return text.getvalue()


def masked(text: str) -> str:
    """A message of another program without passwords in addresses and the values of secret environment variables."""
    for name, value in os.environ.items():
        if SECRET.search(name) and len(value) >= LEAST_SECRET:
            text = text.replace(value, "***")
    return PASSWORD.sub("://***@", text)


def warn(text: str) -> None:
    """A line on standard error, without secrets; control characters are shown as escapes."""
    print(f"stabrun: {shown(masked(text))}", file=sys.stderr, flush=True)


def human(count: float) -> str:
    """Bytes in B, KiB, MiB or GiB."""
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} GiB"
