"""Peak speed and memory of the GPUs that `study.gpu` and torch name; no torch."""

import re
from dataclasses import dataclass


@dataclass(frozen=True)
class Gpu:
    """A row of the data sheet: `name` in `study.gpu`, a regular expression for torch's name of the device, memory in
    GiB, and dense peaks in TFLOP/s by precision; None where the precision has no unit of its own.
    """

    name: str
    pattern: str
    memory: int
    fp32: float
    tf32: float | None
    fp16: float
    bf16: float | None

    @property
    def usable(self) -> int:
        """Bytes for a step: CUDA, error correction and fragmentation take about a tenth of the memory on the sheet."""
        return self.memory * 9 * 2**30 // 10

    def peak(self, precision: str) -> float | None:
        """FLOP/s at a value of `train.precision`."""
        teraflops: float | None = getattr(self, precision)
        return None if teraflops is None else teraflops * 1e12


# From the vendors' data sheets, and for L4, RTX and MI300X their architecture papers. Figures that are given with
# sparsity are halved. Low precisions accumulate in fp32. On CUDA, torch names part of a GPU after the whole with `MIG`.
GPUS = (
    Gpu("b200", r"\bB200\b", 180, 75, 1125, 2250, 2250),
    Gpu("h200", r"\bH200$", 141, 67, 494.5, 989.5, 989.5),
    Gpu("h200-nvl", r"\bH200 NVL\b", 141, 60, 417.5, 835.5, 835.5),
    Gpu("h100", r"\bH100 80GB HBM3\b", 80, 67, 494.5, 989.5, 989.5),
    Gpu("h100-nvl", r"\bH100 NVL\b", 94, 60, 417.5, 835.5, 835.5),
    Gpu("h100-pcie", r"\bH100 PCIe\b", 80, 51, 378, 756.5, 756.5),
    Gpu("a100", r"\bA100\b.*\b80GB\b", 80, 19.5, 156, 312, 312),
    Gpu("a100-40", r"\bA100\b.*\b40GB\b", 40, 19.5, 156, 312, 312),
    Gpu("l40s", r"\bL40S\b", 48, 91.6, 183, 362.05, 362.05),
    Gpu("l4", r"\bL4\b", 24, 30.3, 60, 121, 121),
    Gpu("a40", r"\bA40\b", 48, 37.4, 74.8, 149.7, 149.7),
    Gpu("a10", r"\bA10\b", 24, 31.2, 62.5, 125, 125),
    Gpu("v100", r"\bV100-SXM2-16GB\b", 16, 15.7, None, 125, None),
    Gpu("v100-32", r"\bV100-SXM2-32GB\b", 32, 15.7, None, 125, None),
    Gpu("t4", r"\bT4\b", 16, 8.1, None, 65, None),
    Gpu("rtx4090", r"\bRTX 4090$", 24, 82.6, 82.6, 165.2, 165.2),
    Gpu("rtx3090", r"\bRTX 3090$", 24, 35.6, 35.6, 71, 71),
    Gpu("mi300x", r"\bMI300X\b", 192, 163.4, 653.7, 1307.4, 1307.4),
)
BY_NAME = {gpu.name: gpu for gpu in GPUS}


def of_device(device: str) -> Gpu | None:
    """The GPU that torch and `nvidia-smi` call `device`, such as `NVIDIA H100 80GB HBM3`; None for others."""
    if re.search(r"\bMIG\b", device):
        return None
    return next((gpu for gpu in GPUS if re.search(gpu.pattern, device)), None)
