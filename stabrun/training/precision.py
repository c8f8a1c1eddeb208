"""Device and number formats: fp32 master weights always, matrix products in the configured precision."""

import ctypes
import os
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import torch

from stabrun.config import Config, TrainConfig, UserError
from stabrun.model.describe import LOW, fitting, human, memory

M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_THRESHOLD = -1, -2, -3  # malloc.h


def pick_device(config: TrainConfig) -> torch.device:
    """The configured device; `auto` is CUDA, else the CPU. UserError if the device is not available."""
    there = {"cuda": torch.cuda.is_available(), "cpu": True, "mps": torch.backends.mps.is_available()}
    name = next(name for name, present in there.items() if present) if config.device == "auto" else config.device
    if not there[name]:
        present = ", ".join(name for name, has in there.items() if has)
        raise UserError(f"train.device={name}: not available; this machine has {present}.")
    if config.precision == "tf32" and name != "cuda":
        raise UserError(f"train.precision=tf32: requires CUDA, and the device is {name}.")
    return torch.device(name)


def autocast(config: TrainConfig, device: torch.device) -> AbstractContextManager:
    """Matrix products in bf16 or fp16 if configured. The model keeps norms, softmax and logits in fp32."""
    if config.precision not in LOW:
        return nullcontext()
    return torch.autocast(device.type, dtype=getattr(torch, LOW[config.precision]))


def prepare_backend(config: TrainConfig) -> None:
    """Set threads, determinism and the allocator of the whole process."""
    keep_freed_memory()
    torch.set_float32_matmul_precision("high" if config.precision == "tf32" else "highest")
    if config.threads:
        torch.set_num_threads(config.threads)
    if config.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # required by cuBLAS
    if torch.are_deterministic_algorithms_enabled() != config.deterministic:  # the call imports Inductor: 2 s
        torch.use_deterministic_algorithms(config.deterministic)


def refuse_too_large(config: Config, device: torch.device) -> None:
    """UserError if a step needs more memory than is free on the device, with the settings that fit.

    A CPU's system would kill the process, and a GPU would fail at the first step.
    """
    free, needed = free_memory(device), memory(config, device.type)["peak_bytes"]
    if free is None or needed <= free:
        return
    size = config.train.micro_batch_size or config.train.batch_size
    fits = fitting(config, device.type, free)
    advice = f"{' '.join(fits)} fits." if fits else "Use a smaller model."
    raise UserError(
        f"train.micro_batch_size={size}: a step needs about {human(needed)}, and {human(free)} are free. {advice}"
    )


def free_memory(device: torch.device) -> int | None:
    """Bytes that are free on a device; of a CPU with reclaimable caches. None if that is unknown."""
    if device.type == "cuda":
        free: int = torch.cuda.mem_get_info(device)[0]
        return free
    if device.type != "cpu":
        return None
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")), None)


def keep_freed_memory() -> None:
    """Make glibc keep freed memory instead of returning it to the system and faulting it in again.

    A CPU step frees and allocates the same tens of megabytes each time: at nano 1,900 page faults per step, an eighth
    of its time. Other C libraries are not changed.
    """
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):
        return
    for parameter, value in ((M_MMAP_THRESHOLD, 32 << 20), (M_TRIM_THRESHOLD, 512 << 20), (M_TOP_PAD, 64 << 20)):
        mallopt(parameter, value)
