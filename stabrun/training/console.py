"""The console output of a run: a live view on a terminal, plain lines elsewhere."""

import os
import sys
import time
from collections.abc import Callable

from rich.console import Console as RichConsole
from rich.console import Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from stabrun.record.jsonl import number
from stabrun.record.schema import Row
from stabrun.text import shown
from stabrun.verdict.growth import Growth
from stabrun.verdict.judge import Verdict

REFRESH = 0.5  # seconds between two updates of the live view
LINES = 10  # plain lines per run


class Console:
    """Shows rows as they arrive. Calls `judge` only when it draws."""

    def __init__(self, title: str, done: int, steps: int, judge: Callable[[], Verdict]) -> None:
        self.steps, self.judge = steps, judge
        self.started, self.drawn = time.monotonic(), 0.0
        self.first_tokens: int | None = None
        self.growth = Growth()
        self.verdict, self.judge_at = judge(), 0
        self.live: Live | None = None
        title, rich = shown(title), RichConsole()
        if rich.is_terminal:
            columns = (
                TextColumn("{task.description}", markup=False),
                BarColumn(),
                MofNCompleteColumn(),
                TimeRemainingColumn(),
            )
            self.progress = Progress(*columns)
            self.task = self.progress.add_task(title, total=steps, completed=done)
            self.live = Live(self.progress, console=rich, auto_refresh=False, transient=True)
            self.live.start()
        else:
            self.say(title)

    def row(self, row: Row) -> None:
        """Show a row, if it is time to."""
        now, done = time.monotonic(), row["step"] + 1
        if self.first_tokens is None:
            self.first_tokens, self.started = row["tokens"], now
        self.growth.add(row)
        if self.live is not None:
            if now - self.drawn >= REFRESH:
                self.drawn = now
                self.progress.update(self.task, completed=done)
                line = Table.grid(padding=(0, 2))
                line.add_row(*(f"[dim]{name}[/dim] {value}" for name, value in self._facts(row, now).items()))
                self.live.update(Group(self.progress, line), refresh=True)
        elif done % max(1, self.steps // LINES) == 0:
            facts = "  ".join(f"{name} {value}" for name, value in self._facts(row, now).items())
            self.say(f"step {done}/{self.steps}  {facts}")

    def _facts(self, row: Row, now: float) -> dict[str, str]:
        seconds = max(now - self.started, 1e-9)
        rate = (row["tokens"] - (self.first_tokens or 0)) / seconds
        if row["step"] >= self.judge_at:  # a verdict costs time in proportion to the rows
            self.verdict, self.judge_at = self.judge(), round(1.01 * row["step"]) + 1
        verdict = self.verdict
        facts = {
            "loss": f"{number(row['train/loss']):.4f}",
            "grad norm": f"{number(row['grad/norm']):.3g}",
            "lr": f"{row['train/lr']:.2e}",
            "tokens/s": f"{rate:,.0f}" if seconds > REFRESH else "…",
        }
        for site in self.growth.most(1):
            facts["grew most"] = f"{site.site} ×{site.factor:.1f}"
        facts["so far"] = {"converged": "falling", "undecided": verdict.reason}.get(verdict.verdict, verdict.verdict)
        return facts

    def say(self, text: str) -> None:
        """Print a line that stays."""
        if self.live is not None:
            self.live.console.print(text, highlight=False, markup=False)
            return
        try:
            print(text, flush=True)
        except OSError:  # the reader of the output is gone: stay silent, and continue the run
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())

    def close(self) -> None:
        if self.live is not None:
            self.live.stop()
            self.live = None
