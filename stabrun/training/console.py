"""What a run shows while it goes: a live view on a terminal, plain lines elsewhere."""

import math
import os
import sys
import time
from collections.abc import Callable
from typing import Any

from rich.console import Console as Rich
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from stabrun.record.jsonl import number
from stabrun.record.metrics import by_site
from stabrun.verdict.judge import Verdict

REFRESH = 0.5  # seconds between two views on a terminal
LINES = 10  # plain lines a run


class Console:
    """Shows rows as they come. `judge` is asked for the verdict only when something is drawn."""

    def __init__(self, title: str, first: int, steps: int, judge: Callable[[], Verdict]) -> None:
        self.steps, self.judge, self.title = steps, judge, title
        self.rich = Rich(stderr=False)
        self.started, self.drawn = time.monotonic(), 0.0
        self.first_tokens: int | None = None
        self.first_norms: dict[str, float] = {}
        self.said, self.ask_at = judge(), 0
        self.live: Live | None = None
        if self.rich.is_terminal:
            self.progress = Progress(
                TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
            )
            self.task = self.progress.add_task(title, total=steps, completed=first)
            self.live = Live(self.progress, console=self.rich, auto_refresh=False, transient=True)
            self.live.start()
        else:
            self.say(title)

    def row(self, row: dict[str, Any]) -> None:
        if self.first_tokens is None:
            self.first_tokens = row["tokens"]
            self.started = time.monotonic()
        if not self.first_norms:
            self.first_norms = by_site(row, "norm/out/")
        now = time.monotonic()
        if self.live is not None:
            if now - self.drawn >= REFRESH:
                self.drawn = now
                self.progress.update(self.task, completed=row["step"] + 1)
                self.live.update(self._table(row, now), refresh=True)
        elif (row["step"] + 1) % max(1, self.steps // LINES) == 0:
            facts = self._facts(row, now)
            self.say(f"step {row['step'] + 1}/{self.steps}  " + "  ".join(f"{k} {v}" for k, v in facts.items()))

    def _facts(self, row: dict[str, Any], now: float) -> dict[str, str]:
        seconds = max(now - self.started, 1e-9)
        rate = (row["tokens"] - (self.first_tokens or 0)) / seconds
        if row["step"] >= self.ask_at:  # a verdict costs time in proportion to the rows
            self.said, self.ask_at = self.judge(), round(1.01 * row["step"]) + 1
        verdict = self.said
        facts = {
            "loss": f"{number(row['train/loss']):.4f}",
            "grad norm": f"{number(row['grad/norm']):.3g}",
            "lr": f"{row['train/lr']:.2e}",
            "tokens/s": f"{rate:,.0f}" if seconds > REFRESH else "…",
        }
        if grown := self._grown(row):
            facts["grew most"] = grown
        facts["so far"] = {"converged": "falling", "undecided": verdict.reason}.get(verdict.verdict, verdict.verdict)
        return facts

    def _grown(self, row: dict[str, Any]) -> str:
        """The site whose output norm grew most since the first row seen, and by how much."""
        ratios = {k: v / self.first_norms[k] for k, v in by_site(row, "norm/out/").items() if self.first_norms.get(k)}
        if not ratios:
            return ""
        name = max(ratios, key=lambda k: ratios[k] if math.isfinite(ratios[k]) else math.inf)
        return f"{name} ×{ratios[name]:.1f}"

    def _table(self, row: dict[str, Any], now: float) -> Table:
        table = Table.grid(padding=(0, 2))
        facts = Table.grid(padding=(0, 2))
        facts.add_row(*(f"[dim]{name}[/dim] {value}" for name, value in self._facts(row, now).items()))
        table.add_row(self.progress)
        table.add_row(facts)
        return table

    def say(self, text: str) -> None:
        """A line that stays."""
        if self.live is not None:
            self.live.console.print(text, highlight=False, markup=False)
        else:
            self._print(text)

    def _print(self, text: str) -> None:
        """A line; where nobody can read it any more the console falls silent, for a run outlives its reader."""
        try:
            print(text, flush=True)
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())

    def close(self) -> None:
        if self.live is not None:
            self.live.stop()
            self.live = None
