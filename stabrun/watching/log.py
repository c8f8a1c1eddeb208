"""The record of a watched run: its files, its verdict and what the caller wants to be told."""

import json
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from stabrun.config import TrackerConfig, UserError
from stabrun.record.disk import sentence
from stabrun.record.jsonl import jsonable
from stabrun.record.nowhere import NoRunDir, NoWriter
from stabrun.record.run_dir import RunDir, naming
from stabrun.record.schema import EMPTY, INTERRUPTED, WRITTEN, Row, Summary
from stabrun.record.watched import Watched
from stabrun.text import warn
from stabrun.training.offline import write_run
from stabrun.training.tracker import Tracker, watched_identity
from stabrun.verdict.judge import Judge, Verdict
from stabrun.verdict.rule import DIVERGED, RECOVERED
from stabrun.verdict.wording import verdict_line
from stabrun.watching.backlog import Backlog
from stabrun.watching.exchange import from_first, is_first

STOP, WARN = "stop", "warn"
Policy = str | Callable[[Any], Any] | None
BUSY = "another process, or a watch that has not been closed, writes to it now"
JUDGED_AGAIN = 1.01  # growth of the record after which it is judged again: that costs time in proportion to the rows


class Log:
    """Writes rows and events, judges them, and applies the policies.

    A policy is "stop" (`stopped` becomes true), "warn" (a line on standard error), a function of what was found, which
    may return "stop" or "warn", or None. Raises UserError if `out` holds another record.

    With several ranks, only the first has `out`; the others learn from it what the record holds, so that all judge
    alike. `device` is that of the model.
    """

    def __init__(
        self,
        out: Path | None,
        watched: Watched,
        first_step: int,
        overwrite: bool,
        policies: dict[str, Policy],
        device: torch.device,
    ) -> None:
        self.run = RunDir(out) if out is not None else NoRunDir()
        self.policies, self.stopped = policies, False
        self.stack = ExitStack()
        self.writer = Backlog(NoWriter(self.run))
        earlier: list[Row] = from_first(lambda: self._open(out, watched, first_step, overwrite), device)
        self.judge = Judge(watched.planned, watched.constant)
        self.last: Row = earlier[-1] if earlier else {}
        self.tokens = int(self.last.get("tokens", 0))
        self.watched = watched
        self.tracker: Tracker | None = None
        self.rows, self.judge_at = 0, 0
        self.verdict = self.judge.verdict()
        self.told: dict[str, Any] = {"on_signal": set(), "on_spike": set()}
        for row in earlier:
            self._add(row)
        self.verdict = self.judge.verdict()

    def _open(self, out: Path | None, watched: Watched, first_step: int, overwrite: bool) -> list[Row]:
        """Take hold of the record; returns its rows before the first step."""
        if out is None:
            return []
        with naming("watch: out", out):
            refuse_record(self.run, first_step, overwrite)
        writer = self.stack.enter_context(self.run.hold("watch: out", BUSY))
        self.writer = Backlog(writer)
        if overwrite:
            erase(self.run)
        earlier = writer.cut_from(first_step)
        self.run.summary_file.unlink(missing_ok=True)  # of an earlier start: the run is not over
        self.run.write_watched(watched)
        return earlier

    def start(self, step: int, facts: dict[str, Any], settings: TrackerConfig) -> None:
        """Record a start, and the environment of the first one; open the tracker."""
        self.run.keep_environment(facts)
        self.writer.event("start", step=step, environment=self.run.environment())
        if settings.name != "none":
            self.tracker = Tracker(settings, watched_identity(self.watched, settings, self.run), self.run)

    def _add(self, row: Row) -> None:
        self.judge.add(row)
        self.rows += 1

    def add(self, rows: Iterable[Row]) -> None:
        """Write rows, judge them, and apply the policies."""
        over = self.judge.over
        for row in rows:
            self.writer.write(row)
            self._add(row)
            self.last = row
        if self.rows >= self.judge_at or self.judge.over != over:
            self.judge_at = round(JUDGED_AGAIN * self.rows) + 1
            self._judge()

    def _judge(self) -> None:
        before, self.verdict = self.verdict, self.judge.verdict()
        if self.policies["on_signal"] or self.policies["on_spike"] or self.verdict.verdict == DIVERGED:
            self.verdict = self.judge.conclude(running=True)
        if (before.verdict, before.reason) != (self.verdict.verdict, self.verdict.reason):
            facts = {"verdict": self.verdict.verdict, "reason": self.verdict.reason}
            self.writer.event("verdict", step=self.verdict.horizon, **facts)
            self._tell("on_verdict", self.verdict, self.sentence(), self.verdict.verdict)
        for name, alarm in self.verdict.signals.items():
            if self._is_new("on_signal", name):
                place = f" in {alarm['site']}" if alarm["site"] else ""
                self._tell(
                    "on_signal", {"name": name, **alarm}, f"{name} left its trend{place} at step {alarm['step']}"
                )
        for step, height in (self.verdict.spikes or {"list": []})["list"]:
            if self._is_new("on_spike", step):
                self._tell(
                    "on_spike", {"step": step, "height": height}, f"the loss spiked by {height:.3g} at step {step}"
                )

    def _is_new(self, policy: str, what: Any) -> bool:
        new = what not in self.told[policy]
        self.told[policy].add(what)
        return new

    def _tell(self, name: str, found: Any, sentence: str, verdict: str = DIVERGED) -> None:
        """Apply a policy. A verdict is a reason to stop if it is `diverged`, and to warn if the run rose at all."""
        policy = self.policies[name]
        answer = policy(found) if callable(policy) else policy
        if (answer == WARN and verdict in (DIVERGED, RECOVERED)) or (answer == STOP and verdict == DIVERGED):
            if is_first():
                warn(f"{sentence}." + " Training should stop." * (answer == STOP))
            self.stopped = self.stopped or answer == STOP
        elif answer == STOP and callable(policy):
            self.stopped = True

    def sentence(self) -> str:
        """The verdict so far, with the last healthy step and the newest checkpoint before it."""
        text = verdict_line(asdict(self.verdict))
        healthy = self.verdict.last_healthy_step
        if self.verdict.first_bad_step is not None and healthy is not None:
            text += f"; last healthy step {healthy}"
            if checkpoint := self.run.healthy_checkpoint(healthy):
                text += f", newest checkpoint before it {checkpoint['path']} (step {checkpoint['step']})"
        return text

    def close(self, status: str) -> Summary:
        """Write the summary and the event that ends this start, and release the directory, even if that fails."""
        with self.stack:
            summary = self._close(status)
        if self.tracker:
            settings = self.tracker.tracker  # which a watched run does not record
            project, every = json.dumps(settings.project, ensure_ascii=False), settings.norms_every
            changes = [f"tracker.project={project}", f"tracker.norms_every={every}"]
            write_run(settings, self.tracker.files, summary, changes)
        return summary

    def _close(self, status: str) -> Summary:
        verdict: Verdict = self.judge.conclude()
        self.verdict = verdict
        steps = int(verdict.horizon) + 1
        known = {
            **EMPTY,
            "status": status,
            **asdict(verdict),
            "last_healthy_checkpoint": self.run.healthy_checkpoint(verdict.last_healthy_step),
            "lr": self.last.get("train/lr"),
            "steps": steps,
            "tokens": self.tokens,
        }
        self.writer.event(status, step=steps)
        known["seconds"] = round(self.run.seconds_spent(), 3)
        summary: Summary = jsonable({name: known[name] for name in WRITTEN if name in known})
        try:
            self.writer.close()
            self.run.write_summary(summary)
        except OSError as error:
            warn(f"watch: {sentence(error)} The end of the record in {self.run.path} is missing.")
        if self.tracker:
            self.tracker.finish(summary, status == INTERRUPTED)
        return summary


def refuse_record(run: RunDir, first_step: int, overwrite: bool) -> None:
    """Raise UserError if a directory holds a record that the run would not go on with."""
    if run.config_file.exists():
        raise UserError(f"watch: out={run.path} holds a run of `stabrun train`. Choose another directory.")
    done = run.steps_done()
    if done and not first_step and not overwrite:
        raise UserError(
            f"watch: out={run.path} holds a record up to step {done - 1}. Pass first_step={done} to go on with it "
            "(or the step of your checkpoint), overwrite=True to replace it, or another directory."
        )


def erase(run: RunDir) -> None:
    """Remove the record of an earlier run."""
    for file in (run.metrics, run.events_file, run.summary_file, run.environment_file):
        file.unlink(missing_ok=True)
