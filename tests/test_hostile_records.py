"""Files of runs and studies that no version writes: each command ends with a sentence, and writes nowhere else.

`test_damage` damages at random what this version wrote; here are wrong types, depths, lengths, links and disks.
"""

import errno
import json
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import RICH, TINY, a_trainer, run, stabrun, tiny
from safetensors import SafetensorError
from studies import a_plan

from stabrun.config import UserError
from stabrun.record.disk import REMEDIES
from stabrun.record.jsonl import LONGEST, read_lines
from stabrun.record.run_dir import RunDir
from stabrun.record.study_dir import StudyDir
from stabrun.study import worker
from stabrun.study.ledger import DISK, DONE, PLANNED, Ledger
from stabrun.study.snapshot import SnapshotReader
from stabrun.study.worker import work
from stabrun.training import checkpoint

DEEP = "[" * 100_000 + "]" * 100_000
DEEP_OBJECT = '{"a": ' * 100_000 + "1" + "}" * 100_000
OF_JSON = ["{}", "null", DEEP, DEEP_OBJECT]
FILES = ("summary.json", "environment.json", "wandb/sent.json", "events.jsonl", "metrics.jsonl", "config.yaml")
VALUES = (None, [], "x", {"a": None}, 10**400)
EVENTS = ("checkpoint", "start", "complete", "failed", "rewind", None, 3)


def commands(name):
    return ["judge", name], ["status", name], ["upload", name, "--dry-run"]


def check(capsys, words, case):
    """A command ends with 0, or with 2 and a sentence."""
    try:
        status, out, err = run(capsys, *words)
    except Exception as error:
        raise AssertionError(f"{case}: {' '.join(words)}") from error
    assert status in (0, 2), (case, words, status, err)
    assert "Traceback" not in out + err
    assert status == 0 or err.startswith("stabrun: "), (case, words)


@pytest.fixture
def over(tmp_path, monkeypatch, capsys, stopped):
    """A run in the current directory."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(stopped, "run")
    Path("run/wandb").mkdir()
    return RunDir(Path("run"))


def test_each_file_of_a_run_may_hold_anything(capsys, over):
    for name in FILES:
        file = over.path / name
        before = file.read_bytes() if file.exists() else None
        for content in OF_JSON:
            file.write_text(content)
            for words in commands("run"):
                check(capsys, words, f"{content[:20]!r} in {name}")
        file.unlink() if before is None else file.write_bytes(before)


def test_each_field_of_a_summary_may_be_missing_or_anything(capsys, over):
    facts = json.loads(over.summary_file.read_text())
    del facts["check"]
    for name in facts:
        for value in VALUES:
            over.summary_file.write_text(json.dumps(facts | {name: value}))
            try:
                over.summary()
            except UserError:
                continue
            check(capsys, ["status", "run"], f"{name}={str(value)[:20]}")


def test_rows_and_events_of_wrong_types(capsys, over):
    rows = [{"step": step, "train/loss": 2.5, "tokens": step} for step in range(5)]
    keys = ("val/loss", "grad/norm", "scale/skipped", "grad/clipped", "norm/out/qkv", "attn/entropy", "tokens", "mine")
    for key in keys:
        for value in VALUES:
            over.metrics.write_text("".join(json.dumps(row | {key: value}) + "\n" for row in rows))
            over.events_file.write_text("")
            over.summary_file.unlink(missing_ok=True)
            check(capsys, ["judge", "run"], f"{key}={str(value)[:20]}")
    over.metrics.write_text("".join(json.dumps(row) + "\n" for row in rows))
    for kind in EVENTS:
        for value in VALUES:
            lines = [{"event": kind, "step": value, "path": value, "time": value, "error": value}]
            over.events_file.write_text("".join(json.dumps(line) + "\n" for line in lines))
            check(capsys, ["status", "run"], f"{kind} {str(value)[:20]}")


def test_a_text_for_a_number_is_named(capsys, over):
    over.metrics.write_text('{"step": 0, "train/loss": 2.5, "norm/out/fc1": [1.0, "2"]}\n')
    status, _, err = run(capsys, "judge", "run")
    assert (status, "norm/out/fc1 is not a number at step 0" in err) == (2, True)


def test_folders_that_are_no_checkpoints(capsys, over):
    for name in ("step_abc", "step_99999999999999999999", "step_", "step_-1"):
        (over.checkpoints / name).mkdir()
        (over.checkpoints / name / "meta.json").write_text("{}")
    (over.checkpoints / "step_00000099").write_text("")
    for words in (*commands("run"), ["train", *TINY, *RICH, "run_dir=run"]):
        check(capsys, words, "folders")
    assert over.state() == "complete"


@pytest.mark.parametrize("content", [DEEP, "{}", "[]", "cells: 7", "arms: {a: {}}\ncells: [[1]]\nformat: 1"])
def test_each_plan_may_be_anything(tmp_path, capsys, content):
    (tmp_path / "study.yaml").write_text(content)
    for words in commands(str(tmp_path)):
        check(capsys, words, content[:20])


def test_each_file_of_a_study_may_hold_anything(tmp_path, monkeypatch, capsys, made_study):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(made_study, "study")
    cell = next(Path("study/runs").iterdir())
    claim = Path("study/ledger") / f"{cell.name}.0001.claim"
    for file in (Path("study/study.json"), cell / "summary.json", claim, claim.with_suffix(".beat")):
        before = file.read_bytes() if file.exists() else None
        for content in OF_JSON:
            file.write_text(content)
            for words in (["status", "study"], ["status", "study", "--json"], ["upload", "study", "--dry-run"]):
                check(capsys, words, f"{content[:20]!r} in {file}")
        file.unlink() if before is None else file.write_bytes(before)


def test_a_run_without_its_summary_is_named_and_trained_to_its_end(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    plan = a_plan(tmp_path, "study.lrs=[1e-2]", "study.seeds=1", "train.checkpoint_every=10")
    work(tmp_path)
    (cell,) = plan.cells
    run_dir = StudyDir(tmp_path).run(cell)
    record = run_dir.metrics.read_bytes()
    run_dir.summary_file.unlink()
    status, out, _ = run(capsys, "status", ".")
    assert (status, "The same `stabrun sweep` command goes on with it" in out) == (0, True)
    from stabrun.study.rejudge import reopen_damaged

    reopen_damaged(plan, SnapshotReader(tmp_path))
    assert Ledger(tmp_path).entries([cell])[cell].status == PLANNED
    work(tmp_path)
    assert (run_dir.final_summary() or {})["status"] == "complete"
    assert run_dir.metrics.read_bytes() == record


@pytest.mark.parametrize("name", ["metrics.jsonl", "events.jsonl", ".lock", "checkpoints", "checkpoints/incomplete"])
def test_nothing_is_written_through_a_link_out_of_a_run(tmp_path, capsys, over, name):
    outside, link = tmp_path / "outside", over.path / name
    outside.mkdir() if link.is_dir() or "/" in name else outside.write_text("precious")
    shutil.rmtree(link) if link.is_dir() else link.unlink(missing_ok=True)
    link.symlink_to(outside)
    status, _, err = run(capsys, "train", *TINY, *RICH, "run_dir=run")
    assert (status, f"{name} is a link to a place outside" in err) == (2, True), err
    assert (list(outside.iterdir()) == []) if outside.is_dir() else (outside.read_text() == "precious")


def test_a_whole_run_directory_may_be_a_link(tmp_path, capsys, over):
    over.path.rename("elsewhere")
    Path("run").symlink_to("elsewhere")
    assert run(capsys, "train", *TINY, *RICH, "run_dir=run")[0] == 0
    assert RunDir(Path("elsewhere")).state() == "complete"


class Bomb:
    def __reduce__(self):
        return os.mkdir, (os.environ["BOMB"],)


def test_a_pickle_in_place_of_weights_is_not_executed(tmp_path, monkeypatch, capsys, over):
    monkeypatch.setenv("BOMB", str(tmp_path / "executed"))
    newest = checkpoint.latest(over.checkpoints)[1]
    for name in ("model.safetensors", "optimizer.safetensors", "meta.json"):
        (newest / name).write_bytes(pickle.dumps(Bomb()))
    assert run(capsys, "train", *TINY, *RICH, "run_dir=run")[0] == 0  # from the older one
    newest = newest.with_name(f"damaged_{newest.name}")
    (newest / "meta.json").write_text(json.dumps({"step": 13, "scaler": {}}))
    with pytest.raises((OSError, UserError, SafetensorError)):
        checkpoint.load(newest, (trainer := a_trainer(tiny(*RICH))).model, trainer.optimizer)
    assert not (tmp_path / "executed").exists()


MEASURED = """
import sys
from pathlib import Path
from stabrun.cli.main import main
try:
    main(sys.argv[1:])
finally:
    status = Path("/proc/self/status").read_text()  # ru_maxrss is at least that of the process that forked this one
    print(int(status.split("VmHWM:")[1].split()[0]) // 1024, file=sys.stderr)
"""


@pytest.mark.parametrize("name", ["run/metrics.jsonl", "run/events.jsonl", "curve.jsonl"])
def test_a_line_of_200_mb_is_refused_in_bounded_memory(tmp_path, over, name):
    with open(tmp_path / name, "wb") as file:
        file.write(b'{"step": 0, "train/loss": [')
        for _ in range(200):
            file.write(b"1," * 500_000)
        file.write(b"1]}\n" + b'{"step": 1, "train/loss": 2.0}\n')
    where = "run" if name.startswith("run/") else name
    done = subprocess.run(
        [sys.executable, "-c", MEASURED, "judge", where], cwd=tmp_path, capture_output=True, text=True
    )
    *_, peak = done.stderr.split()
    assert "Traceback" not in done.stderr
    assert done.returncode == (0 if "events" in name else 2)
    assert (
        "is not as it was written" in done.stderr + done.stdout
        or "longer than" in done.stderr
        or "line 1" in done.stdout
    )
    assert int(peak) < 450  # MiB; half of it is Python with its packages


def test_a_long_line_is_no_object(tmp_path):
    (tmp_path / "lines.jsonl").write_bytes(b'{"a": "' + b"x" * LONGEST + b'"}\n{"a": 1}\n')
    assert [line.value for line in read_lines(tmp_path / "lines.jsonl")] == [None, {"a": 1}]


@pytest.mark.parametrize("env", [{"PYTHONIOENCODING": "ascii"}, {"LC_ALL": "C", "PYTHONUTF8": "0"}], ids=["ascii", "C"])
def test_an_output_without_unicode(tmp_path, made_study, env):
    done = stabrun("judge", made_study, cwd=tmp_path, env=env)
    assert (done.returncode, done.stderr) == (0, "")
    assert " -> final " in done.stdout


def test_control_characters_of_other_files_are_shown_as_escapes(tmp_path, capsys):
    rows = [f"{step},{3 - step / 50}" for step in range(60)]
    (tmp_path / "a\x1b[31m.csv").write_text("step,train\x1b]0;title\x07_loss\n" + "\n".join(rows) + "\n")
    for words in (["judge", tmp_path], ["judge", tmp_path, "--loss", "x\x1b[2J"]):
        _, out, _ = run(capsys, *words)
        assert "\x1b" not in out


def test_a_full_disk_is_no_fault_of_a_cell(tmp_path, monkeypatch):
    plan = a_plan(tmp_path, "study.lrs=[1e-2]", "study.seeds=1")
    (cell,) = plan.cells

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device", "metrics.jsonl")

    for _ in range(3):
        with monkeypatch.context() as patch:
            patch.setattr(worker, "train", full)
            with pytest.raises(OSError, match="No space"):
                work(tmp_path)
    entry = Ledger(tmp_path).entries([cell])[cell]
    assert (entry.status, len(entry.left), len(entry.failed)) == (PLANNED, 3, 0)
    assert Ledger(tmp_path).reason(cell, 3, "left").startswith(f"{DISK}metrics.jsonl: No space")
    work(tmp_path)
    assert Ledger(tmp_path).entries([cell])[cell].status == DONE


def test_a_sweep_on_a_disk_that_is_full_says_so_and_goes_on_with_every_cell(tmp_path):
    """The size of files is limited, as by a quota: in the workers only, by a hook that Python runs at its start."""
    words = ("sweep", *TINY, "study.lrs=[1e-2,1e-1]", "study.seeds=1", "study.workers=1", "study_dir=study")
    words = (*words, "train.checkpoint_every=10")
    hook = tmp_path / "hook"
    hook.mkdir()
    (hook / "sitecustomize.py").write_text(
        "import resource, sys\n"
        "if 'stabrun.study.worker' in ' '.join(sys.orig_argv):\n"
        "    resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, 30_000))\n"
    )
    path = f"{hook}:{os.environ.get('PYTHONPATH', '')}"
    done = stabrun(*words, cwd=tmp_path, env={"PYTHONPATH": path})
    assert done.returncode == 1
    assert errno.EFBIG in REMEDIES
    assert "run the same command again" in done.stderr, done.stderr
    assert "Traceback" not in done.stderr
    done = stabrun(*words, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "[2/2]" in done.stdout


def test_a_study_directory_that_is_a_file(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("file").write_text("")
    status, _, err = run(capsys, "sweep", *TINY, "study.lrs=[1e-2]", "study_dir=file")
    assert (status, err) == (2, "stabrun: study_dir=file: not a directory.\n")
