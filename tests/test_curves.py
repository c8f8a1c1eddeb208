"""The verdict on own runs: the corpus of losses, and records with a fault planted in one layer."""

import json
import lzma
import subprocess
import sys
from collections import defaultdict
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
from helpers import run, tiny
from omegaconf import OmegaConf

from stabrun.record.jsonl import dumps, jsonable
from stabrun.record.run_dir import RunDir, RunWriter
from stabrun.verdict.judge import STRICTNESS, Judge

DATA = Path(__file__).parent / "data"


def judged(rows):
    judge = Judge()
    for row in rows:
        judge.add(row)
    return judge


@pytest.fixture(scope="module")
def curves():
    """(facts, rows, means of 20 losses) of each run of the corpus."""
    found = []
    with lzma.open(DATA / "curves.npz.xz") as file:
        arrays = np.load(file)
        for index, facts in enumerate(json.loads(str(arrays["facts"]))):
            columns = {key: arrays[f"{index:03d}/{key}"].tolist() for key in ("train/loss", "grad/norm", "train/lr")}
            rows = [{"step": i} | {key: values[i] for key, values in columns.items()} for i in range(facts["steps"])]
            found.append((facts, rows, np.convolve(columns["train/loss"], np.ones(20) / 20, "valid")))
    return found


@pytest.fixture(scope="module")
def faults():
    with lzma.open(DATA / "faults.jsonl.xz", "rt") as file:
        return [json.loads(line) for line in file]


def test_corpus_spans_what_it_should(curves):
    assert len(curves) >= 300
    seen = {key: {facts[key] for facts, _, _ in curves} for key in ("variant", "d_model", "schedule", "steps")}
    assert len(seen["variant"]) == 11
    assert seen["d_model"] == {64, 128}
    assert seen["schedule"] == {"constant", "cosine"}
    assert max(seen["steps"]) / min(seen["steps"]) > 10


@pytest.mark.parametrize("strictness", STRICTNESS)
def test_no_false_alarm_and_no_miss(curves, strictness):
    best = defaultdict(lambda: np.inf)
    for facts, _, means in curves:
        kind = facts["variant"], facts["d_model"], facts["steps"], facts["schedule"]
        best[kind] = min(best[kind], means[-1])
    healthy = lost = 0
    for facts, rows, means in curves:
        kind = facts["variant"], facts["d_model"], facts["steps"], facts["schedule"]
        verdict = judged(rows).verdict(strictness).verdict
        if means[-1] <= best[kind] + 0.05:
            healthy += 1
            assert verdict != "diverged", facts["words"]
        if (means[-(len(rows) // 2) :] > means.min() + 0.3).all():
            lost += 1
            assert verdict == "diverged", facts["words"]
    assert healthy >= 60
    assert lost >= 30


def test_list_of_the_corpus_is_up_to_date():
    script = Path(__file__).parent.parent / "scripts" / "judge_curves.py"
    said = subprocess.run([sys.executable, script], capture_output=True, text=True, check=True).stdout
    assert said == (script.parent.parent / "docs" / "curves.md").read_text()


def test_the_layer_at_fault_is_named(faults):
    named = {}
    for fault in faults:
        verdict = judged(fault["rows"]).conclude()
        if fault["name"].startswith("h"):  # healthy, or a fault that does no harm
            assert (verdict.verdict, verdict.first_bad_site) == ("converged", None), fault["name"]
        else:
            assert verdict.first_bad_step >= fault["at"], fault["name"]
            named[fault["name"]] = (verdict.first_bad_site or "").startswith(f"layer_{fault['layer']:02d}/")
    assert len(named) == 20
    assert sum(named.values()) >= 18, named


def test_live_resumed_and_judged_afterwards_are_the_same_bytes(curves, faults, tmp_path, capsys):
    records = [fault["rows"] for fault in faults[:30]] + [rows for _, rows, _ in curves[:300:15]]
    assert len(records) == 50
    config = tiny()
    for index, rows in enumerate(records):
        directory = tmp_path / str(index)
        directory.mkdir()
        config.train.steps = len(rows)
        (directory / "config.yaml").write_text(OmegaConf.to_yaml(OmegaConf.structured(config)))
        text = "".join(dumps(row) + "\n" for row in rows)
        (directory / "metrics.jsonl").write_text(text)
        live = judged(rows).conclude(len(rows))
        half, _ = RunWriter(RunDir(directory)).cut(len(rows) * index // 50)
        resumed = judged(half + rows[len(half) :]).conclude(len(rows))
        (directory / "metrics.jsonl").write_text(text)
        afterwards = json.loads(run(capsys, "judge", directory, "--json")[1])
        del afterwards["path"], afterwards["notes"]
        assert json.dumps(afterwards) == json.dumps(jsonable(asdict(live))) == json.dumps(jsonable(asdict(resumed)))
