"""`stabrun dashboard --dry-run`: what would be saved in W&B, compared with `tests/data/dashboard.json`.

Updated after a change of the panels by: python tests/test_dashboard.py
"""

import json
import re
import sys
import tempfile
from pathlib import Path

import pytest
from helpers import TINY, run
from made import summaries as a_study

from stabrun.cli import commands
from stabrun.config import UserError
from stabrun.record import metrics
from stabrun.record.metrics import METRICS, SCALAR, flatten
from stabrun.study.question import in_group, planned

pytest.importorskip("wandb_workspaces")
from stabrun.publish import dashboard as module
from stabrun.publish.dashboard import Subject, dashboard, markdown, plain, specification

GOLDEN = Path(__file__).parent / "data" / "dashboard.json"


def a_planned_study(folder, name="edge-0123"):
    """A study of made-up summaries, with its plan."""
    directory = folder / name
    directory.mkdir()
    a_study(directory)
    words = "study.variants=[baseline,qk_norm]", "study.lrs=[1e-2,1e-1,1.0]", "study.seeds=2", "tracker=wandb"
    plan, _, _ = planned([*TINY, *words, f"study_dir={directory}"])
    plan.save(directory)
    return directory


def printed(capsys, *words):
    status, out, _ = run(capsys, "dashboard", *words, "--dry-run")
    assert status == 0
    return json.loads(out)


def panels(views):
    """Every panel of the workspace, by the title of its section."""
    sections = views["workspace"]["spec"]["section"]["panelBankConfig"]["sections"]
    return {section["name"]: section["panels"] for section in sections}


def test_the_spec_is_the_golden_one(tmp_path, capsys):
    found = printed(capsys, a_planned_study(tmp_path))
    assert found == json.loads(GOLDEN.read_text())


def test_each_value_that_is_sent_has_a_panel(tmp_path, capsys):
    """The metrics' own names, as the tracker sends them, against the keys and regular expressions of the panels."""
    row = {"step": 0}
    for metric in METRICS.values():
        for key in metric.keys:
            row.setdefault(key, 1.0 if metric.shape == SCALAR else [1.0] * (1 if key.endswith("/head") else 2))
    configs = [panel["config"] for found in panels(printed(capsys)).values() for panel in found]
    named = {name for config in configs for name in config.get("metrics", ())}
    patterns = [config["metricRegex"] for config in configs if config.get("useMetricRegex")]
    lonely = [key for key in flatten(row) if key not in named and sum(bool(re.search(p, key)) for p in patterns) != 1]
    assert lonely == ["step", "tokens"]


def test_a_new_metric_has_a_panel(monkeypatch):
    """One declaration in the table of metrics is enough, whatever its key begins with."""
    for key, source in (("made/up", metrics.STEP), ("made/by_layer", metrics.BLOCK), ("made/{site}", metrics.OUTPUT)):
        made = metrics.Metric(key, f"label of {key}", "unit", source, "each step", "mean", "a test")
        monkeypatch.setitem(METRICS, key, made)
    sections = module.all_sections()
    plots = {plot.title: plot for name in ("made", "label of made/{site}") for plot in sections[name]}
    assert list(plots) == ["made/up", "made/by_layer", *(f"made/{site}" for site in metrics.SITES)]
    assert plots["made/up"].y == ["made/up"]
    assert re.fullmatch(plots["made/by_layer"].metric_regex, "made/by_layer/layer_11")
    assert re.fullmatch(plots["made/fc2"].metric_regex, "made/fc2/layer_00")
    assert re.fullmatch(plots["made/head"].metric_regex, "made/head")
    assert plots["made/up"].title_y == "label of made/up (unit)"


def test_runs_are_those_of_the_study_by_variant_and_rate(tmp_path, capsys):
    views = printed(capsys, a_planned_study(tmp_path), "tracker.entity=team", "tracker.project=edges")
    assert (views["workspace"]["entity"], views["workspace"]["project"]) == ("team", "edges")
    assert views["report"]["project"] == {"name": "edges", "entityName": "team"}
    grids = [block for block in views["report"]["spec"]["blocks"] if block["type"] == "panel-grid"]
    sets = views["workspace"]["spec"]["section"]["runSets"] + [g["metadata"]["runSets"][0] for g in grids]
    for runs in sets:
        (only,) = runs["filters"]["filters"]
        assert (only["key"]["name"], only["op"], only["value"]) == ("group", "=", "edge-0123")
        assert [key["name"] for key in runs["grouping"]] == ["variant.value", "optim.value.lr"]


@pytest.mark.parametrize(
    "group", ["it's", 'a "b" c', "lr=1e-2 == x", "1 and 2 within_last 5 days", "back\\slash", "ü(x)"]
)
def test_a_group_of_any_name_is_asked_for_as_it_is(group):
    config = in_group(planned([*TINY, "study.lrs=[1e-2]"])[2], group)
    view = module.workspace(Subject("x", config.tracker, "summary"), "me")
    (only,) = specification({"view": view})["view"]["spec"]["section"]["runSets"][0]["filters"]["filters"]
    assert only["value"] == group


def test_a_project_alone_has_a_workspace_and_no_report(capsys):
    views = printed(capsys, "tracker.project=edges")
    assert list(views) == ["workspace"]
    assert views["workspace"]["displayName"] == "edges"
    assert views["workspace"]["spec"]["section"]["runSets"][0]["filters"]["filters"] == []


def test_names_cannot_break_the_table_or_the_view():
    arm = "<script>|alert"
    facts = {"strategy": "grid", "runs": 0, "cells": 1, "rule": 3, "variants": {arm: {"runs": [], "frontier": {}}}}
    assert "| &lt;script&gt;\\|alert | 0 | 0 |" in markdown(facts)
    assert plain("edge 🚀 ü\n") == "edge  ü"


def test_without_a_server_the_error_is_a_sentence(tmp_path, monkeypatch):
    monkeypatch.delenv("WANDB_MODE")
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    with pytest.raises(UserError, match="wandb login"):
        dashboard()
    monkeypatch.setenv("WANDB_API_KEY", "x" * 40)
    monkeypatch.setenv("WANDB_MODE", "offline")
    with pytest.raises(UserError, match="online"):
        dashboard()
    monkeypatch.delenv("WANDB_MODE")
    monkeypatch.setattr(module, "save", lambda shown: 1 / 0)
    assert dashboard() == 1


def test_without_the_package_the_error_is_a_sentence(monkeypatch, capsys):
    monkeypatch.setattr(commands, "find_spec", lambda name: None)
    status, _, err = run(capsys, "dashboard", "--dry-run")
    assert status == 2
    assert "pip install 'stabrun[dashboard]'" in err


@pytest.mark.parametrize(
    "words", [["--force"], ["nowhere", "--dry-run"], ["--dry-run", "optim.lr=1"], ["--dry-run", "a=b"]]
)
def test_user_errors_are_sentences(capsys, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    status, out, err = run(capsys, "dashboard", *words)
    assert (status, out) == (2, "")
    assert err.startswith("stabrun: ")


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as scratch, open(GOLDEN, "w") as golden:
        sys.stdout = golden
        dashboard(a_planned_study(Path(scratch)), dry_run=True)
