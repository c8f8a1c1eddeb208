"""A NaN that a chosen layer puts out at a chosen step: the verdict names both."""

import math

import pytest
from helpers import tiny

from stabrun.observe.sites import linear_sites
from stabrun.training.run import train
from stabrun.training.trainer import Trainer

STEP = 22
CHOSEN = [("layer_00", "qkv"), ("layer_01", "proj"), ("layer_00", "fc2"), ("layer_01", "fc1"), ("", "head")]


def layer_of(model, layer, site):
    (module,) = linear_sites(model)[site][int(layer[-2:]) if layer else 0].modules.values()
    return module


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize(("layer", "site"), CHOSEN, ids=["/".join(filter(None, place)) for place in CHOSEN])
def test_the_verdict_names_the_step_and_the_site(tmp_path, monkeypatch, precision, layer, site):
    own = Trainer.step

    def step(self, number):
        if number == STEP:
            chosen = layer_of(self.model, layer, site)
            chosen.register_forward_hook(lambda module, inputs, output: output * math.nan, prepend=True)
        return own(self, number)

    monkeypatch.setattr(Trainer, "step", step)
    summary = train(tiny(f"train.precision={precision}", f"run_dir={tmp_path / 'run'}"))
    place = f"{layer}/{site}" if layer else site
    assert (summary["verdict"], summary["reason"]) == ("diverged", "nonfinite_loss")
    assert (summary["first_bad_step"], summary["first_bad_site"], summary["status"]) == (STEP, place, "stopped")
