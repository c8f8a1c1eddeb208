"""Where diverged runs break, compared to the records of a study that was made up."""

import csv
import json
import math
import shutil
from statistics import median

import pytest
from made import a_study

from stabrun.publish.pack import pack, unpack
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


@pytest.fixture
def uneven(made_study, tmp_path):
    """The made-up study, with norms that differ by run, site and layer."""
    directory = shutil.copytree(made_study, tmp_path / "study")
    for place, record in enumerate(sorted(directory.glob("runs/*/metrics.jsonl"))):
        rows = [json.loads(line) for line in record.read_text().splitlines()]
        for row in rows:
            for k, site in enumerate(("qkv", "proj", "fc1", "fc2")):
                norms = row[f"norm/out/{site}"]
                row[f"norm/out/{site}"] = [
                    norm * (1 + (place * 7 + k * 3 + layer * 5 + row["step"]) % 11) for layer, norm in enumerate(norms)
                ]
        record.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return directory


@pytest.mark.parametrize("site", ["qkv", "proj", "fc2"])
def test_growth_is_that_of_the_first_bad_step(uneven, site):
    """By hand: norms of each diverged run and of the highest converged run of its arm, the mean of logarithms."""
    study, ratios = read(uneven), []
    for arm in study.plan.arms:
        own = [row for row in study.rows if row["arm"] == arm]
        reference = max(
            (row for row in own if row["verdict"] == "converged"), key=lambda row: (row["lr"], -row["seed"])
        )
        for row in own:
            if row["verdict"] == "diverged":
                over, under = (
                    list(RunDir(uneven / "runs" / one["run_id"]).rows())[row["first_bad_step"]][f"norm/out/{site}"]
                    for one in (row, reference)
                )
                ratios.append(math.prod(a / b for a, b in zip(over, under, strict=True)) ** (1 / len(over)))
    assert len(ratios) > 3
    row = next(row for row in parsed(breaking.growth(study)) if (row["norm"], row["site"]) == ("out", site))
    assert int(row["runs"]) == len(ratios)
    assert math.isclose(float(row["median"]), median(ratios), rel_tol=1e-9)
    assert int(row["above"]) == sum(ratio > 2 for ratio in ratios)


def test_growth_of_a_packed_study_is_that_of_the_study(uneven, tmp_path):
    """But for the digits of the statistics that are kept."""
    pack(uneven, tmp_path / "file.tar.xz", every=1000)
    again = unpack(tmp_path / "file.tar.xz", tmp_path / "again")
    before, after = (parsed(breaking.growth(read(path))) for path in (uneven, again))
    for row, kept in zip(before, after, strict=True):
        assert (row["site"], row["runs"]) == (kept["site"], kept["runs"])
        assert row["norm"] != "out" or row["largest"] == kept["largest"], "the others are ties but for digits"
        assert float(kept["median"]) == pytest.approx(float(row["median"]), rel=1e-3)


def test_quartiles_are_ratios_that_occur(uneven, monkeypatch):
    monkeypatch.setattr(
        breaking, "ratios_of", lambda study, reference, runs: [{"out/qkv": value} for value in (1.0, 10.0)]
    )
    monkeypatch.setattr(breaking, "pairs", lambda study: [(None, None)])
    (row,) = parsed(breaking.growth(read(uneven)))
    assert [float(row[key]) for key in ("low", "median", "high")] == [1.0, 5.5, 10.0]


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
