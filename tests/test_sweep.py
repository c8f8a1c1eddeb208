"""`stabrun sweep` as a user runs it: to its end, extended, killed, interrupted, refused."""

import json
import os
import random
import resource
import signal
import subprocess
import sys
import time

import pytest
from helpers import TINY, stabrun
from studies import QUESTION, rows, started, swept
from wandb_files import inspected


def test_a_study_to_its_end_the_same_again_and_a_larger_one(alone, tmp_path):
    done = swept(tmp_path)
    assert done.returncode == 0, done.stderr
    assert len(alone) == 8
    assert rows(tmp_path) == alone
    lines = done.stdout.splitlines()
    top = next(index for index, line in enumerate(lines) if line.startswith("lr "))
    assert lines[top].split() == ["lr", "1e-2", "0.1"]
    assert [line.split()[0] for line in lines[top + 1 : top + 3]] == ["baseline", "qk_norm"]
    assert all(len(mark) == 2 for line in lines[top + 1 : top + 3] for mark in line.split()[1:])
    answer = [line.split()[:4] for line in lines[-5:-3]]
    assert answer == [["baseline", "0", "of", "4"], ["qk_norm", "0", "of", "4"]]
    assert lines[-1] == "records: study"
    claims = sorted(os.listdir(tmp_path / "study" / "ledger"))
    again = swept(tmp_path)
    assert again.returncode == 0
    assert "[" not in again.stdout, "nothing is trained"
    assert sorted(os.listdir(tmp_path / "study" / "ledger")) == claims
    assert rows(tmp_path) == alone
    more = swept(tmp_path, "study.lrs=[1e-2,3e-2]", "study.seeds=1")
    assert more.returncode == 0
    assert "[9/10]" in more.stdout
    assert "] baseline lr=3e-2 s0" in more.stdout
    assert len(rows(tmp_path)) == 10
    other = swept(tmp_path, "train.steps=20")
    assert other.returncode == 2
    assert "train.steps=30 (now 20)" in other.stderr


def test_a_tracked_study_is_one_group_and_its_summary_is_sent_once(tmp_path):
    words = ("tracker=wandb", "study.lrs=[1e-2]", "study.seeds=1", "study.variants=[qk_norm]")
    for _ in range(2):
        assert swept(tmp_path, *words).returncode == 0
    (summary,) = (tmp_path / "study").glob("wandb/offline-run-*")
    (run,) = (tmp_path / "study").glob("runs/*/wandb/offline-run-*")
    told = [next(record["run"] for record in inspected(folder) if record["type"] == "run") for folder in (summary, run)]
    assert [facts["run_group"] for facts in told] == ["study", "study"]
    assert [facts["display_name"] for facts in told] == ["study: the answer", "qk_norm lr=1e-2 s0"]


@pytest.mark.parametrize("seed", [0, 1])
def test_killed_at_any_moment_the_same_command_completes(alone, tmp_path, seed):
    """Twice: all of it at once, and the sweep alone, whose workers go on beside those of the next."""
    dice, orphans = random.Random(seed), None
    for whole in (True, False):
        process = started(tmp_path)
        time.sleep(dice.uniform(1.0, 5.0))
        if whole:
            os.killpg(process.pid, signal.SIGKILL)
        else:
            process.kill()
            orphans = process.pid
        process.communicate()
    last = swept(tmp_path)
    assert last.returncode == 0, last.stderr
    assert rows(tmp_path) == alone
    for cell in os.listdir(tmp_path / "study" / "runs"):
        ends = (tmp_path / "study" / "runs" / cell / "events.jsonl").read_text().count('"event": "complete"')
        assert ends == 1, "no finished cell is run again"
    deadline = time.monotonic() + 30
    while orphans and time.monotonic() < deadline:
        try:
            os.killpg(orphans, 0)
        except ProcessLookupError:
            orphans = None
        time.sleep(0.1)
    assert orphans is None, "workers end when no cell is left"


def test_a_search_killed_on_its_way_completes(tmp_path):
    """Few steps at rates that tell little: each arm gets its runs, once, with the seeds in order."""
    words = (
        *TINY, "study.strategy=frontier", "study.variants=[baseline,qk_norm]", "study.lr_range=[3e-3,3]",
        "study.max_runs=4", "study.workers=2", "study_dir=study", "train.checkpoint_every=5",
    )  # fmt: skip
    command = [sys.executable, "-m", "stabrun", "sweep", *words]
    process = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.DEVNULL, start_new_session=True)
    deadline = time.monotonic() + 60
    while len(list(tmp_path.glob("study/runs/*/summary.json"))) < 2:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    done = stabrun("sweep", *words, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    found = rows(tmp_path)
    assert len(found) == len(os.listdir(tmp_path / "study" / "runs"))
    told = json.loads((tmp_path / "study" / "study.json").read_text())
    for arm in ("baseline", "qk_norm"):
        seeds = [int(row["seed"]) for row in found if row["arm"] == arm]
        assert seeds == list(range(len(seeds)))
        assert len(seeds) == 4 or told["variants"][arm]["enough"]
    assert "a grid as fine (21 learning rates × 3 seeds) takes 126 runs" in done.stdout
    again = stabrun("sweep", *words, cwd=tmp_path)
    assert "[" not in again.stdout
    assert rows(tmp_path) == found


def test_ctrl_c_ends_it_and_the_same_command_goes_on(alone, tmp_path):
    process = started(tmp_path)
    time.sleep(4.0)
    os.killpg(process.pid, signal.SIGINT)
    out, err = process.communicate(timeout=60)
    if process.returncode == 130:
        assert b"the same command goes on" in out + err
    assert b"Traceback" not in err
    assert swept(tmp_path).returncode == 0
    assert rows(tmp_path) == alone


def test_ctrl_c_leaves_each_cell_its_checkpoint(tmp_path):
    """There is none before the end of a run: only a worker that stops after its step writes one."""
    process = started(tmp_path, "train.steps=20000", "train.checkpoint_every=0")
    deadline = time.monotonic() + 60
    while len(list(tmp_path.glob("study/attempts/*/metrics.jsonl"))) < 2:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGINT)
    process.communicate(timeout=60)
    assert process.returncode == 130
    attempts = list((tmp_path / "study" / "attempts").iterdir())
    assert len(attempts) == 2
    assert all(list(attempt.glob("checkpoints/step_*/meta.json")) for attempt in attempts)


def test_a_cell_that_cannot_be_trained_is_named(tmp_path):
    (tmp_path / "bad.txt").write_bytes(b"\xff\xfe")
    words = "data=embedded,local", f"data.path={tmp_path / 'bad.txt'}"
    refused = stabrun("sweep", *QUESTION, *words, cwd=tmp_path)
    assert refused.returncode == 2, "embedded text takes no path: all cells are checked before anything runs"
    done = swept(
        tmp_path, "data=local", f"data.path={tmp_path / 'bad.txt'}", "study.seeds=1", "study.variants=[baseline]"
    )
    assert done.returncode == 1
    assert "baseline lr=1e-2 s0" in done.stderr
    assert "not UTF-8 text" in done.stderr
    assert "Traceback" not in done.stderr
    assert "baseline  !     !" in done.stdout


def test_two_sweeps_of_one_study_at_once_count_each_cell_once(alone, tmp_path):
    sweeps = [started(tmp_path), started(tmp_path)]
    ends = [process.communicate(timeout=120) for process in sweeps]
    assert [process.returncode for process in sweeps] == [0, 0], ends
    assert rows(tmp_path) == alone
    claims = list((tmp_path / "study" / "ledger").glob("*.claim"))
    assert len(claims) == len(rows(tmp_path)), "no cell was tried twice"


def test_a_cell_that_runs_out_of_memory_is_named_and_the_rest_goes_on(tmp_path):
    """Two vocabularies, of which one takes 5 GB and more; a worker may have 3 GB of address space in all."""
    limit = 3 * 2**30
    words = (
        *TINY,
        "model.vocab_size=256,6000000",
        "study.lrs=[1e-2]",
        "study.seeds=1",
        "study.workers=1",
        "study_dir=study",
    )
    process = subprocess.Popen(
        [sys.executable, "-m", "stabrun", "sweep", *words],
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
    ("words", "said"),
    [
        (("study.variants=[qk_nrom]",), "qk_nrom"),
        (("study.lrs=[-1]",), "optim.lr=-1.0"),
        (("study.strategy=frontier", "study.lrs=[]", "study.lr_range=[2,1]"), "study.lr_range=[2.0, 1.0]"),
        (("--follow",), "no such flag"),
        (("study.wrokers=2",), "Did you mean study.workers?"),
    ],
)
def test_bad_studies_make_nothing(tmp_path, words, said):
    done = stabrun("sweep", *QUESTION, *words, cwd=tmp_path)
    assert done.returncode == 2
    assert said in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_the_process_of_a_sweep_imports_no_torch(tmp_path):
    """Its workers do; it would wait a second for nothing."""
    program = "import sys; from stabrun.study.sweep import sweep; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], cwd=tmp_path).returncode == 0


def test_dry_run_tells_and_makes_nothing(tmp_path):
    done = stabrun("sweep", *QUESTION, "--dry-run", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    tokens = 8 * 30 * 4 * 16
    assert f"in all 8 of 8 cells, {tokens:,} tokens" in done.stdout
    assert "by 1 worker" in done.stdout
    assert "the times are lower bounds" in done.stdout
    assert "GFLOP/s a worker" in done.stdout
    assert list(tmp_path.iterdir()) == []
