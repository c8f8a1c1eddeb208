"""What one start of a run uses: the share of the GPU's peak, and memory."""

import time
from pathlib import Path
from typing import Any

import torch

from stabrun.config import Config
from stabrun.model.counts import flops_per_token
from stabrun.model.gpus import of_device
from stabrun.record.schema import Row

SETTLING = 2  # rows of a start before its speed counts: with and without expensive statistics, both compile
CLEAR_REFS, STATUS = Path("/proc/self/clear_refs"), Path("/proc/self/status")
RESET_PEAK = "5"  # of the resident size, see proc(5)


class Usage:
    """Measures from its construction on. `add` is called with each row, once its values are read."""

    def __init__(self, config: Config, device: torch.device) -> None:
        self.config, self.device = config, device
        self.rows, self.tokens, self.seconds = 0, 0, 0.0  # of the start; tokens and seconds after the settling rows
        self.memory_is_known = reset_peak_memory(device)

    def add(self, row: Row) -> None:
        now = time.monotonic()
        self.rows += 1
        if self.rows <= SETTLING:
            self.began, self.first = now, row["tokens"]
        else:
            self.seconds, self.tokens = now - self.began, row["tokens"] - self.first

    def mfu(self) -> float | None:
        """Model FLOPs utilization (arXiv 2204.02311, appendix B): FLOPs per token · tokens/s / peak FLOP/s.

        The peak is that of the GPUs of all ranks, which are alike. Measured after the settling rows. Validations and
        checkpoints take time, and count no FLOPs. None on a CPU, on an unknown GPU, and in a run of these rows alone.
        """
        peak = peak_flops(self.device, self.config.train.precision)
        if peak is None or self.seconds <= 0:
            return None
        flops = self.tokens * flops_per_token(self.config.model, self.config.data.seq_len)
        return float(f"{flops / self.seconds / (peak * self.config.train.ranks):.4g}")

    def facts(self) -> dict[str, Any]:
        return {"mfu": self.mfu(), "peak_memory_bytes": peak_memory(self.device) if self.memory_is_known else None}


def peak_flops(device: torch.device, precision: str) -> float | None:
    """FLOP/s from the data sheet of the GPU; None for other devices."""
    gpu = of_device(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
    return gpu.peak(precision) if gpu else None


def reset_peak_memory(device: torch.device) -> bool:
    """Begin to measure the peak anew: a worker trains several runs in one process. False if that is not possible."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return True
    if device.type != "cpu":
        return False
    try:
        CLEAR_REFS.write_text(RESET_PEAK)
    except OSError:  # not Linux, or not allowed
        return False
    return True


def peak_memory(device: torch.device) -> int | None:
    """Bytes since the reset: tensors on CUDA; on a CPU the resident size of the process, Python and torch included."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    lines = STATUS.read_text().splitlines()
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:")), None)
