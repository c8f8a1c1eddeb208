"""What the finished runs of a study say: `results.csv`, a row a run, and `study.json`, a grid's numbers by arm."""

import csv
import io
import json
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from stabrun.observe.record import number, read_object, worded, write_whole
from stabrun.study.grid import Curve, best_loss, best_rate, estimate, gain, lr_sensitivity
from stabrun.study.plan import Plan

BASELINE = "baseline"
COLUMNS = (
    "run_id", "arm", "variant", "lr", "seed", "status", "verdict", "reason", "horizon", "rule", "first_bad_step",
    "first_bad_site", "certain_step", "scar", "init_loss", "best_loss", "final_loss", "val_loss", "val_perplexity",
    "val_gap", "clipped_share", "skipped_steps", "steps", "tokens", "seconds", "tokens_per_second",
)  # fmt: skip

Row = dict[str, Any]


def finished(plan: Plan, directory: Path) -> Iterator[Row]:
    """The summary of each finished run, with its `arm`, in the order of the plan."""
    for cell in plan.cells.values():
        file = directory / "runs" / cell.id / "summary.json"
        if file.is_file():
            yield {**read_object(file), "arm": cell.arm}


def write(plan: Plan, directory: Path) -> None:
    """Make `results.csv` and `study.json` anew from the runs that are finished; a reader never sees half of one."""
    rows = list(finished(plan, directory))
    write_whole(directory / "results.csv", table(rows))
    write_whole(directory / "study.json", json.dumps(worded(by_arm(plan, rows)), indent=1) + "\n")


def table(rows: Iterable[Row]) -> str:
    """The rows as CSV; what a summary leaves open is an empty cell."""
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def by_arm(plan: Plan, rows: list[Row]) -> dict[str, Any]:
    """Arm → what its runs say; `lr_sensitivity` and the best rate only where each rate has each seed."""
    told: dict[str, Any] = {}
    baseline = curve(plan, BASELINE, rows)
    for arm in plan.arms:
        own = [row for row in rows if row["arm"] == arm]
        rates = sorted({row["lr"] for row in own})
        lost = {rate: [row["verdict"] == "diverged" for row in own if row["lr"] == rate] for rate in rates}
        stable = [rate for rate in rates if not any(lost[rate])]
        first = min((rate for rate in rates if any(lost[rate])), default=None)
        told[arm] = {
            "runs": [{"lr": rate, "runs": len(lost[rate]), "diverged": sum(lost[rate])} for rate in rates],
            "max_stable_lr": max((rate for rate in stable if first is None or rate < first), default=None),
            "min_diverged_lr": first,
        }
        if found := curve(plan, arm, rows):
            told[arm] |= {
                "lr_sensitivity": asdict(estimate(lr_sensitivity, found)),
                "best_lr": best_rate(found),
                "best_final_loss": asdict(estimate(best_loss, found)),
                "gain": asdict(gain(found, baseline)) if baseline and arm != BASELINE else None,
            }
    return told


def curve(plan: Plan, arm: str, rows: list[Row]) -> Curve | None:
    """The LR–loss curve of an arm; None until each of its learning rates has each of its seeds."""
    cells = [cell for cell in plan.cells.values() if cell.arm == arm]
    rates, seeds = sorted({cell.lr for cell in cells}), sorted({cell.seed for cell in cells})
    ends = {(row["lr"], row["seed"]): row for row in rows if row["arm"] == arm}
    if not cells or any((rate, seed) not in ends for rate in rates for seed in seeds):
        return None
    losses = [[number(ends[rate, seed]["final_loss"]) for seed in seeds] for rate in rates]
    firsts = [number(ends[rates[0], seed]["init_loss"]) for seed in seeds]
    return Curve(np.array(rates), np.array(losses), np.array(firsts))
