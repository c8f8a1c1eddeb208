"""Device and number formats: fp32 master weights always, matrix products in the configured precision."""

import ctypes
import gc
import os
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import torch

from stabrun.config import Config, TrainConfig, UserError, micro_batch
from stabrun.model.describe import LOW, fitting, human, memory
from stabrun.training.place import Place

M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_THRESHOLD = -1, -2, -3  # malloc.h


def pick_device(config: TrainConfig, place: Place | None = None) -> torch.device:
    """The configured device; `auto` is CUDA, else the CPU. Several ranks have a GPU each.

    Raises UserError if the device is not available.
    """
    there = {"cuda": torch.cuda.is_available(), "cpu": True, "mps": torch.backends.mps.is_available()}
    name = next(name for name, present in there.items() if present) if config.device == "auto" else config.device
    if not there[name]:
        present = ", ".join(name for name, has in there.items() if has)
        raise UserError(f"train.device={name}: not available; this machine has {present}.")
    if config.precision == "tf32" and name != "cuda":
        raise UserError(f"train.precision=tf32: requires CUDA, and the device is {name}.")
    if config.ranks == 1:
        return torch.device(name)
    if name == "mps":
        raise UserError(f"train.ranks={config.ranks}: requires train.device=cpu or cuda, and the device is mps.")
    if name == "cpu":
        return torch.device(name)
    gpus, needed = torch.cuda.device_count(), place.neighbors if place else config.ranks
    if gpus == 1 and place:  # Slurm may show each rank its own GPU only
        return torch.device(name, 0)
    if needed > gpus:
        raise UserError(f"train.ranks={config.ranks}: needs {needed} GPUs on this machine, which has {gpus}.")
    return torch.device(name, place.local if place else 0)


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


def refuse_too_large(config: Config, device: torch.device, ranks: int = 1) -> None:
    """UserError if a step needs more memory than is free on the device, with the settings that fit.

    A CPU's system would kill the process, and a GPU would fail at the first step. `ranks` share the device.
    """
    free, needed = free_memory(device), memory(config, device.type)["peak_bytes"] * ranks
    if free is None or needed <= free:
        return
    fits = fitting(config, device.type, free // ranks)
    advice = f"{' '.join(fits)} fits." if fits else "Use a smaller model."
    raise UserError(
        f"train.micro_batch_size={micro_batch(config)}: a step needs about {human(needed)}, and {human(free)} are "
        f"free. {advice}"
    )


def free_memory(device: torch.device) -> int | None:
    """Bytes that are free on a device; of a CPU with reclaimable caches. None if that is unknown.

    Of CUDA, what torch keeps of an earlier run of the process is given back first: it may be nearly all there is.
    """
    if device.type == "cuda":
        gc.collect()  # model and hooks refer to each other
        torch.cuda.empty_cache()
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
