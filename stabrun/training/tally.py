"""Counts over the rows of a run, for its summary."""

from dataclasses import dataclass
from typing import Any

from stabrun.record.jsonl import number
from stabrun.record.schema import Row


@dataclass
class Tally:
    """Counts updates, clipped updates, and steps skipped by fp16; None if the record does not contain them."""

    updates: int = 0
    clipped: int | None = None
    skipped: int | None = None

    def add(self, row: Row) -> None:
        skipped = row.get("scale/skipped", 0) > 0
        if "scale/skipped" in row:
            self.skipped = (self.skipped or 0) + skipped
        skipped = skipped or row.get("recovery/skipped", 0) > 0
        self.updates += not skipped
        if "grad/clipped" in row:
            self.clipped = (self.clipped or 0) + (not skipped and number(row["grad/clipped"]) > 0)

    def facts(self) -> dict[str, Any]:
        """`clipped_share` of the updates, and the number of `skipped_steps`."""
        share = None if self.clipped is None else self.clipped / max(1, self.updates)
        return {"clipped_share": share, "skipped_steps": self.skipped}
