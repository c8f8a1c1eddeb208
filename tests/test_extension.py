"""`train.extends`: a longer run that begins from a shorter one's checkpoint."""

import pytest
from helpers import events, metrics, tiny

from stabrun.config import UserError, run_id
from stabrun.record import checkpoints
from stabrun.record.run_dir import RunDir, RunWriter
from stabrun.training.extension import beginning
from stabrun.training.run import train

SCHEDULES = {  # and the steps of the shorter run that the longer one can begin with
    "constant": (("schedule=constant",), 30),
    "inverse_sqrt": (("schedule=inverse_sqrt",), 30),
    "wsd": (("schedule=wsd", "schedule.decay_share=0.2"), 24),
}
COMMON = ("train.checkpoint_every=8", "train.val_every=9", "model.dropout=0.1")


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_an_extended_run_is_the_longer_run_to_the_bit(tmp_path, schedule):
    words, begins = SCHEDULES[schedule]
    words = (*COMMON, *words)
    short, long = tmp_path / "short", tmp_path / "long"
    train(tiny(*words, f"run_dir={short}"))
    kept = metrics(short)
    undisturbed = tiny(*words, "train.steps=45", f"run_dir={tmp_path / 'undisturbed'}")
    train(undisturbed)
    config = tiny(*words, "train.steps=45", f"train.extends={short}", f"run_dir={long}")
    summary = train(config)
    assert metrics(long) == metrics(tmp_path / "undisturbed")
    assert metrics(short) == kept
    assert summary["run_id"] == run_id(undisturbed) == run_id(config) != RunDir(short).summary()["run_id"]
    (event,) = events(long, "extended")
    assert (event["step"], event["run"], event["path"]) == (begins, RunDir(short).summary()["run_id"], str(short))
    assert events(long, "start")[0]["step"] == begins
    newest = [max(checkpoints.steps(run / "checkpoints").items())[1] for run in (long, tmp_path / "undisturbed")]
    weights = [(path / "model.safetensors").read_bytes() for path in newest]
    assert weights[0] == weights[1]


REFUSED = {
    "cosine": (("schedule=cosine", "train.steps=45"), "schedule.kind=cosine has the same learning rates"),
    "wsd in its decay": (("schedule=wsd", "train.steps=45", "train.keep_checkpoints=1"), "up to step 24 only"),
    "warmup that is a share": (("schedule=constant", "schedule.warmup_share=0.5", "train.steps=45"), "up to step 0"),
    "fewer steps": (("schedule=constant", "train.steps=20"), "train.steps=20: must be above 30"),
    "another rate": (("schedule=constant", "train.steps=45", "optim.lr=1e-4"), r"optim\.lr"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_extended_is_refused(tmp_path, case):
    words, sentence = REFUSED[case]
    own = [word for word in words if not word.startswith(("train.steps", "optim.lr"))]
    train(tiny(*COMMON, *own, f"run_dir={tmp_path / 'short'}"))
    with pytest.raises(UserError, match=sentence):
        train(tiny(*COMMON, *words, f"train.extends={tmp_path / 'short'}", f"run_dir={tmp_path / 'long'}"))
    with pytest.raises(UserError, match="not a run directory"):
        train(tiny(*COMMON, *words, f"train.extends={tmp_path}", f"run_dir={tmp_path / 'other'}"))
    assert [item.name for item in tmp_path.iterdir()] == ["short"]


def test_the_way_to_more_steps_is_told(tmp_path):
    train(tiny("train.steps=3", f"run_dir={tmp_path / 'run'}"))
    with pytest.raises(UserError, match=f"train.extends={tmp_path / 'run'} to go on from this run"):
        train(tiny("train.steps=4", f"run_dir={tmp_path / 'run'}"))


def test_an_interrupted_extension_begins_again(tmp_path, monkeypatch):
    words = (*COMMON, "schedule=constant")
    train(tiny(*words, f"run_dir={tmp_path / 'short'}"))
    config = tiny(*words, "train.steps=45", f"train.extends={tmp_path / 'short'}", f"run_dir={tmp_path / 'long'}")
    with monkeypatch.context() as patch:
        patch.setattr("shutil.copytree", lambda *paths: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            train(config)
    assert train(config)["steps"] == 45
    assert [row["step"] for row in RunDir(tmp_path / "long").rows()] == list(range(45))
    assert events(tmp_path / "long", "start")[0]["step"] == 30


def test_what_another_process_trained_meanwhile_is_kept(tmp_path):
    words = (*COMMON, "schedule=constant")
    short = train(tiny(*words, f"run_dir={tmp_path / 'short'}"))
    config = tiny(*words, "train.steps=45", f"train.extends={tmp_path / 'short'}", f"run_dir={tmp_path / 'long'}")
    run = RunDir(tmp_path / "long")
    before = beginning(config, run, RunDir(tmp_path / "short").environment()["data_hash"])
    assert before is not None
    assert len(before.rows) == short["steps"]
    train(config)
    trained = {path: path.read_bytes() for path in run.path.rglob("*") if path.is_file()}
    before.write(RunWriter(run))
    assert {path: path.read_bytes() for path in run.path.rglob("*") if path.is_file()} == trained
