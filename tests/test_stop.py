"""Signals stop a run after its step with a checkpoint, in whatever it does, and all its processes."""

import os
import signal
import subprocess
import sys

import pytest
from clusters import cluster, needs_slurm
from helpers import TINY, metrics, tiny
from studies import ended, running, wait_for

from stabrun.record.run_dir import RunDir
from stabrun.training.run import train
from stabrun.training.stop import WARNINGS, Stop

LONG = (*TINY, "schedule=constant", "train.steps=100000", "train.checkpoint_every=0")
TRAIN = ("-m", "stabrun", "train", *LONG, "run_dir=run")
QUICK = [signal.SIGTERM, signal.SIGUSR1]
SLOW = [pytest.param(which, marks=pytest.mark.slow) for which in (signal.SIGINT, signal.SIGUSR2)]


def assert_resumes(run, *overrides):
    """What a stopped run wrote, and 20 steps after it, are the bytes of a run that was not stopped."""
    stopped = run.checkpoint_step()
    assert stopped == run.steps_done()
    config = tiny(*LONG[len(TINY) :], *overrides, f"train.steps={stopped + 20}")
    resumed, whole = (run.path.with_name(name) for name in ("resumed", "whole"))
    run.path.rename(resumed)
    _, recorded = (resumed / "config.yaml").read_text().split("\n", 1)  # without its checksum
    (resumed / "config.yaml").write_text(recorded.replace("steps: 100000", f"steps: {stopped + 20}"))
    train(config, resumed)
    train(config, whole)
    assert metrics(resumed) == metrics(whole)


@pytest.mark.parametrize("which", [*QUICK, *SLOW])
def test_each_signal_stops_a_run_after_its_step(tmp_path, which):
    run = RunDir(tmp_path / "run")
    with running(*TRAIN, cwd=tmp_path) as process:
        wait_for(lambda: run.steps_done() > 20)
        os.killpg(process.pid, which)  # Slurm's go to all processes of a job
        status, said = ended(process)
    assert status == 130, said
    assert f"interrupted after step {run.steps_done()}; the same command resumes from there." in said
    assert_resumes(run)


@pytest.mark.slow
@pytest.mark.parametrize("which", [signal.SIGTERM, signal.SIGUSR1])
def test_all_ranks_stop_after_the_same_step(tmp_path, which):
    run = RunDir(tmp_path / "run")
    with running(*TRAIN, "train.ranks=2", cwd=tmp_path) as process:
        wait_for(lambda: run.steps_done() > 20)
        os.killpg(process.pid, which)
        status, said = ended(process)
    assert (status, run.checkpoint_step()) == (130, run.steps_done()), said
    assert "interrupted after step" in said


@pytest.mark.slow
def test_one_rank_alone_stops_the_others(tmp_path):
    run = RunDir(tmp_path / "run")
    with running(*TRAIN, "train.ranks=2", cwd=tmp_path) as process:
        wait_for(lambda: run.steps_done() > 20)
        ranks = subprocess.run(
            ["pgrep", "-P", str(process.pid), "-f", "spawn_main"], capture_output=True, text=True
        ).stdout.split()
        os.kill(int(ranks[1]), signal.SIGTERM)
        status, said = ended(process)
    assert (status, run.checkpoint_step()) == (130, run.steps_done()), said


def test_a_cluster_may_repeat_its_signal():
    """Only a second Ctrl-C stops at once."""
    with Stop() as stop:
        for which in (signal.SIGTERM, signal.SIGTERM, *WARNINGS):
            stop.ask(which, None)
        assert stop.asked
        with pytest.raises(KeyboardInterrupt):
            stop.ask(signal.SIGINT, None)


def test_a_handler_of_the_program_for_a_warning_is_left_alone(monkeypatch):
    before = signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    try:
        with Stop():
            assert signal.getsignal(signal.SIGUSR1) == signal.SIG_IGN
            assert callable(signal.getsignal(signal.SIGUSR2))
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert signal.getsignal(signal.SIGUSR2) == signal.SIG_DFL


@pytest.mark.slow
def test_a_warning_reaches_a_script_that_calls_train(tmp_path):
    words = [*LONG, "run_dir=run"]
    (tmp_path / "script.py").write_text(
        "import signal\nimport stabrun\nfrom stabrun.composition import compose\n"
        f"signal.pthread_sigmask(signal.SIG_SETMASK, [])\nprint(stabrun.train(compose({words})).summary['status'])\n"
    )
    run = RunDir(tmp_path / "run")
    with running("script.py", cwd=tmp_path, env={"PYTHONPATH": os.pathsep.join(sys.path)}) as process:
        wait_for(lambda: run.steps_done() > 20)
        process.send_signal(signal.SIGUSR1)
        status, said = ended(process)
    assert status == 0
    assert "interrupted\n" in said
    assert_resumes(run)


@pytest.mark.slow
def test_in_the_middle_of_a_validation(tmp_path):
    words = ("train.val_every=5", "train.val_sequences=3000")
    run = RunDir(tmp_path / "run")
    with running(*TRAIN, *words, cwd=tmp_path) as process:
        wait_for(lambda: run.steps_done() > 10)  # nearly all of the time is that of validations
        process.send_signal(signal.SIGUSR1)
        status, said = ended(process)
    assert status == 130, said
    assert_resumes(run, *words)


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("which", [signal.SIGTERM, signal.SIGUSR1])
def test_while_the_model_is_compiled(tmp_path, which, ranks):
    """That may take minutes, and there is nothing to lose: the run ends at once, and the next one is whole."""
    run = RunDir(tmp_path / "run")
    env = {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "inductor")}
    words = ("train.compile=true", f"train.ranks={ranks}", "train.steps=100000")
    with running(*TRAIN, *words, cwd=tmp_path, env=env) as process:
        wait_for(lambda: (tmp_path / "inductor").exists())
        os.killpg(process.pid, which)
        status, said = ended(process)
    assert status == 130, said
    assert said.splitlines()[-1] == "stabrun: interrupted; the same command resumes from the last checkpoint."
    assert run.steps_done() == 0


@pytest.mark.slow
@pytest.mark.slurm
@needs_slurm
@pytest.mark.parametrize("how", ["--signal=B:USR1@60", "srun --signal=USR2@60"])
def test_slurm_warns_of_the_time_limit(tmp_path, monkeypatch, how):
    """The job ends by itself, with a checkpoint, before its limit. Slurm may warn a minute earlier than asked."""
    (*launcher, option) = how.split()
    start = "exec" if not launcher else "srun"
    (tmp_path / "job.sh").write_text(f"#!/bin/sh\n{start} {sys.executable} {' '.join(TRAIN)}\n")
    run = RunDir(tmp_path / "run")
    with cluster("slurm.py", 1, "SLURM_CONF") as (env, _):
        monkeypatch.chdir(tmp_path)
        command = ["sbatch", "--wait", "--parsable", "--time=2", option, "--output=log", "--cpus-per-task=2", "job.sh"]
        done = subprocess.run(command, env=os.environ | env, capture_output=True, text=True)
    log = (tmp_path / "log").read_text()
    assert done.returncode == 130, done.stderr + log
    assert "interrupted after step" in log
    assert "DUE TO TIME LIMIT" not in log
    assert_resumes(run)
