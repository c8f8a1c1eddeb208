"""Training on a GPU. None of this has run where there is none: `make gpu-check` on a machine that has one."""

import gc
import math

import pytest
import torch
from helpers import VARIANTS, a_trainer, configured, tiny

from stabrun.config import micro_batch
from stabrun.model.memory import memory
from stabrun.training.compilation import graphs

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA"),
]
NANO = "model.n_layer=4", "model.d_model=64", "data.seq_len=64", "train.batch_size=8", "train.device=cuda"
COMPILED = ("baseline", "soft_cap", "soft_clip")


def rows(*words, steps=6):
    trainer = a_trainer(tiny(*NANO, *words))
    return [trainer.step(step).read() for step in range(steps)], trainer


@pytest.mark.parametrize("precision", ["fp32", "tf32", "bf16", "fp16"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_every_variant_trains(variant, precision):
    words = f"+variant={variant}", f"train.precision={precision}", "train.compile=false", "train.loss_scale=1024"
    found, trainer = rows(*words, steps=12)
    losses = [row["train/loss"] for row in found]
    assert all(p.is_cuda for p in trainer.parameters)
    assert losses[-1] < losses[0]
    assert all(math.isfinite(value) for row in found for value in (row["grad/norm"], *row["residual/norm"]))
    assert math.isfinite(trainer.validate())


@pytest.mark.parametrize("variant", VARIANTS)
def test_fp32_rows_are_those_of_the_cpu(variant):
    words = f"+variant={variant}", "train.compile=false", "optim.z_loss=1e-3", "train.micro_batch_size=4"
    on_gpu, _ = rows(*words, steps=2)
    on_cpu, _ = rows(*words, "train.device=cpu", steps=2)
    for row, expected in zip(on_gpu, on_cpu, strict=True):
        assert row.keys() == expected.keys()
        for key, value in expected.items():
            assert row[key] == pytest.approx(value, rel=5e-3, abs=1e-5), key


@pytest.mark.parametrize("variant", COMPILED)
def test_compiled_rows_are_those_without(variant):
    words = f"+variant={variant}", "train.precision=bf16", "train.recompute=blocks"
    torch._dynamo.reset()
    before = graphs()
    compiled, trainer = rows(*words, "train.compile=true", steps=4)
    made = graphs() - before
    plain, _ = rows(*words, "train.compile=false", steps=4)
    assert trainer.compiled
    assert made == 5  # as on the CPU, see test_compilation.py
    for row, expected in zip(compiled, plain, strict=True):
        assert row["train/loss"] == pytest.approx(expected["train/loss"], rel=2e-2)
        assert row.keys() == expected.keys()


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_a_step_does_not_synchronize(variant, precision):
    words = f"+variant={variant}", f"train.precision={precision}", "train.compile=false", "train.micro_batch_size=4"
    trainer = a_trainer(tiny(*NANO, *words))
    for step in range(2):
        trainer.step(step).read()
    torch.cuda.set_sync_debug_mode("error")
    try:
        pending = trainer.step(10)  # with all statistics
        fast = trainer.step(11)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(math.isfinite(row.read()["train/loss"]) for row in (pending, fast))


def test_deterministic_runs_are_equal_to_the_bit():
    words = "train.deterministic=true", "train.precision=bf16", "train.compile=false", "model.dropout=0.1"
    assert rows(*words)[0] == rows(*words)[0] == rows(*words, "train.recompute=blocks")[0]
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("variant", ["baseline", "soft_cap", "qkv_norm"])
@pytest.mark.parametrize("recompute", ["none", "blocks"])
def test_peak_memory_is_the_predicted_one(variant, recompute):
    words = f"+variant={variant}", "data.tokenizer=bytes", "train.batch_size=8", "train.micro_batch_size=4"
    config = configured(
        "model=small", "train.device=cuda", "train.compile=false", f"train.recompute={recompute}", *words
    )
    gc.collect()  # models of other tests
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    trainer = a_trainer(config)
    assert micro_batch(config) == 4
    for step in range(2):
        torch.cuda.reset_peak_memory_stats()
        trainer.step(step).read()
    peak = torch.cuda.max_memory_allocated() - before
    assert memory(config)["peak_bytes"] == pytest.approx(peak, rel=0.1)
