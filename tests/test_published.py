"""The script of docs/published.md: what it computes from the runs of a study, against formulas."""

from types import SimpleNamespace

import numpy as np
import published
import pytest
from pandas import Series
from studies import trained_alone


def ended(loss=1.0, spikes=0):
    return SimpleNamespace(summary={"final_loss": loss, "spikes": {"count": spikes}}, verdict="converged")


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    directory = tmp_path_factory.mktemp("published")
    trained_alone(
        directory, "study.variants=[qk_norm]", "study.lrs=[1e-3]", "study.seeds=2", "optim.z_loss=1e-12,0.1",
        "train.steps=6",
    )  # fmt: skip
    return published.runs_of(directory / "study")


def test_log_z_does_not_depend_on_the_coefficient_that_it_is_recorded_with(runs):
    weak, strong = (runs[f"qk_norm z_loss={weight}", 1e-3] for weight in ("1e-12", "0.1"))
    for one, other in zip(weak, strong, strict=True):
        assert published.log_z(one)[0] == pytest.approx(published.log_z(other)[0], rel=1e-5)
    assert published.log_z(weak[0])[0] != published.log_z(weak[1])[0]  # two seeds


def test_the_largest_logit_is_that_of_all_layers(runs):
    (run, _) = runs["qk_norm z_loss=0.1", 1e-3]
    recorded = {row["step"]: max(row["attn/max_logit"]) for row in run.files.rows() if "attn/max_logit" in row}
    assert published.max_logit(run).to_dict() == recorded


def test_the_median_is_of_the_last_steps():
    assert published.last_median(Series(np.arange(300.0))) == np.median(np.arange(200, 300))
    assert published.last_median(Series([1.0, 2.0, 9.0], index=[0, 195, 290])) == 5.5


def test_the_interval_of_a_difference_is_students():
    text = published.lowered([ended(3.0), ended(2.5), ended(2.9)], [ended(2.0), ended(2.0), ended(2.0)])
    half = 4.302653 * np.std([1.0, 0.5, 0.9], ddof=1) / 3**0.5
    assert text == f"0.800 ({0.8 - half:.3f}–{0.8 + half:.3f})"


def test_spikes_are_compared_by_a_sign_test(monkeypatch, tmp_path):
    runs = {
        ("no_clip+high_beta2", 0.1): [ended(spikes=count) for count in (3, 2, 1, 2, 5, 1, 0)],
        ("stable_adamw+high_beta2", 0.1): [ended(spikes=0) for _ in range(7)],
    }
    monkeypatch.setattr(published, "runs_of", lambda directory: runs)
    *_, last = published.spikes(tmp_path)
    assert last[2] == f"fewer with the latter in 6, more in 0 pairs: p = {2 * 0.5**6:.3f}"


def test_a_simulated_grid_has_both_outcomes_and_an_interval_that_covers_a_sharp_edge():
    random = np.random.default_rng(1)
    for truth in (-4.0, -2.0, -0.5):
        found = published.simulated(truth, 0.05, random)
        assert found.outcomes == {True, False}
        assert published.covers(found.rate_at(0.5), truth)
