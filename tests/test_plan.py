"""Plans of studies: their cells, that these are frozen, and which studies can be extended."""

import resource
import time

import pytest
from studies import asked, points

from stabrun.composition import Sources
from stabrun.config import UserError
from stabrun.study.plan import extended, load
from stabrun.study.question import planned

QUESTION = ("study.variants=[baseline,qk_norm]", "study.lrs=[1e-2,1e-1]", "study.seeds=2")


def test_a_saved_plan_is_read_back(tmp_path):
    plan = asked(*QUESTION, "tracker.tags=[a,b]", "model.attn.soft_cap=30")
    plan.save(tmp_path)
    again = load(tmp_path)
    assert again == plan
    assert [again.config(cell) for cell in again.cells.values()] == [plan.config(c) for c in plan.cells.values()]


def test_planned_configurations_are_frozen(tmp_path):
    """Editing a configuration file later does not change a cell."""
    (tmp_path / "conf" / "variant").mkdir(parents=True)
    mine = tmp_path / "conf" / "variant" / "mine.yaml"
    mine.write_text("# @package _global_\nmodel: {attn: {soft_cap: 20.0}}\n")
    words, sources = ["study.lrs=[0.1]", "study.variants=[mine]"], Sources(tmp_path / "conf")
    planned(words, sources)[0].save(tmp_path)
    mine.write_text("# @package _global_\nmodel: {attn: {soft_cap: 10.0}}\n")
    plan = load(tmp_path)
    assert {plan.config(cell).model.attn.soft_cap for cell in plan.cells.values()} == {20.0}
    with pytest.raises(UserError, match=r"model.attn.soft_cap=20.0 \(now 10.0\)"):
        extended(plan, planned(words, sources)[0])


def test_a_larger_study_extends_the_plan_in_the_same_directory():
    directory = planned(list(QUESTION))[1]
    for more in ("study.variants=[qk_norm,soft_cap]", "study.lrs=[3e-2]", "study.seeds=3", "study.lrs=[1e-2,0.5]"):
        larger, other, _ = planned([*QUESTION[:0], *(w for w in QUESTION if w[:9] != more[:9]), more])
        assert other == directory, more
        both = extended(asked(*QUESTION), larger)
        assert points(both) == sorted(set(points(asked(*QUESTION))) | set(points(larger)))
    assert planned([*QUESTION, "train.steps=30"])[1] != directory
    assert extended(asked(*QUESTION), asked(*QUESTION)) == asked(*QUESTION)


def test_a_contradicting_study_is_refused():
    with pytest.raises(UserError, match=r"train.steps=500 \(now 30\)"):
        extended(asked(*QUESTION), asked(*QUESTION, "train.steps=30"))
    search = "study.strategy=frontier", "study.lr_range=[1e-3,1]", "study.variants=[baseline]"
    with pytest.raises(UserError, match=r"strategy=grid \(now frontier\)"):
        extended(asked(*QUESTION), asked(*search))


@pytest.mark.parametrize("content", ["", "format: 1\n", "{", "format: 9\narms: {}\ncells: []\n", "[1]"])
def test_a_damaged_plan_is_named(tmp_path, content):
    (tmp_path / "study.yaml").write_text(content)
    with pytest.raises(UserError, match=r"study\.yaml"):
        load(tmp_path)
    with pytest.raises(UserError, match="not a study directory"):
        load(tmp_path / "nowhere")


def test_time_and_memory_of_two_thousand_cells(tmp_path):
    rates = ",".join(str(1e-3 * 1.2**k) for k in range(20))
    before, began = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.monotonic()
    plan = asked(
        "study.variants=[baseline,qk_norm,qk_norm_cap,qkv_norm,qk_fc_norm]", f"study.lrs=[{rates}]", "study.seeds=20"
    )
    plan.save(tmp_path)
    assert len(load(tmp_path).cells) == 2000
    print(f"{time.monotonic() - began:.2f} s")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300_000
