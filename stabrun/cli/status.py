"""`stabrun status`: what a study or a run is doing now, from another terminal; nothing is written."""

import json
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console

from stabrun.config import run_id
from stabrun.record.jsonl import jsonable, number
from stabrun.record.run_dir import RunDir
from stabrun.record.schema import OVER, RUNNING
from stabrun.record.study_dir import StudyDir, find
from stabrun.study.ledger import DONE, FAILED, PLANNED
from stabrun.study.live_table import LEGEND, at_work, coloured, counts, given_up
from stabrun.study.plan import load
from stabrun.study.snapshot import Snapshot, SnapshotReader, seconds_left
from stabrun.text import duration_text, run_name
from stabrun.verdict.judge import Judge
from stabrun.verdict.wording import short, verdict_line

STATES = {
    "running": "is running",
    "complete": "is complete",
    "stopped": "was stopped early, for it had diverged",
    "interrupted": "was interrupted",
    "failed": "has failed",
}


def status(directory: Path, as_json: bool = False) -> None:
    """Print what a study or a run is doing."""
    found = find(directory)
    if isinstance(found, StudyDir):
        look = SnapshotReader(directory).look(load(directory))
        facts, lines = of_study(directory, look), told_of_study(look)
    else:
        facts = of_run(found)
        lines = told_of_run(facts)
    if as_json:
        print(json.dumps(jsonable(facts), indent=1))
        return
    screen = Console(markup=False, emoji=False, highlight=False)
    for line in lines:
        screen.print(line, soft_wrap=True)


def of_study(directory: Path, look: Snapshot) -> dict[str, Any]:
    """A study as plain data."""
    return {
        "path": str(directory),
        "name": look.plan.name,
        "strategy": look.plan.strategy,
        "counts": {status: look.count(status) for status in (PLANNED, RUNNING, DONE, FAILED)},
        "seconds_left": seconds_left(look),
        "cells": [
            {
                **asdict(cell),
                "status": look.entries[cell.id].status,
                "attempts": len(look.entries[cell.id].claim),
                "verdict": look.summaries.get(cell.id, {}).get("verdict"),
                "error": look.failed.get(cell.id),
            }
            for cell in look.plan.cells.values()
        ],
        "running": [
            {
                "id": attempt.cell.id,
                "attempt": attempt.number,
                "step": attempt.step,
                "steps": attempt.steps,
                "steps_per_second": attempt.rate,
                "host": attempt.host,
                "pid": attempt.pid,
                "seconds_since_beat": attempt.beat,
                "owner_gone": attempt.gone,
            }
            for attempt in look.running
        ],
    }


def told_of_study(look: Snapshot) -> Iterator[Any]:
    """Counts, table, who is at work, what was given up, and whether nobody goes on."""
    yield f"{look.plan.name}: {counts(look)}"
    yield from coloured(look, Console().width)
    yield LEGEND
    yield from at_work(look)
    yield from given_up(look)
    if look.count(PLANNED) + look.count(RUNNING) and all(attempt.gone for attempt in look.running):
        yield "no cell is being trained now; the same `stabrun sweep` goes on from there."


def of_run(run: RunDir) -> dict[str, Any]:
    """A run as plain data: its state, and the verdict, on what is recorded so far where it is not over."""
    config, state = run.config(), run.state()
    if summary := run.final_summary():
        verdict, step = {**summary}, summary["steps"]
    else:
        judge = Judge()
        for row in run.rows():
            judge.add(row)
        step = judge.steps[-1] + 1 if judge.steps else 0
        verdict = asdict(judge.conclude(None if state == RUNNING else config.train.steps)) if step else {}
    rate = run.steps_per_second() if state == RUNNING else None
    return {
        "path": str(run.path),
        "run_id": run_id(config),
        "variant": config.variant,
        "lr": config.optim.lr,
        "seed": config.seed,
        "status": state,
        "error": run.error() if state == "failed" else None,
        "step": step,
        "steps": config.train.steps,
        "steps_per_second": rate,
        "seconds_left": (config.train.steps - step) / rate if rate else None,
        "last_loss": (run.last_row() or {}).get("train/loss"),
        "checkpoint": run.checkpoint_step(),
        "verdict": verdict or None,
    }


def told_of_run(facts: dict[str, Any]) -> Iterator[str]:
    """`qk_norm lr=1e-2 s0 is running: step 225 of 500, loss 1.912, 33 steps/s, 8 s left`, and what stands below."""
    parts = [f"step {facts['step']} of {facts['steps']}"]
    if facts["last_loss"] is not None:
        parts.append(f"loss {short(number(facts['last_loss']))}")
    if facts["steps_per_second"]:
        parts += [f"{facts['steps_per_second']:.3g} steps/s", f"{duration_text(facts['seconds_left'])} left"]
    yield f"{run_name(facts['variant'], facts['lr'], facts['seed'])} {STATES[facts['status']]}: {', '.join(parts)}"
    if facts["error"]:
        yield facts["error"]
    if facts["verdict"]:
        yield ("" if facts["status"] in OVER else "so far: ") + verdict_line(facts["verdict"])
    step = facts["checkpoint"]
    yield "no checkpoint yet" if step is None else f"last checkpoint: after step {step}"
