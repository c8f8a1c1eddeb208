"""No key, token or password of the environment is in a file, log or message."""

import os

import pytest
from helpers import TINY, stabrun
from studies import QUESTION

from stabrun.text import masked

MARK = "5ecre7"
SECRETS = {
    "WANDB_API_KEY": f"{MARK}0123456789abcdef0123456789abcdef01",
    "HF_TOKEN": f"hf_{MARK}abcdefghijkl",
    "AWS_SECRET_ACCESS_KEY": f"{MARK}/aws/abcdefghijklmnop",
    "WANDB_BASE_URL": f"http://user:{MARK}@127.0.0.1:9",
}
OTHERS = {"MY_OWN_VARIABLE": f"{MARK} is no secret, but nobody asked for it"}


def leaks(folder):
    """The files below `folder` that contain the mark."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert len(files) > 10
    return [path for path in files if MARK.encode() in path.read_bytes()]


@pytest.mark.slow
@pytest.mark.parametrize("launcher", [(), ("hydra/launcher=submitit_local",)], ids=["workers", "submitit"])
def test_a_study_and_its_report_hold_no_secret(tmp_path, launcher):
    if launcher:
        pytest.importorskip("submitit")
    env = {**SECRETS, **OTHERS, "WANDB_MODE": "offline", "STABRUN_CACHE": str(tmp_path / "cache")}
    words = (*QUESTION, "study.lrs=[1e-2]", "study.seeds=1", "study.variants=[baseline]", "tracker=wandb")
    said = ""
    for command in (("sweep", *words, *launcher), ("report", "study"), ("upload", "study"), ("status", "study")):
        done = stabrun(*command, cwd=tmp_path, env=env)
        assert done.returncode == 0, done.stderr
        said += done.stdout + done.stderr
    assert MARK not in said
    assert leaks(tmp_path) == []


@pytest.mark.slow
def test_a_run_whose_server_is_away_holds_no_secret(tmp_path):
    """The message of W&B quotes the address of the server."""
    env = {**SECRETS, **OTHERS, "WANDB_MODE": "online", "STABRUN_CACHE": str(tmp_path / "cache")}
    done = stabrun("train", *TINY, "tracker=wandb", "train.steps=3", "run_dir=run", cwd=tmp_path, env=env)
    assert done.returncode == 0
    assert "stabrun: W&B" in done.stderr
    assert MARK not in done.stdout + done.stderr
    assert leaks(tmp_path) == []


def test_values_of_secret_variables_and_passwords_in_addresses_are_masked(monkeypatch):
    for name, value in SECRETS.items():
        monkeypatch.setitem(os.environ, name, value)
    for value in SECRETS.values():
        assert MARK not in masked(f"failed ({value}): why")
    assert masked("GET http://user:pw@host:1/x?a=b") == "GET http://***@host:1/x?a=b"
    assert masked("a@b: 3://4, https://host/@user") == "a@b: 3://4, https://host/@user"
    monkeypatch.setitem(os.environ, "SHORT_KEY", "e")
    assert masked("here") == "here"
