"""The commands that a report shows plan the same study again."""

from dataclasses import replace

import pytest
from helpers import TINY

from stabrun.config import RESULT, marked
from stabrun.report.commands import commands, overrides
from stabrun.report.study_data import read
from stabrun.study.question import planned


def test_the_overrides_of_a_grid(made_study):
    study = read(made_study)
    plan, _, _ = planned(overrides(study))
    assert set(plan.cells) == set(study.plan.cells)


def test_the_overrides_of_a_search_with_a_further_axis(tmp_path):
    words = (
        "study.strategy=frontier",
        "study.lr_range=[0.01,1]",
        "model.n_layer=1,2",
        "study.variants=[baseline,qk_norm]",
    )
    plan, _, _ = planned([*TINY, *words])
    for name in ("runs", "ledger"):
        (tmp_path / name).mkdir()
    plan.save(tmp_path)
    again, _, _ = planned(overrides(read(tmp_path)))
    assert [marked(arm, RESULT) for arm in again.arms.values()] == [marked(arm, RESULT) for arm in plan.arms.values()]
    assert (again.strategy, again.lr_range) == (plan.strategy, plan.lr_range)


@pytest.mark.parametrize(
    "entries",
    [
        "baseline,'qk_norm model.n_layer=1','baseline model.n_layer=3 model.attn.out_norm=true'",
        "baseline,'qk_norm model.n_layer=1'",
        "qk_norm,'qk_norm_cap model.attn.soft_cap=25',fc_norm,'fc_norm model.mlp.out_norm=false'",
    ],
)
def test_the_overrides_of_arms_with_settings_of_their_own(tmp_path, entries):
    plan, _, _ = planned([*TINY, f"study.variants=[{entries}]", "study.lrs=[0.1]", "study.seeds=2"])
    for name in ("runs", "ledger"):
        (tmp_path / name).mkdir()
    plan.save(tmp_path)
    again, _, _ = planned(overrides(read(tmp_path)))
    assert list(again.arms) == list(plan.arms)
    assert set(again.cells) == set(plan.cells)


def test_a_variant_that_is_not_shipped_leaves_the_command_out(made_study):
    study = read(made_study)
    study.plan.arms["mine"] = replace(study.plan.arms["baseline"], variant="mine")
    assert list(commands(study)) == [f"stabrun report {made_study}"]
