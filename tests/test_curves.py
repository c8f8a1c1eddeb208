"""The verdict on recorded runs: the corpus of losses, and records with a fault injected into one layer."""

import hashlib
import json
import lzma
import sys
from collections import defaultdict
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
from helpers import run, tiny
from losses import folded
from omegaconf import OmegaConf

from stabrun.record.jsonl import dumps, jsonable
from stabrun.record.run_dir import RunDir, RunWriter
from stabrun.verdict.judge import Judge
from stabrun.verdict.rule import STRICTNESS

DATA = Path(__file__).parent / "data"
ROOT = DATA.parent.parent


@pytest.fixture(scope="session")
def curves():
    """(facts, rows, means of 20 losses) of each run of the corpus."""
    runs = []
    with lzma.open(DATA / "curves.npz.xz") as file:
        arrays = np.load(file)
        for index, facts in enumerate(json.loads(str(arrays["facts"]))):
            columns = {key: arrays[f"{index:03d}/{key}"].tolist() for key in ("train/loss", "grad/norm", "train/lr")}
            rows = [{"step": i} | {key: values[i] for key, values in columns.items()} for i in range(facts["steps"])]
            runs.append((facts, rows, np.convolve(columns["train/loss"], np.ones(20) / 20, "valid")))
    return runs


@pytest.fixture(scope="session")
def judges(curves):
    """The judge of each run, which has taken all of its rows."""
    return [folded(rows, facts["steps"], facts["schedule"] == "constant") for facts, rows, _ in curves]


@pytest.fixture(scope="module")
def faults():
    with lzma.open(DATA / "faults.jsonl.xz", "rt") as file:
        return [json.loads(line) for line in file]


def test_corpus_spans_variants_sizes_schedules_and_lengths(curves):
    assert len(curves) >= 300
    seen = {key: {facts[key] for facts, _, _ in curves} for key in ("variant", "d_model", "schedule", "steps")}
    assert len(seen["variant"]) == 11
    assert seen["d_model"] == {64, 128}
    assert seen["schedule"] == {"constant", "cosine"}
    assert max(seen["steps"]) / min(seen["steps"]) > 10


@pytest.mark.parametrize("strictness", STRICTNESS)
def test_no_false_alarm_and_no_miss(curves, judges, strictness):
    best = defaultdict(lambda: np.inf)
    for facts, _, means in curves:
        group = facts["variant"], facts["d_model"], facts["steps"], facts["schedule"]
        best[group] = min(best[group], means[-1])
    healthy = lost = 0
    for (facts, rows, means), judge in zip(curves, judges, strict=True):
        group = facts["variant"], facts["d_model"], facts["steps"], facts["schedule"]
        verdict = judge.verdict(strictness).verdict
        if means[-1] <= best[group] + 0.05:
            healthy += 1
            assert verdict != "diverged", facts["words"]
        if (means[-(len(rows) // 2) :] > means.min() + 0.3).all():
            lost += 1
            assert verdict == "diverged", facts["words"]
    assert healthy >= 60
    assert lost >= 30


def test_page_of_the_corpus_is_up_to_date(judges, monkeypatch):
    monkeypatch.setattr(sys, "path", [str(ROOT / "scripts"), *sys.path])
    import judge_curves

    page = "\n".join(judge_curves.page(list(judge_curves.corpus()), judges))
    assert page + "\n" == (ROOT / "docs" / "curves.md").read_text(), "run `python scripts/judge_curves.py`"


def test_the_layer_at_fault_is_named(faults):
    named = {}
    for fault in faults:
        verdict = folded(fault["rows"]).conclude()
        if fault["name"].startswith("h"):  # healthy, or a fault that does no harm
            assert (verdict.verdict, verdict.first_bad_site) == ("converged", None), fault["name"]
        else:
            assert verdict.first_bad_step >= fault["at"], fault["name"]
            named[fault["name"]] = (verdict.first_bad_site or "").startswith(f"layer_{fault['layer']:02d}/")
    assert len(named) == 20
    assert sum(named.values()) >= 18, named


def same_bytes(rows, directory, cut, capsys):
    """Judge a run live, after a resume at row `cut`, and from its record."""
    directory.mkdir()
    config = tiny(f"train.steps={len(rows)}")
    (directory / "config.yaml").write_text(OmegaConf.to_yaml(OmegaConf.structured(config)))
    text = "".join(dumps(row) + "\n" for row in rows)
    (directory / "metrics.jsonl").write_text(text)
    live = Judge.of(config)
    for row in rows:
        live.add(row)
    live = live.conclude()
    kept, _ = RunWriter(RunDir(directory)).cut(cut)
    resumed = folded(kept + rows[len(kept) :]).conclude(len(rows))
    (directory / "metrics.jsonl").write_text(text)
    afterwards = json.loads(run(capsys, "judge", directory, "--json")[1])
    del afterwards["path"], afterwards["notes"], afterwards["last_healthy_checkpoint"]
    return json.dumps(afterwards) == json.dumps(jsonable(asdict(live))) == json.dumps(jsonable(asdict(resumed)))


@pytest.mark.parametrize("count", [10, pytest.param(50, marks=pytest.mark.slow)])
def test_live_resumed_and_recorded_runs_have_the_same_verdict(curves, faults, tmp_path, capsys, count):
    records = [fault["rows"] for fault in faults[:30]] + [rows for _, rows, _ in curves[:300:15]]
    assert len(records) == 50
    for index in range(0, 50, 50 // count):
        rows = records[index]
        assert same_bytes(rows, tmp_path / str(index), len(rows) * index // 50, capsys), index


def test_the_rule_is_the_one_that_was_frozen():
    """An edit of these files needs a new freeze: a new date, and counts on what the rule was not made with."""
    files = [ROOT / "stabrun" / "verdict" / f"{name}.py" for name in ("chart", "direction", "restarts", "rule")]
    frozen = hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()
    assert frozen in (ROOT / "docs" / "verdict.md").read_text()
