import json
import math

import pytest
from helpers import tiny

from stabrun.config import UserError
from stabrun.record import metrics as keys
from stabrun.record.jsonl import Record, dumps, number, read_rows, write_atomic
from stabrun.training.run import train


def test_numbers_that_are_not_finite_become_words():
    row = {"a": math.nan, "b": [1.5, math.inf, -math.inf], "c": 3}
    line = dumps(row)
    assert json.loads(line) == {"a": "nan", "b": [1.5, "inf", "-inf"], "c": 3}
    assert math.isnan(number("nan"))
    assert number("-inf") == -math.inf


ROWS = [f'{{"step": {step}, "train/loss": 2.5}}\n' for step in range(3)]


@pytest.mark.parametrize("tail", ["", '{"step": 3, "x"', "not json\n", '[1]\n{"step": 3}\n'])
def test_rows_end_at_the_first_line_that_is_none(tmp_path, tail):
    file = tmp_path / "metrics.jsonl"
    file.write_text("".join(ROWS) + tail)
    assert [row["step"] for row in read_rows(file)] == [0, 1, 2]
    assert [row["step"] for row in Record(tmp_path).cut(2)[0]] == [0, 1]
    assert file.read_text() == "".join(ROWS[:2])


@pytest.mark.parametrize("line", ["not json", '{"x": 1}', '{"step": 7}'])
def test_a_damaged_record_is_refused_before_it_is_cut(tmp_path, line):
    file = tmp_path / "metrics.jsonl"
    file.write_text(ROWS[0] + line + "\n" + ROWS[2])
    before = file.read_bytes()
    with pytest.raises(UserError, match="does not hold the 3 steps"):
        Record(tmp_path).cut(3)
    assert file.read_bytes() == before


def test_file_is_replaced_whole(tmp_path):
    file = tmp_path / "summary.json"
    write_atomic(file, "old")
    with pytest.raises(UnicodeEncodeError):
        write_atomic(file, "new \ud800")
    assert file.read_text() == "old"
    assert list(tmp_path.iterdir()) == [file]


def test_keys_of_a_run_are_those_of_the_table(tmp_path):
    train(tiny(f"run_dir={tmp_path / 'run'}", "train.steps=11", "train.precision=fp16", "optim.z_loss=1e-4"))
    rows = list(read_rows(tmp_path / "run" / "metrics.jsonl"))
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
    from pathlib import Path

    page = Path(__file__).parent.parent / "docs" / "metrics.md"
    assert page.read_text() == keys.table() + "\n", "run `make docs`"
