"""The table of what lr50 owes to the rule."""

import csv
import json

import pytest

from stabrun.report import tables
from stabrun.report.strictness import strictness
from stabrun.report.study_data import read
from stabrun.study.frontier import Frontier
from stabrun.study.search import parameter_grid


def parsed(table):
    return list(csv.DictReader(tables.as_csv(table).splitlines()))


def test_lr50_by_strictness_is_that_of_study_json(made_study):
    study = read(made_study)
    expected = json.loads((made_study / "study.json").read_text())["variants"]
    rows = parsed(strictness(study))
    for row in rows:
        for level in ("lenient", "standard", "strict"):
            found = expected[row["variant"]]["frontier"][level]
            assert float(row[f"lr50_{level}"]) == found["lr50"]["median"]
            assert row[f"over_qk_norm_{level}"] == str(found["over"].get("qk_norm", {}).get("median", ""))
    assert [row["rank_standard"] for row in rows] == ["2", "1"]


@pytest.mark.parametrize(("word", "diverged"), [("diverged", True), ("stable", False)])
def test_undecided_runs_counted_as_diverged_or_stable(made_study, word, diverged):
    """As the posterior of the same runs with this outcome for those that are undecided."""
    study = read(made_study)
    own = [row for row in study.rows if row["arm"] == "baseline"]
    for row in own[2:4]:
        row["verdict"] = "undecided"
        summary = study.summaries[row["run_id"]]
        summary |= {"verdict": "undecided", "by_strictness": dict.fromkeys(summary["by_strictness"], "undecided")}
    runs = [(row["lr"], diverged if row["verdict"] == "undecided" else row["verdict"] == "diverged") for row in own]
    expected = Frontier.of(parameter_grid(study.plan), runs).rate_at(0.5)
    found = parsed(strictness(study))[0]
    assert found[f"lr50_undecided_{word}"] == str(expected["median"] or "")
    assert found[f"lr50_undecided_{word}_low"] == str(expected["low"] or "")
