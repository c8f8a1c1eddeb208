"""A real Ray cluster of two nodes on this machine carries a study: `scripts/ray_cluster.py` starts it."""

import os
import signal

import pytest
from clusters import LONG, await_, cluster, crew_of_study, ended, pids, ray_there, sweeping, swept, training
from studies import rows

pytestmark = [pytest.mark.ray, ray_there]

RAY = "hydra/launcher=ray"


def test_two_ray_nodes_carry_a_study_to_the_local_one_s_results(tmp_path, undisturbed_rows):
    with cluster("ray_cluster.py", 2, "RAY_") as (env, _):
        swept(tmp_path, RAY, env=env)
    assert rows(tmp_path) == undisturbed_rows
    assert [item.name for item in tmp_path.iterdir()] == ["study"]
    assert "Connecting to existing Ray cluster" in (tmp_path / "study" / "worker.log").read_text()
    workers = crew_of_study(tmp_path / "study")
    assert len(workers) == len(set(workers)) == 2, "a node has one CPU, so that both were at work"


@pytest.mark.slow
@pytest.mark.parametrize("whole_node", [False, True], ids=["worker", "node"])
def test_a_ray_worker_killed_in_mid_study(tmp_path, long_rows, whole_node):
    with cluster("ray_cluster.py", 2, "RAY_") as (env, ray), sweeping(tmp_path, *LONG, RAY, env=env) as process:
        await_(lambda: len(training(tmp_path / "study")) == 2)
        if whole_node:
            (start,) = pids(ray.pid, "start --block .*--address=")
            (victim,) = pids(start, "raylet/raylet")
        else:
            victim = training(tmp_path / "study")[0]
        os.kill(victim, signal.SIGKILL)
        assert process.poll() is None, "in mid-study"
        assert ended(process)[0] == 0
    assert rows(tmp_path) == long_rows


@pytest.mark.slow
def test_ctrl_c_stops_ray_s_workers_after_their_step(tmp_path, long_rows):
    folder, words = tmp_path / "study", (*LONG, RAY, "study.workers=3", "train.checkpoint_every=0")
    with cluster("ray_cluster.py", 2, "RAY_") as (env, _):
        with sweeping(tmp_path, *words, env=env) as process:
            await_(lambda: len(training(folder)) == 2)
            process.send_signal(signal.SIGINT)
            assert ended(process)[0] == 130
        assert len(list(folder.glob("attempts/*/checkpoints/step_*/meta.json"))) == 2
        swept(tmp_path, *words, env=env)
    assert rows(tmp_path) == long_rows
