"""Time, memory and page size of a report, for a synthetic study.

    python scripts/bench_report.py [RUNS] [STEPS]        default: 500 runs × 2,000 steps

The records have the keys and cadence of a nano run, with random values.
"""

import json
import math
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml

from stabrun.record.jsonl import dumps
from stabrun.record.study_dir import StudyDir
from stabrun.study.plan import Cell, Plan
from stabrun.study.question import planned
from stabrun.study.results import write
from stabrun.study.snapshot import SnapshotReader
from stabrun.verdict.judge import Judge

VARIANTS = ["baseline", "qk_norm", "qk_norm_cap", "qkv_norm", "qk_fc_norm"]
SEEDS = 10
EVERY = "norm/out", "norm/in", "norm/weight", "norm/grad"
SLOW = "norm/in_grad", "norm/update", "norm/adam_m", "norm/adam_v", "adam/surprise"
SITES = {"qkv": 4, "proj": 4, "fc1": 4, "fc2": 4, "head": 1}
NANO_LAYERS = 4


def a_study(directory: Path, runs: int, steps: int) -> None:
    """Runs of five variants with ten seeds, at as many learning rates as needed. High rates diverge."""
    rates = [1e-2 * 100 ** (place / 9) for place in range(max(2, runs // (len(VARIANTS) * SEEDS)))]
    words = [
        f"study.variants=[{','.join(VARIANTS)}]",
        f"study.lrs=[{','.join(map(str, rates))}]",
        f"study.seeds={SEEDS}",
    ]
    plan, _, _ = planned([*words, f"train.steps={steps}", "tracker=none"])
    for name in ("runs", "ledger"):
        (directory / name).mkdir()
    plan.save(directory)
    records = {lost: record(steps, lost) for lost in (False, True)}
    for cell in plan.cells.values():
        a_run(directory / "runs" / cell.id, plan, cell, *records[cell.lr > 0.1 * (1 + VARIANTS.index(cell.arm))])
    write(plan, SnapshotReader(directory).read(plan).rows, StudyDir(directory))


def record(steps: int, lost: bool) -> tuple[str, dict[str, Any]]:
    """The text of a `metrics.jsonl` and its verdict, shared by all runs with the same outcome."""
    draw, judge, lines = random.Random(lost), Judge(steps), []
    for step in range(steps):
        rise = max(0.0, step / steps - 0.4) if lost else 0.0
        row: dict[str, Any] = {"step": step, "tokens": 1024 * (step + 1), "train/lr": 0.03}
        row |= {"train/loss": 4 * math.exp(-5 * step / steps) + 1.7 + 6 * rise + draw.gauss(0, 0.05)}
        row |= {"grad/norm": 1 + draw.random() + rise, "grad/clipped": float(lost)}
        for kind in EVERY + SLOW * (step % 10 == 0):
            row |= {
                f"{kind}/{site}": [math.exp(5 * rise) + draw.random() for _ in range(count)]
                for site, count in SITES.items()
            }
        for key in ("grad/norm_by_layer", "residual/norm") + ("attn/max_logit", "attn/entropy") * (step % 10 == 0):
            row[key] = [math.exp(5 * rise) + draw.random() for _ in range(NANO_LAYERS)]
        judge.add(row)
        lines.append(dumps(row) + "\n")
    return "".join(lines), asdict(judge.conclude())


def a_run(folder: Path, plan: Plan, cell: Cell, rows: str, verdict: dict[str, Any]) -> None:
    folder.mkdir()
    (folder / "metrics.jsonl").write_text(rows)
    (folder / "config.yaml").write_text(yaml.dump(asdict(plan.config(cell)), Dumper=yaml.CSafeDumper))
    (folder / "environment.json").write_text(json.dumps({"stabrun": "made up"}))
    facts = {"run_id": cell.id, "variant": cell.arm, "lr": cell.lr, "seed": cell.seed, "status": "complete"}
    ends = {"val_loss": 2.0, "val_perplexity": 7.39, "clipped_share": 0.1, "skipped_steps": None, "steps": 1}
    final = verdict["final_loss"] + random.Random(cell.id).random()
    facts |= verdict | {"final_loss": final} | ends | {"tokens": 1, "seconds": 1.0, "tokens_per_second": 1.0}
    (folder / "summary.json").write_text(dumps(facts))


def main() -> None:
    runs, steps = map(int, [*sys.argv[1:], *("500", "2000")[len(sys.argv) - 1 :]])
    with tempfile.TemporaryDirectory() as place:
        directory = Path(place) / "study"
        directory.mkdir()
        a_study(directory, runs, steps)
        records = sum(file.stat().st_size for file in directory.glob("runs/*/metrics.jsonl"))
        start = time.perf_counter()
        process = subprocess.Popen(
            [sys.executable, "-m", "stabrun", "report", str(directory)], stdout=subprocess.DEVNULL
        )
        _, status, used = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - start
        page = (directory / "report" / "index.html").stat().st_size
        found = len(list(directory.glob("runs/*")))
        print(f"{found} runs of {steps} steps, {records / 1e6:.0f} MB of records")
        print(
            f"{seconds:.1f} s ({used.ru_utime + used.ru_stime:.1f} s of CPU), {used.ru_maxrss / 1024:.0f} MB of memory"
        )
        print(f"page {page / 1e6:.1f} MB, status {os.waitstatus_to_exitcode(status)}")
        shutil.rmtree(directory)


if __name__ == "__main__":
    main()
