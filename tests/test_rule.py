"""The rule on made-up curves of every kind, against what a careful reading says of the kind."""

import math

import made_up_curves
import numpy as np
import pytest
from hypothesis import assume
from hypothesis import strategies as st
from losses import falling, folded, judged, rising, sampled
from made_up_curves import KINDS, drawn, returning
from scipy import stats

from stabrun.verdict.direction import correlation, direction, is_lower
from stabrun.verdict.restarts import schedule_restarts, whole_restarts
from stabrun.verdict.rule import STRICTNESS

NAME, SEED = st.sampled_from(sorted(KINDS)), st.integers(0, 10**6)


@sampled(200, name=NAME, seed=SEED)
def test_a_curve_of_each_kind_is_called_diverged_or_not(name, seed):
    allowed = KINDS[name].verdicts
    diverged = drawn(name, seed).verdict().verdict == "diverged"
    assert diverged <= ("diverged" in allowed)
    assert diverged >= (set(allowed) == {"diverged"})


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("count", [20, pytest.param(200, marks=pytest.mark.slow)])
def test_the_verdict_is_what_a_careful_reading_says(name, count):
    agree = [drawn(name, seed).verdict().verdict in KINDS[name].verdicts for seed in range(count)]
    assert sum(agree) >= 0.97 * count


@sampled(60, name=NAME, seed=SEED, scale=st.sampled_from([2.0**-10, 0.5, 64.0]))
def test_the_unit_of_the_loss_changes_nothing(name, seed, scale):
    curve = drawn(name, seed)
    validations = {row: scale * loss for row, loss in curve.validations.items()}
    scaled = made_up_curves.Curve(scale * curve.losses, curve.rates, validations).verdict()
    one = curve.verdict()
    for field in ("verdict", "reason", "direction", "first_bad_step", "last_healthy_step", "restarts", "lost_steps"):
        assert getattr(scaled, field) == getattr(one, field)
    assert scaled.best_loss == scale * one.best_loss


@sampled(60, name=NAME, seed=SEED)
def test_a_stricter_rule_finds_more_divergences(name, seed):
    judge = drawn(name, seed).judge()
    diverged = [judge.verdict(strictness).verdict == "diverged" for strictness in STRICTNESS]
    assert diverged == sorted(diverged)


@sampled(40, seed=SEED)
def test_the_runaway_before_a_nan_is_dated(seed):
    curve = drawn("nan after a runaway", seed)
    verdict, finite = curve.verdict(), curve.losses[np.isfinite(curve.losses)]
    risen = int(np.flatnonzero(finite <= finite[0])[-1]) + 1
    assert verdict.first_bad_step <= risen + max(5, len(curve.losses) // 20)
    assert verdict.last_healthy_step < verdict.first_bad_step
    assert verdict.certain_step == len(finite)


@sampled(40, seed=SEED)
def test_a_run_above_its_start_is_dated_to_the_first_row_above_it(seed):
    verdict = drawn("far above its start with noise", seed).verdict()
    assert (verdict.reason, verdict.first_bad_step, verdict.last_healthy_step) == ("above_start", 1, 0)


@sampled(20, seed=SEED)
def test_a_second_run_in_the_record_is_judged_alone(seed):
    both = drawn("several runs", seed)
    second = both.losses[len(both.losses) // 2 :]
    halfway = int(np.argmax(second < (second[0] + second[-1]) / 2))
    assume(halfway >= 5)  # a faster fall is not told from a spike
    verdict, alone = both.verdict(), judged(second)
    assert verdict.restarts == [len(second)]
    for field in ("verdict", "reason", "init_loss", "best_loss", "final_loss"):
        assert getattr(verdict, field) == getattr(alone, field)


def test_a_spike_and_a_divergence_are_no_second_run():
    losses = falling(400)
    losses[200] = losses[0]
    assert whole_restarts(np.array(losses)) == []
    assert whole_restarts(np.array(rising(falling(400), 200, 3.0, over=1))) == []
    assert whole_restarts(np.array([])) == []


def test_restarts_of_a_schedule():
    cosine = [0.1 * (1 + math.cos(math.pi * (i % 100) / 100)) / 2 for i in range(300)]
    warmup = [0.1 * min(1, (i + 1) / 20) * (1 - i / 300) for i in range(300)]
    assert schedule_restarts(np.array(cosine)) == [100, 200]
    assert schedule_restarts(np.array(warmup)) == []
    assert schedule_restarts(np.array([0.1] * 50)) == []
    assert schedule_restarts(np.array([math.nan] * 50)) == []
    gaps = np.where(np.arange(300) % 10 == 0, cosine, math.nan)
    assert schedule_restarts(gaps) == [100, 200]


def test_a_restart_of_the_schedule_excuses_a_rise_that_does_not_go_on():
    rows = np.arange(400)
    losses = np.array(rising(falling(400), 200, 0.5, over=1))
    rates = np.where(rows < 200, 0.1 - rows * 4e-4, 0.1)
    assert judged(losses).reason == "runaway"
    verdict = judged(losses, train__lr=rates)
    assert (verdict.verdict, verdict.reason, verdict.restarts) == ("undecided", "restarted", [200])
    assert judged(losses + 0.01 * np.maximum(0, rows - 200), train__lr=rates).verdict == "diverged"
    assert judged(losses + 9.0 * (rows >= 200), train__lr=rates).verdict == "diverged", "above its start"


def test_steps_that_were_lost():
    verdict = judged(rising(falling(400), 150, 1.0, over=1, until=250))
    assert verdict.lost_steps == pytest.approx(100, abs=30)
    wild = [5.0] * 5 + [50.0 + i % 7 for i in range(200)] + falling(195)
    verdict = judged(wild)
    assert (verdict.verdict, verdict.reason) == ("recovered", "came_back")
    assert verdict.lost_steps == pytest.approx(200, abs=30)


def test_a_rise_of_a_loss_that_has_nothing_left_means_nothing():
    fell = [2.4 * math.exp(-i / 5) + 1e-5 for i in range(100)]
    assert judged(fell + [1e-4] * 100).verdict == "converged"
    assert judged(fell + [0.5] * 100).verdict == "diverged"


@pytest.mark.parametrize(("last", "reason"), [(2, "fell"), (4, "rising"), (20, "runaway")])
def test_a_rise_shorter_than_a_window_is_not_yet_a_divergence(last, reason):
    losses = [*falling(60), *[4.0] * last]
    assert judged(losses).reason == reason


@pytest.mark.parametrize("count", [300, pytest.param(10_000, marks=pytest.mark.slow)])
def test_no_certain_divergence_comes_back(count):
    for seed in range(count):
        curve = returning(seed)
        judge = curve.judge(planned=len(curve.losses))
        if judge.certain is not None:
            judge.certain = None
            assert judge.verdict().verdict == "diverged", seed


@pytest.mark.parametrize("seed", range(20))
def test_rank_tests_are_those_of_scipy(seed):
    source = np.random.default_rng(seed)
    values = np.round(source.normal(0, 1, 50 + seed) + 0.03 * seed * np.arange(50 + seed) / 10, seed % 3)
    assert correlation(values) == pytest.approx(stats.spearmanr(values, np.arange(len(values))).statistic)
    for shift in (0.0, 1.0):
        chance = stats.mannwhitneyu(
            values[:20] + shift, values[20:], alternative="greater", method="asymptotic", use_continuity=False
        ).pvalue
        # The normal approximation without the correction for ties.
        assert is_lower(values[:20] + shift, values[20:]) == (chance < stats.norm.sf(3.0)) or 1e-4 < chance < 5e-3


def test_the_direction_of_batches_that_alternate():
    source = np.random.default_rng(0)
    hard = 3.0 * (source.random(120) < 0.4)
    assert direction(hard + source.normal(0, 0.05, 120)) == "flat"
    assert direction(hard + source.normal(0, 0.05, 120) - np.arange(120) / 150) == "falling"
    assert direction(np.array([1.0])) == direction(np.ones(50)) == "flat"
    assert direction(np.arange(30.0)) == "rising"


def test_a_loss_that_starts_at_zero_is_judged_from_the_first_loss_that_is_not():
    assert judged([0.0, 0.0, *falling(200)]).verdict == "converged"
    assert judged([0.0, *rising(falling(200), 100, 2.0)]).first_bad_step > 100
    policy = [0.0, *(1e-3 * (i + 1) / 200 + 1e-5 * math.sin(i) for i in range(200))]
    assert (judged(policy).verdict, judged(policy).reason) == ("undecided", "around_zero")
    signed = [-0.01 + 0.015 * i / 200 + 1e-4 * math.sin(i) for i in range(200)]
    assert (judged(signed).verdict, judged(signed).reason) == ("undecided", "around_zero")
    assert judged([0.0] * 100).reason == "no_learning"


def test_validations_that_only_get_worse_are_a_rise():
    rows = [{"step": i, "train/loss": 3.7 + 0.1 * math.sin(i * i)} for i in range(300)]
    for i, loss in ((80, 3.56), (160, 3.57), (240, 3.6)):
        rows[i]["val/loss"] = loss
    assert folded(rows).conclude().reason == "rising"
    rows[240]["val/loss"] = 3.55
    assert folded(rows).conclude().reason == "no_learning"


def test_an_objective_that_changes_at_the_start_is_named():
    """The training loss rises from its first value on, and the validation loss falls all along."""
    rows = [{"step": i, "train/loss": 1e-3 * (1 + i) + 1e-4 * math.sin(i * i)} for i in range(300)]
    for i in range(0, 300, 10):
        rows[i]["val/loss"] = 0.01 + 0.02 * math.exp(-i / 50)
    verdict = folded(rows).conclude()
    assert (verdict.verdict, verdict.reason) == ("undecided", "objective_changed")


def test_a_late_peak_that_the_loss_has_left_is_coming_back():
    """The loss rises for half of the rise and falls for the other."""
    bump = [max(0.0, 1.5 - abs(i - 350) / 40) for i in range(400)]
    losses = [loss + up for loss, up in zip(falling(400, noise=0.01), bump, strict=True)]
    assert judged(losses[:350]).reason == "runaway"
    assert judged(losses[:385]).reason == "coming_back"


@sampled(40, seed=SEED)
def test_a_run_that_is_coming_back_is_said_to_fall(seed):
    for name in ("restart of the schedule", "a long way back"):
        verdict = drawn(name, seed).verdict()
        assert verdict.direction == "falling" or verdict.reason == "came_back"


def restarts_row_by_row(losses):
    """The same as `whole_restarts`, each row by itself."""
    found = []
    for row in range(20, len(losses)):
        before = float(np.median(losses[row - 5 : row]))
        half = int(np.argmax(losses[:row] < (losses[0] + before) / 2))
        rows = max(20, 2 * half)
        again = losses[row : row + rows]
        if half == 0 or len(again) < rows or losses[row] <= losses[row - 1] or (found and row < found[-1] + rows):
            continue
        jumped = again[0] - before >= 0.75 * (losses[0] - before)
        near = np.median(np.abs(again - losses[:rows])) <= 0.25 * np.median(np.abs(again - before))
        lowest = min(np.median(losses[i : i + 5]) for i in range(row, len(losses) - 4))
        if jumped and near and lowest - before < 0.25 * (losses[0] - before):
            found.append(row)
    return found


@sampled(60, name=NAME, seed=SEED)
def test_whole_restarts_are_those_found_row_by_row(name, seed):
    losses = drawn(name, seed).losses
    losses = losses[np.isfinite(losses)]
    assert whole_restarts(losses) == restarts_row_by_row(losses)
