"""A real Slurm on this machine carries a study, disturbed or not: `scripts/slurm.py` starts it."""

import json
import os
import signal
import subprocess
import sys

import pytest
from clusters import (
    LONG,
    SCRIPTS,
    await_,
    cluster,
    crew_of_study,
    ended,
    pids,
    slurm_there,
    submitit_there,
    sweeping,
    swept,
    training,
)
from studies import rows

pytestmark = [pytest.mark.slurm, submitit_there, slurm_there]

SLURM = "hydra/launcher=submitit_slurm"
ONE_A_NODE = "hydra.launcher.cpus_per_task=2"


def said_by(command, env):
    return subprocess.run(command, env=os.environ | env, capture_output=True, text=True, check=True).stdout.split()


def nodes_at_work(env):
    return set(said_by(["squeue", "-ht", "running", "-o", "%N"], env))


def queue(env):
    """The jobs that are there, `1_0` and the like."""
    return said_by(["squeue", "-hr", "-o", "%i"], env)


def test_slurm_carries_a_study_to_the_local_one_s_results(tmp_path, undisturbed_rows):
    with cluster("slurm.py", 1, "SLURM_CONF") as (env, _):
        swept(tmp_path, SLURM, env=env)
    assert rows(tmp_path) == undisturbed_rows
    assert [item.name for item in tmp_path.iterdir()] == ["study"]
    assert list((tmp_path / "study" / "launcher").glob("*/.submitit/*/*_result.pkl")), "Slurm's jobs did it"


def test_the_script_refuses_where_slurm_is_not_installed_and_hands_on_the_command_s_status():
    command = [sys.executable, SCRIPTS / "slurm.py", "1", "sh", "-c", "exit 3"]
    assert subprocess.run(command).returncode == 3
    script = "import slurm; slurm.PROGRAMS = ('slurmd-of-nowhere',)\nwith slurm.slurm(1): pass"
    refused = subprocess.run([sys.executable, "-c", script], cwd=SCRIPTS, capture_output=True, text=True)
    assert refused.returncode == 1
    assert refused.stderr.count("\n") == 1
    assert "slurmd-of-nowhere: not found" in refused.stderr


@pytest.mark.slow
@pytest.mark.parametrize("how", ["cancelled", "time is up", "killed"])
def test_two_nodes_and_a_job_that_ends_early(tmp_path, long_rows, how):
    """Slurm keeps no accounts here, so that submitit never learns of a worker that was killed."""
    folder = tmp_path / "study"
    with (
        cluster("slurm.py", 2, "SLURM_CONF") as (env, _),
        sweeping(tmp_path, *LONG, SLURM, ONE_A_NODE, env=env) as process,
    ):
        await_(lambda: len(training(folder)) == 2)
        assert nodes_at_work(env) == {"n1", "n2"}
        if how == "killed":
            os.kill(training(folder)[0], signal.SIGKILL)
        else:
            said_by(["scancel", *(["--signal=USR2"] if how == "time is up" else []), queue(env)[0]], env)
        assert ended(process)[0] == 0
        assert await_(lambda: not queue(env))
    assert rows(tmp_path) == long_rows
    assert len(crew_of_study(folder)) == 3, "another job took its place"
    reasons = [json.loads(file.read_text())["reason"] for file in folder.glob("ledger/*.left")]
    assert ("interrupted" in reasons) == (how != "killed"), "it gave its cell back, where it could"


@pytest.mark.slow
@pytest.mark.parametrize("crash", [False, True], ids=["daemon", "daemon and job"])
def test_a_node_s_daemon_stopped(tmp_path, long_rows, crash):
    with (
        cluster("slurm.py", 2, "SLURM_CONF") as (env, slurm),
        sweeping(tmp_path, *LONG, SLURM, ONE_A_NODE, env=env) as process,
    ):
        await_(lambda: len(training(tmp_path / "study")) == 2)
        (daemon,) = pids(slurm.pid, "slurmd -D -N n2")
        os.kill(daemon, signal.SIGKILL)
        if crash:
            os.kill(training(tmp_path / "study")[0], signal.SIGKILL)
        await_(lambda: said_by(["sinfo", "-hn", "n2", "-o", "%T"], env)[0].startswith("down"))
        assert process.poll() is None, "in mid-study"
        assert ended(process)[0] == 0
    assert rows(tmp_path) == long_rows


@pytest.mark.slow
def test_ctrl_c_stops_the_jobs_after_their_step_and_takes_back_those_in_the_queue(tmp_path, long_rows):
    folder, words = tmp_path / "study", (*LONG, SLURM, "study.workers=3", "train.checkpoint_every=0")
    with cluster("slurm.py", 1, "SLURM_CONF") as (env, _):
        with sweeping(tmp_path, *words, env=env) as process:
            await_(lambda: len(training(folder)) == 2)
            assert len(queue(env)) == 3
            process.send_signal(signal.SIGINT)
            assert ended(process)[0] == 130
        assert await_(lambda: not queue(env))
        assert len(crew_of_study(folder)) == 2
        assert len(list(folder.glob("attempts/*/checkpoints/step_*/meta.json"))) == 2
        swept(tmp_path, *words, env=env)
    assert rows(tmp_path) == long_rows
