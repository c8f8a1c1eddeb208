"""Which of the processes of a run this one is. No torch, whose import takes seconds."""

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Self

from stabrun.config import Config, UserError

GIVEN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True)
class Place:
    """Rank `number` of `count`; rank `local` of the `neighbors` on this machine. `started`: by torch's launcher."""

    number: int = 0
    count: int = 1
    local: int = 0
    neighbors: int = 1
    started: bool = False

    @classmethod
    def here(cls, environment: Mapping[str, str] = os.environ) -> Self:
        """The place that torch's launcher (torchrun, too) gave this process; the only one if it started none."""
        if not all(environment.get(name) for name in GIVEN):
            return cls()
        number, count, local, neighbors = (int(environment[name]) for name in GIVEN[:4])
        return cls(number, count, local, neighbors, started=True)

    @property
    def first(self) -> bool:
        """Whether this process keeps the record of the run."""
        return self.number == 0

    def of_rank(self, config: Config) -> Config:
        """The configuration of this process: with the number of ranks that were started, and one tracker in all.

        Raises UserError if `train.ranks` asks for another number.
        """
        train, tracker = config.train, config.tracker
        if self.started and train.ranks not in (1, self.count):
            raise UserError(f"train.ranks={train.ranks}: torchrun started {self.count}; leave out train.ranks.")
        return replace(
            config,
            train=replace(train, ranks=self.count) if self.started else train,
            tracker=tracker if self.first else replace(tracker, name="none"),
        )
