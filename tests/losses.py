"""Synthetic losses, and their verdict."""

import math
import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stabrun.verdict.judge import Judge


def folded(rows, planned=None, constant=True):
    """A judge that has taken these rows."""
    judge = Judge(planned, constant)
    for row in rows:
        judge.add(row)
    return judge


def judged(losses, planned=None, **columns):
    """The verdict on losses; further columns by key, with `__` for `/`."""
    rows = [{"step": step, "train/loss": loss, "grad/norm": 1.0, "train/lr": 0.01} for step, loss in enumerate(losses)]
    for key, values in columns.items():
        for row, value in zip(rows, values, strict=False):
            row[key.replace("__", "/")] = value
    return folded(rows, planned).conclude()


def falling(count, noise=0.03, seed=0):
    """5.5 nats falling to 2.5, with white noise."""
    source = random.Random(seed)
    return [2.5 + 3 * math.exp(-i / 40) + source.gauss(0, noise) for i in range(count)]


def rising(losses, start, by, over=40, until=None):
    """`losses` lifted from row `start` on, linearly over some rows, and back again at `until`."""
    lifted = list(losses)
    for i in range(start, until or len(losses)):
        lifted[i] += by * min(1.0, (i - start) / over)
    return lifted


def white(count, seed=0, noise=0.03):
    return 2.5 + np.random.default_rng(seed).normal(0, noise, count)


NOISE = st.fixed_dictionaries({
    "seed": st.integers(0, 999), "size": st.floats(0.001, 0.2), "ρ": st.floats(0, 0.7), "count": st.integers(120, 600),
})  # fmt: skip


def drawn(noise, shape=lambda i, n: 0.0):
    """A falling loss with AR(1) noise, plus `shape(row, rows)`."""
    source, red, losses = random.Random(noise["seed"]), 0.0, []
    for i in range(noise["count"]):
        red = noise["ρ"] * red + source.gauss(0, noise["size"])
        losses.append(2.5 + 3 * math.exp(-6 * i / noise["count"]) + red + shape(i, noise["count"]))
    return losses


def sampled(count, **strategies):
    """A property test by hypothesis with a quarter of `count` examples, and with all of them in a slow test."""

    def decorate(check):
        @pytest.mark.parametrize("examples", [count // 4, pytest.param(count, marks=pytest.mark.slow)])
        def test(examples):
            settings(max_examples=examples)(given(**strategies)(check))()

        test.__name__, test.__doc__ = check.__name__, check.__doc__
        return test

    return decorate
