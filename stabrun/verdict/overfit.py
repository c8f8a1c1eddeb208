"""Overfitting: the validation loss rises while the training loss still falls. Reported separately."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

SHARE = 0.03  # of what was learned, by validation loss; the same share as in the standard verdict


@dataclass(frozen=True)
class Overfit:
    """The validation loss stayed above its lowest (at `best_step`) from `step` on, and ended `rise` nats above it."""

    step: float
    best_step: float
    rise: float


def overfit(steps: Sequence[float], val: Sequence[float], train: Sequence[float], init: float) -> Overfit | None:
    """Whether a run overfits, from its validations: `val` and the training loss's level `train`, at each of `steps`.

    `init` is the loss before learning. At least two validations, up to the last, must be above the lowest one by a
    share of what was learned, and the training loss must not have risen since.
    """
    losses, levels = np.asarray(val, dtype=float), np.asarray(train, dtype=float)
    if len(losses) < 3 or losses.min() >= init or not (np.isfinite(losses).all() and np.isfinite(levels).all()):
        return None
    best = int(np.argmin(losses))
    limit = losses[best] + SHARE * (init - float(losses[best]))
    above = int(np.flatnonzero(losses <= limit)[-1]) + 1
    if len(losses) - above < 2 or levels[-1] > levels[best]:
        return None
    return Overfit(steps[above], steps[best], float(losses[-1] - losses[best]))
