import json

import pytest
from helpers import tiny
from wandb_files import history, inspected, summary_of

from stabrun.config import run_id
from stabrun.record.run_dir import RunDir
from stabrun.study import tracking
from stabrun.training import tracker
from stabrun.training.run import Run, train
from stabrun.training.tracker import Tracker, projection


def assert_equal_to_record(directory, norms_every):
    rows = list(RunDir(directory).rows())
    logged = history(directory / "wandb" / "latest-run")
    assert [item["_step"] for item in logged] == [row["step"] for row in rows]
    for row, item in zip(rows, logged, strict=True):
        told = {key: value for key, value in item.items() if not key.startswith("_")}
        assert told == pytest.approx(projection(row, norms_every), rel=1e-12)
    assert "norm/out/fc2/layer_01" in logged[0]
    assert "norm/out/fc2/layer_01" not in logged[1]


def test_offline_run_holds_the_values_of_the_record(tmp_path):
    config = tiny("tracker=wandb", "tracker.norms_every=4", "+variant=qk_norm", f"run_dir={tmp_path / 'run'}")
    summary = train(config)
    assert_equal_to_record(tmp_path / "run", 4)
    folder = tmp_path / "run" / "wandb" / "latest-run"
    started = next(record["run"] for record in inspected(folder) if record["type"] == "run")
    assert started["run_id"] == summary["run_id"]
    assert started["run_group"] == "qk_norm"
    assert started["display_name"] == "qk_norm lr=1e-2 s0"
    assert started["job_type"] == "train"
    assert started["config"]["update"]["model"]["attn"]["qk_norm"] == "head"
    told = summary_of(folder)
    assert told["verdict"] == summary["verdict"]
    assert told["final_loss"] == pytest.approx(summary["final_loss"])


def test_resumed_run_is_whole_and_the_same_run(tmp_path, monkeypatch):
    config = tiny("tracker=wandb", "tracker.norms_every=4", f"run_dir={tmp_path / 'run'}")
    launch = Run.launch

    def interrupted(self, step):
        import signal

        if step == 13:
            signal.raise_signal(signal.SIGINT)
        return launch(self, step)

    with monkeypatch.context() as patch:
        patch.setattr(Run, "launch", interrupted)
        assert train(config)["status"] == "interrupted"
    train(config)
    assert_equal_to_record(tmp_path / "run", 4)
    runs = [folder.name for folder in (tmp_path / "run" / "wandb").glob("offline-run-*")]
    assert len(runs) == 2
    assert all(run_id(config) in name for name in runs)


def test_a_fault_of_wandbs_stops_no_run(tmp_path, monkeypatch, capsys):
    def broken(self, row):
        raise ConnectionError("the server went away\nwith details")

    monkeypatch.setattr(Tracker, "_log", broken)
    summary = train(tiny("tracker=wandb", f"run_dir={tmp_path / 'run'}"))
    assert summary["status"] == "complete"
    err = capsys.readouterr().err
    assert err.count("W&B is off") == 1
    assert "the server went away" in err


@pytest.mark.parametrize(
    ("environment", "mode"),
    [
        ({}, "offline"),
        ({"WANDB_API_KEY": "x" * 40}, "online"),
        ({"WANDB_API_KEY": "x" * 40, "WANDB_MODE": "offline"}, "offline"),
        ({"WANDB_MODE": "disabled"}, "disabled"),
    ],
)
def test_mode_needs_no_prompt(monkeypatch, tmp_path, environment, mode):
    for name in ("WANDB_API_KEY", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert tracker.wandb_mode() == mode


def test_a_login_counts_as_a_key(monkeypatch, tmp_path):
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    (tmp_path / "netrc").write_text("machine api.wandb.ai login user password key\n")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    assert tracker.wandb_mode() == "online"
    monkeypatch.setenv("WANDB_BASE_URL", "https://wandb.example.org")
    assert tracker.wandb_mode() == "offline"


def test_a_study_has_a_summary_run_with_its_table_and_numbers(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_DATA_DIR", str(tmp_path / "data"))
    rows = [
        {"run_id": "a", "arm": "baseline", "lr": 0.1, "final_loss": "nan"},
        {"run_id": "b", "arm": "baseline", "lr": 0.2, "final_loss": 2.5},
    ]
    answer = {
        "name": "edge",
        "variants": {"baseline": {"runs": [1], "frontier": {"strict": {"median": 0.1, "low": None}}}},
    }
    directory = tmp_path / "edge-0123"
    directory.mkdir()
    tracking.track_study(tiny("tracker=wandb").tracker, directory, rows, answer)
    folder = directory / "wandb" / "latest-run"
    started = next(record["run"] for record in inspected(folder) if record["type"] == "run")
    facts = {key: started[key] for key in ("run_id", "run_group", "job_type", "display_name")}
    assert facts == {
        "run_id": "edge-0123", "run_group": "edge-0123", "job_type": "study", "display_name": "edge-0123: the answer",
    }  # fmt: skip
    told = summary_of(folder)
    assert told["variants/baseline/frontier/strict/median"] == 0.1
    assert "variants/baseline/frontier/strict/low" not in told
    (file,) = (folder / "files" / "media" / "table").glob("results*.json")
    table = json.loads(file.read_text())
    assert table["columns"] == ["run_id", "arm", "lr", "final_loss"]
    assert table["data"] == [list(row.values()) for row in rows]
