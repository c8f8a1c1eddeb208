"""A real Ray cluster of two nodes on this machine carries a study: `scripts/ray_cluster.py` starts it."""

import pytest
from clusters import cluster, crew_of_study, ray_there, rows, swept

pytestmark = [pytest.mark.ray, ray_there]


def test_two_ray_nodes_carry_a_study_to_the_local_one_s_results(tmp_path, undisturbed_rows):
    with cluster("ray_cluster.py", 2, "RAY_") as (env, _):
        swept(tmp_path, "hydra/launcher=ray", env=env)
    assert rows(tmp_path) == undisturbed_rows
    assert [item.name for item in tmp_path.iterdir()] == ["study"]
    assert "Connecting to existing Ray cluster" in (tmp_path / "study" / "worker.log").read_text()
    workers = crew_of_study(tmp_path / "study")
    assert len(workers) == len(set(workers)) == 2, "a node has one CPU, so that both were at work"
