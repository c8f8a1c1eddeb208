"""The table of metrics: a run records its keys, and its page is up to date."""

from pathlib import Path

from helpers import tiny

from stabrun.record import metrics as keys
from stabrun.record.run_dir import RunDir
from stabrun.training.run import train


def test_keys_of_a_run_are_those_of_the_table(tmp_path):
    train(tiny(f"run_dir={tmp_path / 'run'}", "train.steps=11", "train.precision=fp16", "optim.z_loss=1e-4"))
    rows = list(RunDir(tmp_path / "run").rows())
    expected = {key for metric in keys.METRICS.values() for key in metric.keys}
    assert set().union(*rows) == expected
    by_key = {key: metric for metric in keys.METRICS.values() for key in metric.keys}
    cadence = {
        "observe.every": range(11),
        "observe.slow_every": (0, 10),
        "train.val_every": (10,),
    }
    for key, metric in by_key.items():
        always = metric.cadence.startswith("each step")
        assert [row["step"] for row in rows if key in row] == list(range(11) if always else cadence[metric.cadence]), (
            key
        )
        value = rows[10][key]
        assert isinstance(value, list) == (metric.shape != keys.SCALAR), key
        if metric.shape != keys.SCALAR:
            assert len(value) == (1 if key.endswith("head") else 2), key


def test_page_of_the_keys_is_up_to_date():
    page = Path(__file__).parent.parent / "docs" / "metrics.md"
    assert page.read_text() == keys.table() + "\n", "run `make docs`"
