"""`results.csv`, `study.json` and the table of the answer, from made-up summaries."""

from dataclasses import asdict

import pytest
from helpers import TINY
from made import RATES, summaries

from stabrun.study.frontier import Frontier, Grid
from stabrun.study.plan import planned
from stabrun.study.results import COLUMNS
from stabrun.study.summary import at, beside, by_arm, lines, rate_told
from stabrun.verdict.judge import STRICTNESS


def test_a_row_a_run(tmp_path):
    rows, _ = summaries(tmp_path)
    assert [(row["arm"], float(row["lr"]), int(row["seed"])) for row in rows] == [
        (arm, rate, seed) for arm in ("baseline", "qk_norm") for rate in RATES for seed in (0, 1)
    ]
    assert tuple(rows[0]) == COLUMNS
    assert rows[0]["first_bad_step"] == ""
    assert rows[4]["final_loss"] == "nan"
    assert [rows[2][name] for name in ("lenient", "standard", "strict")] == ["converged", "converged", "diverged"]


def test_numbers_by_arm(tmp_path):
    _, told = summaries(tmp_path)
    facts = {name: told[name] for name in ("name", "strategy", "cells", "runs", "tokens")}
    assert facts == {"name": "study", "strategy": "grid", "cells": 12, "runs": 12, "tokens": 1200}
    baseline, normed = told["variants"]["baseline"], told["variants"]["qk_norm"]
    assert baseline["runs"][2] == {"lr": 1.0, "runs": 2, "diverged": 2, "undecided": 0}
    assert (baseline["max_stable_lr"], baseline["min_diverged_lr"]) == (0.1, 1.0)
    assert (normed["max_stable_lr"], normed["min_diverged_lr"]) == (1.0, None)
    assert normed["gain"]["value"] == pytest.approx(0.1)
    assert baseline["best_lr"] == 1e-2
    # Means over seeds of min(loss, 6): 2.015, 2.105 and 6, above the lowest by 0, 0.09 and 3.985.
    assert baseline["lr_sensitivity"]["value"] == pytest.approx((0.09 + 3.985) / 3)
    assert baseline["lr_sensitivity"]["low"] <= baseline["lr_sensitivity"]["value"]
    assert (baseline["separated"], normed["separated"]) == (True, False), "nothing of qk_norm diverged"
    lenient, standard, strict = (baseline["frontier"][name]["lr50"] for name in STRICTNESS)
    assert lenient == standard
    assert 0.01 < standard["low"] < 0.1 < standard["median"] < 1.0
    assert strict["median"] < standard["median"]
    assert baseline["frontier"]["standard"]["lr10"]["median"] < standard["median"]
    assert normed["frontier"]["standard"]["over"]["baseline"]["low"] > 0
    assert set(baseline["frontier"]["standard"]["over"]) == {"qk_norm"}


def test_the_frontier_of_a_grid_is_bayes_over_its_rates(tmp_path):
    _, told = summaries(tmp_path)
    runs = [(0.01, False)] * 2 + [(0.1, False)] * 2 + [(1.0, True)] * 2
    by_hand = Frontier.of(Grid(0.01, 1.0), runs).rate_at(0.5)
    assert told["variants"]["baseline"]["frontier"]["standard"]["lr50"] == asdict(by_hand)


def test_further_axes_have_their_own_baselines(tmp_path):
    plan, _, _ = planned([*TINY, "study.variants=[baseline,qk_norm]", "study.lrs=[0.1,1]", "model.n_layer=1,2"])
    told = by_arm(plan, [])
    assert list(told) == ["baseline n_layer=1", "baseline n_layer=2", "qk_norm n_layer=1", "qk_norm n_layer=2"]
    assert [beside("qk_norm n_layer=2", name) for name in ("baseline", "qk_norm")] == [
        "baseline n_layer=2",
        "qk_norm n_layer=2",
    ]


def test_the_table_of_a_grid_reads_as_its_numbers(tmp_path):
    _, told = summaries(tmp_path)
    head, baseline, normed, legend = lines(told)
    assert legend.startswith("lr50: half of the seeds diverge")
    assert head.split("  ")[0] == ""
    assert baseline.startswith("baseline  2 of 6")
    assert "0 of 6" in normed
    gain = told["variants"]["qk_norm"]["gain"]
    assert f"{gain['value']:.3f} ({gain['low']:.3f}–{gain['high']:.3f})" in normed
    assert baseline.index("2.015") == normed.index("1.915"), "the columns stand below each other"


@pytest.mark.parametrize(
    ("interval", "said"),
    [
        ((0.15, 0.1, 0.2), "0.15 (0.1–0.2)"),
        ((2.8, 2.1, None), "2.8 (> 2.1)"),
        ((None, 3.0, None), "> 3"),
        ((None, None, 0.003), "< 0.003"),
        ((None, None, None), "?"),
    ],
)
def test_an_interval_in_words(interval, said):
    assert rate_told(dict(zip(("median", "low", "high"), interval, strict=True))) == said


def test_an_arm_that_can_be_compared_to_none_has_no_ratio():
    frontier = {"standard": {"lr50": None, "over": {}}}
    assert at("standard", "over", "baseline")({"frontier": frontier}) == "-"


def test_a_study_that_is_not_whole_has_no_sensitivity_yet(tmp_path):
    rows, told = summaries(tmp_path, missing={("qk_norm", 1.0, 1)})
    assert len(rows) == 11
    told = told["variants"]
    assert "lr_sensitivity" not in told["qk_norm"]
    assert told["qk_norm"]["runs"][2]["runs"] == 1
    assert told["baseline"]["lr_sensitivity"]["value"] > 0


def test_one_seed_and_nothing_finished(tmp_path):
    _, told = summaries(tmp_path / "one", seeds=1)
    assert told["variants"]["baseline"]["lr_sensitivity"]["low"] is None
    places = {(arm, rate, 0) for arm in ("baseline", "qk_norm") for rate in RATES}
    (tmp_path / "none" / "runs").mkdir(parents=True)
    rows, told = summaries(tmp_path / "none", seeds=1, missing=places)
    assert rows == []
    bare = {"runs": [], "max_stable_lr": None, "min_diverged_lr": None, "separated": False}
    assert told["variants"]["baseline"] == bare | {"frontier": dict.fromkeys(STRICTNESS)}
    (line,) = (line for line in lines(told) if line.startswith("baseline"))
    assert line.split() == ["baseline", "0", "of", "0", *"-----"]
