"""What a site feeds, against the structure of the models, and the site at fault in records of such models."""

import math

import numpy as np
import pytest
from watched_records import MODELS, rows, statistics

from stabrun.record.metrics import METRICS, by_site, flatten
from stabrun.verdict import signals
from stabrun.verdict.feeds import feeds, role
from stabrun.verdict.judge import Judge
from stabrun.verdict.signals import History, first_nonfinite

OUTPUT = METRICS["norm/out/{site}"].signal


@pytest.mark.parametrize(
    ("site", "expected"),
    [
        ("c_attn", "qkv"), ("attn.c_proj", "proj"), ("c_fc", "fc1"), ("mlp.c_proj", "fc2"), ("lm_head", "head"),
        ("v_proj", "qkv"), ("o_proj", "proj"), ("gate_proj", "fc1"), ("down_proj", "fc2"),
        ("encoder.SelfAttention.k", "qkv"), ("EncDecAttention.o", "proj"), ("decoder.wi_0", "fc1"), ("wo", "fc2"),
        ("attention.attention.query", "qkv"), ("attention.output.dense", "proj"), ("output.dense", "fc2"),
        ("intermediate.dense", "fc1"), ("fc2", "fc2"), ("qkv", "qkv"), ("mixer.Wqkv", "qkv"), ("c_proj", None),
        ("experts.gate", None), ("wte", None),
    ],
)  # fmt: skip
def test_the_role_of_a_layer_is_told_by_the_end_of_its_name(site, expected):
    assert role(site) == expected


@pytest.mark.parametrize("name", MODELS)
def test_what_a_site_feeds_is_what_the_model_says(name):
    model = MODELS[name]
    row = statistics(model, ("norm/out", "norm/in", "long"), 0, 0, None, 0) | {"attn/max_logit": [1.0]}
    found = feeds(list(row))
    for site, fed in model.feeds.items():
        assert {*fed} <= {*found[site]}
        assert {*found[site]} - {*fed} <= {"attn/max_logit"} | {
            key for key in row if role(site) == "qkv" and role(key.rpartition("/")[2]) == "proj" and "norm/in" in key
        }
    others = {key.rpartition("/")[2] for key in row if key.startswith("norm/out")} - model.feeds.keys()
    assert all(found[site] == [] for site in model.before if site in others)
    assert [found[site] for site in model.after] == [[f"norm/out/{site}"] for site in model.after]


def test_stabruns_own_sites_feed_what_its_blocks_say():
    keys = [f"norm/{way}/{site}" for way in ("out", "in") for site in ("qkv", "proj", "fc1", "fc2", "head")]
    assert feeds([*keys, "residual/norm", "attn/max_logit", "grad/norm"]) == {
        "qkv": ["norm/in/proj", "attn/max_logit"],
        "proj": ["residual/norm"],
        "fc1": ["norm/in/fc2"],
        "fc2": ["residual/norm"],
        "head": ["norm/out/head"],
    }


FAULTS = [(name, site) for name, model in MODELS.items() for site in model.feeds]


@pytest.mark.parametrize(("name", "site"), FAULTS)
def test_the_site_at_fault_is_named_in_any_model(name, site):
    judge = Judge()
    for row in rows(name, fault=site):
        judge.add(row)
    verdict = judge.conclude()
    assert (verdict.verdict, verdict.first_bad_site) == ("diverged", f"layer_02/{site}")
    assert verdict.signals["output_norm"]["site"] == f"layer_02/{site}"


def test_growth_that_reaches_nothing_is_not_named_unless_it_is_unknown_what_it_feeds():
    def named(site, **changed):
        judge = Judge()
        for row in rows("LlamaForCausalLM", fault="down_proj"):
            loud, quiet = row["norm/out/down_proj"], row["norm/out/up_proj"]
            judge.add(row | {"residual/norm": quiet, "norm/out/down_proj": quiet, f"norm/out/{site}": loud} | changed)
        return judge.conclude().first_bad_site

    assert named("o_proj") is None
    assert named("router") == "layer_02/router"


def test_a_site_outside_the_layers_is_named_without_a_layer():
    judge = Judge()
    for index, row in enumerate(rows("ViTForImageClassification", fault="output.dense")):
        grown = math.exp(0.15 * min(max(0, index - 100), 40))
        judge.add(row | {"norm/out/output.dense": row["norm/out/query"], "norm/out/projection": grown})
    assert judge.conclude().first_bad_site == "projection"


def test_layers_that_are_not_called_change_nothing_else():
    def verdict(**options):
        judge = Judge()
        for row in rows("T5ForConditionalGeneration", fault="decoder.wo", **options):
            judge.add(row)
        return judge.conclude()

    assert verdict(absent=("encoder.wi", "shared")) == verdict()


def test_a_layer_that_is_not_called_keeps_its_value():
    history = History("norm/out/q", OUTPUT)
    for index, value in enumerate([[None, 1.0, None], [2.0, None, None], [None, 4.0, None], [8.0, "nan", None]]):
        history.add(index, value)
    expected = [[2.0, 1.0, math.nan], [2.0, 1.0, math.nan], [2.0, 4.0, math.nan], [8.0, math.nan, math.nan]]
    np.testing.assert_equal(history.table(), expected)
    assert history.growth(2)[:2] == pytest.approx([0.0, math.log(4)])
    assert history.growth(3)[[0, 2]] == pytest.approx([math.log(4), 0.0])


def test_a_long_history_is_thinned(monkeypatch):
    monkeypatch.setattr(signals, "KEPT", 20)
    history, values = History("norm/out/q", OUTPUT), np.exp(np.arange(2000).reshape(1000, 2) / 100)
    for row, value in enumerate(values.tolist()):
        history.add(row, value)
    kept = list(history.rows)
    assert 10 <= len(kept) <= 20
    assert kept == list(range(0, 1000, kept[1]))
    np.testing.assert_equal(history.table(), values[kept])


@pytest.mark.parametrize(
    ("bad", "first"),
    [
        ((("wte", None), ("c_fc", 0), ("lm_head", None)), "wte"),
        ((("mlp.c_proj", 1), ("c_attn", 2), ("lm_head", None)), "layer_01/mlp.c_proj"),
        ((("c_fc", 1), ("attn.c_proj", 1)), "layer_01/attn.c_proj"),
        ((("lm_head", None),), "lm_head"),
        ((), None),
    ],
)
def test_the_first_site_that_is_not_finite(bad, first):
    row = statistics(MODELS["GPT2LMHeadModel"], ("norm/out",), 0, 0, None, 0)
    row["norm/out/c_attn"][0] = None
    for site, layer in bad:
        if layer is None:
            row[f"norm/out/{site}"] = "nan"
        else:
            row[f"norm/out/{site}"][layer] = "inf"
    assert first_nonfinite(row, "norm/out/") == first


def test_all_layers_of_the_first_stack_come_before_those_of_the_second():
    row = statistics(MODELS["T5ForConditionalGeneration"], ("norm/out",), 0, 0, None, 0)
    row["norm/out/EncDecAttention.q"] = ["nan"] * 4
    row["norm/out/encoder.wo"][3] = "nan"
    assert first_nonfinite(row, "norm/out/") == "layer_03/encoder.wo"


def test_rows_of_foreign_sites_as_numbers():
    row = {"step": 3, "norm/out/wte": 2.0, "norm/out/q": [None, 3.0], "attn/entropy/encoder": [1.0, "nan"]}
    row |= {"norm/out/head": [5.0]}
    assert by_site(row, "norm/out/") == {"wte": 2.0, "layer_01/q": 3.0, "head": 5.0}
    flat = flatten(row)
    assert math.isnan(flat.pop("attn/entropy/encoder/layer_01"))
    assert flat == {
        "step": 3, "norm/out/wte": 2.0, "norm/out/q/layer_01": 3.0, "attn/entropy/encoder/layer_00": 1.0,
        "norm/out/head": 5.0,
    }  # fmt: skip
    assert flatten(row, lists=False) == {"step": 3, "norm/out/wte": 2.0}
