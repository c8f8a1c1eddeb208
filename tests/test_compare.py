"""Whether two losses are the same within a tolerance: made-up differences, the formula, and error rates."""

import math

import numpy as np
import pytest
from hypothesis import strategies as st
from losses import sampled, white
from scipy import stats

from stabrun.verdict.chart import LEAST_ROWS
from stabrun.verdict.compare import sameness
from stabrun.verdict.wording import rounded_up, sameness_line

ROWS = 400
WINDOW = 20  # 5 % of ROWS
FALL = 2.5 + 3 * np.exp(-np.arange(ROWS) / 40)


def rows(losses, every=1):
    return [{"step": every * i, "train/loss": float(loss)} for i, loss in enumerate(losses)]


def same(this, other, tolerance, **words):
    return sameness(rows(this), rows(other), tolerance, **words)


def test_a_constant_difference_is_compared_with_the_tolerance():
    assert same(FALL + 0.02, FALL, 0.0201)["same"] is True
    apart = same(FALL - 0.02, FALL, 0.0199)
    assert (apart["same"], apart["apart"], apart["within"]) == (False, pytest.approx(-0.02), pytest.approx(0.02))
    equal = same(FALL, FALL, 0)
    assert (equal["same"], equal["within"], equal["apart_step"], equal["apart"]) == (True, 0, None, None)


def test_a_difference_that_comes_and_goes_is_one():
    bump = np.where((np.arange(ROWS) >= 200) & (np.arange(ROWS) < 240), 0.1, 0.0)
    found = same(FALL + bump, FALL, 0.05)
    assert (found["same"], found["apart"]) == (False, pytest.approx(0.1))
    assert 219 <= found["apart_step"] < 240


def test_the_interval_is_students():
    this, other = white(ROWS, seed=1), white(ROWS, seed=2)
    means = (this - other).reshape(-1, WINDOW // 2).mean(axis=1)
    error = math.sqrt(np.mean(np.diff(means) ** 2) / 2) / math.sqrt(2)  # of the mean of two such means
    levels = np.convolve(this - other, np.ones(WINDOW) / WINDOW, "valid")
    within = np.abs(levels).max() + stats.t.ppf(0.975, len(means) - 1) * error
    assert same(this, other, 0.1)["within"] == pytest.approx(within)


@sampled(
    100, seed=st.integers(0, 999), noise=st.floats(1e-4, 1), offset=st.floats(-1, 1), steps=st.integers(LEAST_ROWS, 300)
)
def test_the_smallest_tolerance_that_is_shown(seed, noise, offset, steps):
    this, other = white(steps, seed, noise) + offset, white(steps, seed + 1000, noise)
    within = same(this, other, 0)["within"]
    assert same(this, other, within)["same"] is True
    assert same(this, other, 0.999 * within)["same"] is not True
    assert same(this, other, float(rounded_up(within)))["same"] is True, "the tolerance that the sentence names"
    assert float(rounded_up(within)) <= 1.1001 * within
    assert same(other, this, 0)["within"] == within
    assert same(this + 7, other + 7, 0)["within"] == pytest.approx(within)


@pytest.mark.parametrize("count", [LEAST_ROWS, 150, 1000])
def test_errors_are_rare(count):
    """In 200 pairs of runs, whose levels differ by nothing, by the tolerance, and by a multiple of it."""
    ends = {}
    for offset in (0.0, 0.05, 0.3):
        pairs = [(white(count, seed) + offset, white(count, seed + 1000)) for seed in range(200)]
        ends[offset] = [same(*pair, 0.05)["same"] for pair in pairs]
    assert ends[0.0].count(False) <= 10
    assert ends[0.05].count(True) <= 10
    assert ends[0.05].count(False) <= 10
    assert ends[0.3].count(False) >= 180
    assert count < 1000 or ends[0.0].count(True) >= 180


def test_losses_that_are_not_finite():
    lost = np.where(np.arange(ROWS) < 300, FALL, math.nan)
    found = same(lost, FALL, 0.01)
    assert (found["same"], found["apart_step"], found["apart"], found["within"]) == (False, 300, None, None)
    assert same(FALL, np.where(np.isnan(lost), math.inf, lost), 0.01)["apart_step"] == 300
    assert same(lost, np.where(np.isnan(lost), math.inf, lost), 0.01)["same"] is True
    assert same(np.full(ROWS, math.nan), np.full(ROWS, math.nan), 0.01)["same"] is None
    assert same(np.full(ROWS, 1e308), np.full(ROWS, -1e308), 0.01)["same"] is not True


def test_a_verdict_of_divergence_that_only_one_run_has():
    found = same(FALL, FALL, 0.01, one_diverged=True)
    assert (found["same"], found["within"]) == (False, 0)
    assert "one run diverged, and the other did not" in sameness_line(found)


def test_only_common_steps_count():
    this, other = rows(FALL), rows(FALL[::2], every=2)
    assert sameness(this, other, 0)["same"] is True
    few = sameness(this[: LEAST_ROWS - 1], this, 0.01)
    assert (few["same"], few["within"]) == (None, None)
    assert f"fewer than {LEAST_ROWS} common steps" in sameness_line(few)
    assert sameness(this[:LEAST_ROWS], this, 0.01)["same"] is True
    assert sameness(this, [], 0.01)["same"] is None


def test_two_digits_rounded_up():
    cases = {0.0: "0", 0.0101: "0.011", 0.2: "0.2", 0.0999: "0.1", 3.14: "3.2", 1234.0: "1.3e+03", 2e-7: "2e-07"}
    cases[math.inf] = "inf"
    assert {value: rounded_up(value) for value in cases} == cases
