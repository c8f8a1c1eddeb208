"""The learning rate as a pure function of the step."""

import math

from stabrun.config import Config

RAMP = "ramp"


def learning_rate(config: Config, step: int) -> float:
    """The rate of update `step` (from 0): linear warmup to `optim.lr`, then a shape that falls toward `min_lr`.

    The ramp goes the other way: linear warmup to `min_lr`, then a rise to `optim.lr`.
    """
    peak, low, warmup = config.optim.lr, config.schedule.min_lr, warmup_steps(config)
    rises = config.schedule.kind == RAMP
    if step < warmup:
        return (low if rises else peak) * (step + 1) / warmup
    return ramp(config, step) if rises else low + (peak - low) * FALLING[config.schedule.kind](config, step + 1)


def warmup_steps(config: Config) -> int:
    share = config.schedule.warmup_share
    return config.schedule.warmup_steps if share is None else round(share * config.train.steps)


def unreached(config: Config) -> str | None:
    """A sentence if warmup is longer than the run, so that the peak rate is never reached; else None."""
    steps, warmup = config.train.steps, warmup_steps(config)
    if warmup <= steps:
        return None
    last = learning_rate(config, steps - 1)
    return f"The warmup of {warmup} steps is longer than the run of {steps}: the learning rate ends at {last:.3g}."


def passed(config: Config, done: int) -> float:
    """The share of the steps after warmup that are done after `done` updates: 1 at the last step."""
    warmup = warmup_steps(config)
    return (done - warmup) / (config.train.steps - warmup)


def constant(config: Config, done: int) -> float:
    return 1.0


def cosine(config: Config, done: int) -> float:
    return 0.5 * (1 + math.cos(math.pi * passed(config, done)))


def linear(config: Config, done: int) -> float:
    return 1 - passed(config, done)


def inverse_sqrt(config: Config, done: int) -> float:
    """√(warmup / t), 1 where warmup ends (arXiv 1706.03762, section 5.3)."""
    return math.sqrt(max(1, warmup_steps(config)) / done)


def wsd(config: Config, done: int) -> float:
    """Warmup, stable, decay (arXiv 2404.06395). The decay is linear, over the last `decay_share` of the steps, or over
    all steps after warmup if those are fewer.
    """
    steps = config.train.steps
    return min(1.0, (steps - done) / min(config.schedule.decay_share * steps, steps - warmup_steps(config)))


def ramp(config: Config, step: int) -> float:
    """The rate of update `step`: by the same factor each step, from `min_lr` to `optim.lr` at the last one."""
    low, warmup = config.schedule.min_lr, warmup_steps(config)
    return low * (config.optim.lr / low) ** ((step - warmup) / max(1, config.train.steps - 1 - warmup))


FALLING = {"constant": constant, "cosine": cosine, "linear": linear, "inverse_sqrt": inverse_sqrt, "wsd": wsd}
SHAPES = (*FALLING, RAMP)
