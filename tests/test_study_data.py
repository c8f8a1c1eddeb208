"""Reading a study or a run for a report: damaged lines are noted and left out."""

import pytest

from stabrun.config import UserError
from stabrun.record.run_dir import RunDir
from stabrun.report.study_data import read, read_results, read_rows


def test_a_damaged_line_is_noted_and_left_out(made_study, tmp_path):
    run = next((made_study / "runs").iterdir())
    lines = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    file = tmp_path / "run" / "metrics.jsonl"
    file.parent.mkdir()
    file.write_text("".join([*lines[:5], lines[5][:40] + "\n", *lines[6:9], lines[9][:50]]))
    notes = []
    assert [row["step"] for row in read_rows(RunDir(file.parent), notes)] == [0, 1, 2, 3, 4, 6, 7, 8]
    assert notes == [
        "run/metrics.jsonl: line 6 is not a row of a record; it was left out.",
        "run/metrics.jsonl: line 10 is incomplete; it was left out.",
    ]
    text = (made_study / "results.csv").read_text()
    (tmp_path / "results.csv").write_text(text[:-20])
    notes = []
    assert len(list(read_results(tmp_path / "results.csv", notes))) == 11
    assert notes == ["results.csv: line 13 is damaged; it was left out."]


def test_a_directory_without_a_study_or_run_is_refused(tmp_path):
    with pytest.raises(UserError, match="neither a study nor a run"):
        read(tmp_path)
