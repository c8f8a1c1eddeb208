"""Where diverged runs break, compared to the records of a study that was made up."""

import csv
import json
import math
import shutil
from statistics import median

from made import a_study

from stabrun.record.run_dir import RunDir
from stabrun.report import breaking, tables
from stabrun.report.study_data import read


def parsed(table):
    return list(csv.DictReader(tables.as_csv(table).splitlines()))


def test_first_sites_by_arm_site_and_layer(made_study):
    study = read(made_study)
    lost = [row for row in study.rows if row["verdict"] == "diverged"]
    sites = ["layer_01/fc2", "layer_00/fc2", "layer_01/qkv", "head", None, ""]
    for row, site in zip(lost, sites, strict=False):
        row["first_bad_site"] = site
    assert len(lost) >= len(sites)
    rows = {row["variant"]: row for row in parsed(breaking.first_sites(study))}
    assert list(rows) == ["baseline", "qk_norm", "all"]
    for arm, row in rows.items():
        own = [other["first_bad_site"] or "" for other in lost if arm in (other["arm"], "all")]
        assert int(row["runs"]) == len(own) > 0
        for site in ("qkv", "proj", "fc1", "fc2", "head"):
            assert int(row[site]) == sum(place.endswith(site) for place in own)
        for layer in ("layer_00", "layer_01"):
            assert int(row[layer]) == sum(place.startswith(layer) for place in own)
        assert int(row["unknown"]) == own.count("")


def test_growth_is_that_of_the_first_bad_step(made_study):
    """By hand: norms of each diverged run and of the highest converged run of its arm, the mean of logarithms."""
    study, ratios = read(made_study), []
    for arm in study.plan.arms:
        own = [row for row in study.rows if row["arm"] == arm]
        reference = max(
            (row for row in own if row["verdict"] == "converged"), key=lambda row: (row["lr"], -row["seed"])
        )
        for row in own:
            if row["verdict"] == "diverged":
                over, under = (
                    list(RunDir(made_study / "runs" / one["run_id"]).rows())[row["first_bad_step"]]["norm/out/proj"]
                    for one in (row, reference)
                )
                ratios.append(math.prod(a / b for a, b in zip(over, under, strict=True)) ** (1 / len(over)))
    assert len(ratios) > 3
    row = next(row for row in parsed(breaking.growth(study)) if (row["norm"], row["site"]) == ("out", "proj"))
    assert int(row["runs"]) == len(ratios)
    assert math.isclose(float(row["median"]), median(ratios), rel_tol=1e-9)
    assert int(row["above"]) == sum(ratio > 2 for ratio in ratios)


def test_a_study_without_diverged_runs_has_neither(tmp_path):
    a_study(tmp_path, edges={"baseline": 9.0, "qk_norm": 9.0})
    study = read(tmp_path)
    assert breaking.first_sites(study) is breaking.growth(study) is None


def test_a_norm_that_is_not_finite_has_grown_without_bound(made_study, tmp_path):
    shutil.copytree(made_study, tmp_path / "study")
    study = read(tmp_path / "study")
    row = next(row for row in study.rows if row["verdict"] == "diverged")
    record = RunDir(tmp_path / "study" / "runs" / row["run_id"]).metrics
    lines = [json.loads(line) for line in record.read_text().splitlines()]
    for line in lines[row["first_bad_step"] :]:
        line["norm/out/fc2"] = ["inf"] * len(line["norm/out/fc2"])
    record.write_text("".join(json.dumps(line) + "\n" for line in lines))
    rows = {(row["norm"], row["site"]): row for row in parsed(breaking.growth(study))}
    assert int(rows["out", "fc2"]["largest"]) > int(rows["out", "qkv"]["largest"]) >= 0
