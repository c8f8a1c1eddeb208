"""The draw of runs to judge by eye, and the tables of agreement."""

import csv
import math

import by_eye
import pytest
from scipy.stats import beta

from stabrun.report.study_data import read


@pytest.fixture(scope="module")
def studies(made_study):
    return {"made": read(made_study)}


def test_half_of_the_runs_are_near_the_edge(studies, monkeypatch):
    """Near as it is defined, from study.json; the draw is the same each time, and no run is drawn twice."""
    monkeypatch.setattr(by_eye, "NEAR", 1.0)
    study, found = studies["made"], by_eye.drawn(studies, 4)
    assert found == by_eye.drawn(studies, 4)
    assert len({row["run_id"] for _, row in found}) == 4
    middles = {arm: one["frontier"]["standard"]["lr50"]["median"] for arm, one in study.arm_summaries.items()}
    assert sum(abs(math.log2(row["lr"]) - math.log2(middles[row["arm"]])) <= 1.0 for _, row in found) == 2


def test_the_draw_and_the_verdicts_that_are_filled_in(studies, tmp_path, monkeypatch):
    found = [("made", row) for row in studies["made"].rows[:10]]
    monkeypatch.setattr(by_eye, "drawn", lambda studies: found)
    file = tmp_path / "by_eye.csv"
    by_eye.draw(studies, file, tmp_path / "sheets")
    assert {path.name for path in (tmp_path / "sheets").iterdir()} == {"1.png", "2.png"}
    with open(file, newline="") as source:
        rows = list(csv.DictReader(source))
    assert [row["run_id"] for row in rows] == [row["run_id"] for _, row in found]
    with pytest.raises(ValueError, match="by_eye of 1, 2, 3"):
        by_eye.judged(studies, file)
    file.write_text(file.read_text().replace(",,", ",diverged,"))
    assert [one.row for one in by_eye.judged(studies, file)] == [row for _, row in found]
    with pytest.raises(FileExistsError):
        by_eye.draw(studies, file, tmp_path / "others")


def test_tables_of_agreement(studies):
    rows = studies["made"].rows[:6]
    said = ["diverged" if row["verdict"] == "converged" else row["verdict"] for row in rows[:1]]
    said += [row["verdict"] for row in rows[1:]]
    found = [
        by_eye.Judged({"number": str(k), "record": "made", "by_eye": word, "remark": "x"}, row, k < 6 - 2)
        for k, (row, word) in enumerate(zip(rows, said, strict=True))
    ]
    confusion, agreement, different = by_eye.by_eye_tables(found)
    counts = {
        (row[0].text, verdict): int(row[k].text)
        for row in confusion.rows
        for k, verdict in enumerate(by_eye.VERDICTS, 1)
    }
    assert sum(counts.values()) == 6
    assert counts["diverged", "converged"] == 1
    assert [row[1].text for row in agreement.rows] == ["4", "2"]
    low, high = beta.ppf(0.025, 3, 2), beta.ppf(0.975, 4, 1)  # Clopper and Pearson
    assert agreement.rows[0][2].text == f"3 of 4, 0.75 ({low:.2f}–{high:.2f})"
    assert [row[0].text for row in different.rows] == ["0"]
    assert len(by_eye.disagreements(studies, found).panels) == 1
