"""SIGKILL at random moments: every start resumes, and the record and the weights are those of the undisturbed run."""

import pytest
from helpers import configured, events, metrics, tiny
from kill_chain import killed

from stabrun.record import checkpoints
from stabrun.training.run import train

OFTEN = ("train.checkpoint_every=3", "train.val_every=20", "model.dropout=0.1", "tracker=none", "train.threads=1")
LONG = {  # precision: steps of nano, kills of each of the runs
    "fp32": (400, (67, 67, 66)),
    "bf16": (60, (10,)),
    "fp16": (60, (10,)),
}


def assert_same(one, other):
    assert metrics(one) == metrics(other)
    names = "model.safetensors", "optimizer.safetensors", "meta.json"
    newest = [next(iter(checkpoints.steps(run / "checkpoints").values())) for run in (one, other)]
    assert all((newest[0] / name).read_bytes() == (newest[1] / name).read_bytes() for name in names)


def chained(tmp_path, config, kills, rows, seed):
    train(config, tmp_path / "whole")
    done, in_checkpoint = killed(config, tmp_path / "run", kills, rows, seed)
    assert_same(tmp_path / "run", tmp_path / "whole")
    starts = len(events(tmp_path / "run", "start"))
    print(f"\n{done} kills, {in_checkpoint} of them while a checkpoint was written; {starts} starts reached training")
    return done


def test_killed_at_random_moments(tmp_path):
    assert chained(tmp_path, tiny(*OFTEN, "train.steps=120"), kills=8, rows=8, seed=0) > 3


@pytest.mark.slow
@pytest.mark.parametrize(
    ("precision", "seed", "kills"),
    [(precision, seed, kills) for precision, (_, runs) in LONG.items() for seed, kills in enumerate(runs)],
)
def test_killed_in_long_runs(tmp_path, precision, seed, kills):
    config = configured(*OFTEN, f"train.steps={LONG[precision][0]}", f"train.precision={precision}", f"seed={seed}")
    assert chained(tmp_path, config, kills, rows=8, seed=seed) == kills
