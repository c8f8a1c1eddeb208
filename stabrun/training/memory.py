"""Memory of the device: what is free, runs that need more, and an allocator that keeps what was freed."""

import ctypes
import gc
from pathlib import Path

import torch

from stabrun.config import Config, UserError, micro_batch
from stabrun.model.memory import fitting, memory
from stabrun.text import human

M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_THRESHOLD = -1, -2, -3  # malloc.h


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
