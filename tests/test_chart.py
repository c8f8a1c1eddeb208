"""Control charts: trailing medians and means, windows, what was learned, and the estimate of noise."""

import statistics

import numpy as np
import pytest
from losses import falling, judged, white

from stabrun.verdict.chart import Level, trailing_means, trailing_medians
from stabrun.verdict.rule import STRICTNESS


@pytest.mark.parametrize(("count", "window"), [(30, 5), (100, 5), (1000, 51)])
def test_windows_are_5_percent_and_at_least_5(count, window):
    losses = falling(count)
    verdict = judged(losses)
    medians = [statistics.median(losses[i : i + window]) for i in range(count - window + 1)]
    assert verdict.best_loss == min(medians)
    assert verdict.final_loss == medians[-1]


@pytest.mark.parametrize("window", [1, 2, 3, 20, 25, 31, 64, 100])
def test_medians_are_those_of_sorted_windows(window):
    values = np.array(falling(100))
    expected = np.sort(np.lib.stride_tricks.sliding_window_view(values, window), axis=1)[:, window // 2]
    assert trailing_medians(values, window).tolist() == expected.tolist()


@pytest.mark.parametrize(
    ("start", "early", "floor", "learned"),
    [
        (8.0, 4.0, 3.0, 5.0),  # the whole fall
        (200.0, 4.0, 3.0, 19.7),  # a tenth of the fall, more than three times what is left
        (20.0, 4.0, 3.0, 9.0),  # three times what is left
        (20.0, 9.0, 3.0, 17.0),  # most was learned after the first window
        (1.0, 0.5, 0.0, 1.0),
        (2.0, 3.0, 3.0, 0.0),  # nothing
    ],
)
def test_what_was_learned_is_limited_by_what_is_left(start, early, floor, learned):
    losses = np.concatenate([[start], np.full(4, early + 1), np.full(5, early), np.full(40, floor)])
    assert Level(losses, 5, start).learned[-1] == pytest.approx(learned)


@pytest.mark.parametrize("window", [1, 2, 3, 20, 25, 31, 64, 100])
def test_means_are_those_of_numpy_and_survive_a_huge_value(window):
    values = np.array(falling(100))
    for spike in (None, 1e14, 1e20, 1e300):
        if spike:
            values[10] = spike
        expected = np.lib.stride_tricks.sliding_window_view(values, window).mean(-1)
        np.testing.assert_allclose(trailing_means(values, window), expected, rtol=1e-12)


def test_a_rise_does_not_inflate_its_own_noise_estimate_by_more_than_a_factor():
    strictness = STRICTNESS["standard"]
    flat = np.concatenate([[6.0, 5.0, 4.0, 3.0, 2.7], white(1000)])
    chart = Level(flat, 51, 6.0)
    # The difference of two medians of 51 normal values.
    assert chart.error[-1] == pytest.approx(1.2533 * 0.03 * (2 / 51) ** 0.5, rel=0.4)
    wild = flat.copy()
    wild[500:] += 1 + np.random.default_rng(1).normal(0, 2, 505)
    chart = Level(wild, 51, 6.0)
    assert 500 <= chart.rises(strictness)[-1][0] <= 550
    assert chart.error[-1] / chart.error[450] < 2


def test_autocorrelation_widens_the_error():
    source = np.random.default_rng(0).normal(0, 0.03, 2000)
    red = source.copy()
    for i in range(1, len(red)):
        red[i] = 0.9 * red[i - 1] + source[i]
    drop = [6.0, 5.0, 4.0, 3.0, 2.7]
    errors = [Level(np.array([*drop, *(2.5 + noise)]), 101, 6.0).error[-1] for noise in (source, red)]
    # The mean of n values of an AR(1) of innovation s has standard deviation s / (1 − ρ) / √n: ten times white's.
    assert errors[1] / errors[0] > 5
