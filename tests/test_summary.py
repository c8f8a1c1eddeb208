"""`results.csv`, `study.json` and its table, from made-up summaries."""

import pytest
from helpers import TINY
from made import RATES, summaries
from studies import asked

from stabrun.study.facts import FACTS, GRID_FACTS, interval_text, summary_lines
from stabrun.study.frontier import Frontier, ParameterGrid
from stabrun.study.results import COLUMNS
from stabrun.study.summary import by_arm, counterpart
from stabrun.verdict.rule import STRICTNESS


def test_one_row_per_run(tmp_path):
    rows, _ = summaries(tmp_path)
    assert [(row["arm"], float(row["lr"]), int(row["seed"])) for row in rows] == [
        (arm, rate, seed) for arm in ("baseline", "qk_norm") for rate in RATES for seed in (0, 1)
    ]
    assert tuple(rows[0]) == COLUMNS
    assert rows[0]["first_bad_step"] == ""
    assert rows[4]["final_loss"] == "nan"
    assert [rows[2][name] for name in ("lenient", "standard", "strict")] == ["converged", "converged", "diverged"]


def test_numbers_by_arm(tmp_path):
    _, summary = summaries(tmp_path)
    facts = {name: summary[name] for name in ("name", "strategy", "cells", "runs", "tokens")}
    assert facts == {"name": "study", "strategy": "grid", "cells": 12, "runs": 12, "tokens": 1200}
    baseline, normed = summary["variants"]["baseline"], summary["variants"]["qk_norm"]
    assert baseline["runs"][2] == {"lr": 1.0, "runs": 2, "diverged": 2, "undecided": 0}
    assert (baseline["max_stable_lr"], baseline["min_diverged_lr"]) == (0.1, 1.0)
    assert (normed["max_stable_lr"], normed["min_diverged_lr"]) == (1.0, None)
    assert normed["gain"]["value"] == pytest.approx(0.1)
    assert baseline["best_lr"] == 1e-2
    # Means over seeds of min(loss, 6): 2.015, 2.105 and 6, above the lowest by 0, 0.09 and 3.985.
    assert baseline["lr_sensitivity"]["value"] == pytest.approx((0.09 + 3.985) / 3)
    assert baseline["lr_sensitivity"]["low"] < baseline["lr_sensitivity"]["value"] < baseline["lr_sensitivity"]["high"]
    assert len(list(summary_lines(summary))) == 4, "a header, two arms and the legend"
    assert (baseline["separated"], normed["separated"]) == (True, False), "no run of qk_norm diverged"
    lenient, standard, strict = (baseline["frontier"][name]["lr50"] for name in STRICTNESS)
    assert lenient == standard
    assert 0.01 < standard["low"] < 0.1 < standard["median"] < 1.0
    assert strict["median"] < standard["median"]
    assert baseline["frontier"]["standard"]["lr10"]["median"] < standard["median"]
    assert normed["frontier"]["standard"]["over"]["baseline"]["low"] > 0
    assert set(baseline["frontier"]["standard"]["over"]) == {"qk_norm"}


def test_the_frontier_of_a_grid_is_the_posterior_of_its_runs(tmp_path):
    _, summary = summaries(tmp_path)
    runs = [(0.01, False)] * 2 + [(0.1, False)] * 2 + [(1.0, True)] * 2
    by_hand = Frontier.of(ParameterGrid(0.01, 1.0), runs).rate_at(0.5)
    assert summary["variants"]["baseline"]["frontier"]["standard"]["lr50"] == by_hand


def test_further_axes_have_their_own_baselines():
    plan = asked(*TINY, "study.variants=[baseline,qk_norm]", "study.lrs=[0.1,1]", "model.n_layer=1,2")
    assert list(by_arm(plan, [])) == [
        "baseline n_layer=1",
        "baseline n_layer=2",
        "qk_norm n_layer=1",
        "qk_norm n_layer=2",
    ]
    assert [counterpart("qk_norm n_layer=2", name) for name in ("baseline", "qk_norm")] == [
        "baseline n_layer=2",
        "qk_norm n_layer=2",
    ]


def test_the_table_of_a_grid_has_its_numbers(tmp_path):
    _, summary = summaries(tmp_path)
    head, baseline, normed, legend = summary_lines(summary)
    assert legend.startswith("lr50, lr10: half, a tenth of the seeds diverge")
    assert head.split()[:4] == ["variant", "runs", "diverged", "lr50"]
    assert baseline.split()[:3] == ["baseline", "6", "2"]
    assert normed.split()[:3] == ["qk_norm", "6", "0"]
    gain = summary["variants"]["qk_norm"]["gain"]
    assert f"{gain['value']:.3f} ({gain['low']:.3f}–{gain['high']:.3f})" in normed
    assert baseline.index("2.015") == normed.index("1.915"), "columns are aligned"


@pytest.mark.parametrize(
    ("interval", "text"),
    [
        ((0.15, 0.1, 0.2), "0.15 (0.1–0.2)"),
        ((0.01, -0.02, 0.05), "0.01 (-0.02 to 0.05)"),
        ((2.8, 2.1, None), "2.8 (> 2.1)"),
        ((None, 3.0, None), "> 3"),
        ((None, None, 0.003), "< 0.003"),
        ((None, None, None), "?"),
    ],
)
def test_an_interval_as_text(interval, text):
    assert interval_text(dict(zip(("median", "low", "high"), interval, strict=True))) == text


def test_an_arm_without_counterpart_has_no_ratio():
    (fact,) = (fact for fact in FACTS if fact.key == "over_baseline")
    arm = {"frontier": {"standard": {"lr50": None, "over": {}}}}
    assert fact.text(arm) == "-"
    assert fact.values(arm) == (None, None, None)


def test_an_incomplete_grid_has_no_sensitivity(tmp_path):
    rows, summary = summaries(tmp_path, missing={("qk_norm", 1.0, 1)})
    assert len(rows) == 11
    summary = summary["variants"]
    assert "lr_sensitivity" not in summary["qk_norm"]
    assert summary["qk_norm"]["runs"][2]["runs"] == 1
    assert summary["baseline"]["lr_sensitivity"]["value"] > 0


def test_one_rate_has_no_sensitivity(tmp_path):
    _, summary = summaries(tmp_path, rates=(0.1,))
    arm = summary["variants"]["qk_norm"]
    assert (arm["lr_sensitivity"], arm["best_final_loss"]["value"]) == (None, pytest.approx(2.005))
    (row,) = (line for line in summary_lines(summary) if line.startswith("qk_norm"))
    assert row.endswith(" -")
    assert "LR sensitivity needs at least two learning rates" in summary_lines(summary)


def test_one_seed_and_nothing_finished(tmp_path):
    _, summary = summaries(tmp_path / "one", seeds=1)
    assert summary["variants"]["baseline"]["lr_sensitivity"]["low"] is None
    missing = {(arm, rate, 0) for arm in ("baseline", "qk_norm") for rate in RATES}
    (tmp_path / "none" / "runs").mkdir(parents=True)
    rows, summary = summaries(tmp_path / "none", seeds=1, missing=missing)
    assert rows == []
    bare = {"runs": [], "max_stable_lr": None, "min_diverged_lr": None, "separated": False}
    assert summary["variants"]["baseline"] == bare | {"frontier": dict.fromkeys(STRICTNESS)}
    (line,) = (line for line in summary_lines(summary) if line.startswith("baseline"))
    assert line.split() == ["baseline", "0", "0", *"-----"]


def test_facts_have_the_values_of_the_summary(tmp_path):
    _, summary = summaries(tmp_path)
    arm = summary["variants"]["qk_norm"]
    values = {fact.key: fact.values(arm) for fact in (*FACTS, *GRID_FACTS)}
    assert (values["runs"], values["diverged"], values["max_stable_lr"]) == ((6,), (0,), (1.0,))
    assert values["gain"] == tuple(arm["gain"][end] for end in ("value", "low", "high"))
    strict = arm["frontier"]["strict"]["lr50"]
    assert values["lr50_strict"] == tuple(strict[end] for end in ("median", "low", "high"))
