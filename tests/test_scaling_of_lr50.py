"""The line through lr50 over width and tokens, compared to made-up lines and to scipy's."""

from types import SimpleNamespace

import numpy as np
import pytest
from scipy.stats import linregress, t
from studies import asked

from stabrun.report.scaling import Line, scaling
from stabrun.study.cost import tokens_per_run

SETTINGS = "", " model=mini", " model=micro", " train.steps=800"
VARIANTS = "baseline", "qk_norm"


def a_study(law, entries):
    """A study whose lr50 follow a law of the variant, the width and the tokens of a run."""
    plan = asked(
        f"study.variants=[{','.join(map(repr, entries))}]", "study.lrs=[0.1]", "study.seeds=1", "train.steps=200"
    )
    middles = {
        arm: law(config.variant, config.model.d_model, tokens_per_run(config)) for arm, config in plan.arms.items()
    }
    summaries = {
        arm: {"frontier": {"standard": {"lr50": {"median": middle, "low": None, "high": None}}}}
        for arm, middle in middles.items()
    }
    return SimpleNamespace(plan=plan, arm_summaries=summaries)


def entries(variants=VARIANTS, settings=SETTINGS):
    return [variant + setting for variant in variants for setting in settings]


def test_a_law_without_noise_is_found_and_carried_to_the_papers_size():
    def law(variant, width, tokens):
        return {"baseline": 0.1, "qk_norm": 0.6}[variant] * (width / 64) ** -0.5 * (tokens / 1e5) ** -0.25

    slopes, ends = scaling(a_study(law, entries()))
    assert [row[0].text for row in slopes.rows] == ["width (d_model)", "tokens per run"]
    for row, power in zip(slopes.rows, (-0.5, -0.25), strict=True):
        assert row[-1].values == pytest.approx([2**power] * 3, rel=1e-9)
    least = 200 * 16 * 64
    for variant, row in zip(VARIANTS, ends.rows, strict=True):
        assert row[1].values == pytest.approx([law(variant, 1024, least)] * 3, rel=1e-9)
        assert row[2].values == pytest.approx([law(variant, 1024, 512 * 4096 * 1500)] * 3, rel=1e-9)
    assert [row[3].text for row in ends.rows] == ["6e-3", "4e-2"]


def test_an_interval_is_that_of_scipys_regression():
    """One variant and one axis: slope and its standard error by `linregress`; a prediction by its textbook formula."""
    random = np.random.default_rng(3)
    x = np.array([6.0, 7.0, 8.6, 9.0, 10.0])
    y = 1.5 - 0.4 * x + random.normal(0, 0.3, len(x))
    line, found = Line(np.stack([np.ones_like(x), x], axis=1), y), linregress(x, y)
    factor = t.ppf(0.975, len(x) - 2)
    assert line.at([0, 1], noise=False) == pytest.approx(
        (found.slope, found.slope - factor * found.stderr, found.slope + factor * found.stderr)
    )
    residual = np.sqrt(np.sum((y - found.intercept - found.slope * x) ** 2) / (len(x) - 2))
    spread = residual * np.sqrt(1 + 1 / len(x) + (12 - x.mean()) ** 2 / np.sum((x - x.mean()) ** 2))
    middle = found.intercept + 12 * found.slope
    assert line.at([1, 12], noise=True) == pytest.approx((middle, middle - factor * spread, middle + factor * spread))


def test_nothing_without_an_axis_or_with_too_few_arms():
    def flat(*place):
        return 0.1

    assert scaling(a_study(flat, entries(settings=("", " model.n_layer=2")))) == []
    assert scaling(a_study(flat, entries(settings=("",)))) == []
    assert scaling(a_study(flat, entries(("baseline",), ("", " model=mini")))) == []
    assert scaling(a_study(lambda *place: None, entries())) == []


def test_an_axis_that_is_not_varied_has_no_slope():
    (slopes, _) = scaling(
        a_study(lambda variant, width, tokens: width**-0.3, entries(settings=("", " model.d_model=128")))
    )
    assert [row[0].text for row in slopes.rows] == ["width (d_model)"]
