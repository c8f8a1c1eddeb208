"""Rows brought to one number a column: tables in long form, and the parts of a loss."""

from collections.abc import Iterable
from dataclasses import dataclass

from stabrun.foreign.columns import Cells
from stabrun.foreign.detectors import parts_of, summed
from stabrun.foreign.melted import melted, pivoted


@dataclass(frozen=True)
class Shape:
    """What the rows of a record need before its columns are chosen."""

    long: tuple[str, str] | None
    parts: dict[str, list[str]]

    def rows(self, found: Iterable[Cells]) -> Iterable[Cells]:
        """The rows in the common form."""
        if self.long:
            found = pivoted(found, *self.long)
        return summed(found, self.parts) if self.parts else found

    def notes(self, loss: str | None) -> list[str]:
        """What is said of the column of the loss."""
        names = ", ".join(name.strip() for name in self.parts.get("train/loss", []))
        return [f"the loss is the sum of {names}"] if names and loss == "train/loss" else []


def shape_of(sample: list[Cells], loss: str | None) -> Shape:
    """The shape of these rows; `loss` is the column that the user chose."""
    long = melted(sample)
    wide = list(pivoted(sample, *long)) if long else sample
    return Shape(long, parts_of(wide) if loss is None else {})
