"""`stabrun status` from outside: of studies and runs that are planned, going on, killed, failed and finished."""

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import contextmanager, redirect_stdout, suppress
from io import StringIO

import pytest
from helpers import TINY, run, stabrun

from stabrun.cli.status import status
from stabrun.study.ledger import Ledger
from stabrun.study.plan import planned

WORDS = (*TINY, "study.variants=[baseline,qk_norm]", "study.lrs=[1e-2,1e-1]", "study.seeds=2")
LONG = "train.steps=100000", "train.checkpoint_every=0"


def a_study(folder, *words):
    plan, _, _ = planned([*WORDS, *words])
    plan.save(folder)
    return plan


@contextmanager
def going(folder, *words, pattern):
    """`stabrun WORDS` in a session of its own, from when two files like `pattern` have rows; killed at the end."""
    process = subprocess.Popen(
        [sys.executable, "-m", "stabrun", *words],
        cwd=folder,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    deadline = time.monotonic() + 90
    try:
        while not [file for file in folder.glob(pattern) if file.read_text().count("\n") > 5]:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        yield process
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def told(directory, *words):
    """What `stabrun status DIRECTORY WORDS` prints."""
    with redirect_stdout(StringIO()) as printed:
        status(directory, as_json="--json" in words)
    return printed.getvalue()


def facts(directory):
    return json.loads(told(directory, "--json"))


def everything(folder):
    """Each file below a folder with what tells whether it was touched."""
    return {path: (path.lstat().st_mtime_ns, path.lstat().st_size) for path in [folder, *folder.rglob("*")]}


def test_a_study_with_only_a_plan(tmp_path):
    a_study(tmp_path)
    before = everything(tmp_path)
    lines = told(tmp_path).splitlines()
    assert lines[:4] == ["study: 0 of 8 done", "lr        1e-2  0.1", "baseline  ..    ..", "qk_norm   ..    .."]
    assert "no cell is being trained now" in lines[-1]
    assert facts(tmp_path)["counts"] == {"planned": 8, "running": 0, "done": 0, "failed": 0}
    assert everything(tmp_path) == before


def test_a_study_that_goes_on_and_is_killed(tmp_path):
    sweep = "sweep", *WORDS, *LONG, "study.workers=1", "study_dir=study"
    with going(tmp_path, *sweep, pattern="study/attempts/*/metrics.jsonl"):
        seen = facts(tmp_path / "study")
        assert seen["counts"] == {"planned": 7, "running": 1, "done": 0, "failed": 0}
        (running,) = seen["running"]
        assert 5 < running["step"] <= running["steps"] == 100000
        assert running["steps_per_second"] > 0
        assert running["attempt"] == 1
        assert not running["owner_gone"]
        os.kill(running["pid"], 0)
        left = 8 * 100000 - running["step"]
        assert seen["seconds_left"] == pytest.approx(left / running["steps_per_second"])
        assert ", beat " in told(tmp_path / "study")
    deadline = time.monotonic() + 30
    while not facts(tmp_path / "study")["running"][0]["owner_gone"]:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    before = everything(tmp_path)
    text = told(tmp_path / "study")
    assert "0 of 8 done, 1 running\n" in text
    assert f"{running['host'].partition('.')[0]}:{running['pid']} is gone" in text
    assert "no cell is being trained now" in text
    assert everything(tmp_path) == before


def test_an_owner_on_another_machine_is_not_judged(tmp_path):
    plan = a_study(tmp_path)
    ledger, cell = Ledger(tmp_path), next(iter(plan.cells))
    ledger.owner |= {"host": "elsewhere.of.a.cluster", "pid": 1, "born": "0"}
    ledger.claim(cell, ledger.entries([cell])[cell]).beat(12)
    assert "elsewhere:1, beat " in told(tmp_path)
    beat = ledger.path(cell, 1, "beat")
    os.utime(beat, (time.time() - 3600,) * 2)
    text = told(tmp_path)
    assert "elsewhere:1, no beat for 1 h" in text
    assert " is gone" not in text


def test_a_failed_cell_is_named_with_its_reason(tmp_path):
    plan = a_study(tmp_path)
    ledger, cell = Ledger(tmp_path), next(iter(plan.cells))
    for _ in range(2):
        ledger.claim(cell, ledger.entries([cell])[cell]).fail("OSError: the disk is full\nand more")
    text, seen = told(tmp_path), facts(tmp_path)
    assert f"baseline lr=1e-2 s0 ({cell}) was given up after 2 attempts: OSError: the disk is full\n" in text
    assert "baseline  !.    .." in text
    assert seen["counts"]["failed"] == 1
    assert (seen["cells"][0]["status"], seen["cells"][0]["attempts"]) == ("failed", 2)
    assert seen["cells"][0]["error"].startswith("OSError")


def test_half_written_and_vanished_files_are_survived(tmp_path):
    plan = a_study(tmp_path)
    ledger = Ledger(tmp_path)
    halved, bare, finished, lost, *_ = plan.cells
    claims = {cell: ledger.claim(cell, ledger.entries([cell])[cell]) for cell in (halved, bare, finished, lost)}
    claims[halved].beat(3)
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
    text, seen = told(tmp_path), facts(tmp_path)
    assert seen["counts"] == {"planned": 4, "running": 2, "done": 1, "failed": 1}
    assert [attempt["step"] for attempt in seen["running"]] == [1, 0]
    assert "baseline  >>    ?!" in text
    assert "the reason is lost" in text


def test_a_run_from_its_start_to_its_end(tmp_path):
    train = "train", *TINY, "+variant=qk_norm", "run_dir=run"
    with going(tmp_path, *train, *LONG, pattern="run/metrics.jsonl"):
        seen, text = facts(tmp_path / "run"), told(tmp_path / "run")
        assert (seen["variant"], seen["lr"], seen["seed"], seen["status"]) == ("qk_norm", 0.01, 0, "running")
        assert 5 < seen["step"] < seen["steps"] == 100000
        assert seen["seconds_left"] == pytest.approx((100000 - seen["step"]) / seen["steps_per_second"])
        assert seen["verdict"]["reason"] != "interrupted"
        assert text.startswith("qk_norm lr=1e-2 s0 is running: step ")
        assert text.endswith("no checkpoint yet\n")
    before = everything(tmp_path)
    seen, text = facts(tmp_path / "run"), told(tmp_path / "run")
    rows = (tmp_path / "run" / "metrics.jsonl").read_text().split("\n")[:-1]
    assert (seen["status"], seen["step"], seen["checkpoint"]) == ("interrupted", len(rows), None)
    assert seen["last_loss"] == json.loads(rows[-1])["train/loss"]
    assert seen["verdict"]["verdict"] == "undecided"
    assert "\nso far: undecided" in text
    assert everything(tmp_path) == before
    assert stabrun("train", *TINY, "train.checkpoint_every=20", "run_dir=whole", cwd=tmp_path).returncode == 0
    before = everything(tmp_path)
    seen, text = facts(tmp_path / "whole"), told(tmp_path / "whole")
    summary = json.loads((tmp_path / "whole" / "summary.json").read_text())
    assert (seen["status"], seen["step"], seen["checkpoint"], seen["verdict"]) == ("complete", 30, 30, summary)
    assert "baseline lr=1e-2 s0 is complete: step 30 of 30, loss " in text
    assert summary["verdict"] in text
    assert everything(tmp_path) == before


def test_a_run_that_an_error_ended(tmp_path):
    assert stabrun("train", *TINY, "run_dir=run", cwd=tmp_path).returncode == 0
    (tmp_path / "run" / "summary.json").unlink()
    with open(tmp_path / "run" / "events.jsonl", "a") as file:
        file.write('{"event": "failed", "time": 1.0, "step": 30, "error": "OSError: no space"}\n')
    assert facts(tmp_path / "run")["status"] == "failed"
    assert "has failed: step 30 of 30" in told(tmp_path / "run")
    assert "OSError: no space" in told(tmp_path / "run")


def test_a_study_s_finished_runs_stand_in_its_table(tmp_path):
    words = *WORDS, "study.seeds=1", "study.workers=2", "study_dir=study"
    swept = stabrun("sweep", *words, cwd=tmp_path)
    assert swept.returncode == 0, swept.stderr
    before = everything(tmp_path)
    lines = told(tmp_path / "study").splitlines()
    assert lines[0] == "study: 4 of 4 done"
    assert stabrun("status", "study", cwd=tmp_path).stdout.splitlines() == lines
    shown = swept.stdout.splitlines()
    top = next(index for index, line in enumerate(shown) if line.startswith("lr "))
    assert lines[1:] == shown[top : top + 4]
    assert [cell["verdict"] is not None for cell in facts(tmp_path / "study")["cells"]] == [True] * 4
    dry = stabrun("sweep", *words, "study.lrs=[1e-2,2e-2]", "--dry-run", cwd=tmp_path)
    assert "qk_norm: 1 cells to train, 1,920 tokens, " in dry.stdout
    assert "at least" not in dry.stdout, "the times are measured ones"
    assert everything(tmp_path) == before


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ((), "name one DIR"),
        (("one", "two"), "name one DIR"),
        (("--follow", "."), "the only flag is --json"),
        (("nowhere",), "nowhere: neither a study nor a run: no such directory."),
        ((".",), "study.yaml and config.yaml are missing"),
    ],
)
def test_what_is_neither_a_study_nor_a_run(tmp_path, monkeypatch, capsys, words, said):
    monkeypatch.chdir(tmp_path)
    status, out, err = run(capsys, "status", *words)
    assert status == 2
    assert said in err
    assert (out, len(err.splitlines())) == ("", 1)
    assert list(tmp_path.iterdir()) == []
