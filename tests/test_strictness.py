"""The table of what lr50 owes to the rule."""

import csv
import json

import pytest

from stabrun.report import tables
from stabrun.report.strictness import rank, strictness
from stabrun.report.study_data import read
from stabrun.study.facts import known_end
from stabrun.study.frontier import Frontier, ratio
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


@pytest.mark.parametrize(
    ("name", "verdict", "diverged"),
    [("undecided_diverged", "undecided", True), ("undecided_stable", "undecided", False),
     ("recovered_diverged", "recovered", True)],
)  # fmt: skip
def test_runs_counted_otherwise(made_study, name, verdict, diverged):
    """As the posterior of the same runs with this outcome for those of the verdict."""
    study = read(made_study)
    own = [row for row in study.rows if row["arm"] == "baseline"]
    for row in own[2:4]:
        row["verdict"] = verdict
        summary = study.summaries[row["run_id"]]
        summary |= {"verdict": verdict, "by_strictness": dict.fromkeys(summary["by_strictness"], verdict)}
    runs = [(row["lr"], diverged if row["verdict"] == verdict else row["verdict"] == "diverged") for row in own]
    expected = Frontier.of(parameter_grid(study.plan), runs).rate_at(0.5)
    found = parsed(strictness(study))[0]
    assert found[f"lr50_{name}"] == str(expected["median"] or "")
    assert found[f"lr50_{name}_low"] == str(expected["low"] or "")
    other = [(row["lr"], row["verdict"] == "diverged") for row in study.rows if row["arm"] == "qk_norm"]
    grid = parameter_grid(study.plan)
    over = ratio(Frontier.of(grid, other), Frontier.of(grid, runs))
    assert parsed(strictness(study))[1][f"over_qk_norm_{name}"] == ""
    if over["median"]:
        assert float(found[f"over_qk_norm_{name}"]) == pytest.approx(1 / over["median"], rel=0.1)
    else:
        assert found[f"over_qk_norm_{name}"] == ""


def test_an_undecided_run_that_learned_nothing_stays_stable(made_study):
    study = read(made_study)
    row = next(row for row in study.rows if row["arm"] == "baseline")
    idle = {"verdict": "undecided", "reason": "no_learning", "by_strictness": {}, "init_loss": 5.5, "final_loss": 5.5}
    study.summaries[row["run_id"]] |= idle
    before = parsed(strictness(read(made_study)))[0]
    after = parsed(strictness(study))[0]
    assert after["lr50_undecided_diverged"] == before["lr50_undecided_diverged"] != ""


def test_a_bound_has_the_rank_of_the_bound():
    known = {"a": 0.1, "b": 0.13, "c": 0.12}
    assert [rank(known, arm) for arm in ("b", "c", "a", "d")] == [1, 2, 3, None]
    assert known_end({"median": None, "low": 0.13, "high": None}) == 0.13
