"""The record of a watched run: its file, its lock, the rows that a resume keeps, its checkpoints and its judge."""

import json
from pathlib import Path

import pytest
from watched_records import a_watched_run, rows

from stabrun.config import UserError
from stabrun.record.jsonl import append_line, dumps
from stabrun.record.nowhere import NoRunDir
from stabrun.record.run_dir import RunDir, RunWriter
from stabrun.record.watched import Watched
from stabrun.verdict.judge import Judge

WATCHED = Watched(
    model="GPT2LMHeadModel",
    planned=500,
    constant=True,
    every=10,
    slow_every=50,
    sites={"c_attn": ["h.0.attn.c_attn", "h.1.attn.c_attn"], "lm_head": ["lm_head"]},
    stacks={"": ["h.0", "h.1"]},
    single=["lm_head"],
    settings={"lr": 1e-3, "name": "mine", "seed": 1},
)


@pytest.fixture
def files(tmp_path):
    return RunDir(tmp_path / "run")


def test_what_is_written_is_read(files):
    with files.hold():
        files.write_watched(WATCHED)
    assert files.watched() == WATCHED
    assert files.is_run()
    assert WATCHED.name == "mine"
    assert json.loads(files.watched_file.read_text())["sites"]["c_attn"] == ["h.0.attn.c_attn", "h.1.attn.c_attn"]


def test_keys_of_other_versions_are_left_out_and_missing_ones_have_their_defaults(files):
    files.path.mkdir()
    files.watched_file.write_text('{"model": "T5", "future": [1]}')
    assert files.watched() == Watched(model="T5")
    assert files.watched().name == "T5"


@pytest.mark.parametrize("text", ["", "[]", "{", '{"planned": "many"}', '{"sites": {"q": "path"}}', '{"constant": 1}'])
def test_a_damaged_file_is_named(files, text):
    files.path.mkdir()
    files.watched_file.write_text(text)
    with pytest.raises(UserError, match=r"watch\.json is damaged"):
        files.watched()


def test_a_record_of_a_newer_version_is_read_but_not_written_to(files):
    files.path.mkdir()
    files.watched_file.write_text('{"format": 99, "model": "T5"}')
    assert files.watched().model == "T5"
    with pytest.raises(UserError, match="format 99 was written by a newer version"):
        files.write_watched(WATCHED)


def test_a_held_directory_is_refused_to_others(files):
    with files.hold() as writer:
        assert files.is_locked()
        writer.event("start", step=0)
        with pytest.raises(UserError, match="another process is training it now"), RunDir(files.path).hold():
            pass
    assert not files.is_locked()
    assert [event["event"] for event in files.events()] == ["start"]
    (files.path / "letter.txt").write_text("")
    with pytest.raises(UserError, match=r"letter\.txt: not a directory"), RunDir(files.path / "letter.txt").hold():
        pass


def test_ranks_without_a_record_write_nothing():
    nowhere = NoRunDir()
    with nowhere.hold() as writer:
        nowhere.write_watched(WATCHED)
        writer.write({"step": 0})
        assert writer.cut_from(5) == []
    assert nowhere.watched() is None
    assert nowhere.checkpoint_before(5) is None


GAPS = [f'{{"step": {step}, "train/loss": 2.5}}\n' for step in (40, 50, 60, 70)]


@pytest.mark.parametrize("tail", ["", '{"step": 80, "tr'])
@pytest.mark.parametrize(("step", "kept"), [(0, 0), (40, 0), (41, 1), (60, 2), (65, 3), (71, 4), (1000, 4)])
def test_a_resume_keeps_the_rows_before_its_step(files, tail, step, kept):
    files.path.mkdir()
    files.metrics.write_text("".join(GAPS) + tail)
    assert [row["step"] for row in RunWriter(files).cut_from(step)] == [40, 50, 60, 70][:kept]
    assert files.metrics.read_text() == "".join(GAPS[:kept])


def test_nothing_is_cut_where_nothing_is_recorded(files):
    files.path.mkdir()
    assert RunWriter(files).cut_from(10) == []
    assert not files.metrics.exists()


@pytest.mark.parametrize("line", ["not json\n", '{"step": 55}\n', "[1]\n"])
def test_damage_before_the_step_is_refused_before_anything_is_cut(files, line):
    files.path.mkdir()
    files.metrics.write_text("".join([*GAPS[:2], line, *GAPS[2:]]))
    before = files.metrics.read_bytes()
    with pytest.raises(UserError, match=r"metrics\.jsonl"):
        RunWriter(files).cut_from(70)
    assert files.metrics.read_bytes() == before
    assert len(RunWriter(files).cut_from(50)) == 1, "damage behind the step is cut with the rest"


def test_the_newest_checkpoint_that_holds_no_later_update_and_exists(files, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    saved = {50: "saved/50.pt", 100: str(tmp_path / "hundred"), 150: "step_00000150", 200: "saved/gone.pt"}
    for path in (tmp_path / "saved", files.checkpoints / "step_00000150", tmp_path / "hundred"):
        path.mkdir(parents=True)
    (tmp_path / "saved" / "50.pt").write_text("")
    writer = RunWriter(files)
    assert files.checkpoint_before(1000) is None
    for step, path in saved.items():
        writer.event("checkpoint", step=step, path=path)
    writer.event("checkpoint", step=20)  # by a version that names no path
    writer.event("checkpoint", step=30, path="")
    found = {step: files.checkpoint_before(step) for step in (48, 49, 98, 99, 148, 149, 5000)}
    paths = {50: "saved/50.pt", 100: str(tmp_path / "hundred"), 150: str(files.checkpoints / "step_00000150")}
    by_step = {step: place and (place[0], str(place[1])) for step, place in found.items()}
    newest = {48: None, 49: 50, 98: 50, 99: 100, 148: 100, 149: 150, 5000: 150}
    assert by_step == {step: updates and (updates, paths[updates]) for step, updates in newest.items()}


def test_the_first_start_of_a_watched_run_is_no_restart(files):
    a_watched_run(files.path, first=500)
    assert (files.starts(), files.restarts()) == ([500], [])
    RunWriter(files).event("start", step=700)
    assert files.restarts() == [700]


def test_the_judge_knows_what_the_record_says_of_the_plan(files):
    a_watched_run(files.path, planned=240)
    assert (Judge.of_record(files).planned, Judge.of_record(files).constant) == (240, False)
    assert Judge.of_record(RunDir(files.path.parent)).planned is None


@pytest.mark.parametrize(("every", "planned", "verdict"), [(10, 1000, "converged"), (10, 1200, "undecided")])
def test_a_run_that_tells_every_tenth_step_has_reached_its_last_one(every, planned, verdict):
    judge = Judge(planned)
    for row in rows("GPT2LMHeadModel", steps=100, every=every):  # up to step 990
        judge.add(row)
    assert judge.conclude().verdict == verdict
    assert json.loads(dumps(judge.conclude().horizon)) == 990


def test_a_checkpoint_inside_the_run_is_named_as_the_run_is(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = RunDir(Path("runs/mine"))
    run.path.mkdir(parents=True)
    (run.path / "step_3.pt").touch()
    append_line(run.events_file, {"event": "checkpoint", "step": 3, "path": str(tmp_path / "runs/mine/step_3.pt")})
    assert run.checkpoint_before(5) == (3, Path("runs/mine/step_3.pt"))
    assert run.healthy_checkpoint(5) == {"step": 3, "path": "step_3.pt"}
