"""The state of a study at one moment, read from its files. Nothing is written, and files may vanish meanwhile."""

import time
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from stabrun.config import UserError
from stabrun.record.schema import Summary
from stabrun.record.study_dir import StudyDir
from stabrun.study.cost import flops_per_run, measured_seconds, medians
from stabrun.study.ledger import DONE, FAILED, PLANNED, RUNNING, Entry, Ledger, has_ended
from stabrun.study.plan import GRID, Cell, Plan, load


@dataclass(frozen=True)
class Attempt:
    """A cell that is being trained: its progress, and what is known of the owner."""

    cell: Cell
    attempt: int
    step: int
    steps: int
    steps_per_second: float | None = None  # since this attempt began
    host: str = "?"
    pid: int | None = None
    seconds_since_beat: float | None = None
    owner_gone: bool = False  # its process has ended

    @property
    def steps_left(self) -> int:
        return max(0, self.steps - self.step)


@dataclass(frozen=True)
class Snapshot:
    """A study at one moment: `summaries` of finished cells, `running` attempts, and the reasons of `failed` cells."""

    plan: Plan
    entries: dict[str, Entry]
    summaries: dict[str, Summary]
    running: list[Attempt]
    failed: dict[str, str]

    def cells(self, status: str) -> list[Cell]:
        return [self.plan.cells[cell] for cell, entry in self.entries.items() if entry.status == status]

    @property
    def counts(self) -> dict[str, int]:
        """Status → number of cells."""
        return {status: len(self.cells(status)) for status in (PLANNED, RUNNING, DONE, FAILED)}

    @property
    def rows(self) -> list[Summary]:
        """The summaries with their `arm`, in the order of the plan."""
        return [
            {**self.summaries[cell.id], "arm": cell.arm, "lr": cell.lr, "seed": cell.seed}
            for cell in self.plan.cells.values()
            if cell.id in self.summaries
        ]

    @property
    def ended(self) -> set[str]:
        """The cells that will not be trained any more."""
        return {cell for cell, entry in self.entries.items() if entry.status in (DONE, FAILED)}


class SnapshotReader:
    """Reads a study repeatedly. What cannot change any more is read once."""

    def __init__(self, directory: Path, to_train: bool = False) -> None:
        self.study, self.ledger, self.to_train = StudyDir(directory), Ledger(directory), to_train
        self.summaries: dict[str, Summary] = {}
        self.reasons: dict[tuple[str, int], str] = {}  # of failed attempts
        self._plan: tuple[tuple[int, int], Plan] | None = None

    def plan(self) -> Plan:
        """The plan, read again if its file has changed. Raises UserError as `plan.load` does."""
        stat = self.study.plan_file.stat() if self.study.is_study() else None
        stamp = (stat.st_mtime_ns, stat.st_ino) if stat else (0, 0)
        if self._plan is None or self._plan[0] != stamp:
            self._plan = stamp, load(self.study.path, self.to_train)
        return self._plan[1]

    def read(self, plan: Plan | None = None, attempts: bool = True) -> Snapshot:
        """The study now; `plan`: the current one, if known. Without `attempts`, `running` is empty, which is faster."""
        plan = plan or self.plan()
        entries = self.ledger.entries(plan.cells)
        for cell, entry in entries.items():
            if entry.status == DONE and cell not in self.summaries and (summary := self._summary(cell)):
                self.summaries[cell] = summary
        summaries = {
            cell: summary for cell, summary in self.summaries.items() if cell in entries and entries[cell].done
        }
        running = [
            self._attempt(plan.cells[cell], plan, entry.attempt)
            for cell, entry in entries.items()
            if entry.status == RUNNING and attempts
        ]
        failed = {cell: self._reason(cell, entry.attempt) for cell, entry in entries.items() if entry.status == FAILED}
        return Snapshot(plan, entries, summaries, running, failed)

    def forget(self, cell: str) -> None:
        """Read the summary of a cell again: it was changed."""
        self.summaries.pop(cell, None)

    def _reason(self, cell: str, attempt: int) -> str:
        if (cell, attempt) not in self.reasons:
            self.reasons[cell, attempt] = self.ledger.reason(cell, attempt)
        return self.reasons[cell, attempt]

    def _summary(self, cell: str) -> Summary | None:
        try:
            return self.study.run(cell).summary()
        except (OSError, UserError):
            return None

    def _attempt(self, cell: Cell, plan: Plan, number: int) -> Attempt:
        ledger, run = self.ledger, self.study.attempt(cell.id, number)
        owner, step = ledger.owner_of(cell.id, number), ledger.step(cell.id, number)
        modified = [at for kind in ("beat", "claim") if (at := _modified(ledger.path(cell.id, number, kind)))]
        return Attempt(
            cell,
            number,
            max(run.steps_done(), step),
            plan.arms[cell.arm].train.steps,
            run.steps_per_second(),
            str(owner.get("host", "?")),
            owner.get("pid"),
            max(0.0, time.time() - modified[0]) if modified else None,
            has_ended(owner),
        )


def seconds_left(snapshot: Snapshot) -> float | None:
    """Time until the last cell is done, if the present workers go on at their speed. Early stops are not considered.

    None if nothing is known, if no worker is active, or in a search, whose further cells depend on later results.
    """
    plan, working = snapshot.plan, [attempt for attempt in snapshot.running if not attempt.owner_gone]
    pace = seconds_per_step(snapshot)
    if not working or plan.strategy != GRID or not pace:
        return None
    total = sum(plan.arms[cell.arm].train.steps * pace[cell.arm] for cell in snapshot.cells(PLANNED))
    total += sum(attempt.steps_left * pace[attempt.cell.arm] for attempt in snapshot.running)
    return max(total / len(working), *(attempt.steps_left * pace[attempt.cell.arm] for attempt in working))


def seconds_per_step(snapshot: Snapshot) -> dict[str, float]:
    """Of each arm: from its finished runs, else from its running ones, else from the other arms by FLOPs.

    Empty while no arm has been timed.
    """
    plan = snapshot.plan
    running = ((attempt.cell.arm, attempt.steps_per_second) for attempt in snapshot.running)
    timed = medians((arm, 1 / speed) for arm, speed in running if speed) | measured_seconds(snapshot.rows)
    if not timed:
        return {}
    flops = {arm: flops_per_run(config) / config.train.steps for arm, config in plan.arms.items()}
    per_flop = median(seconds / flops[arm] for arm, seconds in timed.items())
    return {arm: timed.get(arm, per_flop * flops[arm]) for arm in plan.arms}


def _modified(path: Path) -> float | None:
    try:
        return path.stat().st_mtime
    except OSError:
        return None
