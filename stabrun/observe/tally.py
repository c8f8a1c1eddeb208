"""What is counted over a run's rows for its summary."""

from dataclasses import dataclass
from typing import Any


@dataclass
class Tally:
    """Steps that were clipped, and steps that fp16 left out."""

    rows: int = 0
    clipped: int | None = None
    skipped: int | None = None

    def add(self, row: dict[str, Any]) -> None:
        self.rows += 1
        if "grad/clipped" in row:
            self.clipped = (self.clipped or 0) + (row["grad/clipped"] > 0)
        if "scale/skipped" in row:
            self.skipped = (self.skipped or 0) + (row["scale/skipped"] > 0)

    def facts(self) -> dict[str, Any]:
        """`clipped_share` of the steps and the number of `skipped_steps`; None where nothing is clipped or scaled."""
        share = None if self.clipped is None else self.clipped / self.rows
        return {"clipped_share": share, "skipped_steps": self.skipped}
