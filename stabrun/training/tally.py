"""What is counted over a run's rows for its summary."""

from dataclasses import dataclass
from typing import Any

from stabrun.record.jsonl import number


@dataclass
class Tally:
    """Steps that were clipped, and steps that fp16 left out."""

    updates: int = 0
    clipped: int | None = None
    skipped: int | None = None

    def add(self, row: dict[str, Any]) -> None:
        left_out = row.get("scale/skipped", 0) > 0
        if "scale/skipped" in row:
            self.skipped = (self.skipped or 0) + left_out
        self.updates += not left_out
        if "grad/clipped" in row:
            self.clipped = (self.clipped or 0) + (not left_out and number(row["grad/clipped"]) > 0)

    def facts(self) -> dict[str, Any]:
        """`clipped_share` of the updates and the number of `skipped_steps`; None where nothing is clipped or scaled."""
        share = None if self.clipped is None else self.clipped / max(1, self.updates)
        return {"clipped_share": share, "skipped_steps": self.skipped}
