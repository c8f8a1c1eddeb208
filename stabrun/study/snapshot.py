"""What a study is doing at one moment, read from its files. Nothing is written, and files may vanish meanwhile."""

import time
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from stabrun.config import Config, UserError
from stabrun.model.describe import flops_per_token
from stabrun.record.jsonl import read_json
from stabrun.record.schema import Row, Summary
from stabrun.study.ledger import DONE, FAILED, PLANNED, RUNNING, Entry, Ledger, gone
from stabrun.study.plan import GRID, Cell, Plan


@dataclass(frozen=True)
class Attempt:
    """A cell that is being trained: how far it is, and what is known of its owner."""

    cell: Cell
    number: int
    step: int
    steps: int
    rate: float | None = None  # steps a second, since this attempt began
    host: str = "?"
    pid: int | None = None
    beat: float | None = None  # seconds since its owner last said that it is alive
    gone: bool = False  # its owner's process has ended

    @property
    def left(self) -> int:
        return max(0, self.steps - self.step)


@dataclass(frozen=True)
class Snapshot:
    """A study at one moment: `summaries` of finished cells, `running` ones, and why `failed` ones were given up."""

    plan: Plan
    entries: dict[str, Entry]
    summaries: dict[str, Summary]
    running: list[Attempt]
    failed: dict[str, str]

    def count(self, status: str) -> int:
        return sum(entry.status == status for entry in self.entries.values())


class SnapshotReader:
    """Looks at one study again and again; what cannot change any more is read once."""

    def __init__(self, directory: Path) -> None:
        self.ledger = Ledger(directory)
        self.summaries: dict[str, Summary] = {}

    def look(self, plan: Plan, entries: dict[str, Entry] | None = None) -> Snapshot:
        """The study now. `entries` are the ledger's, where they were just read."""
        entries = self.ledger.entries(plan.cells) if entries is None else entries
        for cell, entry in entries.items():
            if entry.status == DONE and cell not in self.summaries:
                try:
                    summary = self.ledger.study.run(cell).summary()
                except (OSError, UserError):
                    continue
                if summary:
                    self.summaries[cell] = summary
        running = [self._attempt(plan, cell, entry) for cell, entry in entries.items() if entry.status == RUNNING]
        failed = {
            cell: str(_object(self.ledger.path(cell, entry.attempt, "failed")).get("reason", "the reason is lost"))
            for cell, entry in entries.items()
            if entry.status == FAILED
        }
        return Snapshot(plan, entries, self.summaries, running, failed)

    def _attempt(self, plan: Plan, cell: str, entry: Entry) -> Attempt:
        number, ledger, planned = entry.attempt, self.ledger, plan.cells[cell]
        run = ledger.study.attempt(cell, number)
        owner, said = (_object(ledger.path(cell, number, kind)) for kind in ("claim", "beat"))
        beats = (_modified(ledger.path(cell, number, kind)) for kind in ("beat", "claim"))
        last = next((beat for beat in beats if beat is not None), None)
        return Attempt(
            planned,
            number,
            max(run.steps_done(), int(said.get("step", 0))),
            plan.arms[planned.arm].train.steps,
            run.steps_per_second(),
            str(owner.get("host", "?")),
            owner.get("pid"),
            None if last is None else max(0.0, time.time() - last),
            "pid" in owner and gone(owner),
        )


def seconds_left(look: Snapshot) -> float | None:
    """Until the last cell is done, if those who are at work go on so; an early end of a run is not reckoned with.

    None while nothing is known or nobody works, and in a search, whose further cells depend on what is to come.
    """
    working = [attempt for attempt in look.running if not attempt.gone]
    if not working or look.plan.strategy != GRID:
        return None
    pace = seconds_a_step(look)
    if not pace:
        return None
    waiting = [place for cell, place in look.plan.cells.items() if look.entries[cell].status == PLANNED]
    total = sum(look.plan.arms[place.arm].train.steps * pace[place.arm] for place in waiting)
    total += sum(attempt.left * pace[attempt.cell.arm] for attempt in look.running)
    return max(total / len(working), *(attempt.left * pace[attempt.cell.arm] for attempt in working))


def seconds_a_step(look: Snapshot) -> dict[str, float]:
    """Arm → seconds a step: of its finished runs, else of its running ones, else by FLOPs from the other arms.

    Empty while no arm has been timed.
    """
    done: dict[str, list[float]] = {arm: [] for arm in look.plan.arms}
    for cell, row in look.summaries.items():
        if cell in look.plan.cells and row.get("steps") and row.get("seconds"):
            done[look.plan.cells[cell].arm].append(row["seconds"] / row["steps"])
    going: dict[str, list[float]] = {arm: [] for arm in look.plan.arms}
    for attempt in look.running:
        if attempt.rate:
            going[attempt.cell.arm].append(1 / attempt.rate)
    known = {arm: median(done[arm] or going[arm]) for arm in look.plan.arms if done[arm] or going[arm]}
    if not known:
        return {}
    each = median(seconds / flops_a_step(look.plan.arms[arm]) for arm, seconds in known.items())
    return {arm: known.get(arm, each * flops_a_step(config)) for arm, config in look.plan.arms.items()}


def flops_a_step(config: Config) -> int:
    return config.train.batch_size * config.data.seq_len * flops_per_token(config.model, config.data.seq_len)


def _object(path: Path) -> Row:
    """The object in a JSON file; empty where there is none, or none yet."""
    try:
        return read_json(path)
    except (OSError, UserError):
        return {}


def _modified(path: Path) -> float | None:
    try:
        return path.stat().st_mtime
    except OSError:
        return None
