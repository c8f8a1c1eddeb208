"""`stabrun status` of studies and runs that are planned, running, killed, failed and finished."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from contextlib import contextmanager, redirect_stdout, suppress
from io import StringIO
from pathlib import Path

import pytest
from helpers import TINY, run
from made import a_study
from studies import ENDLESS, a_plan, sweep_here, wait_for

from stabrun.cli.status import status
from stabrun.record.jsonl import append_line, read_checked
from stabrun.report.study_data import read as read_study_data
from stabrun.study.ledger import Ledger

WORDS = (*TINY, "study.variants=[baseline,qk_norm]", "study.lrs=[1e-2,1e-1]", "study.seeds=2")


@contextmanager
def running(folder, *words, pattern):
    """`stabrun WORDS` in a session of its own, once a record like `pattern` has rows. It is killed at the end."""
    process = subprocess.Popen(
        [sys.executable, "-m", "stabrun", *words],
        cwd=folder,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        wait_for(lambda: [file for file in folder.glob(pattern) if file.read_text().count("\n") > 5])
        yield process
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def output(directory, *words):
    """What `stabrun status DIRECTORY WORDS` prints."""
    with redirect_stdout(StringIO()) as printed:
        status(directory, as_json="--json" in words)
    return printed.getvalue()


def facts(directory):
    return json.loads(output(directory, "--json"))


def everything(folder):
    """The time and size of each file below a directory."""
    return {path: (path.lstat().st_mtime_ns, path.lstat().st_size) for path in [folder, *folder.rglob("*")]}


def test_a_study_with_only_a_plan(tmp_path):
    a_plan(tmp_path, *WORDS)
    before = everything(tmp_path)
    lines = output(tmp_path).splitlines()
    assert lines[:4] == ["study: 0 of 8 done", "lr        1e-2  0.1", "baseline  ..    ..", "qk_norm   ..    .."]
    assert "no cell is being trained now" in lines[-1]
    assert facts(tmp_path)["counts"] == {"planned": 8, "running": 0, "done": 0, "failed": 0}
    assert everything(tmp_path) == before


def test_a_running_study_is_killed(tmp_path):
    sweep = "sweep", *WORDS, *ENDLESS, "study.workers=1", "study_dir=study"
    with running(tmp_path, *sweep, pattern="study/attempts/*/metrics.jsonl"):
        state = facts(tmp_path / "study")
        assert state["counts"] == {"planned": 7, "running": 1, "done": 0, "failed": 0}
        (attempt,) = state["running"]
        assert 5 < attempt["step"] <= attempt["steps"] == 100000
        assert attempt["steps_per_second"] > 0
        assert attempt["attempt"] == 1
        assert not attempt["owner_gone"]
        os.kill(attempt["pid"], 0)
        left = 8 * 100000 - attempt["step"]
        assert state["seconds_left"] == pytest.approx(left / attempt["steps_per_second"])
        assert ", heartbeat " in output(tmp_path / "study")
    wait_for(lambda: facts(tmp_path / "study")["running"][0]["owner_gone"])
    before = everything(tmp_path)
    text = output(tmp_path / "study")
    assert "0 of 8 done, 1 running\n" in text
    assert f"{attempt['host'].partition('.')[0]}:{attempt['pid']} has ended" in text
    assert "no cell is being trained now" in text
    assert everything(tmp_path) == before


def test_an_owner_on_another_machine_may_be_alive(tmp_path):
    plan = a_plan(tmp_path, *WORDS)
    ledger, cell = Ledger(tmp_path), next(iter(plan.cells))
    ledger.owner |= {"host": "elsewhere.of.a.cluster", "pid": 1, "born": "0"}
    ledger.claim(cell, ledger.entries([cell])[cell]).heartbeat(12)
    assert "elsewhere:1, heartbeat " in output(tmp_path)
    beat = ledger.path(cell, 1, "beat")
    os.utime(beat, (time.time() - 3600,) * 2)
    text = output(tmp_path)
    assert "elsewhere:1, no heartbeat for 1 h" in text
    assert " has ended" not in text


def test_a_failed_cell_is_named_with_its_reason(tmp_path):
    plan = a_plan(tmp_path, *WORDS)
    ledger, cell = Ledger(tmp_path), next(iter(plan.cells))
    for _ in range(2):
        ledger.claim(cell, ledger.entries([cell])[cell]).end("failed", "OSError: the disk is full\nand more")
    text, state = output(tmp_path), facts(tmp_path)
    assert f"baseline lr=1e-2 s0 ({cell}) was given up after 2 attempts: OSError: the disk is full\n" in text
    assert "baseline  !.    .." in text
    assert state["counts"]["failed"] == 1
    assert (state["cells"][0]["status"], state["cells"][0]["attempts"]) == ("failed", 2)
    assert state["cells"][0]["error"].startswith("OSError")


def test_incomplete_and_missing_files(tmp_path):
    plan = a_plan(tmp_path, *WORDS)
    ledger = Ledger(tmp_path)
    halved, bare, finished, lost, *_ = plan.cells
    claims = {cell: ledger.claim(cell, ledger.entries([cell])[cell]) for cell in (halved, bare, finished, lost)}
    claims[halved].heartbeat(3)
    claims[halved].directory.mkdir()
    (claims[halved].directory / "metrics.jsonl").write_text('{"step": 0, "train/loss": 5.9}\n{"step": 1, "tra')
    for kind in ("claim", "beat"):
        ledger.path(halved, 1, kind).write_text('{"host": "vm", "p')
    (tmp_path / "runs" / finished).mkdir()
    (tmp_path / "runs" / finished / "summary.json").write_text('{"verdict": "conv')
    for _ in range(2):
        ledger.end(lost, 1, "failed", "")
        ledger.claim(lost, ledger.entries([lost])[lost])
    ledger.end(lost, 2, "failed", "")
    ledger.path(lost, 2, "failed").write_text("")
    text, state = output(tmp_path), facts(tmp_path)
    assert state["counts"] == {"planned": 4, "running": 2, "done": 1, "failed": 1}
    assert [attempt["step"] for attempt in state["running"]] == [1, 0]
    assert "baseline  >>    ?!" in text
    assert "unknown reason" in text


def test_a_run_from_its_start_to_its_end(tmp_path, monkeypatch, capsys):
    train = "train", *TINY, "+variant=qk_norm", "run_dir=run"
    with running(tmp_path, *train, *ENDLESS, pattern="run/metrics.jsonl"):
        state, text = facts(tmp_path / "run"), output(tmp_path / "run")
        assert (state["variant"], state["lr"], state["seed"], state["status"]) == ("qk_norm", 0.01, 0, "running")
        assert 5 < state["step"] < state["steps"] == 100000
        assert state["seconds_left"] == pytest.approx((100000 - state["step"]) / state["steps_per_second"])
        assert state["verdict"]["reason"] != "interrupted"
        assert text.startswith("qk_norm lr=1e-2 s0 is running: step ")
        assert text.endswith("no checkpoint yet\n")
    before = everything(tmp_path)
    state, text = facts(tmp_path / "run"), output(tmp_path / "run")
    rows = (tmp_path / "run" / "metrics.jsonl").read_text().split("\n")[:-1]
    assert (state["status"], state["step"], state["checkpoint"]) == ("interrupted", len(rows), None)
    assert state["last_loss"] == json.loads(rows[-1])["train/loss"]
    assert state["verdict"]["verdict"] == "undecided"
    assert "\nso far: undecided" in text
    assert everything(tmp_path) == before
    monkeypatch.chdir(tmp_path)
    assert run(capsys, "train", *TINY, "train.checkpoint_every=20", "run_dir=whole")[0] == 0
    before = everything(tmp_path)
    state, text = facts(tmp_path / "whole"), output(tmp_path / "whole")
    summary = read_checked(tmp_path / "whole" / "summary.json")
    assert (state["status"], state["step"], state["checkpoint"], state["verdict"]) == ("complete", 30, 30, summary)
    assert "baseline lr=1e-2 s0 is complete: step 30 of 30, loss " in text
    assert summary["verdict"] in text
    assert everything(tmp_path) == before


def test_a_run_that_failed(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert run(capsys, "train", *TINY, "run_dir=run")[0] == 0
    (tmp_path / "run" / "summary.json").unlink()
    failed = {"event": "failed", "time": 1.0, "step": 30, "error": "OSError: no space"}
    append_line(tmp_path / "run" / "events.jsonl", failed)
    assert facts(tmp_path / "run")["status"] == "failed"
    assert "failed: step 30 of 30" in output(tmp_path / "run")
    assert "OSError: no space" in output(tmp_path / "run")


def test_finished_runs_are_in_the_table(tmp_path, monkeypatch, capsys):
    words = "study.seeds=1", "study.lrs=[1e-2]"
    status, shown, err = sweep_here(monkeypatch, capsys, tmp_path, *words)
    assert status == 0, err
    before = everything(tmp_path)
    lines = output(tmp_path / "study").splitlines()
    assert lines[0] == "study: 2 of 2 done"
    assert run(capsys, "status", "study")[1].splitlines() == lines
    shown = shown.splitlines()
    top = next(index for index, line in enumerate(shown) if line.startswith("lr "))
    assert lines[1:] == shown[top : top + 4]
    assert [cell["verdict"] is not None for cell in facts(tmp_path / "study")["cells"]] == [True] * 2
    _, dry, _ = sweep_here(monkeypatch, capsys, tmp_path, *words, "study.lrs=[1e-2,2e-2]", "--dry-run")
    assert re.search(r"^qk_norm +1 +\S+M +1,920 +", dry, re.MULTILINE)
    assert "≥" not in dry, "the times are measured"
    assert "at least" not in dry
    assert everything(tmp_path) == before


def test_only_planned_cells_count(tmp_path, capsys):
    """By judge, status and report alike; another directory in `runs/`, such as of a run by hand, is not part of it."""
    plan = a_study(tmp_path / "study", variants=("baseline",), lrs=(1e-2,), seeds=2)
    copy = tmp_path / "study" / "runs" / "by_hand"
    shutil.copytree(tmp_path / "study" / "runs" / next(iter(plan.cells)), copy)
    assert facts(tmp_path / "study")["counts"]["done"] == 2
    assert len(read_study_data(tmp_path / "study").rows) == 2
    judged = json.loads(run(capsys, "judge", tmp_path / "study", "--json")[1])
    assert [Path(verdict["path"]).name for verdict in judged] == list(plan.cells)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((), "missing argument 'DIR'"),
        (("one", "two"), "unexpected extra argument (two)"),
        (("--follow", "."), "no such option '--follow'"),
        (("nowhere",), "nowhere: neither a study nor a run: no such directory."),
        ((".",), "study.yaml, config.yaml and watch.json are missing"),
    ],
)
def test_neither_a_study_nor_a_run(tmp_path, monkeypatch, capsys, words, message):
    monkeypatch.chdir(tmp_path)
    status, out, err = run(capsys, "status", *words)
    assert status == 2
    assert message in err
    assert (out, len(err.splitlines())) == ("", 1)
    assert list(tmp_path.iterdir()) == []
