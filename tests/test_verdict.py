"""The verdict on synthetic losses."""

import dataclasses
import json
import math
import random
import subprocess
import sys

import numpy as np
import pytest
from helpers import tiny
from hypothesis import strategies as st
from losses import NOISE, drawn, falling, folded, judged, rising, sampled

from stabrun.record.run_dir import RunDir
from stabrun.training.run import train
from stabrun.verdict.chart import LEAST_ROWS
from stabrun.verdict.judge import Judge


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("noise", [0.0, 0.03, 0.1])
def test_a_falling_loss_converges(seed, noise):
    assert judged(falling(400, noise, seed)).verdict == "converged"


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("by", [0.3, 1.0, 5.0])
def test_a_loss_that_rises_and_stays_has_diverged(seed, by):
    verdict = judged(rising(falling(400, seed=seed), 200, by))
    assert verdict.verdict == "diverged"
    assert verdict.reason == "runaway" or by == 0.3, "in noise a small rise can look slow"
    assert 200 < verdict.first_bad_step < 260
    assert verdict.direction in ("rising", "flat")
    assert 150 < verdict.last_healthy_step <= verdict.first_bad_step
    assert math.isfinite(verdict.final_loss)


def test_a_loss_that_comes_back_has_recovered():
    verdict = judged(rising(falling(400), 150, 1.0, until=250))
    assert verdict.verdict == "recovered"
    assert 150 < verdict.first_bad_step < 200
    assert verdict.scar == pytest.approx(verdict.final_loss - verdict.best_loss)


@pytest.mark.parametrize("bad", [math.nan, math.inf, "nan", "inf"])
def test_a_loss_that_is_not_finite_has_diverged(bad):
    losses = falling(100)
    losses[60] = bad
    verdict = judged(losses)
    assert (verdict.verdict, verdict.reason, verdict.first_bad_step) == ("diverged", "nonfinite_loss", 60)
    assert judged([bad]).verdict == "diverged"
    first = folded([{"step": 650, "train/loss": bad}]).verdict()
    assert (first.first_bad_step, first.certain_step) == (650, 650)


def test_a_gradient_that_is_not_finite_has_diverged():
    judge = Judge()
    for step, loss in enumerate(falling(50)):
        judge.add({"step": step, "train/loss": loss, "grad/norm": "inf" if step == 40 else 1.0})
    assert (judge.verdict().reason, judge.verdict().first_bad_step) == ("nonfinite_grad", 40)
    assert judge.over


@pytest.mark.parametrize("bad", ["nan", math.inf])
def test_a_validation_loss_that_is_not_finite_has_diverged(bad):
    """As of a run whose last update was too large: no training loss tells."""
    losses, one, other = falling(50), Judge(), Judge()
    for step, loss in enumerate(losses):
        one.add({"step": step, "train/loss": loss} | {30: {"val/loss": 2.0}, 49: {"val/loss": bad}}.get(step, {}))
    columns = np.arange(50.0), np.array(losses), np.full(50, np.nan), np.full(50, -1.0)
    other.add_columns(*columns, validations=[(30, 2.0), (49, float(bad))])
    verdict = one.conclude()
    assert (verdict.verdict, verdict.reason, verdict.first_bad_step) == ("diverged", "nonfinite_val", 49)
    assert verdict.best_val_loss == 2.0
    assert repr(other.conclude()) == repr(verdict)


def test_not_learning_is_not_diverging():
    verdict = judged([5.5 + random.Random(i).gauss(0, 0.01) for i in range(300)])
    assert (verdict.verdict, verdict.reason) == ("undecided", "no_learning")


def test_a_short_record_is_undecided():
    assert judged(falling(LEAST_ROWS - 1)).reason == "too_short"
    assert judged(falling(LEAST_ROWS)).reason != "too_short"
    assert Judge().verdict().reason == "too_short"


def test_a_single_spike_does_not_affect_the_verdict():
    losses = falling(400)
    losses[200] += 1.5
    assert judged(losses).verdict == "converged"


def test_verdict_during_training_is_that_of_the_record(tmp_path):
    summary = train(tiny(f"run_dir={tmp_path / 'run'}", "train.steps=60", "optim.lr=0.5", "schedule=constant"))
    verdict = dataclasses.asdict(folded(RunDir(tmp_path / "run").rows()).conclude(60))
    assert {field: summary[field] for field in verdict} == json.loads(json.dumps(verdict))


def test_a_run_cut_short_is_not_called_stable():
    losses = falling(400)
    assert judged(losses, planned=400).verdict == "converged"
    assert (judged(losses, planned=500).verdict, judged(losses, planned=500).reason) == ("undecided", "interrupted")
    assert judged(rising(losses, 200, 1.0), planned=500).verdict == "diverged"


def test_judging_does_not_import_torch():
    ask = "import sys, stabrun.verdict.judge; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", ask]).returncode == 0


@pytest.mark.parametrize(("rows", "height"), [(1, 50.0), (5, 7.0), (10, 5.0)])
@pytest.mark.parametrize("seed", range(5))
def test_a_late_spike_that_came_straight_back_is_stable(seed, rows, height):
    losses = falling(1000, seed=seed)
    losses[880 : 880 + rows] = [loss + height for loss in losses[880 : 880 + rows]]
    verdict = judged(losses)
    assert verdict.verdict in ("converged", "recovered")
    assert verdict.spikes["count"] == 1


def test_a_slow_rise_is_a_creep():
    losses = [value + max(0, i - 500) * 2e-4 for i, value in enumerate(falling(2000))]
    verdict = judged(losses)
    assert (verdict.verdict, verdict.reason) == ("diverged", "creep")
    assert verdict.first_bad_step > 500


def above(count=400, until=None):
    """A loss that rises from 5.5 to 9 within 10 rows, and returns at once at row `until`."""
    losses = rising([5.5 + random.Random(i).gauss(0, 0.03) for i in range(count)], 1, 3.5, over=10, until=until)
    return losses[:until] + falling(count)[: count - len(losses[:until])] if until else losses


def test_a_run_above_its_start_is_certain_at_half_of_its_steps():
    for planned, constant, certain in ((400, True, True), (None, True, False), (400, False, False)):
        judge = folded([{"step": i, "train/loss": loss} for i, loss in enumerate(above())], planned, constant)
        verdict = judge.conclude()
        assert (verdict.verdict, verdict.reason) == ("diverged", "above_start")
        assert verdict.first_bad_step <= 5
        assert verdict.certain_step == (199 if certain else None)


def test_a_certain_divergence_stays_one():
    rows = [{"step": i, "train/loss": loss} for i, loss in enumerate(above(until=300))]
    assert folded(rows, 400).verdict().verdict == "diverged"
    assert folded(rows).verdict().verdict == "recovered", "not certain, because the number of steps is not known"


def test_overshoot_of_the_warmup_is_not_a_recovery():
    losses = falling(400)
    overshot = [losses[0] + 1.5 * math.sin(i / 60 * math.pi) + 0.03 * math.sin(i) for i in range(60)] + losses
    assert judged(overshot).verdict == "converged"


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("times", [1, 2, 3, 4])
def test_repeated_rises_that_come_back_are_not_taken_for_noise(seed, times):
    losses = falling(400, seed=seed)
    for start in (100 + 240 * i // times for i in range(times)):
        losses = rising(losses, start, 0.3, over=1, until=start + 32)
    assert judged(losses).verdict == "recovered"


@pytest.mark.parametrize("count", [300, 1000])
def test_a_first_loss_of_hundreds_of_nats_does_not_hide_a_rise(count):
    high = [loss + 200 * math.exp(-i / 5) for i, loss in enumerate(falling(count))]
    assert judged(high).verdict == "converged"
    assert judged(rising(high, 2 * count // 3, 1.5)).verdict == "diverged"


@pytest.mark.parametrize("seed", range(10))
def test_a_spike_within_the_last_window_is_not_a_rise(seed):
    losses = falling(400, seed=seed)
    losses[387] += 20.0
    verdict = judged(losses)
    assert (verdict.verdict, verdict.spikes["count"]) == ("converged", 1)


@pytest.mark.parametrize("seeds", [20, pytest.param(80, marks=pytest.mark.slow)])
def test_strongly_autocorrelated_noise_is_rarely_called_diverged(seeds):
    """AR(1) noise with ρ = 0.9 has a correlation time of about half a window."""
    wrong = 0
    for count in (100, 300, 600):
        for seed in range(seeds):
            noise = {"seed": seed, "size": 0.05 * (1 - 0.9**2) ** 0.5, "ρ": 0.9, "count": count}
            wrong += judged(drawn(noise)).verdict == "diverged"
    assert wrong <= 0.05 * 3 * seeds


@pytest.mark.filterwarnings("error")
def test_losses_near_the_largest_number_cause_no_warning():
    assert judged([*falling(150), *[1.7e308] * 50]).verdict == "diverged"


HARMLESS = {
    "nothing": lambda i, n: 0.0,
    "spikes": lambda i, n: 4.0 * (i in (n // 3, n // 2)),
    "plateau": lambda i, n: 0.5 * (i < n // 2),
    "step decay": lambda i, n: 0.8 * (i < 2 * n // 3) + 0.4 * (i < 5 * n // 6),
    "warmup overshoot": lambda i, n: math.sin(min(1.0, i / (0.05 * n)) * math.pi),
}


@sampled(125, shape=st.sampled_from(sorted(HARMLESS)), noise=NOISE)
def test_harmless_shapes_are_not_called_diverged(shape, noise):
    assert judged(drawn(noise, HARMLESS[shape])).verdict != "diverged"


def test_a_schedule_restart_recovers():
    restart = [value + 0.6 * math.exp(-(i - 300) / 30) * (i >= 300) for i, value in enumerate(falling(600))]
    assert judged(restart).verdict in ("converged", "recovered")


@sampled(40, noise=NOISE, start=st.floats(0.3, 0.6), by=st.floats(1.5, 50))
def test_a_late_runaway_of_any_size_is_detected(noise, start, by):
    for factor in (1, 2, 10):
        losses = drawn(noise, lambda i, n: factor * by * (i > start * n))  # noqa: B023
        assert judged(losses).verdict == "diverged"


@sampled(60, noise=NOISE, start=st.floats(0.2, 0.95), by=st.floats(0, 3), more=st.floats(0, 3))
def test_more_rise_never_makes_a_diverged_run_stable(noise, start, by, more):
    low = judged(drawn(noise, lambda i, n: by * (i > start * n)))
    high = judged(drawn(noise, lambda i, n: (by + more) * (i > start * n)))
    if low.verdict == "diverged":
        assert high.verdict == "diverged"


@sampled(
    60, noise=NOISE, start=st.floats(0.2, 0.95), by=st.floats(0, 3),
    scale=st.sampled_from([0.25, 2.0, 64.0]), shift=st.sampled_from([-8.0, 0.0, 16.0]),
)  # fmt: skip
def test_scale_and_shift_change_nothing_but_the_losses(noise, start, by, scale, shift):
    losses = drawn(noise, lambda i, n: by * (i > start * n))
    one, other = judged(losses), judged([scale * loss + shift for loss in losses])
    for field in ("verdict", "reason", "horizon", "first_bad_step", "certain_step"):
        assert getattr(one, field) == getattr(other, field)
    assert other.best_loss == pytest.approx(scale * one.best_loss + shift)
    assert [step for step, _ in one.spikes["list"]] == [step for step, _ in other.spikes["list"]]


@sampled(30, noise=NOISE, start=st.floats(0.1, 0.9), by=st.floats(0, 20), cut=st.floats(0, 1))
def test_a_verdict_depends_only_on_the_rows_so_far(noise, start, by, cut):
    losses = drawn(noise, lambda i, n: by * (i > start * n))
    whole, part = judged(losses), judged(losses[: round(cut * len(losses))])
    assert part.horizon == round(cut * len(losses)) - 1 <= whole.horizon
    for step in (part.first_bad_step, part.certain_step):
        assert step is None or step <= part.horizon
    if part.certain_step is not None:
        assert (whole.verdict, whole.certain_step) == ("diverged", part.certain_step)


def test_the_three_strictnesses_are_ordered():
    for by in (0.05, 0.1, 0.2, 0.5, 1.0):
        judge = Judge()
        for step, loss in enumerate(rising(falling(400), 200, by)):
            judge.add({"step": step, "train/loss": loss})
        diverged = [judge.verdict(name).verdict == "diverged" for name in ("lenient", "standard", "strict")]
        assert diverged == sorted(diverged)


def test_columns_are_judged_as_their_rows_are():
    source = np.random.default_rng(0)
    for bad in (None, ("losses", 50), ("gradients", 60)):
        columns = {"losses": np.array(falling(120)), "gradients": source.uniform(0.5, 1, 120)}
        columns["gradients"][::3] = -1.0  # not recorded
        if bad:
            columns[bad[0]][bad[1]] = math.inf
        steps, rates = np.arange(0, 1200, 10), np.where(np.arange(120) % 2, 0.1, math.nan)
        judge = Judge()
        judge.add_columns(steps, columns["losses"], rates, columns["gradients"], [(30, 3.0), (70, 2.9)])
        rows = []
        for step, loss, rate, norm in zip(steps, columns["losses"], rates, columns["gradients"], strict=True):
            row = {"step": int(step), "train/loss": loss, "train/lr": rate, "grad/norm": norm}
            rows.append({key: value for key, value in row.items() if key != "grad/norm" or not norm < 0})
        rows[30]["val/loss"], rows[70]["val/loss"] = 3.0, 2.9
        assert judge.conclude() == folded(rows, constant=False).conclude()


def test_fractions_of_epochs_are_steps():
    judge = Judge()
    for i, loss in enumerate(rising(falling(200), 100, 2.0)):
        judge.add({"step": i / 8, "train/loss": loss})
    verdict = judge.conclude()
    assert verdict.horizon == 199 / 8
    assert 100 / 8 < verdict.first_bad_step < 120 / 8
