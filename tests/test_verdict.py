import dataclasses
import json
import math
import random
import subprocess
import sys

import numpy as np
import pytest
from helpers import tiny
from hypothesis import given, settings
from hypothesis import strategies as st

from stabrun.record.run_dir import RunDir
from stabrun.training.run import train
from stabrun.verdict.chart import level, trailing_means
from stabrun.verdict.judge import STRICTNESS, Judge
from stabrun.verdict.spikes import spike_rate, spike_score


def judged(losses, planned=None, **columns):
    judge = Judge()
    for step, loss in enumerate(losses):
        row = {"step": step, "train/loss": loss, "grad/norm": 1.0, "train/lr": 0.01}
        judge.add(row | {key.replace("__", "/"): values[step] for key, values in columns.items()})
    return judge.conclude(planned)


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
    assert (verdict.certain_step is not None) == (by == 5.0), "long above the loss before learning"
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


def test_a_gradient_that_is_not_finite_has_diverged():
    judge = Judge()
    for step, loss in enumerate(falling(50)):
        judge.add({"step": step, "train/loss": loss, "grad/norm": "inf" if step == 40 else 1.0})
    assert (judge.verdict().reason, judge.verdict().first_bad_step) == ("nonfinite_grad", 40)
    assert judge.over


def test_first_site_that_is_not_finite_in_the_order_of_the_forward_pass():
    judge = Judge()
    row = {"norm/out/qkv": [1.0, "nan"], "norm/out/fc2": [1.0, "nan"], "norm/out/proj": [1.0, "inf"]}
    judge.add({"step": 0, "train/loss": "nan", "grad/norm": "nan", **row, "norm/out/head": ["nan"]})
    assert judge.verdict().first_bad_site == "layer_01/qkv"


def test_not_learning_is_not_diverging():
    verdict = judged([5.5 + random.Random(i).gauss(0, 0.01) for i in range(300)])
    assert (verdict.verdict, verdict.reason) == ("undecided", "no_learning")


def test_too_short_to_tell():
    assert judged(falling(30)).reason == "too_short"
    assert Judge().verdict().reason == "too_short"


def test_a_single_spike_decides_nothing():
    losses = falling(400)
    losses[200] += 1.5
    assert judged(losses).verdict == "converged"


def test_windows_are_those_of_the_contract():
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


def test_live_is_the_same_as_afterwards(tmp_path):
    summary = train(tiny(f"run_dir={tmp_path / 'run'}", "train.steps=60", "optim.lr=0.5", "schedule=constant"))
    judge = Judge()
    for row in RunDir(tmp_path / "run").rows():
        judge.add(row)
    verdict = dataclasses.asdict(judge.conclude(60))
    assert {field: summary[field] for field in verdict} == json.loads(json.dumps(verdict))


def test_a_run_cut_short_is_not_called_stable():
    losses = falling(400)
    assert judged(losses, planned=400).verdict == "converged"
    assert (judged(losses, planned=500).verdict, judged(losses, planned=500).reason) == ("undecided", "interrupted")
    assert judged(rising(losses, 200, 1.0), planned=500).verdict == "diverged"


def test_judging_needs_no_torch():
    ask = "import sys, stabrun.verdict.judge; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", ask]).returncode == 0


def white(count, seed=0, noise=0.03):
    return 2.5 + np.random.default_rng(seed).normal(0, noise, count)


def test_noise_is_measured_and_no_rise_hides_in_its_own():
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


def test_scores_of_spikes_are_those_of_their_definitions():
    losses = white(3000, noise=0.1)
    losses[[1500, 1700, 2600]] += 3.0
    high = [losses[i] >= losses[i - 1000 : i].mean() + 7 * losses[i - 1000 : i].std() for i in range(1000, 3000)]
    assert sum(high) == 3
    assert spike_score(losses) == pytest.approx(100 * 3 / 2000)
    above = [losses[i] > np.median(losses[max(0, i - 200) : i + 1]) + 0.1 for i in range(200, 3000)]
    assert spike_rate(losses) == pytest.approx(1e4 * sum(above) / len(above), rel=1e-9)
    assert spike_score(losses[:1500]) is None
    assert spike_rate(losses[:200]) is None


def test_spikes_are_counted_dated_and_sized():
    losses = falling(600)
    for row in (200, 201, 300):
        losses[row] += 1.5
    spikes = judged(losses).spikes
    assert spikes["count"] == 2
    assert [step for step, _ in spikes["list"]] == [200, 300]
    assert all(1.3 < size < 1.7 for _, size in spikes["list"])


@pytest.mark.parametrize(("rows", "height"), [(1, 50.0), (5, 7.0), (10, 5.0)])
@pytest.mark.parametrize("seed", range(5))
def test_a_late_spike_that_came_straight_back_decides_nothing(seed, rows, height):
    losses = falling(1000, seed=seed)
    losses[880 : 880 + rows] = [loss + height for loss in losses[880 : 880 + rows]]
    verdict = judged(losses)
    assert verdict.verdict in ("converged", "recovered")
    assert verdict.spikes["count"] == 1


def test_a_creep_is_called_one():
    losses = [value + max(0, i - 500) * 2e-4 for i, value in enumerate(falling(2000))]
    verdict = judged(losses)
    assert (verdict.verdict, verdict.reason) == ("diverged", "creep")
    assert verdict.first_bad_step > 500


def test_a_certain_divergence_stays_one_and_a_lowered_rate_leaves_hope():
    losses = rising(falling(400), 60, 8.0, over=5, until=300)
    verdict = judged(losses)
    assert (verdict.verdict, verdict.certain_step is not None) == ("diverged", True)
    judge = Judge()
    for step, loss in enumerate(losses):
        judge.add({"step": step, "train/loss": loss, "train/lr": 0.01 * (1 - step / 400)})
    assert (judge.verdict().verdict, judge.certain) == ("recovered", None)


def test_overshoot_of_the_warm_up_is_no_recovery():
    losses = falling(400)
    overshot = [losses[0] + 1.5 * math.sin(i / 60 * math.pi) + 0.03 * math.sin(i) for i in range(60)] + losses
    assert judged(overshot).verdict == "converged"


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("times", [1, 2, 3, 4])
def test_rises_that_come_back_again_and_again_do_not_pass_for_noise(seed, times):
    losses = falling(400, seed=seed)
    for start in (100 + 240 * i // times for i in range(times)):
        losses = rising(losses, start, 0.3, over=1, until=start + 32)
    assert judged(losses).verdict == "recovered"


@pytest.mark.parametrize("count", [300, 1000])
def test_a_first_loss_of_hundreds_of_nats_does_not_hide_a_rise(count):
    high = [loss + 200 * math.exp(-i / 5) for i, loss in enumerate(falling(count))]
    assert judged(high).verdict == "converged"
    assert judged(rising(high, 2 * count // 3, 0.5)).verdict == "diverged"


@pytest.mark.parametrize("seed", range(10))
def test_a_spike_within_the_last_window_is_no_rise(seed):
    losses = falling(400, seed=seed)
    losses[387] += 20.0
    verdict = judged(losses)
    assert (verdict.verdict, verdict.spikes["count"]) == ("recovered", 1)


def test_strongly_autocorrelated_noise_is_rarely_called_diverged():
    """An AR(1) of ρ = 0.9 has a memory as long as half a window: 240 healthy runs, of 100 to 600 rows."""
    wrong = 0
    for count in (100, 300, 600):
        for seed in range(80):
            noise = {"seed": seed, "size": 0.05 * (1 - 0.9**2) ** 0.5, "ρ": 0.9, "count": count}
            wrong += judged(drawn(noise)).verdict == "diverged"
    assert wrong <= 0.05 * 240


@pytest.mark.filterwarnings("error")
def test_losses_near_the_largest_number_warn_of_nothing():
    assert judged([*falling(150), *[1.7e308] * 50]).verdict == "diverged"


def growing(count, start, rate, layers=4, layer=2):
    """Norms of `layers` near 1 with a slow common growth; one grows by `rate` a row from row `start` on."""
    source = random.Random(5)
    return [
        [
            math.exp(i / 200 + source.gauss(0, 0.02) + (min(max(0, i - start), 30) * rate if k == layer else 0))
            for k in range(layers)
        ]
        for i in range(count)
    ]


def test_the_site_that_broke_away_is_named_with_its_lead():
    losses = rising(falling(400), 210, 1.0, over=10)
    quiet, loud = growing(400, 500, 0), growing(400, 195, 0.3)
    verdict = judged(losses, norm__out__fc2=loud, norm__out__proj=quiet, residual__norm=loud)
    assert verdict.first_bad_site == "layer_02/fc2"
    signal = verdict.signals["output_norm"]
    assert signal["site"] == "layer_02/fc2"
    assert 195 <= signal["step"] <= 200
    assert signal["lead"] == verdict.first_bad_step - signal["step"] > 10


def test_a_growth_that_a_norm_stops_is_not_named():
    losses = rising(falling(400), 210, 1.0, over=10)
    quiet, loud, mild = growing(400, 500, 0), growing(400, 195, 0.5), growing(400, 195, 0.2, layer=1)
    verdict = judged(
        losses,
        norm__out__qkv=loud,
        norm__in__proj=quiet,
        attn__max_logit=quiet,
        norm__out__fc2=mild,
        residual__norm=mild,
    )
    assert verdict.first_bad_site == "layer_01/fc2"


def test_nothing_is_named_where_nothing_broke_away():
    quiet = growing(400, 500, 0)
    assert judged(rising(falling(400), 200, 1.0), norm__out__fc2=quiet).first_bad_site is None
    assert judged(falling(400), norm__out__fc2=growing(400, 200, 0.3)).first_bad_site is None


NOISE = st.fixed_dictionaries({
    "seed": st.integers(0, 999), "size": st.floats(0.001, 0.2), "ρ": st.floats(0, 0.7), "count": st.integers(120, 600),
})  # fmt: skip


def drawn(noise, shape=lambda i, n: 0.0):
    """A falling loss with noise of a colour, and something on top."""
    source, red, losses = random.Random(noise["seed"]), 0.0, []
    for i in range(noise["count"]):
        red = noise["ρ"] * red + source.gauss(0, noise["size"])
        losses.append(2.5 + 3 * math.exp(-6 * i / noise["count"]) + red + shape(i, noise["count"]))
    return losses


HARMLESS = {
    "nothing": lambda i, n: 0.0,
    "spikes": lambda i, n: 4.0 * (i in (n // 3, n // 2)),
    "plateau": lambda i, n: 0.5 * (i < n // 2),
    "step decay": lambda i, n: 0.8 * (i < 2 * n // 3) + 0.4 * (i < 5 * n // 6),
    "warm-up overshoot": lambda i, n: math.sin(min(1.0, i / (0.05 * n)) * math.pi),
}


@settings(max_examples=25)
@pytest.mark.parametrize("shape", HARMLESS)
@given(noise=NOISE)
def test_harmless_shapes_are_not_called_diverged(shape, noise):
    assert judged(drawn(noise, HARMLESS[shape])).verdict != "diverged"


def test_a_schedule_restart_recovers():
    restart = [value + 0.6 * math.exp(-(i - 300) / 30) * (i >= 300) for i, value in enumerate(falling(600))]
    assert judged(restart).verdict in ("converged", "recovered")


@settings(max_examples=40)
@given(noise=NOISE, start=st.floats(0.3, 0.6), by=st.floats(1.5, 50))
def test_a_late_runaway_is_seen_and_a_larger_one_too(noise, start, by):
    for factor in (1, 2, 10):
        losses = drawn(noise, lambda i, n: factor * by * (i > start * n))  # noqa: B023
        assert judged(losses).verdict == "diverged"


ORDER = ["converged", "recovered", "undecided", "diverged"]


@settings(max_examples=60)
@given(noise=NOISE, start=st.floats(0.2, 0.95), by=st.floats(0, 3), more=st.floats(0, 3))
def test_more_rise_never_makes_a_diverged_run_stable(noise, start, by, more):
    low = judged(drawn(noise, lambda i, n: by * (i > start * n)))
    high = judged(drawn(noise, lambda i, n: (by + more) * (i > start * n)))
    if low.verdict == "diverged":
        assert high.verdict == "diverged"


@settings(max_examples=60)
@given(
    noise=NOISE, start=st.floats(0.2, 0.95), by=st.floats(0, 3),
    scale=st.sampled_from([0.25, 2.0, 64.0]), shift=st.sampled_from([-8.0, 0.0, 16.0]),
)  # fmt: skip
def test_scale_and_shift_change_nothing_but_the_losses(noise, start, by, scale, shift):
    losses = drawn(noise, lambda i, n: by * (i > start * n))
    one, other = judged(losses), judged([scale * loss + shift for loss in losses])
    for field in ("verdict", "reason", "horizon", "first_bad_step", "certain_step"):
        assert getattr(one, field) == getattr(other, field)
    assert other.best_loss == pytest.approx(scale * one.best_loss + shift)
    assert [step for step, _ in one.spikes["list"]] == [step for step, _ in other.spikes["list"]]


@settings(max_examples=30)
@given(noise=NOISE, start=st.floats(0.1, 0.9), by=st.floats(0, 20), cut=st.floats(0, 1))
def test_a_prefix_sees_no_further_than_itself(noise, start, by, cut):
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
        said = [judge.verdict(name).verdict == "diverged" for name in ("lenient", "standard", "strict")]
        assert said == sorted(said)
