"""Object detectors (YOLO) record the parts of their loss, already weighted, and not their sum."""

import re
from collections.abc import Iterable, Iterator

from stabrun.foreign.cells import number
from stabrun.foreign.columns import Cells

PART = re.compile(r"\s*(train|val)/(?:box|cls|dfl|obj|seg|sem|pose|kobj|rle|angle|giou|l1)_(?:loss|om)\s*")


def parts_of(rows: list[Cells]) -> dict[str, list[str]]:
    """The columns of the parts, by `train/loss` and `val/loss`; empty if the training loss has fewer than two parts."""
    parts: dict[str, list[str]] = {}
    for name in dict.fromkeys(name for row in rows for name in row if type(name) is str):
        if found := PART.fullmatch(name):
            parts.setdefault(f"{found[1]}/loss", []).append(name)
    return parts if len(parts.get("train/loss", [])) > 1 else {}


def summed(rows: Iterable[Cells], parts: dict[str, list[str]]) -> Iterator[Cells]:
    """The rows with the sum of the parts, where all of them are numbers."""
    for row in rows:
        sums = {}
        for total, names in parts.items():
            try:
                values = [number(row.get(name)) for name in names]
            except ValueError:
                continue
            if None not in values:
                sums[total] = sum(value for value in values if value is not None)
        yield row | sums
