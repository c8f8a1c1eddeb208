import math

import pytest
from conftest import tiny

from stabrun.train.schedule import learning_rate


def test_warm_up_is_linear_and_reaches_the_peak():
    config = tiny("optim.lr=0.5", "schedule.warmup_steps=10", "schedule=constant")
    assert [learning_rate(config, step) for step in range(10)] == [0.5 * (step + 1) / 10 for step in range(10)]
    assert {learning_rate(config, step) for step in range(10, 30)} == {0.5}


def test_cosine_falls_to_min_lr_at_the_last_step():
    config = tiny("optim.lr=0.5", "schedule.warmup_steps=10", "schedule.min_lr=0.1", "train.steps=50")
    rates = [learning_rate(config, step) for step in range(50)]
    for step in range(10, 50):
        angle = math.pi * (step - 9) / 40
        assert rates[step] == pytest.approx(0.1 + 0.4 * (1 + math.cos(angle)) / 2, abs=1e-15)
    assert rates[-1] == pytest.approx(0.1)
    assert rates == [*sorted(rates[:10]), *sorted(rates[10:], reverse=True)]


def test_warm_up_may_outlast_the_run():
    config = tiny("optim.lr=1.0", "schedule.warmup_steps=60", "train.steps=30")
    assert learning_rate(config, 29) == 0.5
