"""Runs in W&B, read back with W&B's own tool."""

import json

import pytest
from helpers import tiny, train_interrupted
from wandb_files import Inspected, assert_holds

from stabrun.cli.rerun import rerun_config
from stabrun.config import run_id
from stabrun.model.gpt import meta_gpt
from stabrun.record.run_dir import RunDir
from stabrun.training import tracker
from stabrun.training.run import train
from stabrun.training.tracker import Tracker

QUICK = "tracker=wandb", "tracker.norms_every=4", "train.steps=8"


def latest(directory):
    return directory / "wandb" / "latest-run"


def assert_equal_to_record(directory):
    found = assert_holds(latest(directory), list(RunDir(directory).rows()), norms_every=4)
    assert "norm/out/fc2/layer_01" in found.history[0]
    assert "norm/out/fc2/layer_01" not in found.history[1]
    return found


def test_an_offline_run_has_the_values_of_the_record(tmp_path):
    config = tiny(*QUICK, "tracker.tags=[mine]", "+variant=qk_norm", f"run_dir={tmp_path / 'run'}")
    summary = train(config)
    found = assert_equal_to_record(tmp_path / "run")
    assert found.run["run_id"] == summary["run_id"]
    assert found.run["run_group"] == "qk_norm"
    assert found.run["display_name"] == "qk_norm lr=1e-2 s0"
    assert found.run["job_type"] == "train"
    assert found.run["tags"] == ["mine", "qk_norm", "0.014M"]
    assert found.summary["verdict"] == summary["verdict"]
    assert found.summary["final_loss"] == pytest.approx(summary["final_loss"])
    assert found.summary.get("peak_memory_bytes") == summary["peak_memory_bytes"]
    assert found.summary["tokens_per_second"] == pytest.approx(summary["tokens_per_second"])
    recorded = found.run["config"]["update"]
    environment = json.loads((tmp_path / "run" / "environment.json").read_text())
    model = meta_gpt(config.model, config.data.seq_len)
    assert recorded["model"]["attn"]["qk_norm"] == "head"
    assert recorded["parameters"] == sum(parameter.numel() for parameter in model.parameters())
    assert recorded["data_hash"] == environment["data_hash"] is not None
    assert recorded.get("commit") == environment["commit"]


def test_a_resumed_run_is_complete_and_the_same_run(tmp_path, monkeypatch):
    config = tiny(*QUICK, f"run_dir={tmp_path / 'run'}")
    assert train_interrupted(config, monkeypatch, at=5)["status"] == "interrupted"
    train(config)
    assert_equal_to_record(tmp_path / "run")
    runs = [folder.name for folder in (tmp_path / "run" / "wandb").glob("offline-run-*")]
    assert len(runs) == 2
    assert all(run_id(config) in name for name in runs)


def test_a_rerun_of_a_run_of_a_study_has_a_name_group_and_id_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    train(tiny("train.steps=3", "run_dir=run", "tracker.run_name=cell", "tracker.group=edge-0123"))
    changed = rerun_config(tmp_path / "run", ["seed=7"])
    assert (changed.tracker.run_name, changed.tracker.group) == (None, None)
    assert tracker.wandb_id(changed, RunDir(tmp_path / str(changed.run_dir))) == run_id(changed)
    config = rerun_config(tmp_path / "run", ["tracker.name=wandb"])
    train(config)
    opened = Inspected(latest(tmp_path / "runs" / f"{run_id(config)}-rerun")).run
    assert opened["run_id"] == f"{run_id(config)}-rerun"
    assert (opened["display_name"], opened["run_group"]) == ("baseline lr=1e-2 s0", "baseline")


def test_a_failure_of_wandb_stops_no_run(tmp_path, monkeypatch, capsys):
    def broken(self, row):
        raise ConnectionError("the server went away\nwith details")

    monkeypatch.setattr(Tracker, "_log", broken)
    summary = train(tiny(*QUICK, f"run_dir={tmp_path / 'run'}"))
    assert summary["status"] == "complete"
    err = capsys.readouterr().err
    assert err.count("W&B logging disabled") == 1
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
def test_the_mode_needs_no_prompt(monkeypatch, tmp_path, environment, mode):
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
