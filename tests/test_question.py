"""The plans that overrides ask for: their cells, the packaged experiments, and what is refused."""

import itertools

import pytest
from helpers import configured
from studies import asked, points

from stabrun.config import UserError, conf_dir, run_id
from stabrun.study.cost import tokens_per_run
from stabrun.study.question import planned

QUESTION = ("study.variants=[baseline,qk_norm]", "study.lrs=[1e-2,1e-1]", "study.seeds=2")


def test_cells_are_variants_by_rates_by_seeds():
    plan = asked(*QUESTION)
    assert points(plan) == sorted(itertools.product(("baseline", "qk_norm"), (1e-2, 1e-1), (0, 1)))


def test_a_cell_is_the_run_of_the_same_overrides():
    plan = asked(*QUESTION, "train.steps=30")
    for cell in plan.cells.values():
        words = f"+variant={cell.arm}", f"optim.lr={cell.lr}", f"seed={cell.seed}", "train.steps=30"
        alone = configured(*words)
        assert cell.id == run_id(alone) == run_id(plan.config(cell))
        assert plan.config(cell).variant == cell.arm


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (("+variant=baseline,qk_norm", "optim.lr=1e-2,1e-1", "seed=range(0,2)"), points(asked(*QUESTION))),
        (("study.variants=[qk_norm+soft_cap]", "study.lrs=[0.1]", "study.seeds=1"), [("qk_norm+soft_cap", 0.1, 0)]),
        (("+variant=[qk_norm,soft_cap]", "optim.lr=0.1,0.2", "seed=5,7"), [
            ("qk_norm+soft_cap", lr, seed) for lr in (0.1, 0.2) for seed in (5, 7)
        ]),
        (("model.n_layer=2,4", "study.lrs=[0.1]", "study.seeds=1", "seed=3"), [
            ("baseline n_layer=2", 0.1, 3), ("baseline n_layer=4", 0.1, 3)
        ]),
        (("optim.weight_decay=0.1,1.1", "study.lrs=[0.1]", "study.seeds=1"), [
            ("baseline weight_decay=0.1", 0.1, 0), ("baseline weight_decay=1.1", 0.1, 0)
        ]),
    ],
    ids=["Hydra's syntax", "a variant of two", "as for train", "a further axis", "values with a point"],
)  # fmt: skip
def test_equivalent_overrides(words, expected):
    assert points(asked(*words)) == sorted(expected)


def test_one_learning_rate_is_that_of_the_study():
    assert points(asked("optim.lr=0.3", "study.seeds=1")) == [("baseline", 0.3, 0)]


def test_a_further_axis_is_in_the_configuration():
    plan = asked("model.n_layer=2,4", "study.lrs=[0.1]", "study.seeds=1")
    assert {plan.config(cell).model.n_layer for cell in plan.cells.values()} == {2, 4}


def test_an_arm_with_settings_of_its_own():
    """It is the run of the same words of `stabrun train`, and its name tells keys with the same last part apart."""
    entries = "baseline", "qk_norm model.attn.out_norm=true", "qk_norm  model.mlp.out_norm=true", "soft_cap model=mini"
    plan = asked(f"study.variants=[{','.join(map(repr, entries))}]", "study.lrs=[0.1]", "study.seeds=1")
    assert list(plan.arms) == [
        "baseline", "qk_norm attn.out_norm=true", "qk_norm mlp.out_norm=true", "soft_cap model=mini"
    ]  # fmt: skip
    for cell, entry in zip(plan.cells.values(), entries, strict=True):
        variant, *words = entry.split()
        assert cell.id == run_id(configured(f"+variant={variant}", *words, "optim.lr=0.1"))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("study.lrs=[]",), "study.lrs"),
        (("study.lrs=[1e-2,0.01]",), "study.lrs: 0.01 is given twice"),
        (("study.lrs=[1e-2,-1e-2]",), "optim.lr=-0.01: must be above 0"),
        (("optim.lr=1e-2,fast",), "optim.lr=fast: must be a number"),
        (("study.lrs=[fast]",), "study.lrs"),
        (("study.lrs=[1e-2]", "study.variants=[baseline,qk_nrom]"), "qk_nrom"),
        (("study.lrs=[1e-2]", "study.variants=[qk_norm,qk_norm]"), "qk_norm is given twice"),
        (("study.lrs=[1e-2]", "study.variants=['qk_norm optim.lr=1']"), "optim.lr cannot be set for a single arm"),
        (("study.lrs=[1e-2]", "study.variants=['qk_norm study.seeds=1']"), "study.seeds cannot be set for a single"),
        (("study.lrs=[1e-2]", "study.variants=['qk_norm model.n_layer']"), "model.n_layer is not KEY=VALUE"),
        (("study.lrs=[1e-2]", "study.variants=['qk_norm model.n_layer=1,2']"), "model.n_layer takes one value"),
        (("study.lrs=[1e-2]", "study.variants=['qk_norm train.threads=2']"), "does not change what is computed"),
        (("study.lrs=[1e-2]", "study.variants=['qk_norm model.n_layer=1']", "model.n_layer=2,3"), "is swept as well"),
        (("study.lrs=[1e-2]", "study.variants=['qk_norm model.n_layer=4',qk_norm]"), "are the same configuration"),
        (("study.lrs=[1e-2]", "study.variants=['qk_norm ++model.n_layer=1']", "model.n_layer=2,3"), "is swept as well"),
        (("study.lrs=[1e-2]", "study.variants=['qk_norm ++train.threads=2']"), "does not change what is computed"),
        (("study.lrs=[1e-2]", "study.variants=['qk_norm tracker=none']"), "does not change what is computed"),
        (
            ("study.strategy=frontier", "study.lr_range=[0.1,1]", "study.variants=['qk_norm schedule=cosine']"),
            "a search keeps",
        ),
        (("study.lrs=[1e-2]", "study.variants=['']"), "study.variants: an entry is empty"),
        (("study.lrs=[1e-2]", "seed=0,0"), "seed: 0 is given twice"),
        (("study.lrs=[1e-2]", "study.seeds=0"), "study.seeds=0: must be at least 1"),
        (("study.lrs=[1e-2]", "study.strategy=guess"), "study.strategy=guess"),
        (("study.strategy=frontier",), "study.lr_range=[]"),
        (("study.strategy=frontier", "study.lr_range=[1,1e-3]"), "the lower first"),
        (("study.strategy=frontier", "study.lr_range=[1e-3,1]", "study.lrs=[0.1]"), "use study.lr_range"),
        (("study.lrs=[20]",), "optim.weight_decay"),
        (("study.lrs=[1e-2]", "model.n_head=2,3"), "model.n_head=3: must divide"),
        (("study.lrs=[1e-2]", "seed=0,99999999999"), "seed=99999999999"),
        (("study.lrs=[1e-2]", "seed=0.5,1.7"), "seed=0.5: must be a whole number"),
        (("study.lrs=[1e-2]", "seed=0,inf"), "seed=inf: must be a whole number"),
        (("study.lrs=[1e-2]", "seed=0,nan"), "seed=nan: must be a whole number"),
        (("study.lrs=[1e-2]", "optim.lr=0.3"), "optim.lr=0.3 and study.lrs=[1e-2] both say what to train"),
        (("study.lrs=[1e-2]", "seed=0,1", "study.seeds=2"), "seed=0,1 and study.seeds=2 both say"),
        (("study.lrs=[1e-2]", "+variant=qk_norm", "study.variants=[baseline]"), "both say what to train"),
        (("study.lrs=[1e-2]", "model.n_layer=1,2", "model.n_layer=3"), "model.n_layer=1,2 and model.n_layer=3: give"),
        (("study.lrs=[1e-2]", "train.threads=1,2"), "train.threads=1,2: does not change what is computed"),
        (("study.lrs=[1e-2]", "schedule.min_lr=${optim.lr}"), "schedule.min_lr: depends on the learning rate"),
        (("study.lrs=[1e-2]", "tracker.run_name=run_${seed}"), "tracker.run_name: depends on the learning rate"),
        (("study.lrs=[1e-2]", "tracker.tags=[a,'${optim.lr}']"), "tracker.tags: depends on the learning rate"),
    ],
)
def test_invalid_studies_are_refused(words, message):
    with pytest.raises(UserError) as error:
        asked(*words)
    assert message in str(error.value)


def test_runs_of_a_study_are_one_group_with_readable_names():
    words = "study.variants=[qk_norm]", "study.lrs=[0.2]"
    plan, directory, _ = planned([*words, "model.n_layer=1,2"])
    trackers = [plan.config(cell).tracker for cell in plan.cells.values()]
    assert {tracker.group for tracker in trackers} == {directory.name}
    assert [tracker.run_name for tracker in trackers[:2]] == [f"qk_norm n_layer=1 lr=0.2 s{seed}" for seed in (0, 1)]
    named, _, _ = planned([*words, "tracker.group=mine"])
    assert {config.tracker.group for config in named.arms.values()} == {"mine"}


EXPERIMENTS = {
    "quickstart": (5, 25, 2, "constant"),
    "demo": (5, 0, 3, "constant"),
    "frontier": (5, 0, 3, "constant"),
    "rybakov_nano": (11, 0, 3, "constant"),
    "rybakov_nano_cosine": (11, 66, 5, "cosine"),
    "placements_nano": (12, 0, 3, "constant"),
    "ablations_nano": (23, 0, 3, "constant"),
    "rybakov_mini": (10, 60, 3, "cosine"),
    "scale_nano_mini_micro": (16, 0, 3, "constant"),
    "rybakov2024_divergence": (10, 60, 1, "cosine"),
    "rybakov2024_perplexity": (6, 6, 1, "cosine"),
    "wortsman2023_sensitivity": (2, 14, 3, "cosine"),
}


def test_all_experiments_are_tested():
    assert set(EXPERIMENTS) == {file.stem for file in (conf_dir() / "experiment").glob("*.yaml")}


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_an_experiment_plans_its_cells(name):
    plan, directory, _ = planned([f"+experiment={name}"])
    arms, points, seeds, schedule = EXPERIMENTS[name]
    assert (len(plan.arms), len(plan.cells), len(plan.seeds)) == (arms, points * seeds, seeds)
    assert {config.schedule.kind for config in plan.arms.values()} == {schedule}
    assert directory.name.startswith(f"{name}-")


def test_settings_of_the_papers():
    """Tables of PAPER.md, sections 1 and 2, as far as the experiments use them."""
    divergence = planned(["+experiment=rybakov2024_divergence"])[0]
    assert sorted({cell.lr for cell in divergence.cells.values()}) == [6e-3, 8e-3, 2e-2, 4e-2, 6e-2, 8e-2]
    config = divergence.arms["baseline"]
    assert config.train.batch_size * config.data.seq_len == 2_097_152
    assert (config.train.precision, config.optim.clip, config.model.n_layer) == ("bf16", 1.0, 24)
    perplexity = planned(["+experiment=rybakov2024_perplexity"])[0]
    assert tokens_per_run(perplexity.arms["baseline"]) == pytest.approx(0.2e12, rel=1e-4)
    wortsman = planned(["+experiment=wortsman2023_sensitivity"])[0]
    config = wortsman.arms["qk_norm"]
    assert (config.optim.z_loss, config.optim.weight_decay, config.optim.decay_independent) == (1e-4, 1e-4, True)
    assert (config.train.steps, config.schedule.warmup_steps, config.schedule.min_lr) == (100_000, 5_000, 1e-5)
    assert (config.train.batch_size, config.data.seq_len, config.model.attn.qk_norm) == (256, 512, "head")
