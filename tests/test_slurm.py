"""A real Slurm on this machine carries a study: `scripts/slurm.py` starts it."""

import pytest
from clusters import cluster, rows, slurm_there, submitit_there, swept

pytestmark = [pytest.mark.slurm, submitit_there, slurm_there]


def test_slurm_carries_a_study_to_the_local_one_s_results(tmp_path, undisturbed_rows):
    with cluster("slurm.py", 1, "SLURM_CONF") as (env, _):
        swept(tmp_path, "hydra/launcher=submitit_slurm", env=env)
    assert rows(tmp_path) == undisturbed_rows
    assert [item.name for item in tmp_path.iterdir()] == ["study"]
    assert list((tmp_path / "study" / "launcher").glob("*/.submitit/*/*_result.pkl")), "Slurm's jobs did it"
