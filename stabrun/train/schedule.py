"""The learning rate as a pure function of the step."""

import math

from stabrun.config import Config


def learning_rate(config: Config, step: int) -> float:
    """The rate of update `step` (from 0): linear warm-up to `optim.lr`, then constant, or a cosine to `min_lr`."""
    peak, schedule = config.optim.lr, config.schedule
    if step < schedule.warmup_steps:
        return peak * (step + 1) / schedule.warmup_steps
    after = config.train.steps - schedule.warmup_steps
    share = (step + 1 - schedule.warmup_steps) / after
    return schedule.min_lr + (peak - schedule.min_lr) * SHAPES[schedule.kind](share)


def constant(share: float) -> float:
    return 1.0


def cosine(share: float) -> float:
    return 0.5 * (1 + math.cos(math.pi * share))


SHAPES = {"constant": constant, "cosine": cosine}
