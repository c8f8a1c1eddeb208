"""Plans of studies: which cells a question has, that they are frozen, and which questions go together."""

import itertools
import resource
import time

import pytest
from helpers import configured

from stabrun.config import UserError, conf_dir, run_id
from stabrun.study.plan import Latest, extended, load, planned, tokens_of

QUESTION = ("study.variants=[baseline,qk_norm]", "study.lrs=[1e-2,1e-1]", "study.seeds=2")


def asked(*words):
    return planned(list(words))[0]


def places(plan):
    return sorted((cell.arm, cell.lr, cell.seed) for cell in plan.cells.values())


def test_cells_are_variants_by_rates_by_seeds():
    plan = asked(*QUESTION)
    assert places(plan) == sorted(itertools.product(("baseline", "qk_norm"), (1e-2, 1e-1), (0, 1)))


def test_a_cell_is_the_run_that_train_would_do():
    plan = asked(*QUESTION, "train.steps=30")
    for cell in plan.cells.values():
        words = f"+variant={cell.arm}", f"optim.lr={cell.lr}", f"seed={cell.seed}", "train.steps=30"
        alone = configured(*words)
        assert cell.id == run_id(alone) == run_id(plan.config(cell))
        assert plan.config(cell).variant == cell.arm


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (("+variant=baseline,qk_norm", "optim.lr=1e-2,1e-1", "seed=range(0,2)"), places(asked(*QUESTION))),
        (("study.variants=[qk_norm+soft_cap]", "study.lrs=[0.1]", "study.seeds=1"), [("qk_norm+soft_cap", 0.1, 0)]),
        (("+variant=[qk_norm,soft_cap]", "optim.lr=0.1,0.2", "seed=5,7"), [
            ("qk_norm+soft_cap", lr, seed) for lr in (0.1, 0.2) for seed in (5, 7)
        ]),
        (("model.n_layer=2,4", "study.lrs=[0.1]", "study.seeds=1", "seed=3"), [
            ("baseline n_layer=2", 0.1, 3), ("baseline n_layer=4", 0.1, 3)
        ]),
    ],
    ids=["Hydra's own syntax", "two variants in one", "the same as for train", "a further axis"],
)  # fmt: skip
def test_ways_to_ask(words, expected):
    assert places(asked(*words)) == sorted(expected)


def test_a_further_axis_is_in_the_configuration():
    plan = asked("model.n_layer=2,4", "study.lrs=[0.1]", "study.seeds=1")
    assert {plan.config(cell).model.n_layer for cell in plan.cells.values()} == {2, 4}


def test_a_plan_is_read_as_it_was_written(tmp_path):
    plan = asked(*QUESTION, "tracker.tags=[a,b]", "model.attn.soft_cap=30")
    plan.save(tmp_path)
    again = load(tmp_path)
    assert again == plan
    assert [again.config(cell) for cell in again.cells.values()] == [plan.config(c) for c in plan.cells.values()]


def test_what_is_planned_is_frozen(tmp_path):
    """A configuration file that is edited later moves no cell."""
    (tmp_path / "conf" / "variant").mkdir(parents=True)
    mine = tmp_path / "conf" / "variant" / "mine.yaml"
    mine.write_text("# @package _global_\nmodel: {attn: {soft_cap: 20.0}}\n")
    words = f"hydra.searchpath=[file://{tmp_path / 'conf'}]", "study.lrs=[0.1]", "study.variants=[mine]"
    asked(*words).save(tmp_path)
    mine.write_text("# @package _global_\nmodel: {attn: {soft_cap: 10.0}}\n")
    plan = load(tmp_path)
    assert {plan.config(cell).model.attn.soft_cap for cell in plan.cells.values()} == {20.0}
    with pytest.raises(UserError, match=r"model.attn.soft_cap=20.0 \(now 10.0\)"):
        extended(plan, asked(*words))


def test_a_larger_question_extends_and_keeps_its_folder():
    folder = planned(list(QUESTION))[1]
    for more in ("study.variants=[qk_norm,soft_cap]", "study.lrs=[3e-2]", "study.seeds=3", "optim.lr=1e-2,0.5"):
        larger, there, _ = planned([*QUESTION[:0], *(w for w in QUESTION if w[:9] != more[:9]), more])
        assert there == folder, more
        both = extended(asked(*QUESTION), larger)
        assert places(both) == sorted(set(places(asked(*QUESTION))) | set(places(larger)))
    assert planned([*QUESTION, "train.steps=30"])[1] != folder
    assert extended(asked(*QUESTION), asked(*QUESTION)) == asked(*QUESTION)


def test_a_contradicting_question_is_refused():
    with pytest.raises(UserError, match=r"train.steps=500 \(now 30\)"):
        extended(asked(*QUESTION), asked(*QUESTION, "train.steps=30"))
    search = "study.strategy=frontier", "study.lr_range=[1e-3,1]", "study.variants=[baseline]"
    with pytest.raises(UserError, match=r"strategy=grid \(now frontier\)"):
        extended(asked(*QUESTION), asked(*search))


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("study.lrs=[]",), "study.lrs"),
        (("study.lrs=[1e-2,0.01]",), "study.lrs: 0.01 is there twice"),
        (("study.lrs=[1e-2,-1e-2]",), "optim.lr=-0.01: must be above 0"),
        (("optim.lr=1e-2,fast",), "optim.lr=fast: it must be a number"),
        (("study.lrs=[fast]",), "study.lrs"),
        (("study.lrs=[1e-2]", "study.variants=[baseline,qk_nrom]"), "qk_nrom"),
        (("study.lrs=[1e-2]", "study.variants=[qk_norm,qk_norm]"), "qk_norm is there twice"),
        (("study.lrs=[1e-2]", "seed=0,0"), "seed: 0 is there twice"),
        (("study.lrs=[1e-2]", "study.seeds=0"), "study.seeds=0: must be at least 1"),
        (("study.lrs=[1e-2]", "study.strategy=guess"), "study.strategy=guess"),
        (("study.strategy=frontier",), "study.lr_range=[]"),
        (("study.strategy=frontier", "study.lr_range=[1,1e-3]"), "the lower first"),
        (("study.strategy=frontier", "study.lr_range=[1e-3,1]", "study.lrs=[0.1]"), "it takes study.lr_range"),
        (("study.lrs=[20]",), "optim.weight_decay"),
        (("study.lrs=[1e-2]", "model.n_head=2,3"), "model.n_head=3: must divide"),
        (("study.lrs=[1e-2]", "seed=0,99999999999"), "seed=99999999999"),
    ],
)
def test_bad_studies_are_refused_before_anything_runs(words, said):
    with pytest.raises(UserError) as error:
        asked(*words)
    assert said in str(error.value)


@pytest.mark.parametrize("content", ["", "format: 1\n", "{", "format: 9\narms: {}\ncells: []\n", "[1]"])
def test_a_damaged_plan_is_named(tmp_path, content):
    (tmp_path / "study.yaml").write_text(content)
    with pytest.raises(UserError, match=r"study\.yaml"):
        load(tmp_path)
    with pytest.raises(UserError, match="it is no study"):
        load(tmp_path / "nowhere")


def test_two_thousand_cells_are_few(tmp_path):
    rates = ",".join(str(1e-3 * 1.2**k) for k in range(20))
    before, began = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.monotonic()
    plan = asked(
        "study.variants=[baseline,qk_norm,qk_norm_cap,qkv_norm,qk_fc_norm]", f"study.lrs=[{rates}]", "study.seeds=20"
    )
    plan.save(tmp_path)
    assert len(load(tmp_path).cells) == 2000
    print(f"{time.monotonic() - began:.2f} s")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300_000


def test_runs_of_a_study_are_one_group_with_names_that_read():
    words = "study.variants=[qk_norm]", "study.lrs=[0.2]"
    plan, directory, _ = planned([*words, "model.n_layer=1,2"])
    trackers = [plan.config(cell).tracker for cell in plan.cells.values()]
    assert {tracker.group for tracker in trackers} == {directory.name}
    assert [tracker.run_name for tracker in trackers[:2]] == [f"qk_norm n_layer=1 lr=0.2 s{seed}" for seed in (0, 1)]
    named, _, _ = planned([*words, "tracker.group=mine"])
    assert {config.tracker.group for config in named.arms.values()} == {"mine"}


EXPERIMENTS = {
    "quickstart": (5, 25, 2, "constant"),
    "frontier": (5, 0, 3, "constant"),
    "rybakov2024_divergence": (10, 60, 1, "cosine"),
    "rybakov2024_perplexity": (6, 6, 1, "cosine"),
    "wortsman2023_sensitivity": (2, 14, 3, "cosine"),
}


def test_each_experiment_is_held_here():
    assert set(EXPERIMENTS) == {file.stem for file in (conf_dir() / "experiment").glob("*.yaml")}


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_an_experiment_plans_what_it_says(name):
    plan, directory, _ = planned([f"+experiment={name}"])
    arms, places, seeds, schedule = EXPERIMENTS[name]
    assert (len(plan.arms), len(plan.cells), len(plan.seeds)) == (arms, places * seeds, seeds)
    assert {config.schedule.kind for config in plan.arms.values()} == {schedule}
    assert directory.name.startswith(f"{name}-")


def test_the_papers_settings_are_those_of_its_facts():
    """PAPER.md's tables, sections 1 and 2, as far as the experiments take them over."""
    divergence = planned(["+experiment=rybakov2024_divergence"])[0]
    assert sorted({cell.lr for cell in divergence.cells.values()}) == [6e-3, 8e-3, 2e-2, 4e-2, 6e-2, 8e-2]
    config = divergence.arms["baseline"]
    assert config.train.batch_size * config.data.seq_len == 2_097_152
    assert (config.train.precision, config.optim.clip, config.model.n_layer) == ("bf16", 1.0, 24)
    perplexity = planned(["+experiment=rybakov2024_perplexity"])[0]
    assert tokens_of(perplexity.arms["baseline"]) == pytest.approx(0.2e12, rel=1e-4)
    wortsman = planned(["+experiment=wortsman2023_sensitivity"])[0]
    config = wortsman.arms["qk_norm"]
    assert (config.optim.z_loss, config.optim.weight_decay, config.optim.decay_independent) == (1e-4, 1e-4, True)
    assert (config.train.steps, config.schedule.warmup_steps, config.schedule.min_lr) == (100_000, 5_000, 1e-5)
    assert (config.train.batch_size, config.data.seq_len, config.model.attn.qk_norm) == (256, 512, "head")


def test_the_latest_plan_is_read_again_when_it_has_grown(tmp_path):
    plan = asked(*QUESTION)
    plan.save(tmp_path)
    latest = Latest(tmp_path)
    first = latest.plan()
    assert latest.plan() is first
    plan.add("baseline", 0.5, 0)
    plan.save(tmp_path)
    assert len(latest.plan().cells) == len(first.cells) + 1
