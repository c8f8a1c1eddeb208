"""What many tests use: small configurations, and `stabrun` in this process or in one of its own."""

import functools
import os
import re
import signal
import subprocess
import sys

import pytest

from stabrun import api
from stabrun.cli.main import main
from stabrun.composition import compose, override
from stabrun.config import conf_dir, groups
from stabrun.data.shards import prepare
from stabrun.record.run_dir import RunDir
from stabrun.training.run import Run
from stabrun.training.trainer import Trainer

TINY = (
    "model.n_layer=2",
    "model.d_model=16",
    "data.seq_len=16",
    "train.batch_size=4",
    "train.threads=1",
    "train.steps=30",
    "schedule.warmup_steps=5",
    "train.val_sequences=4",
    "tracker=none",
)
RICH = ("+variant=qk_norm_cap", "model.dropout=0.1", "train.val_every=9", "train.checkpoint_every=8")
FILES = sorted((conf_dir() / "variant").glob("*.yaml"))
ALL_VARIANTS = [file.stem for file in FILES]
VARIANTS = ["baseline", *(file.stem for file in FILES if "\nmodel:" in file.read_text())]  # those of the model
PRESETS = sorted(file.stem for file in (conf_dir() / "model").glob("*.yaml"))


chosen = functools.cache(compose)
GROUPS = re.compile(rf"\+?({'|'.join(groups())})=")


def configured(*overrides):
    """The configuration of these overrides alone. Choices from groups are composed once: that takes 0.2 s."""
    choices = tuple(word for word in overrides if GROUPS.match(word))
    if "data=local" in choices:  # not valid without its path
        return compose(overrides)
    return override(chosen(choices), [word for word in overrides if word not in choices])


def tiny(*overrides):
    """A model of 2 layers × 16 for 30 steps, and these overrides."""
    return configured(*TINY, *overrides)


def metrics(directory):
    return (directory / "metrics.jsonl").read_bytes()


def events(directory, kind):
    return [event for event in RunDir(directory).events() if event["event"] == kind]


def tracked(config):
    """Train, and have the W&B run written, as `stabrun train` does. Returns the summary."""
    return api.train(config).summary


def a_trainer(config):
    """A trainer on this configuration's own data."""
    return Trainer(config, prepare(config.data, config.model))


def stabrun(*words, cwd, env=(), **options):
    """`stabrun WORDS` as a user runs it: a process of its own."""
    return subprocess.run(
        [sys.executable, "-m", "stabrun", *map(str, words)],
        cwd=cwd,
        env=os.environ | dict(env),
        capture_output=True,
        text=True,
        timeout=300,
        **options,
    )


def run(capsys, *words):
    """Exit status, stdout and stderr of `stabrun WORDS` in this process."""
    before = {which: signal.getsignal(which) for which in (signal.SIGINT, signal.SIGTERM)}
    with pytest.raises(SystemExit) as ended:
        main([str(word) for word in words])
    for which, handler in before.items():
        signal.signal(which, handler)
    return ended.value.code, *capsys.readouterr()


def train_interrupted(config, monkeypatch, at):
    """Train, with Ctrl-C in step `at`. Returns the summary."""
    launch = Run.launch

    def interrupted(self, step):
        if step == at:
            signal.raise_signal(signal.SIGINT)
        return launch(self, step)

    with monkeypatch.context() as patch:
        patch.setattr(Run, "launch", interrupted)
        return api.train(config).summary
