"""`stabrun upload`, read back by W&B's own tool."""

import fcntl
import json
import os
import shutil
import struct
import zlib

import helpers
import pytest
import wandb
from helpers import TINY, tiny, tracked
from studies import write_results
from wandb_files import Inspected, assert_holds

from stabrun.config import UserError
from stabrun.publish import upload as module
from stabrun.publish.upload import upload
from stabrun.record.jsonl import jsonable, read_checked
from stabrun.record.run_dir import RunDir
from stabrun.study import results
from stabrun.study.plan import extended, load
from stabrun.study.question import planned
from stabrun.study.summary import study_summary
from stabrun.study.tracking import leaves, track_study
from stabrun.training.run import train

EVERY = 4  # steps between lists over layers
QUESTION = (*TINY, "study.variants=[baseline,qk_norm]", "study.seeds=1", f"tracker.norms_every={EVERY}")


def grown(directory, *words):
    """A study of these words in `directory`, its cells trained."""
    plan, _, _ = planned([*QUESTION, *words, f"study_dir={directory}"])
    directory.mkdir(exist_ok=True)
    if (directory / "study.yaml").exists():
        plan = extended(load(directory), plan)
    plan.save(directory)
    for cell in plan.cells.values():
        train(plan.config(cell), directory / "runs" / cell.id)
    return plan


@pytest.fixture(autouse=True)
def data(tmp_path, monkeypatch):
    """Where W&B keeps a table until it is synced; a process uploads to one place only, the tests to many."""
    monkeypatch.setenv("WANDB_DATA_DIR", str(tmp_path / "data"))


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole") / "edge-0123"
    grown(folder, "study.lrs=[1e-2]")
    return folder


@pytest.fixture
def study(whole, tmp_path):
    return shutil.copytree(whole, tmp_path / whole.name)


@pytest.fixture
def run(study):
    """One run of the study, as a folder of its own."""
    return next((study / "runs").iterdir())


def offline(directory):
    """The offline runs of a folder, the first written first."""
    return sorted((directory / "wandb").glob("offline-run-*"), key=lambda folder: folder.stat().st_mtime_ns)


def files(directory):
    """What lies in a folder, and when it was written; but for the logs of W&B's own doings."""
    found = (path for path in directory.rglob("*") if path.is_file() and path.suffix != ".log")
    return {path: path.stat().st_mtime_ns for path in found}


def records(directory):
    return list(RunDir(directory).rows())


def assert_holds_summary(found, directory):
    """`found`, an offline run, has what the run's summary says."""
    for key, value in read_checked(directory / "summary.json").items():
        if value is not None and not isinstance(value, dict):
            assert found.summary[key] == (pytest.approx(value) if isinstance(value, float) else value), key


def test_a_study_equals_its_records(study, capsys):
    assert upload(study) == 0
    plan = load(study)
    for cell in plan.cells.values():
        directory = study / "runs" / cell.id
        (folder,) = offline(directory)
        found = assert_holds(folder, records(directory), EVERY)
        assert_holds_summary(found, directory)
        started = found.run
        facts = {key: started[key] for key in ("run_id", "run_group", "job_type", "display_name", "project")}
        assert facts == {
            "run_id": cell.id, "run_group": "edge-0123", "job_type": "train", "display_name": f"{cell.arm} lr=1e-2 s0",
            "project": "stabrun",
        }  # fmt: skip
        assert started["config"]["update"]["optim"]["lr"] == 0.01
        lowest = min(row["train/loss"] for row in records(directory))
        assert found.summary["train/loss"] == {"min": pytest.approx(lowest)}
    rows, _ = write_results(plan, study)
    (folder,) = offline(study)
    (file,) = (folder / "files" / "media" / "table").glob("results*.json")
    assert [row[0] for row in json.loads(file.read_text())["data"]] == list(plan.cells)
    found = Inspected(folder).summary
    for key, value in leaves(jsonable(study_summary(plan, rows))).items():
        assert found[key] == (pytest.approx(value) if isinstance(value, float) else value), key
    assert "3 W&B runs written offline" in capsys.readouterr().out


def test_a_second_upload_sends_nothing(study, capsys):
    upload(study)
    before = files(study)
    assert upload(study) == 0
    assert files(study) == before
    assert capsys.readouterr().out.splitlines()[-1] == "nothing to send."


def test_a_dry_run_prints_the_plan_and_sends_nothing(study, capsys):
    before = files(study)
    assert upload(study, dry_run=True) == 0
    assert files(study) == before
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(" →")[0] for line in lines[:-1]] == [
        "baseline lr=1e-2 s0: 30 rows, 1 summary",
        "qk_norm lr=1e-2 s0: 30 rows, 1 summary",
        "summary: 2 rows",
    ]


def test_of_an_extended_study_only_new_runs_are_sent(study):
    upload(study)
    old = {cell: files(study / "runs" / cell) for cell in load(study).cells}
    plan = grown(study, "study.lrs=[1e-2,1e-1]")
    assert upload(study) == 0
    for cell in plan.cells:
        directory = study / "runs" / cell
        assert len(offline(directory)) == 1
        if cell in old:
            assert files(directory) == old[cell]
    first, second = offline(study)
    assert [item["_step"] for folder in (first, second) for item in Inspected(folder).history] == [0, 1]


def test_of_a_longer_record_only_new_rows_are_sent(run, capsys):
    lines = (run / "metrics.jsonl").read_bytes().splitlines(keepends=True)
    (run / "summary.json").rename(run / "later.json")
    (run / "metrics.jsonl").write_bytes(b"".join(lines[:20]) + lines[20][:50])
    assert upload(run) == 0
    assert "line 21 is incomplete; it was left out" in capsys.readouterr().err
    (run / "metrics.jsonl").write_bytes(b"".join(lines))
    (run / "later.json").rename(run / "summary.json")
    assert upload(run) == 0
    first, second = offline(run)
    found = assert_holds(first, records(run)[:20], EVERY), assert_holds(second, records(run)[20:], EVERY)
    assert_holds_summary(found[1], run)
    lowest = min(row["train/loss"] for row in records(run))
    assert found[1].summary["train/loss"] == {"min": pytest.approx(lowest)}
    assert [part.exit_code for part in found] == [130, 0]


def test_a_damaged_line_is_reported_and_left_out(run, capsys):
    lines = (run / "metrics.jsonl").read_bytes().splitlines(keepends=True)
    rows = records(run)
    lines[3], lines[7] = b"\xff{\n", b'{"step": 7}\n'
    (run / "metrics.jsonl").write_bytes(b"".join(lines))
    assert upload(run) == 0
    assert_holds(offline(run)[0], [row for row in rows if row["step"] not in (3, 7)], EVERY)
    err = capsys.readouterr().err
    assert "line 4 is not a row" in err
    assert "line 8 is not a row" in err
    assert "line 9" not in err


def test_of_a_truncated_record_no_step_is_sent_twice(run, capsys):
    whole = (run / "metrics.jsonl").read_bytes()
    lines = whole.splitlines(keepends=True)
    (run / "metrics.jsonl").write_bytes(b"".join(lines[:20]))
    upload(run)
    (run / "metrics.jsonl").write_bytes(b"".join(lines[:10]))
    upload(run)
    assert "W&B keeps the 20 steps it has" in capsys.readouterr().err
    (run / "metrics.jsonl").write_bytes(whole)
    assert upload(run) == 0
    assert [item["_step"] for folder in offline(run) for item in Inspected(folder).history] == list(range(30))


def test_what_was_tracked_is_not_sent_twice(tmp_path, capsys, monkeypatch):
    directory = tmp_path / "run"
    tracked(tiny("tracker=wandb", f"run_dir={directory}"))
    wandb.teardown()  # waits until all of it is on the disk
    before = files(directory)
    assert upload(directory) == 0
    assert files(directory) == before
    monkeypatch.delenv("WANDB_MODE")
    capsys.readouterr()
    upload(directory, dry_run=True)  # no server has seen what an offline run holds
    assert "30 rows, 1 summary → online" in capsys.readouterr().out


def test_a_study_tracked_at_its_end_is_not_sent_twice(study, capsys):
    plan = load(study)
    finished, facts = write_results(plan, study)
    rows = list(map(results.result, finished))
    for _ in range(2):
        track_study(tiny("tracker=wandb").tracker, study, rows, facts)
    assert upload(study) == 0
    assert len(offline(study)) == 1
    assert "summary: 2 rows" not in capsys.readouterr().out


def test_a_resumed_run_that_is_tracked_replaces_its_state(tmp_path):
    directory = tmp_path / "run"
    train(tiny(f"run_dir={directory}"))
    upload(directory)
    assert (directory / "wandb" / "sent.json").exists()
    (directory / "summary.json").unlink()
    tracked(tiny("tracker=wandb", f"run_dir={directory}"))
    assert_holds(offline(directory)[-1], records(directory), norms_every=10)
    assert json.loads((directory / "wandb" / "sent.json").read_text())["steps"] == 30
    assert upload(directory) == 0
    assert len(offline(directory)) == 2


def test_a_run_in_training_is_left_to_its_tracker(tmp_path, capsys):
    directory = tmp_path / "run"
    tracked(tiny("tracker=wandb", f"run_dir={directory}"))
    (directory / "wandb" / "sent.json").unlink()
    with open(directory / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert upload(directory) == 0
    assert "is being trained with W&B tracking" in capsys.readouterr().out
    assert len(offline(directory)) == 1


def test_another_project_gets_everything(run):
    upload(run)
    assert upload(run, ["tracker.project=other", "tracker.entity=team"]) == 0
    started = assert_holds(offline(run)[-1], records(run), EVERY).run
    assert (started["project"], started["entity"]) == ("other", "team")


def test_after_a_failure_of_wandb_the_same_command_continues(study, monkeypatch, capsys):
    opened = module.open_run
    first, second = load(study).cells

    def broken(tracker, sent, files):
        if files.path.name == second:
            raise wandb.errors.CommError("the server went\naway")
        return opened(tracker, sent, files)

    with monkeypatch.context() as patch:
        patch.setattr(module, "open_run", broken)
        assert upload(study) == 1
    assert "W&B: the server went away." in capsys.readouterr().err
    assert upload(study) == 0
    assert [len(offline(study / "runs" / cell)) for cell in (first, second)] == [1, 1]


def a_png(path, color):
    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    pixels = zlib.compress((b"\0" + bytes(color) * 4) * 4)
    header = struct.pack(">IIBBBBB", 4, 4, 8, 2, 0, 0, 0)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b""))


def images(folder):
    return {path.read_bytes() for path in (folder / "files" / "media" / "images").rglob("*.png")}


def test_figures_are_sent_once_and_again_when_they_change(study, run):
    pytest.importorskip("PIL")
    for place in (study, run):
        a_png(place / "report" / "figures" / "curve.png", (255, 0, 0))
    red = (study / "report" / "figures" / "curve.png").read_bytes()
    upload(study)
    assert images(offline(study)[0]) == images(offline(run)[0]) == {red}
    assert Inspected(offline(run)[0]).summary["figures/curve"]["_type"] == "image-file"
    assert Inspected(offline(study)[0]).history[0]["figures/curve._type"] == "image-file"
    before = files(study)
    upload(study)
    assert files(study) == before
    a_png(run / "report" / "figures" / "curve.png", (0, 255, 0))
    upload(study)
    assert len(offline(study)) == 1
    assert Inspected(offline(run)[-1]).history == []
    assert images(offline(run)[-1]) == {(run / "report" / "figures" / "curve.png").read_bytes()}


def test_a_study_in_progress_sends_finished_runs(study, run, capsys):
    (run / "summary.json").unlink()
    assert upload(study) == 0
    assert "1 of 2 cells are not finished" in capsys.readouterr().out
    assert offline(run) == []


def test_a_study_without_a_finished_run_sends_nothing(study, capsys):
    shutil.rmtree(study / "runs")
    assert upload(study) == 0
    assert capsys.readouterr().out.splitlines() == [
        "2 of 2 cells are not finished; the same command sends them later.",
        "nothing to send.",
    ]
    assert offline(study) == []


USER_ERRORS = [
    ([], ["DIR"]),
    (["--dry-run"], ["DIR"]),
    (["nowhere"], ["nowhere", "no such directory"]),
    (["."], ["neither a study nor a run"]),
    (["RUN", "optim.lr=1"], ["optim.lr=1", "tracker"]),
    (["RUN", "tracker.norms_every=0"], ["tracker.norms_every=0", "at least 1"]),
    (["RUN", "tracker.projct=x"], ["projct"]),
    (["RUN", "--force"], ["--force", "--dry-run"]),
]


@pytest.mark.parametrize(("words", "named"), USER_ERRORS, ids=[" ".join(words) for words, _ in USER_ERRORS])
def test_user_errors_are_sentences(capsys, words, named, run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    status, out, err = helpers.run(capsys, "upload", *(word.replace("RUN", str(run)) for word in words))
    assert (status, out) == (2, "")
    assert all(part in err for part in named)
    assert offline(run) == []


@pytest.mark.parametrize(("mode", "named"), [(None, "wandb login"), ("online", "API key"), ("disabled", "disabled")])
def test_without_a_key_nothing_is_written(mode, named, run, tmp_path, monkeypatch):
    for name in ("WANDB_API_KEY", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    if mode:
        monkeypatch.setitem(os.environ, "WANDB_MODE", mode)
    with pytest.raises(UserError, match=named):
        upload(run)
    assert offline(run) == []


def test_a_damaged_state_is_reported(run):
    upload(run)
    (run / "wandb" / "sent.json").write_text('{"mode": "offline"}')
    with pytest.raises(UserError, match=r"sent\.json is damaged"):
        upload(run)
