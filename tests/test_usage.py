"""Model FLOPs utilization by formula, and peak memory of a run by what it allocates."""

import csv

import pytest
import torch
from helpers import tiny
from studies import rows

from stabrun.model.counts import flops_per_token
from stabrun.record.run_dir import RunDir
from stabrun.training import usage
from stabrun.training.run import train
from stabrun.training.usage import SETTLING, Usage

CPU = torch.device("cpu")
MIB = 2**20
linux = pytest.mark.skipif(not usage.CLEAR_REFS.exists(), reason="needs /proc/self/clear_refs")


@pytest.fixture
def clock(monkeypatch):
    """The time that `usage` sees; set by the test."""
    now = [0.0]
    monkeypatch.setattr(usage.time, "monotonic", lambda: now[0])
    return now


def fed(config, clock, times):
    """Usage after rows of 64 tokens each that were read at these times."""
    found = Usage(config, CPU)
    for count, at in enumerate(times, 1):
        clock[0] = at
        found.add({"tokens": 64 * count})
    return found


def test_mfu_follows_the_formula_and_leaves_out_the_first_rows(monkeypatch, clock):
    asked = []
    monkeypatch.setattr(usage, "peak_flops", lambda device, precision: asked.append(precision) or 1e9)
    config = tiny("train.precision=bf16")
    flops = flops_per_token(config.model, config.data.seq_len)
    compiling = [100.0, 150.0]
    assert len(compiling) == SETTLING
    found = fed(config, clock, [*compiling, 150.5, 151.0, 152.0])
    assert found.facts()["mfu"] == pytest.approx(flops * 3 * 64 / 2.0 / 1e9, rel=1e-3)
    assert set(asked) == {"bf16"}
    assert fed(config, clock, compiling).mfu() is None


def test_the_peak_of_several_ranks_is_that_of_all_their_gpus(monkeypatch, clock):
    monkeypatch.setattr(usage, "peak_flops", lambda device, precision: 1e9)
    one, two = (fed(tiny(f"train.ranks={ranks}"), clock, [0, 0, 1.0, 2.0]).mfu() for ranks in (1, 2))
    assert two == pytest.approx(one / 2, rel=1e-3)


def test_the_peak_is_that_of_the_gpu_at_the_precision(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA A100-SXM4-80GB")
    cuda = torch.device("cuda")
    assert usage.peak_flops(cuda, "bf16") == 312e12
    assert usage.peak_flops(cuda, "fp32") == 19.5e12
    assert usage.peak_flops(CPU, "bf16") is None
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA of tomorrow")
    assert usage.peak_flops(cuda, "bf16") is None


@linux
def test_peak_memory_counts_what_was_freed_and_begins_anew_with_each_run():
    config, size = tiny(), 96 * MIB
    first = Usage(config, CPU)
    before = usage.peak_memory(CPU)
    torch.ones(size // 4)
    after = first.facts()["peak_memory_bytes"]
    assert size * 0.9 < after - before < size * 1.5
    assert Usage(config, CPU).facts()["peak_memory_bytes"] < after - size // 2


def test_memory_is_unknown_where_the_peak_cannot_be_reset(monkeypatch, tmp_path):
    monkeypatch.setattr(usage, "CLEAR_REFS", tmp_path / "missing" / "clear_refs")
    assert Usage(tiny(), CPU).facts() == {"mfu": None, "peak_memory_bytes": None}
    assert Usage(tiny(), torch.device("mps")).facts()["peak_memory_bytes"] is None


@linux
def test_a_run_records_its_use(tmp_path, monkeypatch):
    """In its last event and in its summary."""
    wide = "model.d_model=256", "model.n_layer=4", "train.steps=4", f"run_dir={tmp_path / 'run'}"
    config = tiny(*wide)
    monkeypatch.setattr(usage, "peak_flops", lambda device, precision: 1e14)
    summary = train(config)
    event = RunDir(tmp_path / "run").events()[-1]
    assert event["event"] == "complete"
    for key in ("tokens_per_second", "mfu", "peak_memory_bytes"):
        assert event[key] == summary[key] > 0
    weights = 4 * 12 * 256**2
    assert 16 * weights < summary["peak_memory_bytes"] < 64 * 2**30


def test_on_a_cpu_the_utilization_is_none(tmp_path):
    summary = train(tiny("train.steps=4", f"run_dir={tmp_path / 'run'}"))
    assert summary["mfu"] is None
    assert RunDir(tmp_path / "run").events()[-1]["mfu"] is None


def test_results_have_the_columns_and_comparisons_leave_them_out(undisturbed):
    with open(undisturbed.directory / "study" / "results.csv", newline="") as file:
        (first, *_) = csv.DictReader(file)
    assert first.keys() - rows(undisturbed.directory)[0].keys() == {
        "seconds", "tokens_per_second", "mfu", "peak_memory_bytes"
    }  # fmt: skip


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_on_cuda_memory_is_that_of_the_tensors(tmp_path):
    held = torch.ones(64 * MIB, device="cuda")
    words = "model.d_model=256", "train.steps=4", "train.device=cuda", "train.compile=false"
    del held
    summary = train(tiny(*words, f"run_dir={tmp_path / 'run'}"))
    weights = 2 * 12 * 256**2
    assert 16 * weights < summary["peak_memory_bytes"] < 256 * MIB
