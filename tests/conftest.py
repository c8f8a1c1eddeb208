"""What all tests share: no network, one thread, a cache of their own, and runs that are quick."""

import os

os.environ |= {"WANDB_MODE": "offline", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}

import subprocess
import sys
from pathlib import Path

import hypothesis
import pytest
import torch

from stabrun.compose import Words, composed
from stabrun.config import conf_dir
from stabrun.data.shards import prepare
from stabrun.train.trainer import Trainer

torch.set_num_threads(1)
hypothesis.settings.register_profile("ours", deadline=None, derandomize=True, database=None)
hypothesis.settings.load_profile("ours")

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
VARIANTS = sorted(file.stem for file in (conf_dir() / "variant").glob("*.yaml"))
PRESETS = sorted(file.stem for file in (conf_dir() / "model").glob("*.yaml"))


def configured(*overrides):
    """The configuration of these overrides alone."""
    return composed(conf_dir(), Words.parse(list(overrides)))


def tiny(*overrides):
    """A model of 2 layers × 16 for 30 steps, and these overrides."""
    return configured(*TINY, *overrides)


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
        timeout=120,
        **options,
    )


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item):
    """A test fails in place of being skipped where a mark of its own is in STABRUN_MUST_RUN: CI has what it needs."""
    report = yield
    names = os.environ.get("STABRUN_MUST_RUN", "").split()
    if report.skipped and any(item.get_closest_marker(name) for name in names):
        report.outcome = "failed"
        report.longrepr = f"it may not be skipped here (STABRUN_MUST_RUN): {report.longrepr}"
    return report


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory):
    """Token shards below the tests' own folder."""
    os.environ["STABRUN_CACHE"] = str(tmp_path_factory.mktemp("cache"))
    return Path(os.environ["STABRUN_CACHE"])


@pytest.fixture(scope="session")
def undisturbed_rows(tmp_path_factory):
    """The rows of the study in `clusters`."""
    from clusters import QUESTION
    from studies import rows_alone

    return rows_alone(tmp_path_factory.mktemp("undisturbed"), *QUESTION)


@pytest.fixture(scope="session")
def long_rows(tmp_path_factory):
    """The rows of the same study, of longer runs."""
    from clusters import LONG, QUESTION
    from studies import rows_alone

    return rows_alone(tmp_path_factory.mktemp("long"), *QUESTION, *LONG)
