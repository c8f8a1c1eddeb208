"""The table of GPUs: peaks by multiplying out the units of the chip, and the names that drivers give."""

import pytest

from stabrun import config
from stabrun.model.gpus import BY_NAME, GPUS, of_device


def test_study_gpu_allows_the_table():
    assert tuple(gpu.name for gpu in GPUS) == config.GPUS
    assert len(BY_NAME) == len(GPUS)


@pytest.mark.parametrize(
    ("name", "units", "gigahertz", "low", "tf32"),
    [
        # multiprocessors, their clock in tensor operations, dense FMAs of one per clock in 16 bits and in TF32
        ("h100", 132, 1.830, 2048, 1024),
        ("h100-pcie", 114, 1.620, 2048, 1024),
        ("a100", 108, 1.410, 1024, 512),
        ("rtx4090", 128, 2.520, 256, 128),
    ],
)
def test_dense_peaks_are_those_of_the_tensor_cores(name, units, gigahertz, low, tf32):
    """2 FLOPs per FMA; figures with sparsity would be twice these."""
    gpu = BY_NAME[name]
    for precision, per_clock in (("bf16", low), ("fp16", low), ("tf32", tf32)):
        assert gpu.peak(precision) == pytest.approx(2 * units * gigahertz * 1e9 * per_clock, rel=0.01)


@pytest.mark.parametrize(
    ("name", "cores", "gigahertz"),
    [("h100", 132 * 128, 1.980), ("a100", 108 * 64, 1.410), ("v100", 80 * 64, 1.530), ("rtx3090", 82 * 128, 1.695)],
)
def test_fp32_is_that_of_the_cores(name, cores, gigahertz):
    assert BY_NAME[name].peak("fp32") == pytest.approx(2 * cores * gigahertz * 1e9, rel=0.01)


def test_a_precision_without_units_has_no_peak():
    assert [BY_NAME["v100"].peak(precision) for precision in ("bf16", "tf32", "fp16")] == [None, None, 125e12]


@pytest.mark.parametrize(
    ("device", "name"),
    [
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA H100 PCIe", "h100-pcie"),
        ("NVIDIA H100 NVL", "h100-nvl"),
        ("NVIDIA H200", "h200"),
        ("NVIDIA H200 NVL", "h200-nvl"),
        ("NVIDIA B200", "b200"),
        ("NVIDIA A100-SXM4-80GB", "a100"),
        ("NVIDIA A100 80GB PCIe", "a100"),
        ("NVIDIA A100-PCIE-40GB", "a100-40"),
        ("NVIDIA L40S", "l40s"),
        ("NVIDIA L4", "l4"),
        ("NVIDIA A10", "a10"),
        ("NVIDIA A40", "a40"),
        ("Tesla V100-SXM2-16GB", "v100"),
        ("Tesla V100-SXM2-32GB", "v100-32"),
        ("Tesla T4", "t4"),
        ("NVIDIA GeForce RTX 4090", "rtx4090"),
        ("NVIDIA GeForce RTX 3090", "rtx3090"),
        ("AMD Instinct MI300X", "mi300x"),
        # others, though their names are similar: slower, faster, or a part of one
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None),
        ("NVIDIA GH200 480GB", None),
        ("NVIDIA H20", None),
        ("NVIDIA GB200", None),
        ("NVIDIA L40", None),
        ("NVIDIA A10G", None),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("NVIDIA GeForce RTX 4090 D", None),
        ("NVIDIA GeForce RTX 3090 Ti", None),
        ("Tesla P100-PCIE-16GB", None),
        ("", None),
    ],
)
def test_devices_are_recognized_by_name(device, name):
    gpu = of_device(device)
    assert (gpu and gpu.name) == name
