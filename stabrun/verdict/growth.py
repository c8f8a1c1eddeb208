"""How much the output norm of each site has grown since it was first observed."""

import math
from typing import NamedTuple

from stabrun.record.metrics import by_site
from stabrun.record.schema import Row

OUTPUT = "norm/out/"


class Grown(NamedTuple):
    """A site, its first output norm and its last one. A norm that is not finite has grown without bound."""

    site: str
    first: float
    now: float

    @property
    def factor(self) -> float:
        return self.now / self.first if math.isfinite(self.now) else math.inf


class Growth:
    """Takes the rows of a run in order."""

    def __init__(self) -> None:
        self.first: dict[str, float] = {}
        self.row: Row = {}  # the last one with norms

    def add(self, row: Row) -> None:
        if any(key.startswith(OUTPUT) for key in row):
            self.row = row
            self.first = self.first or by_site(row, OUTPUT)

    def most(self, count: int) -> list[Grown]:
        """At most `count` sites, those that have grown most first; none whose first norm is 0 or not finite."""
        now = by_site(self.row, OUTPUT)
        self.first = now | self.first
        sites = [Grown(site, self.first[site], norm) for site, norm in now.items()]
        known = [site for site in sites if site.first and math.isfinite(site.first)]
        return sorted(known, key=lambda site: -site.factor)[:count]
