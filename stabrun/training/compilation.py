"""torch.compile of the parts of a training step, and the count of the graphs that it made.

torch.compile is imported where it is used: that takes seconds, which a run on a CPU does not need.
"""

import os
import sys
from typing import Any

import torch

from stabrun.config import TrainConfig, UserError
from stabrun.model.attention import allow_graphs
from stabrun.training.objective import Objective

OFF = ("TORCH_COMPILE_DISABLE", "TORCHDYNAMO_DISABLE")  # each alone, if it is 1


def compiles(config: TrainConfig, device: torch.device) -> bool:
    """Whether a run is compiled: as `train.compile` says, by default on CUDA only.

    Raises UserError if it was asked for, and an environment variable turns torch.compile off.
    """
    wanted = device.type == "cuda" if config.compile is None else config.compile
    off = next((name for name in OFF if os.environ.get(name) == "1"), None)
    if config.compile and off:
        raise UserError(f"train.compile=true: {off}=1 turns torch.compile off; unset it.")
    return wanted and off is None


def compile_parts(objective: Objective, backend: str = "inductor") -> None:
    """Compile the run of a block, and the output layer with the loss, in place.

    Blocks of one shape share one graph for each kind of pass: with statistics of `observe.every`, with those of
    `observe.slow_every`, the latter without attention (which some micro-batches leave out), with none, and validation,
    again for its last and smaller part. `fullgraph` turns what cannot be compiled, which would silently
    run uncompiled, into an error. With Inductor's `fallback_random`, dropout draws the same numbers as uncompiled.
    """
    import torch._dynamo.config as dynamo

    allow_graphs()
    dynamo.suppress_errors = False
    options: dict[str, Any] = {"fullgraph": True, "dynamic": False, "backend": backend}
    if backend == "inductor":
        options["options"] = {"fallback_random": True}
    objective.model.run = torch.compile(objective.model.run, **options)
    objective.compile(**options)


def graphs() -> int:
    """Graphs compiled by this process so far."""
    if "torch._dynamo" not in sys.modules:
        return 0
    from torch._dynamo.utils import counters

    return int(counters["stats"]["unique_graphs"])
