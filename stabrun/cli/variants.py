"""`stabrun variants`: the variants by group, with definitions, sources and the keys that they set."""

import textwrap
from collections.abc import Iterator
from dataclasses import asdict
from itertools import groupby
from pathlib import Path
from typing import Any

from stabrun.config import UserError
from stabrun.text import shown
from stabrun.variants import Values, Variant, directories, file_values, typed, variants

LEAST, MOST = 40, 110  # characters of a line
INDENT = 2


def entries(config_dir: Path | None) -> list[tuple[Variant, Values]]:
    """Each variant, in the order of the listing, with the keys that it sets.

    Raises UserError if `config_dir` is missing, or if a file in it cannot be read.
    """
    if config_dir is not None and not config_dir.is_dir():
        raise UserError(f"--config-dir {config_dir}: no such directory.")
    places = directories(config_dir)
    return [(variant, file_values("variant", variant.name, places)) for variant in variants(config_dir)]


def facts(listed: list[tuple[Variant, Values]]) -> list[dict[str, Any]]:
    """The listing as plain data: name, group, definition, source, and switches as key → value."""
    return [asdict(variant) | {"switches": values} for variant, values in listed]


def lines(listed: list[tuple[Variant, Values]], columns: int) -> Iterator[str]:
    """The listing as text, at most `columns` characters wide where words allow it."""
    width = max(LEAST, min(columns, MOST))
    margin = min(max(len(shown(variant.name)) for variant, _ in listed) + 2 * INDENT, width // 2)
    for group, members in groupby(listed, key=lambda entry: entry[0].group):
        yield group
        for variant, values in members:
            head, blank = f"{'':{INDENT}}{shown(variant.name)} ", " " * margin
            if len(head) > margin:
                yield head.rstrip()
                head = blank
            switches = " ".join(typed(key, value) for key, value in values.items()) or "sets no key"
            for text in filter(None, (variant.text, switches)):
                yield from textwrap.wrap(
                    shown(text),
                    width,
                    initial_indent=head.ljust(margin),
                    subsequent_indent=blank,
                    break_long_words=False,
                    break_on_hyphens=False,
                )
                head = blank
