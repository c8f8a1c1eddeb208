"""`stabrun sweep` with Hydra's launchers: what is refused, and submitit on this machine."""

import os
import signal

import pytest
from clusters import QUESTION, await_, ended, submitit_there, sweeping, swept, training
from helpers import TINY, stabrun
from studies import rows

from stabrun.composition import SHIPPED, no_such_choice
from stabrun.config import UserError
from stabrun.study.launch import crew_of
from stabrun.study.pool import LocalPool

HERE = "hydra/launcher=submitit_local"
MARKS = (pytest.mark.slurm, submitit_there)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("hydra/launcher=slrum",), "hydra/launcher=slrum: no such hydra/launcher"),
        (("hydra.launcher._target_=os.getcwd",), "names code to run"),
        (("+hydra.callbacks.x._target_=os.getcwd",), "names code to run"),
        pytest.param((HERE, "hydra.launcher.nodes=2"), "a job is one worker", marks=MARKS),
        pytest.param((HERE, "hydra.launcher.nods=2"), "no such key", marks=MARKS),
        pytest.param((HERE, "hydra.launcher.timeout_min=1,2"), "launched alike", marks=MARKS),
    ],
)
def test_launchers_that_are_refused_make_nothing(tmp_path, words, said):
    done = stabrun("sweep", *QUESTION, *words, cwd=tmp_path)
    assert done.returncode == 2
    assert said in done.stderr
    assert "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_launcher_whose_package_is_missing_is_named_with_what_brings_it():
    assert "pip install 'stabrun[ray]'" in no_such_choice("hydra/launcher", "ray", "basic")


def test_hydra_s_own_launcher_means_this_machine(tmp_path):
    assert isinstance(crew_of([*TINY, "hydra/launcher=basic"], SHIPPED, tmp_path, 2), LocalPool)
    with pytest.raises(UserError):
        crew_of([*TINY, "hydra/launcher=slrum"], SHIPPED, tmp_path, 2)


@pytest.mark.slurm
@submitit_there
def test_submitit_s_workers_come_to_the_local_results(tmp_path, undisturbed_rows):
    swept(tmp_path, HERE)
    assert rows(tmp_path) == undisturbed_rows
    assert [item.name for item in tmp_path.iterdir()] == ["study"]


@pytest.mark.slurm
@submitit_there
def test_a_launched_worker_that_is_killed_is_replaced(tmp_path):
    folder = tmp_path / "study"
    with sweeping(tmp_path, HERE, "train.steps=20000") as process:
        os.kill(await_(lambda: training(folder))[0], signal.SIGKILL)
        crew = os.listdir(folder / "launcher")[0]
        await_(lambda: (folder / "ledger" / f"{crew}.0003.claim").exists())
        process.send_signal(signal.SIGINT)
        assert ended(process)[0] == 130


@pytest.mark.slurm
@submitit_there
def test_ctrl_c_reaches_launched_workers_by_the_stop_file(tmp_path):
    folder = tmp_path / "study"
    with sweeping(tmp_path, HERE, "train.steps=20000", "train.checkpoint_every=0") as process:
        await_(lambda: len(list(folder.glob("attempts/*/metrics.jsonl"))) == 2)
        process.send_signal(signal.SIGINT)
        status, said = ended(process)
    assert status == 130
    assert "the same command goes on" in said
    assert len(list(folder.glob("attempts/*/checkpoints/step_*/meta.json"))) == 2
    assert len(list(folder.glob("ledger/*.left"))) == 4, "two cells, and two workers of the crew"


@pytest.mark.slurm
@submitit_there
def test_plain_multirun_by_submitit(tmp_path):
    words = ("-m", "hydra/launcher=submitit_local", "optim.lr=1e-2,1e-1")
    done = stabrun("train", *words, *TINY, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert len(list((tmp_path / "runs").glob("*/summary.json"))) == 2


@pytest.mark.slurm
@submitit_there
def test_shell_commands_for_a_cluster_are_typed_and_not_read_from_a_file(tmp_path):
    """`setup` is a list of lines that submitit puts into its script."""
    folder = tmp_path / "mine" / "experiment"
    folder.mkdir(parents=True)
    sly = "# @package _global_\nhydra: {launcher: {setup: [touch /nowhere]}}\n"
    (folder / "sly.yaml").write_text(sly)
    words = (*QUESTION, "hydra/launcher=submitit_slurm", "--config-dir", tmp_path / "mine", "--dry-run")
    assert stabrun("sweep", *words, "hydra.launcher.setup=[true]", cwd=tmp_path).returncode == 0
    done = stabrun("sweep", *words, "+experiment=sly", cwd=tmp_path)
    assert done.returncode == 2
    assert "hydra.launcher.setup: names code to run" in done.stderr
