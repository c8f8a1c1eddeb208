"""Numbers as people read them."""

import pytest

from stabrun.text import duration_text, hours_text, rate_text, run_name


@pytest.mark.parametrize(
    ("rate", "text"),
    [
        (0.03, "3e-2"), (0.01, "1e-2"), (0.0015, "1.5e-3"), (1e-4, "1e-4"), (0.09996, "0.1"), (0.1, "0.1"),
        (0.15, "0.15"), (0.4, "0.4"), (1.0, "1"), (2.5, "2.5"), (0.17677, "0.177"), (0.015625, "1.56e-2"),
        (1234.0, "1230"), (2e8, "2e8"), (9.999e-3, "1e-2"),
    ],
)  # fmt: skip
def test_rates_read_well_and_mean_what_they_say(rate, text):
    assert rate_text(rate) == text
    assert float(text) == pytest.approx(rate, rel=5e-3)
    assert run_name("qk_norm_cap", rate, 1) == f"qk_norm_cap lr={text} s1"


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.02, "0.02 s"), (0.99, "1 s"), (85, "85 s"), (119.6, "2 min"), (3599, "1 h"), (7500, "2 h 5 min"),
     (48 * 3600, "2 days"), (76 * 3600, "3 days 4 h"), (695.4 * 3600, "29 days"), (4e9 * 3600, "166,666,667 days")],
)  # fmt: skip
def test_durations(seconds, text):
    assert duration_text(seconds) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0 s"), (90, "90 s"), (3500, "58 min"), (3600, "1.0 h"), (2.5e6, "694.4 h"), (9e6, "2,500.0 h")]
)  # fmt: skip
def test_time_of_devices(seconds, text):
    assert hours_text(seconds) == text
