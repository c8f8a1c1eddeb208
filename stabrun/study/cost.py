"""What a study takes: tokens, FLOPs, memory and time per run, and those of the cells that are left, by arm."""

import os
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from statistics import median

from stabrun import interpreter
from stabrun.config import Config, StudyConfig
from stabrun.model.counts import flops_per_token, parameters
from stabrun.model.gpus import BY_NAME, Gpu, of_device
from stabrun.model.memory import CUDA, memory
from stabrun.record.schema import Summary
from stabrun.study.plan import GRID, Plan
from stabrun.study.pool import gpu_names, nvidia_smi

# Prints the FLOP/s of float32 matrix products of size 1024, the best of three.
BENCHMARK = """
import timeit
times = timeit.repeat("a @ a", "import numpy; a = numpy.ones((1024, 1024), numpy.float32)", number=1, repeat=4)
print(2 * 1024**3 / min(times[1:]))
"""


def tokens_per_run(config: Config) -> int:
    return config.train.steps * config.train.batch_size * config.data.seq_len


def flops_per_run(config: Config) -> int:
    return tokens_per_run(config) * flops_per_token(config.model, config.data.seq_len)


def measured_seconds(rows: list[Summary]) -> dict[str, float]:
    """Seconds per step of each arm with finished runs: their median."""
    return medians((row["arm"], row["seconds"] / row["steps"]) for row in rows if row["steps"] and row["seconds"])


def medians(values: Iterable[tuple[str, float]]) -> dict[str, float]:
    """Arm → the median of its values."""
    by_arm = defaultdict[str, list[float]](list)
    for arm, value in values:
        by_arm[arm].append(value)
    return {arm: median(found) for arm, found in by_arm.items()}


@dataclass(frozen=True)
class Cost:
    """What is left of an arm; of a search, at most. `cell_seconds` of one worker: `measured`, by FLOPs, or unknown."""

    arm: str
    config: Config
    device: str
    rates: list[float]
    cells: int
    cell_seconds: float | None
    measured: bool

    @property
    def parameters(self) -> int:
        return parameters(self.config.model, self.config.data.seq_len)["total"]

    @property
    def peak_bytes(self) -> int:
        return memory(self.config, self.device)["peak_bytes"]

    @property
    def tokens(self) -> int:
        return self.cells * tokens_per_run(self.config)

    @property
    def flops(self) -> int:
        return self.cells * flops_per_run(self.config)

    @property
    def devices(self) -> int:
        """That train a cell: each rank has a GPU of its own, while ranks on a CPU share it."""
        return self.config.train.ranks if self.device == CUDA else 1

    @property
    def seconds(self) -> float | None:
        """Time of all devices that train the cells."""
        return None if self.cell_seconds is None else self.cells * self.cell_seconds * self.devices


def costs(plan: Plan, rows: list[Summary], devices: Mapping[str, str], speeds: Mapping[str, float]) -> list[Cost]:
    """The cost of each arm. `rows`: finished runs. `speeds`: FLOP/s of a cell by arm, for arms without such a run."""
    done, seconds_per_step = {row["run_id"] for row in rows}, measured_seconds(rows)
    found = []
    for arm, config in plan.arms.items():
        cells = [cell for cell in plan.cells_of(arm) if cell.id not in done]
        finished = sum(row["arm"] == arm for row in rows)
        count = len(cells) if plan.strategy == GRID else max(0, plan.max_runs - finished)
        measured, speed = seconds_per_step.get(arm), speeds.get(arm)
        seconds = config.train.steps * measured if measured else flops_per_run(config) / speed if speed else None
        rates = sorted({cell.lr for cell in cells})
        found.append(Cost(arm, config, devices[arm], rates, count, seconds, bool(measured)))
    return found


def gpu_of(study: StudyConfig) -> Gpu | None:
    """`study.gpu`, else the GPU of this machine; None if it is not in the table, or if there are several kinds."""
    if study.gpu:
        return BY_NAME[study.gpu]
    kinds = {of_device(name) for name in gpu_names(nvidia_smi())}
    return kinds.pop() if len(kinds) == 1 else None


def matrix_speed(threads: int) -> float:
    """FLOP/s of a large matrix product. In a process of its own: numpy reads the number of threads when imported."""
    env = (
        os.environ | interpreter.environment() | {"OMP_NUM_THREADS": str(threads), "OPENBLAS_NUM_THREADS": str(threads)}
    )
    done = subprocess.run([sys.executable, "-c", BENCHMARK], env=env, capture_output=True, text=True, check=True)
    return float(done.stdout)
