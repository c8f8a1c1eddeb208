"""The draw of runs to judge by eye, and the tables of agreement."""

import csv
import math
from collections import Counter

import by_eye
import pytest
from scipy.stats import beta

from stabrun.report.study_data import read


@pytest.fixture(scope="module")
def studies(made_study):
    return {"made": read(made_study)}


def test_half_of_the_runs_are_near_the_edge(studies, monkeypatch):
    """`near` as it is defined, from study.json; the draw is the same each time, and no run is drawn twice."""
    monkeypatch.setattr(by_eye, "NEAR", 1.0)
    study, found = studies["made"], by_eye.drawn(studies, 4)
    assert found == by_eye.drawn(studies, 4)
    assert len({row["run_id"] for _, row, _ in found}) == 4
    assert Counter(near for _, _, near in found) == {True: 2, False: 2}
    for _, row, near in found:
        middle = study.arm_summaries[row["arm"]]["frontier"]["standard"]["lr50"]["median"]
        assert near == (abs(math.log2(row["lr"]) - math.log2(middle)) <= 1.0)


def test_pictures_tell_nothing_but_the_loss(studies, tmp_path, monkeypatch):
    monkeypatch.setattr(by_eye, "NEAR", 1.0)
    monkeypatch.setattr(by_eye, "drawn", lambda studies: found)
    found = [("made", row, True) for row in studies["made"].rows[:10]]
    by_eye.draw(studies, tmp_path / "by_eye.csv", tmp_path / "sheets")
    assert {path.name for path in (tmp_path / "sheets").iterdir()} == {"1.png", "2.png"}
    with open(tmp_path / "by_eye.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["run_id"] for row in rows] == [row["run_id"] for _, row, _ in found]
    assert {row["by_eye"] for row in rows} == {""}


def test_tables_of_agreement(studies):
    rows = studies["made"].rows[:6]
    said = ["diverged" if row["verdict"] == "converged" else row["verdict"] for row in rows[:1]]
    said += [row["verdict"] for row in rows[1:]]
    found = [
        by_eye.Judged({"number": str(k), "record": "made", "by_eye": word, "near": str(k % 2), "remark": "x"}, row)
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
    assert [row[1].text for row in agreement.rows] == ["6", "3", "3"]
    low, high = beta.ppf(0.025, 5, 2), beta.ppf(0.975, 6, 1)  # Clopper and Pearson
    assert agreement.rows[0][2].text == f"5 of 6, 0.83 ({low:.2f}–{high:.2f})"
    assert [row[0].text for row in different.rows] == ["0"]
    assert len(by_eye.disagreements(studies, found).panels) == 1
