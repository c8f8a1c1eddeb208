"""The tables of a report compared to `study.json` and `results.csv`."""

import csv
import json
import math
import shutil
from statistics import median

import pytest
from made import a_study

from stabrun.record.run_dir import RunDir
from stabrun.report import tables
from stabrun.report.run_curves import read_curves
from stabrun.report.selection import stable_and_diverged
from stabrun.report.study_data import read


def parsed(table):
    return list(csv.DictReader(tables.as_csv(table).splitlines()))


def test_variants_are_those_of_study_json(made_study):
    expected = json.loads((made_study / "study.json").read_text())["variants"]
    rows = parsed(tables.variants(read(made_study)))
    assert [row["variant"] for row in rows] == list(expected)
    for row in rows:
        arm = expected[row["variant"]]
        assert int(row["diverged"]) == sum(point["diverged"] for point in arm["runs"]) > 0
        for name, strictness in (("lr50", "standard"), ("lr50_strict", "strict"), ("lr50_lenient", "lenient")):
            ends = arm["frontier"][strictness]["lr50"]
            assert [row[name], row[f"{name}_low"], row[f"{name}_high"]] == [
                "" if ends[end] is None else str(ends[end]) for end in ("median", "low", "high")
            ]
        for name in ("lr_sensitivity", "best_final_loss"):
            assert float(row[f"{name}_low"]) == arm[name]["low"]
        assert float(row["best_perplexity"]) == pytest.approx(math.exp(arm["best_final_loss"]["value"]))
    assert float(rows[1]["gain"]) == expected["qk_norm"]["gain"]["value"]


def test_totals_are_sums_over_results_csv(made_study):
    with open(made_study / "results.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    (total,) = parsed(tables.totals(read(made_study)))
    assert (int(total["runs"]), int(total["variants"])) == (len(rows), 2)
    assert int(total["tokens"]) == sum(int(row["tokens"]) for row in rows) > 0
    assert float(total["hours"]) * 3600 == pytest.approx(sum(float(row["seconds"]) for row in rows))


def test_outcomes_are_counts_and_medians_over_results_csv(made_study):
    with open(made_study / "results.csv", newline="") as file:
        results = list(csv.DictReader(file))
    for row in parsed(tables.outcomes(read(made_study))):
        own = [other for other in results if other["arm"] == row["variant"]]
        for verdict in ("converged", "recovered", "diverged", "undecided"):
            rises = [float(one["final_loss"]) - float(one["best_loss"]) for one in own if one["verdict"] == verdict]
            assert int(row[verdict]) == len(rises)
            assert row[f"rise_{verdict}"] == (str(median(rises)) if rises else "")
        lost = [
            one for one in own if one["verdict"] == "diverged" and float(one["final_loss"]) > float(one["init_loss"])
        ]
        assert int(row["above_first"]) == len(lost)


def test_runs_are_those_of_results_csv(made_study):
    with open(made_study / "results.csv", newline="") as file:
        expected = list(csv.DictReader(file))
    rows = parsed(tables.runs(read(made_study)))
    assert len(rows) == 12
    for row, other in zip(rows, expected, strict=True):
        assert list(row) == list(other)
        for key, value in other.items():
            assert row[key] == value or float(row[key]) == float(value), key


def test_text_is_escaped_in_markdown_and_latex():
    cell = tables.plain("<script>alert(1)</script>|a_b\\")
    table = tables.Table("t", "T", [tables.Column("a", "a")], [[cell]])
    assert r"&lt;script&gt;alert(1)&lt;/script&gt;\|a\_b\\" in tables.as_markdown(table)
    assert r"\textless{}script\textgreater{}alert(1)\textless{}/script\textgreater{}|a\_b" in tables.as_latex(table)


def test_norm_ratios_of_two_runs(made_study):
    study = read(made_study)
    sides = list(stable_and_diverged(study.rows))
    table = tables.norm_ratios(sides, {row["run_id"]: read_curves(study, row["run_id"]) for row in sides})
    last = int(table.columns[-1].key.removeprefix("step_"))
    rows = [list(RunDir(made_study / "runs" / row["run_id"]).rows())[last] for row in sides]
    stable, diverged = (row["norm/out/qkv"][1] for row in rows)
    assert [cell.values[0] for cell in table.rows[1]][:3] == ["out", "qkv", 1]
    assert table.rows[1][-1].values[0] == diverged / stable > 2


def test_two_studies_side_by_side(made_study, tmp_path):
    a_study(tmp_path / "two", "model.n_layer=1", skip=3)
    studies = {"A": read(made_study), "B": read(tmp_path / "two")}
    row = parsed(tables.comparison(studies))[0]
    baselines = [
        json.loads((path / "study.json").read_text())["variants"]["baseline"] for path in (made_study, tmp_path / "two")
    ]
    assert [row["lr50_a"], row["lr50_b"]] == [str(arm["frontier"]["standard"]["lr50"]["median"]) for arm in baselines]


def test_a_run_beside_a_run_of_another_variant(made_study, tmp_path):
    rows = read(made_study).rows
    runs = [next(row["run_id"] for row in rows if row["arm"] == arm) for arm in ("baseline", "qk_norm")]
    for run in runs:
        shutil.copytree(made_study / "runs" / run, tmp_path / run)
    first, second = parsed(tables.comparison({run: read(tmp_path / run) for run in runs}))
    assert (first["verdict_a"], first["verdict_b"]) == ("converged", "")
    assert (second["verdict_a"], second["verdict_b"]) == ("", "converged")
