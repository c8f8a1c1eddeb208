"""The table of metrics against a run's record, and a statistic added by one declaration and one reduction."""

from pathlib import Path

import pytest
from helpers import a_trainer, tiny

from stabrun.observe import reductions
from stabrun.observe.sites import linear_sites
from stabrun.record import metrics
from stabrun.record.metrics import METRICS, SCALAR, SITES, Metric, Signal
from stabrun.record.run_dir import RunDir
from stabrun.training.run import train


def test_keys_of_a_run_are_those_of_the_table(tmp_path):
    words = "train.steps=11", "train.precision=fp16", "optim.z_loss=1e-4"
    runs = []
    for recovery in ("skip", "rewind"):
        train(tiny(f"run_dir={tmp_path / recovery}", f"train.recovery={recovery}", *words))
        runs.append(RunDir(tmp_path / recovery).rows())
    rows = [one | other for one, other in zip(*runs, strict=True)]
    by_key = {key: metric for metric in METRICS.values() for key in metric.keys}
    assert set().union(*rows) == by_key.keys()
    cadence = {"observe.every": range(11), "observe.slow_every": (0, 10), "train.val_every": (10,)}
    for key, metric in by_key.items():
        expected = range(11) if metric.cadence.startswith("each step") else cadence[metric.cadence]
        assert [row["step"] for row in rows if key in row] == list(expected), key
        value = rows[10][key]
        assert isinstance(value, list) == (metric.shape != SCALAR), key
        if metric.shape != SCALAR:
            assert len(value) == (1 if key.endswith("head") else 2), key


def test_page_of_the_table_is_up_to_date():
    page = Path(__file__).parent.parent / "docs" / "metrics.md"
    assert page.read_text() == metrics.table() + "\n", "run `make docs`"


def test_each_measured_metric_has_a_reduction():
    assert {metric.key for metric in METRICS.values() if metric.source != metrics.STEP} == reductions.REDUCTIONS.keys()


def test_each_metric_names_a_source_and_a_merge():
    for metric in METRICS.values():
        assert metric.source in metrics.SOURCES
        assert metric.merge in metrics.MERGES
        assert [metrics.find(key) for key in metric.keys] == [metric] * len(metric.keys)


@pytest.mark.parametrize(
    ("key", "layer", "where"),
    [
        ("norm/out/fc2", 3, "layer_03/fc2"),
        ("norm/out/head", None, "head"),
        ("norm/out/encoder.SelfAttention.q", 5, "layer_05/encoder.SelfAttention.q"),
        ("norm/out/up", 0, "layer_00/up"),
        ("residual/norm", 12, "layer_12"),
        ("residual/norm/encoder", 3, "layer_03/encoder"),
        ("grad/norm", None, None),
        ("grad/norm/encoder", 0, None),
    ],
)
def test_place_of_a_value(key, layer, where):
    assert metrics.place(key, layer) == where


MADE_UP = Metric(
    "largest/out/{site}", "largest output", "1", metrics.OUTPUT, metrics.EVERY, "max",
    "largest absolute value of the layer's output", Signal("largest_output"),
)  # fmt: skip


@pytest.fixture
def made_up(monkeypatch):
    """A statistic: one declaration and one reduction."""
    monkeypatch.setitem(METRICS, MADE_UP.key, MADE_UP)
    monkeypatch.setitem(reductions.REDUCTIONS, MADE_UP.key, lambda output: output.abs().amax())


@pytest.mark.usefixtures("made_up")
def test_a_new_statistic_is_recorded():
    words = "train.micro_batch_size=2", "train.batch_size=4"
    trainer = a_trainer(tiny(*words))
    largest = dict.fromkeys(SITES, 0.0)
    for site, layers in linear_sites(trainer.model).items():
        (layer,) = layers[0].modules.values()
        layer.register_forward_hook(
            lambda m, x, y, site=site: largest.update({site: max(largest[site], float(y.detach().abs().max()))})
        )
    row = trainer.step(0).read()
    assert {site: row[f"largest/out/{site}"][0] for site in SITES} == largest
    assert "largest/out/qkv" in trainer.step(1).read()
    assert row.keys() - {f"largest/out/{site}" for site in SITES} == without(words).keys()


def without(words):
    """The first row of the same run by the table without the new statistic."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delitem(METRICS, MADE_UP.key)
        return a_trainer(tiny(*words)).step(0).read()


@pytest.mark.usefixtures("made_up")
def test_a_new_statistic_is_documented_and_raises_its_signal():
    from stabrun.verdict.judge import Judge

    assert "| `largest/out/{site}` | largest absolute value of the layer's output |" in metrics.table()
    judge = Judge()
    for step in range(100):
        largest = [1.0 + 0.01 * (step % 3), 50.0 if step > 60 else 1.0]
        judge.add({"step": step, "train/loss": 5.0 - 0.01 * step, "largest/out/fc1": largest})
    assert judge.conclude().signals == {"largest_output": {"step": 61, "site": "layer_01/fc1", "lead": None}}


@pytest.mark.usefixtures("made_up")
def test_a_new_statistic_has_wandb_panels():
    pytest.importorskip("wandb_workspaces")
    from stabrun.publish.dashboard import all_sections

    panels = all_sections()[MADE_UP.label]
    assert [panel.title for panel in panels] == MADE_UP.keys
    assert all(panel.title_y == MADE_UP.title for panel in panels)
