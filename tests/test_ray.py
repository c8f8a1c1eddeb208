"""Studies on a real Ray cluster of two nodes on this machine, started by `scripts/ray_cluster.py`."""

import os
import signal

import pytest
from clusters import LONG, cluster, jobs, needs_ray, pids, training
from studies import ended, rows, sweeping, swept, wait_for

pytestmark = [pytest.mark.ray, needs_ray]

RAY = "hydra/launcher=ray"


def test_a_study_on_two_nodes(tmp_path, undisturbed):
    with cluster("ray_cluster.py", 2, "RAY_") as (env, _):
        swept(tmp_path, RAY, env=env)
    assert rows(tmp_path) == undisturbed.rows
    assert [item.name for item in tmp_path.iterdir()] == ["study"]
    assert "Connecting to existing Ray cluster" in (tmp_path / "study" / "worker.log").read_text()
    workers = jobs(tmp_path / "study")
    assert len(workers) == len(set(workers)) == 2, "one worker per node: a node has one CPU"


@pytest.mark.slow
@pytest.mark.parametrize("whole_node", [False, True], ids=["worker", "node"])
def test_a_worker_or_node_is_killed(tmp_path, undisturbed_long, whole_node):
    with cluster("ray_cluster.py", 2, "RAY_") as (env, ray), sweeping(tmp_path, *LONG, RAY, env=env) as process:
        wait_for(lambda: len(training(tmp_path / "study")) == 2)
        if whole_node:
            (start,) = pids(ray.pid, "start --block .*--address=")
            (victim,) = pids(start, "raylet/raylet")
        else:
            victim = training(tmp_path / "study")[0]
        os.kill(victim, signal.SIGKILL)
        assert process.poll() is None, "the study is not finished"
        assert ended(process)[0] == 0
    assert rows(tmp_path) == undisturbed_long.rows


@pytest.mark.slow
def test_ctrl_c_stops_workers_after_their_step(tmp_path, undisturbed_long):
    folder, words = tmp_path / "study", (*LONG, RAY, "study.workers=3", "train.checkpoint_every=0")
    with cluster("ray_cluster.py", 2, "RAY_") as (env, _):
        with sweeping(tmp_path, *words, env=env) as process:
            wait_for(lambda: len(training(folder)) == 2)
            process.send_signal(signal.SIGINT)
            assert ended(process)[0] == 130
        assert len(list(folder.glob("attempts/*/checkpoints/step_*/meta.json"))) == 2
        swept(tmp_path, *words, env=env)
    assert rows(tmp_path) == undisturbed_long.rows
