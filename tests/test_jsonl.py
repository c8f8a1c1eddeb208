"""JSON lines: numbers that are not finite, lines that are not rows, and files replaced in one step."""

import json
import math
import random
import re

import pytest

from stabrun.record.jsonl import append_line, dumps, number, read_last, read_lines, sealed, write_atomic


def test_numbers_that_are_not_finite_become_strings():
    row = {"a": math.nan, "b": [1.5, math.inf, -math.inf], "c": 3}
    line = dumps(row)
    assert json.loads(line) == {"a": "nan", "b": [1.5, "inf", "-inf"], "c": 3}
    assert math.isnan(number("nan"))
    assert number("-inf") == -math.inf


def test_every_line_is_read_with_what_it_is(tmp_path):
    file = tmp_path / "file.jsonl"
    file.write_bytes(b'{"a": 1}\nnot json\n[1]\n{"a": 2}')
    assert list(read_lines(file)) == [({"a": 1}, True, 9), (None, True, 18), (None, True, 22), (None, False, 30)]
    assert list(read_lines(tmp_path / "nothing")) == []


def test_a_line_is_appended_after_an_incomplete_one(tmp_path):
    file = tmp_path / "file.jsonl"
    for incomplete in ("", '{"a": 1}\n', '{"a'):
        file.write_text(incomplete)
        append_line(file, {"b": math.nan})
        assert file.read_text() == incomplete + "\n" * (incomplete == '{"a') + sealed('{"b": "nan"}') + "\n"


def test_a_file_is_replaced_in_one_step(tmp_path):
    file = tmp_path / "summary.json"
    write_atomic(file, "old")
    with pytest.raises(UnicodeEncodeError):
        write_atomic(file, "new \ud800")
    assert file.read_text() == "old"
    assert list(tmp_path.iterdir()) == [file]


def test_the_last_line_is_read_from_the_end(tmp_path):
    """It is the one that a complete reading finds, for incomplete files and rows longer than the piece read first."""
    dice, file = random.Random(0), tmp_path / "metrics.jsonl"
    assert read_last(file) is None
    rows = [{"step": step, "pad": "x" * dice.choice([0, 100, 70_000, 300_000])} for step in range(12)]
    whole = "".join(json.dumps(row) + "\n" for row in rows).encode()
    ends = [match.end() for match in re.finditer(rb"\n", whole)]
    for cut in [0, 1, *(end + shift for end in ends for shift in (-1, 0, 1)), *dice.sample(range(len(whole)), 20)]:
        file.write_bytes(whole[:cut])
        whole_lines = [line.value for line in read_lines(file) if line.terminated]
        assert read_last(file) == (whole_lines or [None])[-1]
