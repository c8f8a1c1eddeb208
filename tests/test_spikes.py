"""Spikes: their number, steps, heights and scores."""

import numpy as np
import pytest
from losses import falling, judged, white

from stabrun.verdict.spikes import spike_rate, spike_score


def test_scores_follow_their_definitions():
    losses = white(3000, noise=0.1)
    losses[[1500, 1700, 2600]] += 3.0
    high = [losses[i] >= losses[i - 1000 : i].mean() + 7 * losses[i - 1000 : i].std() for i in range(1000, 3000)]
    assert sum(high) == 3
    assert spike_score(losses) == pytest.approx(100 * 3 / 2000)
    above = [losses[i] > np.median(losses[max(0, i - 200) : i + 1]) + 0.1 for i in range(200, 3000)]
    assert spike_rate(losses) == pytest.approx(1e4 * sum(above) / len(above), rel=1e-9)
    assert spike_score(losses[:1500]) is None
    assert spike_rate(losses[:200]) is None


def test_number_steps_and_heights_of_spikes():
    losses = falling(600)
    for row in (200, 201, 300):
        losses[row] += 1.5
    spikes = judged(losses).spikes
    assert spikes["count"] == 2
    assert [step for step, _ in spikes["list"]] == [200, 300]
    assert all(1.3 < size < 1.7 for _, size in spikes["list"])
