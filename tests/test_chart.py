"""Control charts: trailing means, windows, and the estimate of noise."""

import numpy as np
import pytest
from losses import falling, judged, white

from stabrun.verdict.chart import level, trailing_means
from stabrun.verdict.judge import STRICTNESS


def test_windows_are_5_percent_and_at_least_20():
    losses = falling(1000)
    verdict = judged(losses)
    means = [sum(losses[i : i + 50]) / 50 for i in range(951)]
    assert verdict.best_loss == pytest.approx(min(means))
    assert verdict.final_loss == pytest.approx(means[-1])
    assert trailing_means([1.0, 2.0, 3.0, 4.0], 2).tolist() == [1.5, 2.5, 3.5]


@pytest.mark.parametrize("window", [1, 2, 3, 20, 25, 31, 64, 100])
def test_means_are_those_of_numpy_and_survive_a_huge_value(window):
    values = np.array(falling(100))
    for spike in (None, 1e14, 1e20, 1e300):
        if spike:
            values[10] = spike
        expected = np.lib.stride_tricks.sliding_window_view(values, window).mean(-1)
        np.testing.assert_allclose(trailing_means(values, window), expected, rtol=1e-12)


def test_a_rise_does_not_inflate_its_own_noise_estimate():
    strictness = STRICTNESS["standard"]
    flat = np.concatenate([[6.0, 5.0, 4.0, 3.0, 2.7], white(1000)])
    chart = level(flat, 50, strictness)
    assert chart.error[-1] == pytest.approx(0.03 / 50**0.5, rel=0.4)
    wild = flat.copy()
    wild[500:] += 1 + np.random.default_rng(1).normal(0, 2, 505)
    row = level(wild, 50, strictness).rises()[-1][0]
    assert 500 <= row <= 550
    np.testing.assert_allclose(level(wild, 50, strictness).threshold[-1], chart.threshold[450], rtol=0.5)


def test_autocorrelation_widens_the_error():
    source = np.random.default_rng(0).normal(0, 0.03, 2000)
    red = source.copy()
    for i in range(1, len(red)):
        red[i] = 0.9 * red[i - 1] + source[i]
    drop = [6.0, 5.0, 4.0, 3.0, 2.7]
    errors = [
        level(np.array([*drop, *(2.5 + noise)]), 100, STRICTNESS["standard"]).error[-1] for noise in (source, red)
    ]
    # The mean of n values of an AR(1) of innovation s has standard deviation s / (1 − ρ) / √n: ten times white's.
    assert errors[1] / errors[0] > 5
