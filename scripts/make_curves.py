"""Train the runs that the verdict is evaluated on, and pack their curves into one file.

The plan covers all variants, learning rates from far below to far above the edge, constant and cosine schedules, short
and long runs, two sizes and several seeds. Runs go to a scratch directory. Finished runs are not trained again, so the
script can be stopped and restarted. Only finished runs are packed.

    python scripts/make_curves.py --runs /tmp/curves --workers 2 --pack tests/data/curves.npz.xz
"""

import argparse
import json
import lzma
import multiprocessing
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from stabrun.composition import compose
from stabrun.config import run_id
from stabrun.record.jsonl import number
from stabrun.record.run_dir import RunDir

VARIANTS = (  # the variants that existed when the corpus was trained
    "baseline", "fc_norm", "layer_scale", "qk_fc_norm", "qk_norm", "qk_norm_cap", "qkv_norm", "sigma_reparam",
    "soft_cap", "soft_clip", "soft_temp",
)  # fmt: skip
RATES = (1e-3, 1e-2, 0.05, 0.14, 0.3, 0.8, 2.0)
EDGE = (0.1, 0.2, 0.4, 0.56)
FIXED = ["tracker=none", "train.threads=1", "train.val_every=0", "train.checkpoint_every=0", "observe.every=10"]


def plan() -> Iterator[list[str]]:
    """The overrides of each run, most informative first."""

    def nano(variant: str, rate: float, schedule: str, seed: int, steps: int = 300) -> list[str]:
        warmup = 30 if steps < 200 else 50
        words = [f"+variant={variant}", f"optim.lr={rate}", f"schedule={schedule}", f"seed={seed}"]
        return [*words, f"train.steps={steps}", f"schedule.warmup_steps={warmup}"]

    for schedule, seed in (("constant", 0), ("cosine", 1), ("constant", 2)):
        for rate in RATES:
            yield from (nano(variant, rate, schedule, seed) for variant in VARIANTS)
    for rate in (1e-2, 0.3, 2.0):
        yield from (nano(variant, rate, "constant", 3, steps=120) for variant in VARIANTS)
        yield from (
            ["model=mini", *nano(v, rate, "constant", 4, steps=150)] for v in ("baseline", "qk_norm", "qkv_norm")
        )
    for rate in EDGE:
        yield from (nano(variant, rate, "constant", seed) for seed in (5, 6) for variant in ("baseline", "qk_norm"))
    for rate in (1e-2, 0.14, 0.56):
        yield from (nano(variant, rate, "constant", 7, steps=1500) for variant in ("baseline", "qk_norm"))
    for rate in (0.14, 0.3, 0.8, 1e-2):
        yield from (nano(variant, rate, "constant", 8, steps=800) for variant in VARIANTS)


def train_one(job: tuple[list[str], str]) -> str:
    from stabrun.cli.judge import verdict_line
    from stabrun.training.run import train

    words, runs = job
    config = compose([*FIXED, *words])
    config.run_dir = str(Path(runs) / run_id(config))
    return f"{' '.join(words)}: {verdict_line(train(config))}"


def pack(runs: Path, target: Path) -> int:
    """Write the curves of finished runs: loss, gradient norm and learning rate per step, and metadata."""
    arrays: dict[str, np.ndarray] = {}
    facts: list[dict[str, object]] = []
    for words in plan():
        config = compose([*FIXED, *words])
        folder = runs / run_id(config)
        if not (folder / "summary.json").exists():
            continue
        rows = list(RunDir(folder).rows())
        name = f"{len(facts):03d}"
        facts.append(
            {
                "words": words,
                "variant": config.variant,
                "d_model": config.model.d_model,
                "steps": config.train.steps,
                "schedule": config.schedule.kind,
                "lr": config.optim.lr,
            }
        )
        for key in ("train/loss", "grad/norm", "train/lr"):
            arrays[f"{name}/{key}"] = np.array([number(row[key]) for row in rows], dtype=np.float32)
    arrays["facts"] = np.array(json.dumps(facts))
    target.parent.mkdir(parents=True, exist_ok=True)
    with lzma.open(target, "wb") as file:
        np.savez(file, **arrays)  # type: ignore[arg-type]
    return len(facts)


def main(doc: str, jobs: list[Any], train_one: Callable[[Any], str], pack: Callable[[Path, Path], int]) -> None:
    """Call `train_one` for each of `jobs` in several processes, then pack the runs."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, required=True)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--pack", type=Path)
    arguments = parser.parse_args()
    if arguments.workers:
        given = [(job, str(arguments.runs)) for job in jobs]
        with multiprocessing.get_context("spawn").Pool(arguments.workers, maxtasksperchild=20) as pool:
            for number_done, line in enumerate(pool.imap(train_one, given), 1):
                print(f"[{number_done}/{len(given)}] {line}", flush=True)
    if arguments.pack:
        print(f"{pack(arguments.runs, arguments.pack)} runs in {arguments.pack}")


if __name__ == "__main__":
    main(__doc__, list(plan()), train_one, pack)
