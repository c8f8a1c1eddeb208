"""fp16 with dynamic loss scaling, with overflows planted in a gradient."""

import json
import math

import pytest
import torch
from helpers import a_trainer, tiny, train_interrupted

from stabrun.record.run_dir import RunDir
from stabrun.training.run import train
from stabrun.verdict.judge import Judge

FP16 = "train.precision=fp16", "train.loss_scale=1024", "train.loss_scale_growth=4", "observe.slow_every=1"


def overflowing(trainer, bad_steps, value=math.inf):
    """Put `value` into one gradient at these steps, after the loss scale was applied."""
    backward = trainer.backward

    def planted(step):
        losses = backward(step)
        if step in bad_steps:
            trainer.parameters[3].grad.flatten()[5] = value
        return losses

    trainer.backward = planted


@pytest.mark.parametrize("value", [math.inf, math.nan])
@pytest.mark.parametrize("clip", ["optim.clip=1.0", "optim.clip=null", "optim.clip_by=value"])
def test_scale_falls_and_recovers_and_no_bad_gradient_is_applied(value, clip):
    trainer = a_trainer(tiny(*FP16, clip))
    bad = {3, 4, 12}
    overflowing(trainer, bad, value)
    scale, finite = 1024.0, 0
    for step in range(20):
        before = [p.detach().clone() for p in trainer.parameters]
        row = trainer.step(step).read()
        assert (row["scale/loss_scale"], row["scale/skipped"]) == (scale, float(step in bad)), step
        same = [p.equal(b) for p, b in zip(trainer.parameters, before, strict=True)]
        assert all(same) if step in bad else not any(same), step
        assert all(bool(p.isfinite().all()) for p in trainer.parameters)
        state = trainer.optimizer.state.values()
        assert all(bool(part.isfinite().all()) for moments in state for part in moments.values())
        scale, finite = (scale / 2, 0) if step in bad else (scale, finite + 1)
        if finite == 4:
            scale, finite = scale * 2, 0


def test_skipped_steps_are_counted_and_are_not_a_divergence(tmp_path, monkeypatch):
    from stabrun.training.trainer import Trainer

    class Overflowing(Trainer):
        def __init__(self, *facts):
            super().__init__(*facts)
            overflowing(self, {7, 20, 21})

    monkeypatch.setattr("stabrun.training.run.Trainer", Overflowing)
    summary = train(tiny(*FP16, "train.loss_scale_growth=100", "train.steps=60", f"run_dir={tmp_path / 'run'}"))
    assert summary["skipped_steps"] == 3
    assert (summary["verdict"], summary["status"], summary["steps"]) == ("converged", "complete", 60)
    rows = list(RunDir(tmp_path / "run").rows())
    assert [row["step"] for row in rows if row["grad/norm"] == "inf"] == [7, 20, 21]


def test_an_overflow_at_the_lowest_scale_is_a_nonfinite_gradient():
    judge = Judge()
    for step in range(20):
        scale = 2.0 ** (8 - step)
        judge.add(
            {"step": step, "train/loss": 2.0, "grad/norm": "inf", "scale/skipped": 1.0, "scale/loss_scale": scale}
        )
        if judge.over:
            break
    assert (judge.verdict().reason, scale) == ("nonfinite_grad", 1.0)


def test_a_resumed_run_of_fp16_is_the_same_bytes(tmp_path, monkeypatch):
    words = (*FP16, "train.steps=12", "train.checkpoint_every=3")
    train(tiny(*words, f"run_dir={tmp_path / 'whole'}"))
    train_interrupted(tiny(*words, f"run_dir={tmp_path / 'cut'}"), monkeypatch, at=7)
    meta = json.loads(next((tmp_path / "cut").glob("checkpoints/*/meta.json")).read_text())
    assert meta["scaler"]["scale"] == 4096.0
    train(tiny(*words, f"run_dir={tmp_path / 'cut'}"))
    whole, cut = ((tmp_path / name / "metrics.jsonl").read_bytes() for name in ("whole", "cut"))
    assert whole == cut


def test_gradients_equal_those_of_fp32_at_any_scale():
    """Up to the rounding of fp16. The statistics do not depend on the scale either."""
    rows = {}
    for name, words in {
        "fp32": (),
        "64": (*FP16, "train.loss_scale=64"),
        "16384": (*FP16, "train.loss_scale=16384"),
    }.items():
        rows[name] = a_trainer(tiny("observe.slow_every=1", *words)).step(0).read()
    for scale in ("64", "16384"):
        for key in ("train/loss", "grad/norm", "norm/in_grad/qkv", "norm/grad/fc2", "norm/adam_m/fc1"):
            assert rows[scale][key] == pytest.approx(rows["fp32"][key], rel=0.01), key


def test_underflow_grows_as_the_scale_falls():
    shares = [
        a_trainer(tiny(*FP16, f"train.loss_scale={scale}")).step(0).read()["scale/underflow"]
        for scale in (65536, 1.0, 1e-3, 1e-6)
    ]
    assert shares == sorted(shares)
    assert shares[0] < 0.05
    assert shares[-1] > 0.9


def test_weights_and_moments_are_kept_in_fp32():
    for precision in ("bf16", "fp16"):
        trainer = a_trainer(tiny(f"train.precision={precision}"))
        trainer.step(0)
        assert {p.dtype for p in trainer.parameters} == {torch.float32}
        assert {s["exp_avg"].dtype for s in trainer.optimizer.state.values()} == {torch.float32}


def test_fp16_works_without_observation(tmp_path):
    summary = train(tiny(*FP16, "observe.every=0", f"run_dir={tmp_path / 'run'}"))
    assert summary["status"] == "complete"


@pytest.mark.parametrize("scale", ["4e9", "1e-7"])
def test_an_unusable_loss_scale_is_not_blamed_on_the_weights(capsys, tmp_path, scale):
    summary = train(tiny(*FP16, f"train.loss_scale={scale}", f"run_dir={tmp_path / 'run'}"))
    output = capsys.readouterr().out
    assert "not finite" not in output
    assert ("loss scale of fp16 is far too small" in output) == (scale == "1e-7")
    if scale == "4e9":  # skipped steps were not clipped
        rows = list(RunDir(tmp_path / "run").rows())
        kept = [row for row in rows if not row["scale/skipped"]]
        assert summary["clipped_share"] == sum(row["grad/clipped"] for row in kept) / len(kept)
        assert summary["skipped_steps"] == len(rows) - len(kept) > 5


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_entropy_equals_that_of_fp32_in_any_precision(precision):
    words = "observe.slow_every=1", "data.seq_len=64"
    rows = [a_trainer(tiny(*words, f"train.precision={p}")).step(0).read() for p in ("fp32", precision)]
    for key in ("attn/entropy", "attn/max_logit"):
        assert rows[1][key] == pytest.approx(rows[0][key], rel=0.02), key


def test_autocast_does_not_round_the_spectral_norm():
    model = a_trainer(tiny("+variant=sigma_reparam")).model
    for layer in model.sigma_layers:
        with torch.autocast("cpu", torch.bfloat16):
            assert layer.sigma().equal(layer.sigma().float())
            inside = layer.sigma()
        assert inside.equal(layer.sigma())
