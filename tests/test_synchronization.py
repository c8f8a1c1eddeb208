"""Between the launch of a step and the reading of its row, nothing waits for the device.

On a GPU each of the operations below would. They are found by dispatch, and by name where a CPU tensor needs none.
"""

import pytest
import torch
from helpers import ALL_VARIANTS, tiny
from waiting import waits

from stabrun.training.run import Run, train
from stabrun.training.trainer import Trainer


def waits_of(monkeypatch, config):
    """What the launches of a run wait for; their batches are made beforehand, on the host."""
    found, batch, launch = [], Trainer.batch, Run.launch

    def launched(self, step):
        tokens = batch(self.trainer, step)
        with monkeypatch.context() as patch, waits() as waited:
            patch.setattr(Trainer, "batch", lambda trainer, step: tokens)
            row = launch(self, step)
        found.extend(waited)
        return row

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "validate", lambda trainer: 0.0)  # it reads its losses, on purpose
        patch.setattr(Run, "launch", launched)
        assert train(config)["steps"] == config.train.steps
    return found


SETTINGS = {
    **{variant: (f"+variant={variant}", "optim.z_loss=1e-3") for variant in ALL_VARIANTS},
    "by value": ("optim.clip_by=value", "train.micro_batch_size=1", "observe.slow_every=1"),
    "recomputed": ("train.recompute=blocks", "model.dropout=0.1", "+variant=soft_cap"),
    "bf16": ("train.precision=bf16",),
}


@pytest.mark.parametrize("setting", SETTINGS)
def test_a_step_waits_for_nothing(tmp_path, monkeypatch, setting):
    config = tiny(*SETTINGS[setting], "train.steps=3", f"run_dir={tmp_path / 'run'}")
    assert waits_of(monkeypatch, config) == []


QUICK = ("baseline", "recomputed")


@pytest.mark.parametrize(
    "setting", [*QUICK, *(pytest.param(name, marks=pytest.mark.slow) for name in SETTINGS if name not in QUICK)]
)
def test_a_step_waits_for_nothing_with_a_tracker(tmp_path, monkeypatch, setting):
    words = *SETTINGS[setting], "tracker=wandb", "tracker.norms_every=1", "train.steps=3"
    assert waits_of(monkeypatch, tiny(*words, f"run_dir={tmp_path / 'run'}")) == []


@pytest.mark.parametrize(
    "wait",
    [
        lambda x: x.item(),
        lambda x: bool(x),
        lambda x: float(x),
        lambda x: x.tolist(),
        lambda x: x.cpu(),
        lambda x: x.numpy(),
        lambda x: x.nonzero(),
        lambda x: x[x > 0],
    ],
)
def test_what_waits_is_found(tmp_path, monkeypatch, wait):
    step = Trainer.step

    def waiting(self, number):
        snapshot = step(self, number)
        wait(torch.ones(1))
        return snapshot

    monkeypatch.setattr(Trainer, "step", waiting)
    assert waits_of(monkeypatch, tiny("train.steps=1", "schedule.warmup_steps=0", f"run_dir={tmp_path / 'run'}"))
