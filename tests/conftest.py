"""What all tests share: no network, one thread, a cache of their own, and runs that are quick."""

import os
import shutil
import signal

os.environ |= {"WANDB_MODE": "offline", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}

from pathlib import Path

import hypothesis
import pytest
import torch

# A shell starts background jobs with SIGINT ignored, and child processes would inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)
torch.set_num_threads(1)
hypothesis.settings.register_profile("ours", deadline=None, derandomize=True, database=None)
hypothesis.settings.load_profile("ours")


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
def undisturbed(tmp_path_factory):
    """The study of `studies.QUESTION`, each cell trained by itself."""
    from studies import QUESTION, trained_alone

    return trained_alone(tmp_path_factory.mktemp("undisturbed"), *QUESTION)


@pytest.fixture(scope="session")
def undisturbed_long(tmp_path_factory):
    """The same study with the longer runs of `clusters.LONG`."""
    from clusters import LONG
    from studies import QUESTION, trained_alone

    return trained_alone(tmp_path_factory.mktemp("undisturbed"), *QUESTION, *LONG)


@pytest.fixture(scope="session")
def made_study(tmp_path_factory):
    """A study from made-up records, of two variants, three learning rates and two seeds. Do not change it."""
    from made import a_study

    directory = tmp_path_factory.mktemp("made") / "study"
    a_study(directory)
    return directory


@pytest.fixture(scope="session")
def missing_runs(tmp_path_factory):
    """Studies that lack runs to compare: none, one, diverged ones only, or one seed. Do not change them."""
    from made import a_study

    place, lost = tmp_path_factory.mktemp("missing"), {"baseline": 0.0, "qk_norm": 0.0}
    options = {"empty": {"skip": 12}, "one": {"skip": 11}, "lost": {"edges": lost}, "alone": {"seeds": 1}}
    for name, option in options.items():
        a_study(place / name, **option)
    return {name: place / name for name in options}


@pytest.fixture(scope="session")
def whole(tmp_path_factory):
    """The record of an undisturbed run."""
    from helpers import RICH, metrics, tiny

    from stabrun.training.run import train

    directory = tmp_path_factory.mktemp("whole") / "run"
    train(tiny(*RICH, f"run_dir={directory}"))
    return metrics(directory)


@pytest.fixture(scope="session")
def stopped(tmp_path_factory):
    """The directory of that run, interrupted after 13 steps: its checkpoints are of steps 8 and 13."""
    from helpers import RICH, tiny, train_interrupted

    directory = tmp_path_factory.mktemp("stopped") / "run"
    with pytest.MonkeyPatch.context() as patch:
        train_interrupted(tiny(*RICH, f"run_dir={directory}"), patch, at=12)
    return directory


@pytest.fixture
def interrupted(tmp_path, stopped):
    """The configuration of a copy of the interrupted run, in `tmp_path / "run"`."""
    from helpers import RICH, tiny

    shutil.copytree(stopped, tmp_path / "run")
    return tiny(*RICH, f"run_dir={tmp_path / 'run'}")
