"""Device and number formats: fp32 master weights always, matrix products in the configured precision."""

import os
from contextlib import AbstractContextManager, nullcontext

import torch

from stabrun.config import TrainConfig, UserError
from stabrun.model.memory import LOW
from stabrun.training.memory import keep_freed_memory
from stabrun.training.place import Place


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
