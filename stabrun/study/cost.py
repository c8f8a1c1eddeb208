"""What a study would cost: the tokens, FLOPs and time of the cells that are left, by arm, before they are trained."""

import os
import shutil
import subprocess
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from stabrun.config import Config
from stabrun.model.describe import flops_per_token
from stabrun.record.schema import Row
from stabrun.study import results
from stabrun.study.plan import GRID, Plan, tokens_of
from stabrun.study.pool import threads_each
from stabrun.text import duration_text, rate_text

# Prints the FLOPs a second of float32 matrix products of 1024³, the best of three.
SPEED = """
import time, numpy
a, times = numpy.ones((1024, 1024), numpy.float32), []
for _ in range(4):
    began = time.perf_counter()
    a @ a
    times.append(time.perf_counter() - began)
print(2 * 1024**3 / min(times[1:]))
"""
GPU_TOOLS = ("nvidia-smi", "rocm-smi")


@dataclass(frozen=True)
class Cost:
    """What is left of an arm, of a search at most. `seconds` of a worker: by finished runs, else at least so many."""

    arm: str
    rates: list[float]
    cells: int
    tokens: int
    flops: int
    seconds: float | None
    measured: bool


def costs(plan: Plan, rows: Iterable[Row], speed: float | None) -> list[Cost]:
    """By arm, in order. `speed`: FLOPs a second of a worker, for arms without a finished run; None where unknown."""
    rows = list(rows)
    done = {row["run_id"] for row in rows}
    found = []
    for arm, config in plan.arms.items():
        cells = [cell for cell in plan.cells.values() if cell.arm == arm and cell.id not in done]
        ended = sum(row["arm"] == arm for row in rows)
        count = len(cells) if plan.strategy == GRID else max(0, plan.max_runs - ended)
        tokens = count * tokens_of(config)
        flops = tokens * flops_per_token(config.model, config.data.seq_len)
        seen = [row["tokens_per_second"] for row in rows if row["arm"] == arm and row.get("tokens_per_second")]
        seconds = tokens / median(seen) if seen else flops / speed if speed else None
        rates = sorted({cell.lr for cell in cells})
        found.append(Cost(arm, rates, count, tokens, flops, seconds, bool(seen)))
    return found


def described(plan: Plan, directory: Path, workers: int) -> Iterator[str]:
    """What a study would train, in lines for people."""
    rows = list(results.finished(plan, directory))
    unknown = plan.arms.keys() - {row["arm"] for row in rows}
    on_gpu = any(trains_on_gpu(config) for config in plan.arms.values())
    threads = next(iter(plan.arms.values())).train.threads or threads_each(workers)
    speed = matrix_speed(threads) if unknown and not on_gpu else None
    found = costs(plan, rows, speed)
    most = "" if plan.strategy == GRID else "up to "
    for cost in found:
        rates = f", lr {', '.join(map(rate_text, cost.rates))}" if cost.rates else ""
        yield f"{cost.arm}: {most}{cost.cells} cells to train, {cost.tokens:,} tokens{_time([cost], workers)}{rates}"
    cells, tokens, flops = (sum(getattr(cost, name) for cost in found) for name in ("cells", "tokens", "flops"))
    of = f" of {len(plan.cells)}" if plan.strategy == GRID else ""
    yield f"in all {most}{cells}{of} cells, {tokens:,} tokens, {flops:.3g} FLOPs{_time(found, workers)}"
    if speed is not None:
        yield (
            f"the times are lower bounds, at the speed of matrix products here, {speed / 1e9:.3g} GFLOP/s a worker"
            + ("; where a variant has a finished run they are measured" if rows else "")
        )
    elif unknown:
        yield "how many hours is not known until a run of each variant is finished, for they train on a GPU"
    yield f"study: {directory}"


def _time(costs: list[Cost], workers: int) -> str:
    """`, at least 4 min by 2 workers`; nothing where it is not known."""
    left = [cost for cost in costs if cost.cells]
    if not left or any(cost.seconds is None for cost in left):
        return ""
    text = duration_text(sum(cost.seconds or 0.0 for cost in left) / workers)
    bound = "" if all(cost.measured for cost in left) else "at least "
    return f", {bound}{text} by {workers} worker{'s' * (workers != 1)}"


def trains_on_gpu(config: Config) -> bool:
    """Whether a run of this configuration would train on a GPU here; told without torch, which takes seconds."""
    if config.train.device != "auto":
        return config.train.device != "cpu"
    return sys.platform == "darwin" or any(map(shutil.which, GPU_TOOLS))


def matrix_speed(threads: int) -> float:
    """FLOPs a second of a large matrix product with so many threads, which must be set before numpy is imported."""
    env = os.environ | {"OMP_NUM_THREADS": str(threads), "OPENBLAS_NUM_THREADS": str(threads)}
    done = subprocess.run([sys.executable, "-c", SPEED], env=env, capture_output=True, text=True, check=True)
    return float(done.stdout)
