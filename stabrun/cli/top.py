"""`stabrun top`: a live view of a run or a study on a terminal, from its files alone; nothing is written."""

import math
import time
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console, Group
from rich.live import Live
from rich.text import Text

from stabrun.cli.judge import Follower, grown
from stabrun.cli.status import run_facts, run_lines, study_lines
from stabrun.record.run_dir import RunDir
from stabrun.record.schema import RUNNING, Row
from stabrun.record.study_dir import StudyDir, find
from stabrun.study.live_table import COLORS, MARKS, LiveTable, bar, percent
from stabrun.study.search import next_run
from stabrun.study.snapshot import Snapshot, SnapshotReader
from stabrun.text import aligned, shown
from stabrun.verdict.growth import Growth
from stabrun.verdict.judge import Verdict
from stabrun.verdict.wording import short, signal_lines, spikes_line

POLL = 0.3  # seconds between two readings of a study
IDLE = 5.0  # seconds without any worker after which a study counts as ended: one may be between two cells
BLOCKS = "▁▂▃▄▅▆▇█"
CURVE, SITES, ALARMS = 60, 8, 8  # characters of the loss curve; sites and alarms shown


def top(directory: Path) -> int:
    """Show a run or a study until it is over; once if standard output is no terminal. Returns 130 after Ctrl-C.

    Raises UserError if the directory holds neither, or its record is damaged.
    """
    found = find(directory)
    console = Console(markup=False, emoji=False, highlight=False)
    try:
        if isinstance(found, StudyDir):
            watch_study(SnapshotReader(found.path), console)
        elif console.is_terminal:
            watch_run(found, console)
        else:
            view = RunView(found)
            for row in found.rows():
                view.add(row)
            for line in view.lines(CURVE):
                console.print(line, soft_wrap=True)
    except KeyboardInterrupt:
        return 130
    return 0


class RunView:
    """What is shown of a run: its rows so far, each read once."""

    def __init__(self, run: RunDir) -> None:
        self.run, self.follower, self.growth = run, Follower(run), Growth()
        self.verdict: Verdict | None = None

    def add(self, row: Row | None) -> None:
        """Take a row; None begins again, as the record was truncated or replaced."""
        if row is None:
            self.follower, self.growth, self.verdict = Follower(self.run), Growth(), None
            return
        self.follower.judge.add(row)
        self.growth.add(row)

    def facts(self) -> dict[str, Any]:
        """The state of the run, with a verdict that is at most a hundredth of its rows old."""
        if self.follower.judge.losses and (self.verdict is None or self.follower.due):
            self.verdict = self.follower.conclude()
        return run_facts(self.run, self.verdict)

    def lines(self, width: int) -> Iterator[Text]:
        """The view in `width` columns."""
        facts, losses = self.facts(), self.follower.judge.losses
        head, *state = run_lines(self.run, facts)
        yield Text(shown(head), style="bold")
        if facts["steps"]:
            share = min(1.0, facts["step"] / facts["steps"])
            yield Text(f"{bar(share, max(1, min(width, CURVE) - 5))} {percent(share)}", no_wrap=True)
        if losses:
            yield Text(sparkline(losses, min(width, CURVE)), style="cyan", no_wrap=True)
        verdict = facts["verdict"]
        color = COLORS[MARKS.get(verdict["verdict"], "?")] if verdict else ""
        yield from (Text(shown(line), style=color if "loss init" in line else "") for line in state)
        if grown_most := self.growth.most(SITES):
            yield Text("output norms that grew most", style="dim")
            rows = [[site.site, f"{site.first:.3g} → {site.now:.3g}", f"×{site.factor:.3g}"] for site in grown_most]
            yield from (Text(shown(f"  {line}"), no_wrap=True, overflow="ellipsis") for line in aligned(rows))
        if verdict and (verdict["signals"] or verdict["spikes"]):
            alarms = [line for _, line in islice(signal_lines(verdict["signals"]), ALARMS)]
            yield from (Text(shown(line), style="yellow") for line in (*spikes_line(verdict), *alarms))


def watch_run(run: RunDir, console: Console) -> None:
    """Show a run until no process trains it any more."""
    view, ended = RunView(run), False
    with Live(console=console, auto_refresh=False) as live:

        def drawn() -> bool:
            """Draw what was read. True if all was, after the run had ended."""
            nonlocal ended
            before, ended = ended, run.state() != RUNNING
            if ended:
                view.verdict = None  # not to be that of some rows ago
            live.update(Group(*view.lines(console.width)), refresh=True)
            return before and ended

        for row in grown(run.metrics, drawn):
            view.add(row)


def watch_study(reader: SnapshotReader, console: Console) -> None:
    """Show a study until all of its cells are trained, or nobody trains any; at last, or at once, its state."""
    if console.is_terminal:
        table, active = LiveTable(reader), time.monotonic()
        try:
            while not finished(snapshot := table.update()) and time.monotonic() - active < IDLE:
                if not all(attempt.owner_gone for attempt in snapshot.running):
                    active = time.monotonic()
                time.sleep(POLL)
        finally:
            table.close()
    for line in study_lines(reader.read()):
        console.print(line, soft_wrap=True)


def finished(snapshot: Snapshot) -> bool:
    """Whether all cells are trained, and a search plans no further ones."""
    plan = snapshot.plan
    return len(snapshot.ended) == len(plan.cells) and next_run(plan, snapshot.rows, plan.cells) is None


def sparkline(losses: Sequence[float], width: int) -> str:
    """The first loss, the curve of the medians of equal stretches, and the last one: `7.500 █▅▃▂▁▁▁ 1.623`.

    A stretch with a value that is not finite is a `×`.
    """
    first, last = short(losses[0]), short(losses[-1])
    parts = np.array_split(np.asarray(losses), min(len(losses), max(1, width - len(first) - len(last) - 2)))
    levels = [float(np.median(part)) if np.isfinite(part).all() else math.nan for part in parts]
    finite = [level for level in levels if math.isfinite(level)]
    low, high = min(finite, default=0.0), max(finite, default=0.0)
    scale = (len(BLOCKS) - 1) / (high - low) if high > low else 0.0
    curve = "".join(BLOCKS[round((level - low) * scale)] if math.isfinite(level) else "×" for level in levels)
    return f"{first} {curve} {last}"
