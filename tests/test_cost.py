"""What a study costs, by formula."""

import pytest
from snapshots import a_plan

from stabrun.config import Config, StudyConfig, TrainConfig
from stabrun.model.memory import device_type
from stabrun.study import cost
from stabrun.study.cost import costs, gpu_of

ON_CPU = {"baseline": "cpu", "qk_norm": "cpu"}


def test_costs_follow_the_formula():
    plan = a_plan("study.lrs=[1e-2,1e-1]", "study.seeds=2")
    first = next(cell for cell in plan.cells.values() if cell.arm == "qk_norm")
    rows = [{"run_id": first.id, "arm": "qk_norm", "steps": 30, "seconds": 6.0}]
    bounded, measured = costs(plan, rows, ON_CPU, speeds={"baseline": 1e6, "qk_norm": 1e6})
    tokens, weights = 30 * 4 * 16, 2 * 12 * 16 * 16 + 16 * plan.arms["baseline"].model.vocab_size
    assert (bounded.cells, bounded.tokens, bounded.rates) == (4, 4 * tokens, [0.01, 0.1])
    assert bounded.flops == bounded.tokens * (6 * weights + 12 * 2 * 16 * 16)
    assert bounded.seconds == pytest.approx(bounded.flops / 1e6) == pytest.approx(4 * bounded.cell_seconds)
    assert (measured.cells, measured.seconds) == (3, pytest.approx(3 * 6.0))
    assert [arm.measured for arm in (bounded, measured)] == [False, True]
    assert [arm.seconds for arm in costs(plan, [], ON_CPU, {})] == [None, None]


def test_a_search_costs_at_most_its_budget():
    plan = a_plan("study.strategy=frontier", "study.lr_range=[1e-2,1]", "study.max_runs=5")
    ended = [{"run_id": "a", "arm": "qk_norm", "steps": 30, "seconds": 6.0}] * 2
    baseline, qk_norm = costs(plan, ended, ON_CPU, speeds={})
    assert (baseline.cells, baseline.tokens, baseline.seconds) == (5, 5 * 30 * 4 * 16, None)
    assert (qk_norm.cells, qk_norm.seconds) == (3, pytest.approx(3 * 6.0))


@pytest.mark.parametrize(
    ("chosen", "gpu", "tool", "expected"),
    [
        ("auto", None, None, "cpu"),
        ("auto", None, "nvidia-smi", "cuda"),
        ("auto", None, "rocm-smi", "cuda"),
        ("auto", "h100", None, "cuda"),
        ("cuda", None, None, "cuda"),
        ("cpu", "h100", "nvidia-smi", "cpu"),
    ],
)
def test_where_a_study_would_train(monkeypatch, chosen, gpu, tool, expected):
    monkeypatch.setattr("shutil.which", lambda name: name if name == tool else None)
    assert device_type(Config(train=TrainConfig(device=chosen)), gpu) == expected


LINE = "GPU {}: {} (UUID: GPU-1b2c3d4e-0000-1111-2222-333344445555)\n"


@pytest.mark.parametrize(
    ("study", "devices", "expected"),
    [
        (None, [], None),
        (None, ["NVIDIA H100 80GB HBM3"] * 2, "h100"),
        (None, ["NVIDIA H100 80GB HBM3", "NVIDIA L4"], None),
        (None, ["NVIDIA of tomorrow"], None),
        ("a100", ["NVIDIA H100 80GB HBM3"], "a100"),
    ],
)
def test_the_gpu_is_the_one_named_else_that_of_the_machine(monkeypatch, study, devices, expected):
    monkeypatch.setattr(cost, "nvidia_smi", lambda: "".join(LINE.format(*item) for item in enumerate(devices)))
    gpu = gpu_of(StudyConfig(gpu=study))
    assert (gpu and gpu.name) == expected
