"""`stabrun status`: what a study or a run is doing now, from another terminal; nothing is written."""

import fcntl
import json
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console

from stabrun.config import UserError, read_config, run_id
from stabrun.record.jsonl import jsonable, last_row, number, read_events, read_json, read_metrics
from stabrun.study.ledger import DONE, FAILED, PLANNED, RUNNING
from stabrun.study.live_table import LEGEND, at_work, coloured, counts, given_up
from stabrun.study.plan import FILE, load
from stabrun.study.snapshot import Snapshot, SnapshotReader, seconds_left, speed
from stabrun.text import duration_text, run_name
from stabrun.verdict.judge import Judge
from stabrun.verdict.wording import short, verdict_line

USAGE = "status: name one DIR, of a study or a run; the only flag is --json."
OVER = "complete", "stopped"
STATES = {
    "running": "is running",
    "complete": "is complete",
    "stopped": "was stopped early, for it had diverged",
    "interrupted": "was interrupted",
    "failed": "has failed",
}


def status(words: list[str]) -> int:
    """Print what the study or run is doing that `words` name; returns the exit status."""
    places = [word for word in words if word != "--json"]
    if len(places) != 1 or places[0].startswith("-"):
        raise UserError(USAGE)
    directory = Path(places[0])
    if (directory / FILE).is_file():
        look = SnapshotReader(directory).look(load(directory))
        facts, lines = of_study(directory, look), told_of_study(look)
    elif (directory / "config.yaml").is_file():
        facts = of_run(directory)
        lines = told_of_run(facts)
    else:
        missing = f"it holds no {FILE} and no config.yaml" if directory.is_dir() else "there is no such folder"
        raise UserError(f"{directory}: it is neither a study nor a run, for {missing}.")
    if "--json" in words:
        print(json.dumps(jsonable(facts), indent=1))
        return 0
    screen = Console(markup=False, emoji=False, highlight=False)
    for line in lines:
        screen.print(line, soft_wrap=True)
    return 0


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


def of_run(directory: Path) -> dict[str, Any]:
    """A run as plain data: its state, and the verdict, on what is recorded so far where it is not over."""
    config = read_config(directory / "config.yaml")
    rows = directory / "metrics.jsonl"
    summary = read_json(directory / "summary.json") if (directory / "summary.json").is_file() else {}
    if summary.get("status") in OVER:
        verdict, state, step = summary, summary["status"], summary["steps"]
    else:
        state = "running" if held(directory) else "failed" if error_of(directory) else "interrupted"
        judge = Judge()
        for row in read_metrics(rows) if rows.is_file() else ():
            judge.add(row)
        step = judge.steps[-1] + 1 if judge.steps else 0
        verdict = asdict(judge.conclude(None if state == "running" else config.train.steps)) if step else {}
    rate = speed(directory) if state == "running" else None
    return {
        "path": str(directory),
        "run_id": run_id(config),
        "variant": config.variant,
        "lr": config.optim.lr,
        "seed": config.seed,
        "status": state,
        "error": error_of(directory) if state == "failed" else None,
        "step": step,
        "steps": config.train.steps,
        "steps_per_second": rate,
        "seconds_left": (config.train.steps - step) / rate if rate else None,
        "last_loss": (last_row(rows) or {}).get("train/loss"),
        "checkpoint": checkpoint_of(directory),
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


def held(directory: Path) -> bool:
    """Whether a process trains the run: it holds the lock. Asked by a shared one, let go at once."""
    try:
        with open(directory / ".lock", "rb") as lock:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except BlockingIOError:
        return True
    return False


def error_of(directory: Path) -> str | None:
    """What ended the run's last start, where that was an error."""
    events = read_events(directory / "events.jsonl")
    return str(events[-1].get("error")) if events and events[-1].get("event") == "failed" else None


def checkpoint_of(directory: Path) -> int | None:
    """How many updates the last whole checkpoint holds."""
    names = [meta.parent.name for meta in directory.glob("checkpoints/step_*/meta.json")]
    return max((int(name.removeprefix("step_")) for name in names), default=None)
