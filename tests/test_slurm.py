"""Studies on a real Slurm on this machine, started by `scripts/slurm.py`."""

import json
import os
import signal
import subprocess
import sys
from dataclasses import replace

import pytest
from clusters import LONG, SCRIPTS, cluster, jobs, needs_slurm, needs_submitit, pids, training
from helpers import TINY
from processes import free_ports
from studies import ended, rows, sweeping, swept, wait_for
from test_ranks import FP64, assert_same, metrics

from stabrun.record.run_dir import RunDir
from stabrun.training.run import train

pytestmark = [pytest.mark.slurm, needs_submitit, needs_slurm]

SLURM = "hydra/launcher=submitit_slurm"
ONE_A_NODE = "hydra.launcher.cpus_per_task=2"


def output_words(command, env):
    return subprocess.run(command, env=os.environ | env, capture_output=True, text=True, check=True).stdout.split()


def busy_nodes(env):
    return set(output_words(["squeue", "-ht", "running", "-o", "%N"], env))


def queue(env):
    """The jobs in the queue, such as `1_0`."""
    return output_words(["squeue", "-hr", "-o", "%i"], env)


def test_a_study_on_one_node(tmp_path, undisturbed):
    with cluster("slurm.py", 1, "SLURM_CONF") as (env, _):
        swept(tmp_path, SLURM, "study.workers=1", env=env)
    assert rows(tmp_path) == undisturbed.rows
    assert [item.name for item in tmp_path.iterdir()] == ["study"]
    assert list((tmp_path / "study" / "launcher").glob("*/.submitit/*/*_result.pkl")), "its cells were trained by jobs"


def test_the_script_returns_the_status_of_its_command_and_needs_slurm():
    command = [sys.executable, SCRIPTS / "slurm.py", "1", "sh", "-c", "exit 3"]
    assert subprocess.run(command).returncode == 3
    script = (
        "import processes, slurm; slurm.PROGRAMS = ('slurmd-of-nowhere',)\nwith processes.running(slurm.slurm, 1): pass"
    )
    refused = subprocess.run([sys.executable, "-c", script], cwd=SCRIPTS, capture_output=True, text=True)
    assert refused.returncode == 1
    assert refused.stderr.count("\n") == 1
    assert "slurmd-of-nowhere: not found" in refused.stderr


@pytest.mark.slow
@pytest.mark.parametrize("how", ["cancelled", "time is up", "killed"])
def test_a_job_on_two_nodes_ends_early(tmp_path, undisturbed_long, how):
    """There is no accounting here, so that submitit never learns of a worker that was killed."""
    folder = tmp_path / "study"
    with (
        cluster("slurm.py", 2, "SLURM_CONF") as (env, _),
        sweeping(tmp_path, *LONG, SLURM, ONE_A_NODE, env=env) as process,
    ):
        wait_for(lambda: len(training(folder)) == 2)
        assert busy_nodes(env) == {"n1", "n2"}
        if how == "killed":
            os.kill(training(folder)[0], signal.SIGKILL)
        else:
            output_words(["scancel", *(["--signal=USR2"] if how == "time is up" else []), queue(env)[0]], env)
        assert ended(process)[0] == 0
        assert wait_for(lambda: not queue(env))
    assert rows(tmp_path) == undisturbed_long.rows
    assert len(jobs(folder)) == 3, "another job replaced it"
    reasons = [json.loads(file.read_text())["reason"] for file in folder.glob("ledger/*.left")]
    assert ("interrupted" in reasons) == (how != "killed"), "it gave its cell back, unless it was killed"


@pytest.mark.slow
@pytest.mark.parametrize("crash", [False, True], ids=["daemon", "daemon and job"])
def test_the_daemon_of_a_node_is_killed(tmp_path, undisturbed_long, crash):
    with (
        cluster("slurm.py", 2, "SLURM_CONF") as (env, slurm),
        sweeping(tmp_path, *LONG, SLURM, ONE_A_NODE, env=env) as process,
    ):
        wait_for(lambda: len(training(tmp_path / "study")) == 2)
        (daemon,) = pids(slurm.pid, "slurmd -D -N n2")
        os.kill(daemon, signal.SIGKILL)
        if crash:
            os.kill(training(tmp_path / "study")[0], signal.SIGKILL)
        wait_for(lambda: output_words(["sinfo", "-hn", "n2", "-o", "%T"], env)[0].startswith("down"))
        assert process.poll() is None, "the study is not finished"
        assert ended(process)[0] == 0
    assert rows(tmp_path) == undisturbed_long.rows


@pytest.mark.slow
def test_a_study_whose_cells_take_two_ranks(tmp_path):
    words = ("study.seeds=1", "study.lrs=[1e-2]", "study.workers=1", "train.ranks=2")
    with cluster("slurm.py", 1, "SLURM_CONF") as (env, _):
        swept(tmp_path, *words, SLURM, ONE_A_NODE, env=env)
    assert len(rows(tmp_path)) == 2
    for run in map(RunDir, (tmp_path / "study" / "runs").iterdir()):
        alone = replace(run.config(), train=replace(run.config().train, ranks=1))
        train(alone, tmp_path / run.path.name)
        assert_same(metrics(run.path), metrics(tmp_path / run.path.name), within=1e-3)
        assert run.environment()["ranks"] == 2


@pytest.mark.slow
def test_a_run_on_two_nodes_is_cancelled_and_resumes(tmp_path, monkeypatch):
    """torchrun on each node, as docs/gpu.md says. In fp64, it is the run of one process."""
    words = f"{FP64} {' '.join(TINY)} train.steps=400 train.checkpoint_every=0"
    (tmp_path / "job.sh").write_text(
        "#!/bin/sh\n"
        f"srun {sys.executable} -m torch.distributed.run --nnodes=2 --nproc-per-node=1 --rdzv-id=$SLURM_JOB_ID "
        f"--rdzv-backend=c10d --rdzv-endpoint=localhost:{free_ports(1)[0]} {words} train.ranks=2 run_dir=run\n"
    )
    submit = ["sbatch", "--parsable", "--nodes=2", "--ntasks-per-node=1", "--cpus-per-task=2", "--output=log", "job.sh"]
    run = RunDir(tmp_path / "run")
    with cluster("slurm.py", 2, "SLURM_CONF") as (env, _):
        monkeypatch.chdir(tmp_path)
        (job,) = output_words(submit, env)
        wait_for(lambda: run.steps_done() > 20)
        assert busy_nodes(env) == {"n[1-2]"}
        output_words(["scancel", job], env)
        wait_for(lambda: not queue(env))
        stopped = run.checkpoint_step()
        assert stopped == run.steps_done() < 400, "each rank stopped after the same step"
        output_words([*submit[:1], "--wait", *submit[1:]], env)
    subprocess.run([sys.executable, *words.split(), "run_dir=one"], cwd=tmp_path, check=True)
    assert_same(metrics(run.path), metrics(tmp_path / "one"), within=1e-9)
    assert run.starts() == [0, stopped]


@pytest.mark.slow
def test_ctrl_c_stops_running_jobs_and_cancels_waiting_ones(tmp_path, undisturbed_long):
    folder, words = tmp_path / "study", (*LONG, SLURM, "study.workers=3", "train.checkpoint_every=0")
    with cluster("slurm.py", 1, "SLURM_CONF") as (env, _):
        with sweeping(tmp_path, *words, env=env) as process:
            wait_for(lambda: len(training(folder)) == 2)
            assert len(queue(env)) == 3
            process.send_signal(signal.SIGINT)
            assert ended(process)[0] == 130
        assert wait_for(lambda: not queue(env))
        assert len(jobs(folder)) == 2
        assert len(list(folder.glob("attempts/*/checkpoints/step_*/meta.json"))) == 2
        swept(tmp_path, *words, env=env)
    assert rows(tmp_path) == undisturbed_long.rows
