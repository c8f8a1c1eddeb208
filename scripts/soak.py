"""Train a tiny model for many steps with checkpoints, validation and W&B offline; does memory or a count grow?

    python scripts/soak.py [STEPS] [FIRST]

Prints the slopes of resident memory, open files and threads per 1,000 steps after the FIRST steps (1,000 by default),
and ends with status 1 if one grows by more than its limit. One thread; 20,000 steps take some minutes.

What grows by design: the losses and rates that the judge keeps, three numbers of 8 bytes per step; the digests by
which the trainer finds a repeated batch, up to 10,000 steps; and the statistics that the judge keeps, 8 bytes per
number up to 4,096 observations (`observe.every`), from where on they are thinned.
"""

import math
import os
import sys
import tempfile
import threading
from collections.abc import Sequence
from pathlib import Path

os.environ |= {"WANDB_MODE": "offline", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}

from stabrun.composition import compose
from stabrun.record.schema import Row
from stabrun.training.run import train

STEPS, FIRST = 20_000, 1_000
WORDS = (
    "model.n_layer=2", "model.d_model=16", "data.seq_len=16", "train.batch_size=4", "train.threads=1",
    "train.checkpoint_every=200", "train.val_every=100", "train.val_sequences=4", "tracker=wandb",
)  # fmt: skip
LIMITS = {"KiB": 384.0, "open files": 0.5, "threads": 0.5, "KiB of the second half": 128.0}  # per 1,000 steps
PAGE = os.sysconf("SC_PAGE_SIZE")
EVERY = 50  # steps between two measurements


def state() -> dict[str, float]:
    """Resident memory in KiB, open files and threads of this process, by Linux's /proc."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return {
        "KiB": pages * PAGE / 1024,
        "open files": len(os.listdir("/proc/self/fd")),
        "threads": len(os.listdir("/proc/self/task")),
    }


def slope(xs: Sequence[float], ys: Sequence[float]) -> tuple[float, float]:
    """The slope of a straight line by least squares, and its standard error."""
    count, mean_x, mean_y = len(xs), sum(xs) / len(xs), sum(ys) / len(ys)
    spread = sum((x - mean_x) ** 2 for x in xs)
    rise = sum((x - mean_x) * (y - mean_y) for x, y in zip(xs, ys, strict=True)) / spread
    rest = sum((y - mean_y - rise * (x - mean_x)) ** 2 for x, y in zip(xs, ys, strict=True))
    return rise, math.sqrt(rest / max(1, count - 2) / spread)


def soak(steps: int, first: int, directory: Path) -> dict[str, tuple[float, float, float]]:
    """Train. Returns slope per 1,000 steps, its standard error, and the last value, of each part of `state`.

    Of memory also those of the second half, in which the digests of batches do not grow any more.
    """
    found: list[tuple[int, dict[str, float]]] = []

    def measure(row: Row) -> None:
        if row["step"] >= first and row["step"] % EVERY == 0:
            found.append((row["step"], state()))

    train(compose([*WORDS, f"train.steps={steps}", f"run_dir={directory / 'run'}"]), watch=measure)
    thousands = [step / 1000 for step, _ in found]
    series = {name: [values[name] for _, values in found] for name in state()}
    slopes = {name: (*slope(thousands, ys), ys[-1]) for name, ys in series.items()}
    half, memory = len(found) // 2, series["KiB"]
    return slopes | {"KiB of the second half": (*slope(thousands[half:], memory[half:]), memory[-1])}


def main() -> int:
    numbers = [int(word) for word in sys.argv[1:]]
    steps, first = [*numbers, *(STEPS, FIRST)[len(numbers) :]]
    with tempfile.TemporaryDirectory(prefix="soak") as folder:
        slopes = soak(steps, first, Path(folder))
    status = 0
    for name, (rise, error, last) in slopes.items():
        grows = rise - 2 * error > LIMITS[name]
        status = status or int(grows)
        verdict = "GROWS" if grows else "flat"
        print(f"{name}: {rise:+.3f} ± {error:.3f} per 1,000 steps, at the end {last:,.0f}: {verdict}")
    print(f"{threading.active_count()} Python threads at the end")
    return status


if __name__ == "__main__":
    sys.exit(main())
