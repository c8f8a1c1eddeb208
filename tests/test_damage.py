"""Damaged files of runs and studies: no traceback, and no number of a damaged file is believed.

A file of a run or of a study is cut at a random place, or random bytes or a digit of it are overwritten. Each command
then says what the undamaged directory lets it say, or names the damage in a sentence.
"""

import csv
import hashlib
import os
import random
import re
import shutil
import traceback
from pathlib import Path

import pytest
from helpers import RICH, TINY, tiny, train_interrupted
from helpers import run as command
from studies import InProcess, a_plan, write_results

from stabrun.record.run_dir import RunDir
from stabrun.record.synced import OFFLINE, SyncState, digest, file_digest
from stabrun.report import report
from stabrun.study import sweep, worker
from stabrun.study.worker import work
from stabrun.training.run import train

TIMINGS = ("seconds", "tokens_per_second", "mfu", "peak_memory_bytes")
STUDY = (*TINY, "study.lrs=[1e-2,1e-1]", "study.seeds=1", "study.workers=1", "train.checkpoint_every=10")
NAMED = re.compile("damaged|missing|incomplete|left out|neither a study nor a run|cannot be read|does not contain")
PLACES = ("over", "stopped", "study")


@pytest.fixture(scope="module")
def originals(tmp_path_factory):
    """A run that is over, one that was interrupted, and a study with a finished and an interrupted cell."""
    place = tmp_path_factory.mktemp("originals")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        train(tiny(*RICH, "train.keep_checkpoints=2", "run_dir=over"))
        train_interrupted(tiny(*RICH, "train.keep_checkpoints=2", "run_dir=stopped"), patch, at=12)
        (place / "study").mkdir()
        plan = a_plan(place / "study", "study.lrs=[1e-2,1e-1]", "study.seeds=1", "train.checkpoint_every=10")
        really = worker.train

        def interrupted(config, directory, watch, stop):
            def asked(row):
                stop.asked = config.optim.lr == 0.1 and row["step"] == 14
                watch(row)

            return really(config, directory, asked, stop)

        patch.setattr(worker, "train", interrupted)
        with pytest.raises(KeyboardInterrupt):
            work(place / "study")
        write_results(plan, place / "study")
    run = RunDir(place / "over")
    facts = {"sha256": file_digest(run.metrics), "summary": digest(run.summary())}
    SyncState(OFFLINE, None, "stabrun", 30, run.metrics.stat().st_size, **facts).save(run.path)
    return place


def damaged(content, source):
    """The content, damaged, and how."""
    kind = source.choice(["cut", "bytes", "digit"])
    digits = [at for at, byte in enumerate(content) if 48 <= byte <= 57]
    if kind == "cut":
        return content[: source.randrange(len(content))], kind
    data, at = bytearray(content), source.randrange(len(content))
    if kind == "bytes" or not digits:
        for place in range(at, min(len(data), at + source.choice([1, 4, 16]))):
            data[place] = source.randrange(256)
    else:
        at = source.choice(digits)
        data[at] = source.choice([digit for digit in b"0123456789" if digit != data[at]])
    return bytes(data), kind


def reading(name):
    """The commands that read a directory, and write no more than a report."""
    common = [["judge", name, "--json"], ["judge", name], ["status", name, "--json"], ["status", name],
              ["upload", name, "--dry-run"]]  # fmt: skip
    return [*common, *([["rerun", name, "--cfg"]] if name != "study" else []), ["report", name]]


def training(name):
    """The command that goes on with a directory."""
    if name == "study":
        return ["sweep", *STUDY, "study_dir=study"]
    return ["train", *TINY, *RICH, "train.keep_checkpoints=2", f"run_dir={name}"]


def answer(capsys, words):
    """Exit status and output of a command, without what depends on the time."""
    status, out, err = command(capsys, *words)
    out = re.sub(r'"seconds_since_beat": [\d.]+|heartbeat [^,]* ago|ETA .*', "", out)
    if words[0] == "report" and status == 0:
        tables = sorted(Path(words[1], "report", "tables").glob("*.csv"))
        out += "".join(file.read_text() for file in tables)
    return status, out, err


def results(name):
    """What training left: of a study its results without timings; record and weights of what was trained just now."""
    rows, trained = [], [Path(name)]
    if name == "study":
        with open("study/results.csv", newline="") as file:
            rows = [{key: value for key, value in row.items() if key not in TIMINGS} for row in csv.DictReader(file)]
        trained = [Path("study/runs", row["run_id"]) for row in rows if row["lr"] == "0.1"]
    files = [file for run in trained for file in run.glob("checkpoints/step_00000030/*.safetensors")]
    files += [run / "metrics.jsonl" for run in trained if name != "over"]
    return rows, [hashlib.sha256(file.read_bytes()).hexdigest() for file in files]


def difference(one, other):
    return [pair for pair in zip(one.splitlines(), other.splitlines(), strict=False) if pair[0] != pair[1]][:5]


def files_of(directory):
    return sorted(path for path in directory.rglob("*") if path.is_file() and "report" not in path.parts)


def contents(directory):
    return {path: path.read_bytes() for path in files_of(directory)}


@pytest.mark.parametrize("count", [25, pytest.param(500, marks=pytest.mark.slow)])
def test_damage(tmp_path, monkeypatch, capsys, originals, count):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setattr(sweep, "worker_pool", lambda overrides, sources, study, *counts: InProcess(study, 1))
    monkeypatch.setattr(report, "write_figures", lambda charts, folder: None)  # drawing takes most of the time
    monkeypatch.chdir(tmp_path)
    whole, after = {}, {}
    for name in PLACES:
        shutil.copytree(originals / name, name)
        for words in reading(name):
            whole[tuple(words)] = answer(capsys, words)
            assert whole[tuple(words)][0] == 0, whole[tuple(words)]
        assert command(capsys, *training(name))[0] == 0
        after[name] = results(name)
    found = []

    def told(problem):
        found.append(problem)
        with capsys.disabled():
            print(problem, end="\n\n")

    counts = dict.fromkeys(("refused", "named", "the same"), 0)
    first, step = int(os.environ.get("FIRST", 0)), int(os.environ.get("STEP", 1))
    for seed in range(first, count, step):
        source = random.Random(f"damage {seed}")
        name = source.choice(PLACES)
        shutil.rmtree(name)
        shutil.copytree(originals / name, name)
        file = source.choice([file for file in files_of(Path(name)) if file.stat().st_size])
        content, kind = damaged(file.read_bytes(), source)
        file.write_bytes(content)
        before = contents(Path(name))
        ways = reading(name) if count > 25 else source.sample(reading(name), 3)
        for words in [*ways, training(name)]:
            case = f"seed {seed}: {kind} in {file}: {' '.join(words)}"
            problem = ""
            try:
                status, out, err = answer(capsys, words)
            except Exception:
                told(f"{case}: {traceback.format_exc()[-900:]}")
                continue
            last = words == training(name)
            same = (
                results(name) == after[name]
                if last and status == 0
                else (status, out) == whole.get(tuple(words), ("", "", ""))[:2]
            )
            if "Traceback" in out + err or status not in (0, 1, 2):
                problem = "traceback"
            elif not same and not NAMED.search(err + out):
                problem = "not named"
            elif not same and last and status == 0 and name == "stopped":
                problem = "other results"
            elif not last and contents(Path(name)) != before:
                problem = "written"
            if problem:
                apart = difference(out, whole.get(tuple(words), (0, ""))[1])
                told(f"{case}: {problem}: status {status}, stderr: {err[-700:]}, differing lines: {apart}")
            counts["the same" if same and not err else "named" if status == 0 else "refused"] += 1
        if seed % 50 == 49:
            with capsys.disabled():
                print(f"{seed + 1} files damaged, commands: {counts}, problems: {len(found)}")
    assert not found, "\n\n".join(found)
