"""`stabrun sweep` with Hydra's launchers: what is refused, and submitit on this machine."""

import os
import signal

import pytest
from clusters import needs_submitit, training
from helpers import TINY, run, stabrun
from studies import ENDLESS, QUESTION, ended, recorded, rows, sweeping, swept, wait_for

from stabrun.composition import SHIPPED, no_such_choice
from stabrun.config import UserError
from stabrun.study.launch import worker_pool
from stabrun.study.pool import LocalPool

HERE = "hydra/launcher=submitit_local"
MARKS = (pytest.mark.slurm, needs_submitit)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("hydra/launcher=slrum",), "hydra/launcher=slrum: no such hydra/launcher"),
        (("hydra.launcher._target_=os.getcwd",), "names code to run"),
        (("+hydra.callbacks.x._target_=os.getcwd",), "names code to run"),
        pytest.param((HERE, "hydra.launcher.nodes=2"), "a job is one worker", marks=MARKS),
        pytest.param((HERE, "hydra.launcher.nods=2"), "no such key", marks=MARKS),
        pytest.param((HERE, "hydra.launcher.timeout_min=1,2"), "all workers use one launcher", marks=MARKS),
    ],
)
def test_refused_launchers_create_nothing(tmp_path, monkeypatch, capsys, words, message):
    monkeypatch.chdir(tmp_path)
    status, _, err = run(capsys, "sweep", *QUESTION, *words)
    assert status == 2
    assert message in err
    assert err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_a_launcher_whose_package_is_missing_is_named_with_its_extra():
    assert "pip install 'stabrun[ray]'" in no_such_choice("hydra/launcher", "ray", "basic")


def test_the_basic_launcher_is_the_local_pool(tmp_path):
    assert isinstance(worker_pool([*TINY, "hydra/launcher=basic"], SHIPPED, tmp_path, 2), LocalPool)
    with pytest.raises(UserError):
        worker_pool([*TINY, "hydra/launcher=slrum"], SHIPPED, tmp_path, 2)


@pytest.mark.slurm
@needs_submitit
def test_a_study_by_submitit(tmp_path, undisturbed):
    swept(tmp_path, HERE, "study.workers=1")
    assert rows(tmp_path) == undisturbed.rows
    assert [item.name for item in tmp_path.iterdir()] == ["study"]


@pytest.mark.slow
@pytest.mark.slurm
@needs_submitit
def test_a_launched_worker_that_is_killed_is_replaced(tmp_path):
    folder = tmp_path / "study"
    with sweeping(tmp_path, HERE, *ENDLESS) as process:
        os.kill(wait_for(lambda: training(folder))[0], signal.SIGKILL)
        pool = os.listdir(folder / "launcher")[0]
        wait_for(lambda: (folder / "ledger" / f"{pool}.0003.claim").exists())
        process.send_signal(signal.SIGINT)
        assert ended(process)[0] == 130


@pytest.mark.slurm
@needs_submitit
def test_ctrl_c_reaches_launched_workers_by_the_stop_file(tmp_path):
    folder = tmp_path / "study"
    with sweeping(tmp_path, HERE, *ENDLESS) as process:
        wait_for(lambda: len(recorded(folder)) == 2)
        process.send_signal(signal.SIGINT)
        status, out = ended(process)
    assert status == 130
    assert "the same command resumes" in out
    assert len(list(folder.glob("attempts/*/checkpoints/step_*/meta.json"))) == 2
    assert len(list(folder.glob("ledger/*.left"))) == 4, "two cells and two jobs"


@pytest.mark.slurm
@needs_submitit
def test_multirun_by_submitit(tmp_path):
    words = ("-m", "hydra/launcher=submitit_local", "optim.lr=1e-2,1e-1")
    done = stabrun("train", *words, *TINY, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert len(list((tmp_path / "runs").glob("*/summary.json"))) == 2


@pytest.mark.slurm
@needs_submitit
def test_shell_commands_of_a_launcher_are_refused_in_files(tmp_path, monkeypatch, capsys):
    """submitit puts the lines of `setup` into its script."""
    folder = tmp_path / "mine" / "experiment"
    folder.mkdir(parents=True)
    sly = "# @package _global_\nhydra: {launcher: {setup: [touch /nowhere]}}\n"
    (folder / "sly.yaml").write_text(sly)
    monkeypatch.chdir(tmp_path)
    words = (*QUESTION, "hydra/launcher=submitit_slurm", "--config-dir", tmp_path / "mine", "--dry-run")
    assert run(capsys, "sweep", *words, "hydra.launcher.setup=[true]")[0] == 0
    status, _, err = run(capsys, "sweep", *words, "+experiment=sly")
    assert status == 2
    assert "hydra.launcher.setup: names code to run" in err
