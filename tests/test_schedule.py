import math

import numpy as np
import pytest
from helpers import configured, tiny

from stabrun.config import UserError
from stabrun.training.schedule import learning_rate, unreached


def test_warm_up_is_linear_and_reaches_the_peak():
    config = tiny("optim.lr=0.5", "schedule.warmup_steps=10", "schedule=constant")
    assert [learning_rate(config, step) for step in range(10)] == [0.5 * (step + 1) / 10 for step in range(10)]
    assert {learning_rate(config, step) for step in range(10, 30)} == {0.5}


def test_warm_up_may_be_longer_than_the_run():
    config = tiny("optim.lr=1.0", "schedule.warmup_steps=60", "train.steps=30")
    assert learning_rate(config, 29) == 0.5


STEPS, WARMUP, PEAK, LOW = 50, 10, 0.5, 0.1
AFTER = {  # the factor of update t (from 1) after warmup, written out
    "constant": lambda t: 1.0,
    "cosine": lambda t: (1 + math.cos(math.pi * (t - WARMUP) / (STEPS - WARMUP))) / 2,
    "linear": lambda t: (STEPS - t) / (STEPS - WARMUP),
    "inverse_sqrt": lambda t: (WARMUP / t) ** 0.5,
    "wsd": lambda t: 1.0 if t <= 30 else (STEPS - t) / 20,
}


@pytest.mark.parametrize("kind", AFTER)
@pytest.mark.parametrize("warmup", ["schedule.warmup_steps=10", "schedule.warmup_share=0.2"])
def test_each_schedule_is_its_formula(kind, warmup):
    words = f"schedule={kind}", f"schedule.min_lr={LOW}", f"optim.lr={PEAK}", f"train.steps={STEPS}"
    config = tiny(*words, warmup, "schedule.decay_share=0.4")
    for t in range(1, STEPS + 1):
        expected = PEAK * t / WARMUP if t <= WARMUP else LOW + (PEAK - LOW) * AFTER[kind](t)
        assert learning_rate(config, t - 1) == pytest.approx(expected, rel=1e-12), t


@pytest.mark.parametrize("kind", AFTER)
def test_no_warm_up_starts_at_the_peak_or_below(kind):
    config = tiny(f"schedule={kind}", "schedule.warmup_steps=0", "optim.lr=0.5", "train.steps=30")
    rates = [learning_rate(config, step) for step in range(30)]
    assert 0.45 < rates[0] <= 0.5
    assert rates == sorted(rates, reverse=True)


def test_wsd_falls_linearly_over_the_steps_after_the_warm_up():
    config = tiny(
        "schedule=wsd", "schedule.warmup_share=0.9", "schedule.decay_share=0.5", "optim.lr=1", "train.steps=40"
    )
    rates = [learning_rate(config, step) for step in range(36, 40)]
    assert rates == pytest.approx([0.75, 0.5, 0.25, 0.0])


@pytest.mark.parametrize(("warmup", "steps"), [(0, 50), (10, 50), (0, 1), (3, 4)])
def test_a_ramp_rises_by_the_same_factor_from_the_lowest_rate_to_the_peak(warmup, steps):
    words = f"schedule.warmup_steps={warmup}", f"train.steps={steps}", f"optim.lr={PEAK}", f"schedule.min_lr={LOW}"
    config = tiny("schedule=ramp", *words)
    rates = [learning_rate(config, step) for step in range(steps)]
    rise = np.geomspace(LOW, PEAK, steps - warmup)
    assert rates == pytest.approx([*(LOW * (step + 1) / warmup for step in range(warmup)), *rise], rel=1e-12)


def test_the_ramp_of_the_group_needs_no_other_key_and_cannot_rise_from_zero():
    config = configured("schedule=ramp")
    assert (learning_rate(config, 0), learning_rate(config, 499)) == (1e-4, pytest.approx(1e-2))
    with pytest.raises(UserError, match=r"schedule\.min_lr=0: .* above 0"):
        tiny("schedule.kind=ramp")


@pytest.mark.parametrize(
    ("warmup", "sentence"),
    [(60, "The warmup of 60 steps is longer than the run of 30: the learning rate ends at 0.5."), (30, None)],
)
def test_a_peak_that_is_never_reached_is_reported(warmup, sentence):
    assert unreached(tiny("optim.lr=1.0", f"schedule.warmup_steps={warmup}", "train.steps=30")) == sentence
