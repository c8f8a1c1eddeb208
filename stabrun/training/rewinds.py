"""`train.recovery=rewind`: when a run goes back to an earlier state, to which, and what is different afterwards."""

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass

import torch

from stabrun.config import Config
from stabrun.record.jsonl import number
from stabrun.record.schema import Row
from stabrun.training.outliers import LEAST, WINDOW, highest_loss

LEVEL = 5  # rows whose median is a level: a single row is no spike
POINTS = 3  # states that are kept to go back to, the newest ones


@dataclass(frozen=True)
class Rewinds:
    """What was rewound before a step. It decides the rest of the run, and is part of each checkpoint.

    `count` is the number of rewinds, `batches` that of the batches that were passed over.
    """

    count: int = 0
    batches: int = 0

    def back(self, to: int, done: int) -> "Rewinds":
        """After one more rewind, from `done` updates to the state after `to`: their batches are passed over.

        Each rewind passes over twice as many as that before would: a bad stretch of data may be long.
        """
        return Rewinds(self.count + 1, self.batches + (done - to) * 2**self.count)


def allowed(config: Config, rewinds: Rewinds) -> bool:
    """Whether the run may still be rewound."""
    return config.train.recovery == "rewind" and rewinds.count < config.train.recovery_limit


def points(config: Config, steps: Iterable[int]) -> list[int]:
    """Those of the steps of checkpoints whose states the run may go back to, the newest first.

    They depend on keys that decide the result only, not on how often checkpoints are written.
    """
    if config.train.recovery != "rewind":
        return []
    return sorted((step for step in steps if step % config.train.recovery_every == 0), reverse=True)[:POINTS]


def target(points: list[int], healthy: float | None) -> int:
    """The newest point that holds no update after the last healthy step; the oldest one if all do."""
    return next((point for point in points if healthy is not None and point <= healthy + 1), points[-1])


class Levels:
    """Watches the losses for a spike: a level above `highest_loss` of the rows before."""

    def __init__(self, sigmas: float) -> None:
        self.sigmas, self.losses = sigmas, deque[float](maxlen=WINDOW + LEVEL)

    def add(self, row: Row) -> None:
        self.losses.append(number(row["train/loss"]))

    @property
    def spike(self) -> bool:
        losses = torch.tensor(self.losses, dtype=torch.float64)
        if len(losses) < LEAST + LEVEL:
            return False
        return bool(losses[-LEVEL:].median() > highest_loss(losses[:-LEVEL], self.sigmas))
