"""Runs in W&B, read back with W&B's own tool."""

import json
import os
import subprocess
import sys

import pytest
from helpers import TINY, stabrun, tiny, tracked, train_interrupted
from studies import running, wait_for
from wandb_files import Inspected, assert_holds

from stabrun.cli.rerun import rerun_config
from stabrun.config import run_id
from stabrun.model.gpt import meta_gpt
from stabrun.record.run_dir import RunDir
from stabrun.training import offline, tracker

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
    summary = tracked(config)
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
    tracked(config)
    assert_equal_to_record(tmp_path / "run")
    runs = [folder.name for folder in (tmp_path / "run" / "wandb").glob("offline-run-*")]
    assert len(runs) == 2
    assert all(run_id(config) in name for name in runs)


def test_a_rerun_of_a_run_of_a_study_has_a_name_group_and_id_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tracked(tiny("train.steps=3", "run_dir=run", "tracker.run_name=cell", "tracker.group=edge-0123"))
    changed = rerun_config(tmp_path / "run", ["seed=7"])
    assert (changed.tracker.run_name, changed.tracker.group) == (None, None)
    assert tracker.wandb_id(changed, RunDir(tmp_path / str(changed.run_dir))) == run_id(changed)
    config = rerun_config(tmp_path / "run", ["tracker.name=wandb"])
    tracked(config)
    opened = Inspected(latest(tmp_path / "runs" / f"{run_id(config)}-rerun")).run
    assert opened["run_id"] == f"{run_id(config)}-rerun"
    assert (opened["display_name"], opened["run_group"]) == ("baseline lr=1e-2 s0", "baseline")


def broken_wandb(folder, how):
    """The environment of a process in which `import wandb` fails like this."""
    folder.mkdir()
    (folder / "wandb.py").write_text(f"{how}\n")
    return {"PYTHONPATH": os.pathsep.join([str(folder), *sys.path])}


def test_the_process_that_trains_imports_no_wandb(tmp_path):
    watched = "import sys; from stabrun.cli.main import dispatch; dispatch(sys.argv[1:]); print('wandb' in sys.modules)"
    words = (*TINY, *QUICK, "run_dir=run")
    done = subprocess.run(
        [sys.executable, "-c", watched, "train", *words], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines()[-1] == "False"
    assert_equal_to_record(tmp_path / "run")


@pytest.mark.parametrize(
    ("how", "said"), [("raise ImportError('no such wheel')", "no such wheel"), ("import time; time.sleep(600)", "1 s")]
)
def test_a_failure_of_wandb_stops_no_run(tmp_path, monkeypatch, capsys, how, said):
    for name, value in broken_wandb(tmp_path / "broken", how).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(offline, "WAIT", 1.0 if "sleep" in how else offline.WAIT)
    monkeypatch.setattr(offline, "ROW", 0.0)
    config = tiny(*QUICK, f"run_dir={tmp_path / 'run'}")
    assert tracked(config)["status"] == "complete"
    (line,) = capsys.readouterr().err.splitlines()
    assert "W&B offline runs are incomplete" in line
    assert said in line
    assert not (tmp_path / "run" / "wandb" / "sent.json").exists()
    monkeypatch.undo()
    tracked(config)  # nothing is trained; W&B gets what it lacks
    assert_equal_to_record(tmp_path / "run")
    before = [folder.name for folder in (tmp_path / "run" / "wandb").glob("offline-run-*")]
    tracked(config)
    assert [folder.name for folder in (tmp_path / "run" / "wandb").glob("offline-run-*")] == before


def test_a_killed_run_is_complete_after_the_next_start(tmp_path):
    words = (*TINY, *QUICK, "train.steps=60", "train.checkpoint_every=5", "run_dir=run")
    with running("-m", "stabrun", "train", *words, cwd=tmp_path) as process:
        wait_for(lambda: list((tmp_path / "run").glob("checkpoints/step_*/meta.json")))
        process.kill()
    assert stabrun("train", *words, cwd=tmp_path).returncode == 0
    assert_equal_to_record(tmp_path / "run")


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
