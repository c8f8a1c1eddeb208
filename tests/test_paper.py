"""The table that compares a study to the paper."""

import json
import math

from made import a_study

from stabrun.report.paper import over_qk_norm, paper_comparison
from stabrun.report.study_data import read


def test_results_of_the_paper_and_the_differences(made_study):
    table = paper_comparison(read(made_study))
    row = dict(zip((column.key for column in table.columns), table.rows[1], strict=True))
    assert row["paper_last_stable"].values == (0.04,)
    assert row["paper_perplexity"].text == "10.84"
    assert row["paper_gain"].text == f"{math.log(11.19) - math.log(10.84):.3f}"
    assert (
        row["gain"].values[0]
        == json.loads((made_study / "study.json").read_text())["variants"]["qk_norm"]["gain"]["value"]
    )
    assert "830M parameters" in table.note
    assert "2,097,152 tokens per step, 64 here" in table.note


def test_the_ratio_of_two_edges_and_what_the_gaps_between_rates_allow():
    """PAPER.md, section 1: qk_norm between 40e-3 and 60e-3, qkv_norm between 60e-3 and 80e-3, sources disagree on 80e-3
    for qk_norm_cap."""
    assert over_qk_norm("qkv_norm").values == (60 / 40, 60 / 60, 80 / 40)
    assert over_qk_norm("qk_norm_cap").text == "1.5 (> 1)"
    assert over_qk_norm("qk_norm").values == (None, None, None)


def test_arms_with_further_settings_are_not_the_papers(tmp_path):
    a_study(tmp_path, variants=("qk_norm", "'qk_norm model.n_layer=1'"))
    assert [row[0].text for row in paper_comparison(read(tmp_path)).rows] == ["qk_norm"]
