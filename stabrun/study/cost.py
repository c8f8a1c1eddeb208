"""What a study takes: tokens, FLOPs and time per run, and those of the cells that are left, by arm."""

import os
import shutil
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from stabrun.config import Config
from stabrun.model.describe import flops_per_token
from stabrun.record.schema import Summary
from stabrun.study.plan import GRID, Plan
from stabrun.study.pool import threads_per_worker
from stabrun.text import duration_text, rate_text

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
    """What is left of an arm; of a search, at most. `seconds` of one worker: `measured`, a lower bound, or unknown."""

    arm: str
    rates: list[float]
    cells: int
    tokens: int
    flops: int
    seconds: float | None
    measured: bool


def costs(plan: Plan, rows: list[Summary], speed: float | None) -> list[Cost]:
    """The cost of each arm. `rows`: finished runs. `speed`: FLOP/s of a worker, for arms without one, or None."""
    done, seconds_per_step = {row["run_id"] for row in rows}, measured_seconds(rows)
    found = []
    for arm, config in plan.arms.items():
        cells = [cell for cell in plan.cells_of(arm) if cell.id not in done]
        finished = sum(row["arm"] == arm for row in rows)
        count = len(cells) if plan.strategy == GRID else max(0, plan.max_runs - finished)
        flops, measured = count * flops_per_run(config), seconds_per_step.get(arm)
        seconds = count * config.train.steps * measured if measured else flops / speed if speed else None
        rates = sorted({cell.lr for cell in cells})
        found.append(Cost(arm, rates, count, count * tokens_per_run(config), flops, seconds, bool(measured)))
    return found


def cost_lines(plan: Plan, rows: list[Summary], directory: Path, workers: int) -> Iterator[str]:
    """What a study would train, for people."""
    unknown = plan.arms.keys() - {row["arm"] for row in rows}
    on_gpu = any(trains_on_gpu(config) for config in plan.arms.values())
    threads = next(iter(plan.arms.values())).train.threads or threads_per_worker(workers)
    speed = matrix_speed(threads) if unknown and not on_gpu else None
    found = costs(plan, rows, speed)
    at_most = "" if plan.strategy == GRID else "up to "
    for cost in found:
        rates = f", lr {', '.join(map(rate_text, cost.rates))}" if cost.rates else ""
        yield f"{cost.arm}: {at_most}{cost.cells} cells to train, {cost.tokens:,} tokens{_time([cost], workers)}{rates}"
    cells, tokens, flops = (sum(getattr(cost, name) for cost in found) for name in ("cells", "tokens", "flops"))
    of = f" of {len(plan.cells)}" if plan.strategy == GRID else ""
    yield f"total: {at_most}{cells}{of} cells, {tokens:,} tokens, {flops:.3g} FLOPs{_time(found, workers)}"
    if speed is not None:
        measured = "; times of arms with a finished run are measured" if rows else ""
        yield f"times are lower bounds, at {speed / 1e9:.3g} GFLOP/s per worker in matrix products{measured}"
    elif unknown:
        yield "times are unknown until a run of each arm is finished, because they train on a GPU"
    yield f"study: {directory}"


def _time(costs: list[Cost], workers: int) -> str:
    """`, at least 4 min with 2 workers`; empty if it is unknown."""
    left = [cost for cost in costs if cost.cells]
    if not left or any(cost.seconds is None for cost in left):
        return ""
    text = duration_text(sum(cost.seconds or 0.0 for cost in left) / workers)
    bound = "" if all(cost.measured for cost in left) else "at least "
    return f", {bound}{text} with {workers} worker{'s' * (workers != 1)}"


def trains_on_gpu(config: Config) -> bool:
    """Whether a run would train on a GPU of this machine. Determined without torch, whose import takes seconds."""
    if config.train.device != "auto":
        return config.train.device != "cpu"
    return sys.platform == "darwin" or any(map(shutil.which, ("nvidia-smi", "rocm-smi")))


def matrix_speed(threads: int) -> float:
    """FLOP/s of a large matrix product. In a process of its own: numpy reads the number of threads when imported."""
    env = os.environ | {"OMP_NUM_THREADS": str(threads), "OPENBLAS_NUM_THREADS": str(threads)}
    done = subprocess.run([sys.executable, "-c", BENCHMARK], env=env, capture_output=True, text=True, check=True)
    return float(done.stdout)
