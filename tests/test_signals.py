"""Signals: alarms of statistics, and the site that diverged first."""

import math
import random

from losses import falling, judged, rising

from stabrun.verdict.judge import Judge


def test_first_site_that_is_not_finite_in_the_order_of_the_forward_pass():
    judge = Judge()
    row = {"norm/out/qkv": [1.0, "nan"], "norm/out/fc2": [1.0, "nan"], "norm/out/proj": [1.0, "inf"]}
    judge.add({"step": 0, "train/loss": "nan", "grad/norm": "nan", **row, "norm/out/head": ["nan"]})
    assert judge.verdict().first_bad_site == "layer_01/qkv"


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


def test_the_site_that_deviated_is_named_with_its_lead():
    losses = rising(falling(400), 210, 1.0, over=10)
    quiet, loud = growing(400, 500, 0), growing(400, 195, 0.3)
    verdict = judged(losses, norm__out__fc2=loud, norm__out__proj=quiet, residual__norm=loud)
    assert verdict.first_bad_site == "layer_02/fc2"
    signal = verdict.signals["output_norm"]
    assert signal["site"] == "layer_02/fc2"
    assert 195 <= signal["step"] <= 200
    assert signal["lead"] == verdict.first_bad_step - signal["step"] > 10


def test_growth_that_a_norm_removes_is_not_named():
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


def test_no_site_is_named_if_none_deviated():
    quiet = growing(400, 500, 0)
    assert judged(rising(falling(400), 200, 1.0), norm__out__fc2=quiet).first_bad_site is None
    assert judged(falling(400), norm__out__fc2=growing(400, 200, 0.3)).first_bad_site is None
