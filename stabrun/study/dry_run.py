"""What `stabrun sweep --dry-run` prints: a table of costs by arm, their total, and what the times assume."""

from collections import defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path

from stabrun.config import GPUS, Config, StudyConfig
from stabrun.model.gpus import Gpu
from stabrun.model.memory import CPU, CUDA, device_type, fitting
from stabrun.record.schema import Summary
from stabrun.study.cost import Cost, costs, gpu_of, matrix_speed, measured_seconds
from stabrun.study.plan import GRID, Plan
from stabrun.study.pool import threads_per_worker
from stabrun.text import aligned, duration_text, hours_text, human, rate_text

MFU = 0.35  # model FLOPs utilization on a GPU without study.mfu: an assumption
COLUMNS = ["arm", "cells", "parameters", "tokens", "FLOPs", "peak memory", "time per cell", "total time"]


def dry_run_lines(plan: Plan, rows: list[Summary], directory: Path, study: StudyConfig) -> Iterator[str]:
    """What the study would train. `rows`: its finished runs, whose times are used."""
    devices = {arm: device_type(config, study.gpu) for arm, config in plan.arms.items()}
    gpu = gpu_of(study) if CUDA in devices.values() else None
    timed, speeds, notes = measured_seconds(rows), dict[str, float](), list[str]()
    for kind in dict.fromkeys(devices.values()):
        if arms := {arm: config for arm, config in plan.arms.items() if devices[arm] == kind and arm not in timed}:
            found, reasons = speeds_on(kind, arms, gpu, study)
            speeds |= found
            notes += reasons
    by_arm, limit = costs(plan, rows, devices, speeds), "" if plan.strategy == GRID else "up to "
    yield from aligned([COLUMNS, *(columns(cost, limit) for cost in by_arm)])
    cells, tokens, flops = (sum(getattr(cost, name) for cost in by_arm) for name in ("cells", "tokens", "flops"))
    of = f" of {len(plan.cells)}" if plan.strategy == GRID else ""
    time = total_time(by_arm, study.workers)
    yield f"total: {limit}{cells}{of} cells, {tokens:,} tokens, {flops:.3g} FLOPs{time}"
    yield from notes
    if timed and notes:
        yield "times of arms with a finished run are measured"
    if gpu:
        yield from too_large([cost for cost in by_arm if cost.device == CUDA], gpu)
    yield from rate_lines(by_arm)
    yield f"study: {directory}"


def columns(cost: Cost, limit: str) -> list[str]:
    """The line of an arm, in the order of COLUMNS."""
    at_least = "≥ " * (cost.device == CPU and not cost.measured)
    return [
        cost.arm,
        f"{limit}{cost.cells}",
        f"{cost.parameters / 1e6:,.2f}M",
        f"{cost.tokens:,}",
        f"{cost.flops:.3g}",
        human(cost.peak_bytes),
        *("?" if time is None else at_least + hours_text(time) for time in (cost.cell_seconds, cost.seconds)),
    ]


def speeds_on(
    device: str, arms: Mapping[str, Config], gpu: Gpu | None, study: StudyConfig
) -> tuple[dict[str, float], list[str]]:
    """FLOP/s by arm as far as they are known, and sentences: what they assume, or why they are unknown."""
    if device == CPU:
        speed = matrix_speed(next(iter(arms.values())).train.threads or threads_per_worker(study.workers))
        bound = f"times are lower bounds, at {speed / 1e9:.3g} GFLOP/s per worker in matrix products"
        return dict.fromkeys(arms, speed), [f"{bound}; for times on a GPU add study.gpu=h100"]
    if device != CUDA:
        return {}, [f"times are unknown until a run of each arm is finished, because they train on {device}"]
    if gpu is None:
        named = f"set study.gpu to one of {', '.join(GPUS)}"
        return {}, [f"times are unknown until a run of each arm is finished, or the GPU is named: {named}"]
    mfu, notes = study.mfu or MFU, list[str]()
    peaks = {config.train.precision: gpu.peak(config.train.precision) for config in arms.values()}
    if known := [f"{peak / 1e12:,g} TFLOP/s in {precision}" for precision, peak in peaks.items() if peak]:
        notes.append(f"times assume {mfu:.3g} of the peak of {gpu.name}, {', '.join(known)} (study.mfu)")
    if unknown := [precision for precision, peak in peaks.items() if not peak]:
        notes.append(f"times are unknown in {', '.join(unknown)}: {gpu.name} has no units for it")
    speeds = {arm: mfu * peak * c.train.ranks for arm, c in arms.items() if (peak := peaks[c.train.precision])}
    return speeds, notes


def total_time(costs: list[Cost], workers: int) -> str:
    """`, at least 4 min with 2 workers`; on GPUs, also the time of all GPUs together. Empty if it is unknown.

    No study is shorter than its longest cell.
    """
    left = [cost for cost in costs if cost.cells]
    times = [cost.seconds for cost in left if cost.seconds is not None]
    if not left or len(times) < len(left):
        return ""
    devices, longest = max(cost.devices for cost in left), max(cost.cell_seconds or 0.0 for cost in left)
    total = sum(times)
    text = f"{duration_text(max(total / devices / workers, longest))} with {workers} worker{'s' * (workers != 1)}"
    if any(cost.device == CPU and not cost.measured for cost in left):
        return f", at least {text}"
    if all(cost.device == CUDA for cost in left):
        own = ", each on its own GPU" * (workers > 1) if devices == 1 else f" of {devices} GPUs"
        return f", {hours_text(total)} of GPU time: {text}{own}"
    return f", {text}"


def too_large(costs: list[Cost], gpu: Gpu) -> Iterator[str]:
    """A sentence if a step of some arms does not fit into the GPU's memory, with the settings that fit all of them."""
    if large := [cost for cost in costs if cost.cells and cost.peak_bytes > gpu.usable]:
        fits = [fitting(cost.config, CUDA, gpu.usable) for cost in large]
        # The most restrictive of them: recomputation makes a list of two, and then the smallest micro-batch.
        advice = min(fits, key=lambda words: (-len(words), [int(word.rpartition("=")[2]) for word in words[:1]]))
        names = "each arm" if len(large) == len(costs) else ", ".join(cost.arm for cost in large)
        what = f"{' '.join(advice)} fits" if all(fits) else "use a smaller model"
        yield f"a step of {names} needs more than the {human(gpu.usable)} that are usable of {gpu.name}; {what}"


def rate_lines(costs: list[Cost]) -> Iterator[str]:
    """The learning rates that are left, once for all arms that have the same."""
    by_rates = defaultdict[tuple[float, ...], list[str]](list)
    for cost in costs:
        if cost.rates:
            by_rates[tuple(cost.rates)].append(cost.arm)
    for rates, arms in by_rates.items():
        of = "" if len(arms) == len(costs) else f" of {', '.join(arms)}"
        yield f"learning rates{of}: {', '.join(map(rate_text, rates))}"
