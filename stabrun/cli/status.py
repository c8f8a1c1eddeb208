"""`stabrun status`: the state of a study or a run, read from its files; nothing is written."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text

from stabrun.config import UserError, run_id
from stabrun.record.jsonl import jsonable, number
from stabrun.record.run_dir import RunDir, too_few
from stabrun.record.schema import COMPLETE, FAILED, INTERRUPTED, OVER, RUNNING, STOPPED
from stabrun.record.study_dir import StudyDir, find
from stabrun.study.live_table import LEGEND, NO_SUMMARY, colored_table, counts_text, failure_messages, running_lines
from stabrun.study.plan import Cell
from stabrun.study.snapshot import Snapshot, SnapshotReader, seconds_left
from stabrun.text import duration_text, run_name, shown, warn
from stabrun.verdict.judge import Judge, Verdict
from stabrun.verdict.wording import healthy_line, short, verdict_line

STATES = {
    RUNNING: "is running",
    COMPLETE: "is complete",
    STOPPED: "was stopped early because it diverged",
    INTERRUPTED: "was interrupted",
    FAILED: "failed",
}


def status(directory: Path, as_json: bool = False) -> None:
    """Print the state of the study or run in a directory."""
    found = find(directory)
    if isinstance(found, StudyDir):
        snapshot = SnapshotReader(found.path).read()
        facts, lines = study_facts(found.path, snapshot), study_lines(snapshot)
    else:
        for sentence in found.faults():
            warn(f"{found.path}: {sentence}")
        facts = run_facts(found)
        lines = run_lines(found, facts)
    if as_json:
        print(json.dumps(jsonable(facts), indent=1))
        return
    console = Console(markup=False, emoji=False, highlight=False)
    for line in lines:
        console.print(shown(line) if isinstance(line, str) else line, soft_wrap=True)


def study_facts(directory: Path, snapshot: Snapshot) -> dict[str, Any]:
    """The state of a study as plain data."""
    return {
        "path": str(directory),
        "name": snapshot.plan.name,
        "strategy": snapshot.plan.strategy,
        "counts": snapshot.counts,
        "seconds_left": seconds_left(snapshot),
        "cells": [
            {
                **asdict(cell),
                "status": snapshot.entries[cell.id].status,
                "attempts": len(snapshot.entries[cell.id].claim),
                "verdict": snapshot.summaries.get(cell.id, {}).get("verdict"),
                "error": snapshot.failed.get(cell.id) or (NO_SUMMARY if lacks_summary(snapshot, cell) else None),
            }
            for cell in snapshot.plan.cells.values()
        ],
        "running": [
            {"id": attempt.cell.id, **{key: value for key, value in vars(attempt).items() if key != "cell"}}
            for attempt in snapshot.running
        ],
    }


def lacks_summary(snapshot: Snapshot, cell: Cell) -> bool:
    return snapshot.entries[cell.id].done and cell.id not in snapshot.summaries


def study_lines(snapshot: Snapshot) -> Iterator[str | Text]:
    """Counts, table, running cells, failures, and whether no worker is active."""
    yield f"{snapshot.plan.name}: {counts_text(snapshot)}"
    yield from colored_table(snapshot, Console().width)
    yield LEGEND
    yield from running_lines(snapshot)
    yield from failure_messages(snapshot)
    if len(snapshot.ended) < len(snapshot.entries) and all(attempt.owner_gone for attempt in snapshot.running):
        yield "no cell is being trained now; the same `stabrun sweep` command resumes."


def run_facts(run: RunDir, so_far: Verdict | None = None) -> dict[str, Any]:
    """The state of a run as plain data, with the verdict on what is recorded so far if it is not over.

    `so_far` is this verdict, if the rows have been judged already.
    """
    facts, state, summary = identity(run), run.state(), run.final_summary()
    verdict: Any = summary
    last = run.last_row()
    steps = summary["steps"] if summary else last["step"] + 1 if last else 0
    if summary and steps and (last is None or last["step"] + 1 < steps):
        raise UserError(f"{run.metrics} is damaged: {too_few(last['step'] + 1 if last else 0, steps)}.")
    if verdict is None and steps:
        verdict = with_checkpoint(asdict(so_far or judged(run, state == RUNNING)), run)
    speed, planned = run.steps_per_second() if state == RUNNING else None, facts.pop("planned")
    return {
        "path": str(run.path),
        **facts,
        "status": state,
        "error": run.error() if state == FAILED else None,
        "step": steps,
        "steps": planned,
        "steps_per_second": speed,
        "seconds_left": max(0, planned - steps) / speed if speed and planned else None,
        "last_loss": last["train/loss"] if last else None,
        "checkpoint": run.checkpoint_step(),
        "verdict": verdict,
    }


def with_checkpoint(verdict: Mapping[str, Any], run: RunDir | None) -> dict[str, Any]:
    """A verdict with the newest checkpoint before its last healthy step, by a path from the working directory."""
    healthy = verdict["last_healthy_step"]
    found = run.checkpoint_before(healthy) if run and healthy is not None else None
    return {**verdict, "last_healthy_checkpoint": found and {"step": found[0], "path": str(found[1])}}


def judged(run: RunDir, running: bool) -> Verdict:
    """The verdict on all rows of a run."""
    judge = Judge.of_record(run)
    for row in run.rows():
        judge.add(row)
    return judge.conclude(running)


def identity(run: RunDir) -> dict[str, Any]:
    """What a run is called, and its planned steps; None for what is not known of a watched run."""
    if watched := run.watched():
        name, planned = watched.name, watched.planned
        return {"run_id": None, "variant": name, "lr": watched.lr, "seed": watched.seed, "planned": planned}
    config = run.config()
    facts = {"run_id": run_id(config), "variant": config.variant, "lr": config.optim.lr, "seed": config.seed}
    return facts | {"planned": config.train.steps}


def run_lines(run: RunDir, facts: dict[str, Any]) -> Iterator[str]:
    """`qk_norm lr=1e-2 s0 is running: step 225 of 500, loss 1.912, 33 steps/s, 8 s left`, verdict and checkpoint."""
    parts = [f"step {facts['step']}" + (f" of {facts['steps']}" if facts["steps"] else "")]
    if facts["last_loss"] is not None:
        parts.append(f"loss {short(number(facts['last_loss']))}")
    if facts["steps_per_second"]:
        parts.append(f"{facts['steps_per_second']:.3g} steps/s")
    if facts["seconds_left"] is not None:
        parts.append(f"{duration_text(facts['seconds_left'])} left")
    yield f"{run_name(facts['variant'], facts['lr'], facts['seed'])} {STATES[facts['status']]}: {', '.join(parts)}"
    if facts["error"]:
        yield facts["error"]
    if facts["verdict"]:
        yield ("" if facts["status"] in OVER else "so far: ") + verdict_line(facts["verdict"])
        if facts["verdict"]["first_bad_step"] is not None and facts["verdict"]["last_healthy_step"] is not None:
            yield healthy_line(with_checkpoint(facts["verdict"], run))
    step = facts["checkpoint"]
    yield "no checkpoint yet" if step is None else f"last checkpoint: after step {step}"
