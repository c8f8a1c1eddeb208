"""A run directory: what it reads from damaged and unfinished files, its state, and its lock."""

import json
import os
from pathlib import Path

import pytest
from helpers import tiny

import stabrun
from stabrun.config import UserError
from stabrun.record.run_dir import RunDir, RunWriter
from stabrun.record.schema import COMPLETE, FAILED, INTERRUPTED, RUNNING, STOPPED
from stabrun.record.study_dir import StudyDir

ROWS = [f'{{"step": {step}, "train/loss": 2.5}}\n' for step in range(3)]
INCOMPLETE = ["", '{"step": 3, "x"']
DAMAGED = ["not json\n", '[1]\n{"step": 3}\n']


@pytest.fixture
def run(tmp_path):
    return RunDir(tmp_path)


@pytest.mark.parametrize("tail", INCOMPLETE + DAMAGED)
def test_a_resume_keeps_the_rows_of_its_checkpoint(run, tail):
    run.metrics.write_text("".join(ROWS) + tail)
    rows, removed = RunWriter(run).cut(2)
    assert ([row["step"] for row in rows], removed) == ([0, 1], 1)
    assert run.metrics.read_text() == "".join(ROWS[:2])


@pytest.mark.parametrize("line", ["not json", '{"x": 1}', '{"step": 7}'])
def test_a_damaged_record_is_refused_before_it_is_cut(run, line):
    run.metrics.write_text(ROWS[0] + line + "\n" + ROWS[2])
    before = run.metrics.read_bytes()
    with pytest.raises(UserError, match="does not contain the 3 steps"):
        RunWriter(run).cut(3)
    assert run.metrics.read_bytes() == before


@pytest.mark.parametrize("tail", INCOMPLETE + DAMAGED)
def test_rows_are_read_up_to_the_incomplete_line_and_no_damage_is_passed_over(run, tail):
    run.metrics.write_text("".join(ROWS) + tail)
    rows = run.rows()
    assert [next(rows)["step"] for _ in range(3)] == [0, 1, 2]
    if tail in INCOMPLETE:
        assert list(rows) == []
    else:
        with pytest.raises(UserError, match="the line at byte 93 is not as it was written"):
            list(rows)
    readable = [row for row, _ in run.readable_rows()]
    assert [row["step"] for row in readable[:3]] == [0, 1, 2]
    assert all(isinstance(row, str) for row in readable[3:])
    assert bool(readable[3:]) == bool(tail)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"step": 3}, "step or train/loss is missing"),
        ({"train/loss": 2.5}, "step or train/loss is missing"),
        ({"step": 2**53, "train/loss": 2.5}, "step or train/loss is missing"),
        ({"step": 3, "train/loss": True}, "step or train/loss is missing"),
        ({"step": 3, "train/loss": 2.5, "grad/norm": []}, "grad/norm is not a number at step 3"),
    ],
)
def test_an_object_that_is_not_a_row_is_refused(run, row, message):
    run.metrics.write_text(json.dumps(row) + "\n")
    with pytest.raises(UserError, match=message):
        list(run.rows())
    ((sentence, size),) = run.readable_rows()
    assert sentence == "line 1 is not a row of a record; it was left out."
    assert size == run.metrics.stat().st_size


def test_nothing_is_read_from_an_empty_directory(run):
    assert list(run.rows()) == list(run.readable_rows()) == run.events() == run.restarts() == []
    assert (run.last_row(), run.summary(), run.checkpoint_step()) == (None,) * 3
    assert (run.steps_done(), run.steps_per_second(), run.seconds_spent(), run.environment()) == (0, None, 0.0, {})
    assert list(run.path.iterdir()) == []


def test_each_state_is_told_from_the_files(run):
    assert run.state() == INTERRUPTED
    with run.lock(tiny()) as writer:
        assert run.is_locked()
        assert run.state() == RUNNING
        writer.event(FAILED, step=3, error="OSError: no space")
    assert not run.is_locked()
    assert (run.state(), run.error()) == (FAILED, "OSError: no space")
    writer.event("start", step=3)
    assert (run.state(), run.error(), run.restarts()) == (INTERRUPTED, None, [3])
    for state in (INTERRUPTED, COMPLETE, STOPPED):
        run.write_summary({"status": state})
        assert run.state() == state
        assert (run.final_summary() is None) == (state == INTERRUPTED)
    run.summary_file.write_text("[]")
    with pytest.raises(UserError, match=r"summary\.json is damaged"):
        run.state()


def test_one_process_holds_the_lock_and_one_experiment_the_directory(run):
    with run.lock(tiny()), pytest.raises(UserError, match="another process"), RunDir(run.path).lock(tiny()):
        pass
    with pytest.raises(UserError, match=r"optim.lr=0.01 \(now 0.02\)"), run.lock(tiny("optim.lr=0.02")):
        pass
    assert run.config() == tiny()


def test_a_directory_with_other_content_is_refused(tmp_path):
    (tmp_path / "letter.txt").write_text("")
    with pytest.raises(UserError, match="not empty, and not a run directory"):
        RunDir(tmp_path).refuse_other_run(tiny())
    with pytest.raises(UserError, match=r"letter\.txt: not a directory"), RunDir(tmp_path / "letter.txt").lock(tiny()):
        pass


@pytest.mark.parametrize("owner", [RunDir, StudyDir])
def test_the_name_of_each_file_is_in_one_module(owner):
    sources = [file.read_text() for file in Path(stabrun.__file__).parent.rglob("*.py")]
    names = {path.name for path in vars(owner(Path("place"))).values()} - {"place", "config.yaml", "runs", "attempts"}
    assert len(names) >= 6
    for name in names - {".lock", "tokenizer.json"}:  # others have such a file too
        assert sum(f'"{name}"' in text for text in sources) == 1, name


def test_the_speed_is_unknown_until_a_start_has_said_where_it_goes_on(tmp_path):
    """A resumed run has a record at once, whose rows this start did not train."""
    run = RunDir(tmp_path)
    run.metrics.write_text('{"step": 99, "train/loss": 2.5}\n')
    run.events_file.write_text('{"event": "start", "step": 0}\n')
    run.lock_file.touch()
    times = {run.events_file: 10, run.lock_file: 500, run.metrics: 501}
    for file, at in times.items():
        os.utime(file, (at, at))
    assert run.steps_per_second() is None
    run.events_file.write_text(run.events_file.read_text() + '{"event": "start", "step": 96}\n')
    os.utime(run.events_file, (500, 500))
    assert run.steps_per_second() == 4
