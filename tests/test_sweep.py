"""`stabrun sweep`: a study to its end, extended, killed, interrupted, refused."""

import json
import os
import random
import re
import resource
import signal
import subprocess
import sys
import time

import made
import pytest
from helpers import TINY, run
from studies import QUESTION, a_plan, ended, recorded, rows, sweep_here, sweeping, swept, trained_alone, wait_for
from wandb_files import assert_holds, inspected

from stabrun.record.study_dir import StudyDir
from stabrun.study import results, sweep
from stabrun.study.ledger import Entry, Ledger
from stabrun.study.plan import load
from stabrun.study.snapshot import SnapshotReader
from stabrun.verdict.chart import LEAST_ROWS

ONE = "study.workers=1"


def test_a_study_to_its_end(undisturbed, tmp_path):
    lines = swept(tmp_path).splitlines()
    assert len(undisturbed.rows) == 8
    assert rows(tmp_path) == undisturbed.rows
    study = StudyDir(tmp_path / "study")
    for cell in undisturbed.plan.cells:
        assert study.run(cell).metrics.read_bytes() == undisturbed.record(cell)
    assert len(list((study.path / "ledger").glob("*.claim"))) == 8, "each cell was trained once"
    assert list(study.attempts.iterdir()) == []
    top = next(index for index, line in enumerate(lines) if line.startswith("lr "))
    assert lines[top].split() == ["lr", "1e-2", "0.1"]
    assert [line.split()[0] for line in lines[top + 1 : top + 3]] == ["baseline", "qk_norm"]
    assert all(len(marks) == 2 for line in lines[top + 1 : top + 3] for marks in line.split()[1:])
    summary = [line.split()[:3] for line in lines[-5:-3]]
    assert summary == [["baseline", "4", "0"], ["qk_norm", "4", "0"]], "runs, and those that diverged"
    assert lines[-1] == "records: study"


def test_the_same_command_again_and_a_larger_study(undisturbed, tmp_path, monkeypatch, capsys):
    assert sweep_here(monkeypatch, capsys, tmp_path)[0] == 0
    claims = sorted(os.listdir(tmp_path / "study" / "ledger"))
    status, out, _ = sweep_here(monkeypatch, capsys, tmp_path)
    assert status == 0
    assert "[" not in out, "nothing is trained"
    assert sorted(os.listdir(tmp_path / "study" / "ledger")) == claims
    assert rows(tmp_path) == undisturbed.rows
    status, out, _ = sweep_here(monkeypatch, capsys, tmp_path, "study.lrs=[1e-2,3e-2]", "study.seeds=1")
    assert status == 0
    assert "[9/10]" in out
    assert "] baseline lr=3e-2 s0" in out
    assert len(rows(tmp_path)) == 10
    status, _, err = sweep_here(monkeypatch, capsys, tmp_path, "train.steps=20")
    assert status == 2
    assert "train.steps=30 (now 20)" in err


def test_a_tracked_study_is_one_group_and_its_summary_is_sent_once(tmp_path, monkeypatch, capsys):
    words = ("tracker=wandb", "study.lrs=[1e-2]", "study.seeds=1", "study.variants=[qk_norm]")
    for _ in range(2):
        assert sweep_here(monkeypatch, capsys, tmp_path, *words)[0] == 0
    (summary,) = (tmp_path / "study").glob("wandb/offline-run-*")
    (train,) = (tmp_path / "study").glob("runs/*/wandb/offline-run-*")
    sent = [next(item["run"] for item in inspected(folder) if item["type"] == "run") for folder in (summary, train)]
    assert [facts["run_group"] for facts in sent] == ["study", "study"]
    assert [facts["display_name"] for facts in sent] == ["study: summary", "qk_norm lr=1e-2 s0"]


def test_the_offline_runs_of_a_study_are_complete_after_a_kill_before_they_were_written(tmp_path, monkeypatch, capsys):
    words = ("tracker=wandb", "study.lrs=[1e-2]", "study.seeds=2", "study.variants=[qk_norm]")
    with monkeypatch.context() as patch:
        patch.setattr(sweep, "_track", lambda *_: None)
        assert sweep_here(monkeypatch, capsys, tmp_path, *words)[0] == 0
    study = StudyDir(tmp_path / "study")
    assert not list(study.path.rglob("wandb/offline-run-*"))
    assert sweep_here(monkeypatch, capsys, tmp_path, *words)[0] == 0
    for each in study.recorded_runs():
        (folder,) = each.path.glob("wandb/offline-run-*")
        assert_holds(folder, list(each.rows()), norms_every=10)
    assert len(list(study.path.glob("wandb/offline-run-*"))) == 1


class Finishing:
    """A pool that finishes a made-up run each time it is looked after."""

    def __init__(self, directory):
        self.ledger, self.plan = Ledger(directory), load(directory)
        self.left = list(self.plan.cells.values())

    def keep(self, _):
        claim = self.ledger.claim((cell := self.left.pop()).id, Entry())
        made.a_run(claim.directory, self.plan.config(cell), cell, lost=False)
        claim.finish()

    def end(self, interrupt):
        assert not interrupt


def test_results_are_not_written_after_each_of_many_runs(tmp_path, monkeypatch, capsys):
    """Their cost grows with the runs: only as often as it is a small part of the time."""
    a_plan(tmp_path, *QUESTION, "study.seeds=3", "train.steps=40")
    write, written = results.write, []
    monkeypatch.setattr(
        results, "write", lambda plan, rows, study: written.append(len(rows)) or write(plan, rows, study)
    )
    monkeypatch.setattr(sweep.time, "sleep", lambda _: None)
    monkeypatch.setattr(sweep, "PAUSE", 1e9)
    assert sweep._supervise(SnapshotReader(tmp_path), Finishing(tmp_path)) == 0
    assert written == [1]
    assert len(capsys.readouterr().out.splitlines()) == 12, "each run is told at once"


@pytest.mark.parametrize("seed", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_killed_twice_the_same_command_completes(undisturbed, tmp_path, seed):
    """First the whole session, then the sweep alone, whose workers go on beside those of the next sweep."""
    dice, study = random.Random(seed), tmp_path / "study"
    with sweeping(tmp_path, ONE) as process:
        wait_for(lambda: recorded(study))
        time.sleep(dice.uniform(0.0, 1.0))
    with sweeping(tmp_path, ONE) as process:
        claims = len(list((study / "ledger").glob("*.claim")))
        wait_for(lambda: len(list((study / "ledger").glob("*.claim"))) > claims or process.poll() is not None)
        time.sleep(dice.uniform(0.0, 1.0))
        process.kill()
        process.wait()
        swept(tmp_path, ONE)
        wait_for(lambda: not session_exists(process.pid))  # workers end when no cell is left
    assert rows(tmp_path) == undisturbed.rows
    for events in study.glob("runs/*/events.jsonl"):
        assert events.read_text().count('"event": "complete"') == 1, "no finished cell is trained again"


def session_exists(pid):
    try:
        os.killpg(pid, 0)
    except ProcessLookupError:
        return False
    return True


def test_a_search_killed_on_its_way_completes(tmp_path, monkeypatch, capsys):
    """At rates and steps that give little information. Each arm gets its runs, each once, with its seeds in order."""
    words = (
        ONE,
        "study.strategy=frontier",
        "study.lr_range=[3e-3,3]",
        "study.lrs=[]",
        "study.seeds=3",
        "study.max_runs=4",
    )
    with sweeping(tmp_path, *words):
        wait_for(lambda: len(list(tmp_path.glob("study/runs/*/summary.json"))) >= 2)
    status, out, err = sweep_here(monkeypatch, capsys, tmp_path, *words)
    assert status == 0, err
    found = rows(tmp_path)
    assert len(found) == len(os.listdir(tmp_path / "study" / "runs"))
    summary = json.loads((tmp_path / "study" / "study.json").read_text())
    for arm in ("baseline", "qk_norm"):
        seeds = [int(row["seed"]) for row in found if row["arm"] == arm]
        assert seeds == list(range(len(seeds)))
        assert len(seeds) == 4 or summary["variants"][arm]["enough"]
    assert "(21 learning rates × 3 seeds): 126 runs" in out
    assert "[" not in sweep_here(monkeypatch, capsys, tmp_path, *words)[1], "nothing is trained"
    assert rows(tmp_path) == found


SLOW_SIGNALS = [pytest.param(sign, marks=pytest.mark.slow) for sign in (signal.SIGTERM, signal.SIGUSR2)]


@pytest.mark.parametrize("sign", [signal.SIGINT, *SLOW_SIGNALS])
def test_ctrl_c_leaves_checkpoints_and_the_same_command_resumes(tmp_path, monkeypatch, capsys, sign):
    """Without checkpoints during a run: only a worker that stops after its step writes one.

    Terminals and clusters send a signal to all processes, so that a worker gets SIGTERM from two of them.
    """
    words = ("study.lrs=[1e-2]", "study.seeds=1", "train.steps=400", "train.checkpoint_every=0", "train.val_every=0")
    words = (*words, "observe.every=0")
    with sweeping(tmp_path, *words) as process:
        wait_for(lambda: len(recorded(tmp_path / "study")) == 2)
        os.killpg(process.pid, sign)
        status, said = ended(process)
    assert status == 130
    assert "the same command resumes" in said
    assert len(list((tmp_path / "study" / "ledger").glob("*.left"))) == 2, "workers gave their cells back"
    attempts = list((tmp_path / "study" / "attempts").iterdir())
    assert len(attempts) == 2
    assert all(list(attempt.glob("checkpoints/step_*/meta.json")) for attempt in attempts)
    assert sweep_here(monkeypatch, capsys, tmp_path, *words)[0] == 0
    (tmp_path / "alone").mkdir()
    assert rows(tmp_path) == trained_alone(tmp_path / "alone", *QUESTION, *words).rows


def test_a_cell_that_cannot_be_trained_is_named(tmp_path, monkeypatch, capsys):
    (tmp_path / "bad.txt").write_bytes(b"\xff\xfe")
    words = "data=embedded,local", f"data.path={tmp_path / 'bad.txt'}"
    status, _, _ = sweep_here(monkeypatch, capsys, tmp_path, *words)
    assert status == 2, "embedded text takes no path: all cells are checked before anything runs"
    words = "data=local", f"data.path={tmp_path / 'bad.txt'}", "study.seeds=1", "study.variants=[baseline]"
    status, out, err = sweep_here(monkeypatch, capsys, tmp_path, *words)
    assert status == 1
    assert "baseline lr=1e-2 s0" in err
    assert "not UTF-8 text" in err
    assert "Traceback" not in err
    assert "baseline  !     !" in out


@pytest.mark.slow
def test_two_sweeps_of_one_study_at_once_count_each_cell_once(undisturbed, tmp_path):
    with sweeping(tmp_path) as one, sweeping(tmp_path) as other:
        ends = [ended(process) for process in (one, other)]
    assert [status for status, _ in ends] == [0, 0], ends
    assert rows(tmp_path) == undisturbed.rows
    assert len(list((tmp_path / "study" / "ledger").glob("*.claim"))) == 8, "no cell was tried twice"


def test_a_cell_that_runs_out_of_memory_is_named_and_the_rest_is_trained(tmp_path):
    """Of two vocabularies one needs more than 5 GB. A worker may have 3 GB of address space."""
    limit = 3 * 2**30
    words = ("model.vocab_size=256,6000000", "study.lrs=[1e-2]", "study.seeds=1", "study.workers=1")
    process = subprocess.Popen(
        [sys.executable, "-m", "stabrun", "sweep", *TINY, *words, "study_dir=study"],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (limit, limit)),
    )
    _, err = process.communicate(timeout=240)
    assert process.returncode == 1
    assert "baseline vocab_size=6000000 lr=1e-2 s0" in err
    assert "was given up after 2 attempts" in err
    assert "memory" in err
    assert [row["arm"] for row in rows(tmp_path)] == ["baseline vocab_size=256"]
    assert len(list((tmp_path / "study" / "ledger").glob("*.failed"))) == 2


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("study.variants=[qk_nrom]",), "qk_nrom"),
        (("study.lrs=[-1]",), "optim.lr=-1.0"),
        (("study.strategy=frontier", "study.lrs=[]", "study.lr_range=[2,1]"), "study.lr_range=[2.0, 1.0]"),
        (("--follow",), "--follow"),
        (("study.wrokers=2",), "Did you mean study.workers?"),
        (("run_dir=run",), "run_dir: has no effect in a study"),
        (("run_dir=a,b",), "run_dir: has no effect in a study"),
        (("study_dir=file/study",), "study_dir=file/study: not a directory."),
    ],
)
def test_invalid_studies_create_nothing(tmp_path, monkeypatch, capsys, words, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    status, _, err = run(capsys, "sweep", *QUESTION, *words)
    assert status == 2
    assert message in err
    assert [item.name for item in tmp_path.iterdir()] == ["file"]


def test_a_sweep_imports_no_torch():
    """Its workers do. The import takes seconds."""
    program = "import sys; from stabrun.study.sweep import sweep; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program]).returncode == 0


SHORT = (
    "stabrun: warning: train.steps={} is too short for a verdict, which needs at least "
    f"{LEAST_ROWS} steps; every run whose loss stays finite will be undecided (too_short).\n"
)


def test_a_study_too_short_for_a_verdict_is_warned_about_once(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    words = [word for word in QUESTION if not word.startswith("train.steps")]
    steps = f"train.steps={LEAST_ROWS},3,{LEAST_ROWS - 1}"
    status, _, err = run(capsys, "sweep", *words, steps, "--dry-run")
    assert (status, err) == (0, SHORT.format(f"3,{LEAST_ROWS - 1}"))
    assert run(capsys, "sweep", *words, f"train.steps={LEAST_ROWS}", "--dry-run")[2] == ""
    words = ["study.lrs=[1e-2]", "study.seeds=2", "train.steps=3"]
    status, out, err = sweep_here(monkeypatch, capsys, tmp_path, *words)
    assert (status, err) == (0, SHORT.format("3"))
    assert out.count("undecided (too_short)") == 4


def test_dry_run_shows_the_cost_and_creates_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    status, out, err = run(capsys, "sweep", *QUESTION, "--dry-run")
    assert status == 0, err
    tokens = 8 * 30 * 4 * 16
    assert f"total: 8 of 8 cells, {tokens:,} tokens" in out
    assert re.search("FLOPs, at least .* with 2 workers$", out, re.MULTILINE)
    assert re.search("^times are lower bounds, at .* GFLOP/s per worker", out, re.MULTILINE)
    assert list(tmp_path.iterdir()) == []
