"""The content of `environment.json`: software, machine and data of a run."""

import platform
import subprocess
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from stabrun.version import __version__

PACKAGES = ("torch", "hydra-core", "omegaconf", "numpy", "tokenizers", "safetensors", "wandb")


def environment(
    device: torch.device, data_hash: str, *, ranks: int, compiled: bool, attention: list[str]
) -> dict[str, Any]:
    """Those of `machine`, ranks, how the model is computed, and the hash of the data."""
    own = {"ranks": ranks, "compiled": compiled, "attention": attention, "data_hash": data_hash}
    return machine(device) | own


def machine(device: torch.device) -> dict[str, Any]:
    """Versions, commit, machine, device used, threads."""
    processor = platform.processor() or platform.machine()
    return {
        "stabrun": __version__,
        "commit": commit(Path(__file__).parents[1]),
        "python": platform.python_version(),
        "packages": dict(packages()),
        "platform": platform.platform(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else f"{device.type}: {processor}",
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
    }


@cache
def packages() -> dict[str, str]:
    """The versions of the packages that a run's numbers may depend on."""
    return {name: version(name) for name in PACKAGES}


@cache
def commit(folder: Path) -> str | None:
    """The git commit of stabrun's own source, with `+` if files were changed; None outside a checkout.

    Asked once in a process, whose code does not change either.
    """
    if not (folder.parent / ".git").exists():
        return None
    command = ["git", "-C", str(folder), "describe", "--always", "--abbrev=40", "--exclude=*", "--dirty=+"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=5, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None
