"""One run: from a configuration to a record and a verdict."""

import math
import signal
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from stabrun.config import Config, check, run_dir, run_id
from stabrun.data import tokenizer
from stabrun.data.degenerate import Finding
from stabrun.data.shards import prepare
from stabrun.observe.initial import findings
from stabrun.record.jsonl import jsonable, write_atomic
from stabrun.record.run_dir import RunDir, RunWriter
from stabrun.record.schema import COMPLETE, FAILED, INTERRUPTED, STOPPED, Row, Summary
from stabrun.text import rate_text, warn
from stabrun.training import checkpoint
from stabrun.training.console import Console
from stabrun.training.environment import environment
from stabrun.training.schedule import unreached
from stabrun.training.tally import Tally
from stabrun.training.tracker import Tracker
from stabrun.training.trainer import Trainer
from stabrun.verdict.judge import Judge

Watch = Callable[[Row], None]

FINDINGS_SHOWN = 3  # findings about batches that the console shows per start


def train(
    config: Config, directory: Path | None = None, watch: Watch | None = None, stop: "Stop | None" = None
) -> Summary:
    """Train one run to its end, from its checkpoint if it has one. Returns its summary.

    `directory` stands in for the configuration's own; `watch` is shown each row as it comes; `stop` can be asked by
    others, where no signal reaches this process.
    Raises UserError where the configuration or the run directory does not allow it; a divergence raises nothing.
    """
    check(config)
    directory = directory or run_dir(config)
    run = RunDir(directory)
    run.refuse_other_run(config)
    data = prepare(config.data, config.model)
    run.refuse_other_data(data.manifest["hash"])
    if summary := run.final_summary():
        print(f"{directory} holds this run already; nothing is trained.")
        return summary
    trainer = Trainer(config, data)
    with run.lock(config) as record:  # another process may have begun or finished it meanwhile
        run.refuse_other_data(data.manifest["hash"])
        return run.final_summary() or Run(trainer, record, watch).start(stop)


def keep_tokenizer(directory: Path, prepared: Path) -> None:
    """Copy the tokenizer of the prepared data into the run directory, so that the record is complete by itself."""
    if not (directory / tokenizer.FILE).exists():
        write_atomic(directory / tokenizer.FILE, (prepared / tokenizer.FILE).read_bytes().decode())


class Run:
    """One start of a run: the loop, and all that look on."""

    def __init__(self, trainer: Trainer, record: RunWriter, watch: Watch | None = None) -> None:
        self.trainer, self.config, self.record = trainer, trainer.config, record
        self.run_dir = record.run
        self.environment = environment(trainer.device, trainer.data.manifest["hash"], trainer.compiled)
        self.run_dir.keep_environment(self.environment)
        keep_tokenizer(self.run_dir.path, self.trainer.data.folder)
        self.done, path = checkpoint.latest(self.run_dir.checkpoints) or (0, None)
        earlier, later = record.cut(self.done)
        if later:
            warn(
                f"{self.run_dir.path}: {later} of {self.done + later} recorded steps have no checkpoint; trained again."
            )
        if path:
            trainer.scaling.load(checkpoint.load(path, trainer.model, trainer.optimizer))
        self.judge = Judge()
        self.tally = Tally()
        for row in earlier:
            self.judge.add(row)
            self.tally.add(row)
        self.batch_findings = 0
        self.last = earlier[-1] if earlier else {"tokens": 0}
        self.val_loss = next((row["val/loss"] for row in reversed(earlier) if "val/loss" in row), None)
        self.tracker = Tracker(self.config, run_id(self.config), self.run_dir, earlier)
        self.watches: list[Watch] = [self.record.write, self.judge.add, self.tally.add, self.tracker.row]
        self.watches += [watch] if watch else []
        self.before = {"step": self.done, "tokens": self.last["tokens"]}

    def start(self, stop: "Stop | None" = None) -> Summary:
        self.record.event("start", **self.before, environment=self.environment)
        self.open_console()
        began = time.monotonic()
        try:
            with stop or Stop() as stop:
                status = self.loop(stop)
        except Exception as error:
            self.record.event(FAILED, step=self.done, error=f"{type(error).__name__}: {error}")
            raise
        finally:
            self.console.close()
            self.record.close()
        summary = self.summary(status, time.monotonic() - began)
        self.run_dir.write_summary(summary)
        self.tracker.finish(summary, status == INTERRUPTED)
        return summary

    def open_console(self) -> None:
        config = self.config
        title = f"{config.variant}  lr {rate_text(config.optim.lr)}  seed {config.seed}  → {self.run_dir.path}"
        self.console = Console(title, self.done, config.train.steps, self.judge.verdict)
        if sentence := unreached(config):
            self.console.say(sentence)

    def loop(self, stop: "Stop") -> str:
        """Update until done, diverged beyond return or stopped; returns the status.

        A step's values are read after the next one is launched, so that the device never waits for the reader.
        """
        steps, every = self.config.train.steps, self.config.train.checkpoint_every
        late: Row | None = None
        while self.done < steps:
            row = self.launch(self.done)
            self.done += 1
            self.note(late)
            if self.over:
                return STOPPED
            late, stopping, last = row, stop.asked, self.done == steps
            if stopping or last or (every and self.done % every == 0):
                self.note(late)
                late = None
                if not self.over and (every or stopping):
                    self.save()
            if self.over:
                return STOPPED
            if stopping and not last:
                return INTERRUPTED
        return COMPLETE

    @property
    def over(self) -> bool:
        """Whether nothing that follows could change the verdict, as far as the configuration lets that end the run."""
        return self.judge.over or (self.config.train.stop_early and self.judge.certain is not None)

    def launch(self, step: int) -> Row:
        """Queue one update; its row holds the snapshot in place of the values that the device still works on."""
        train, every = self.config.train, self.config.train.val_every
        snapshot = self.trainer.step(step)
        row = {
            "step": step,
            "tokens": (step + 1) * train.batch_size * self.config.data.seq_len,
            "train/lr": self.trainer.rate,
            "snapshot": snapshot,
        }
        for finding in self.trainer.findings:
            self.report_batch(step, finding)
        if step + 1 == train.steps or (every and (step + 1) % every == 0):
            row["val/loss"] = self.trainer.validate()
        return row

    def report_batch(self, step: int, finding: Finding) -> None:
        """Write a finding about a batch to the events, and the first few to the console."""
        where = self.trainer.data.train.where(finding.position)
        self.record.event("batch", step=step, finding=finding.sentence, sequence=finding.sequence, where=where)
        self.batch_findings += 1
        if self.batch_findings <= FINDINGS_SHOWN:
            more = "; further findings are in events.jsonl only" if self.batch_findings == FINDINGS_SHOWN else ""
            self.console.say(f"step {step}: {finding.sentence} ({where}){more}")

    def note(self, row: Row | None) -> None:
        """Read a row's values and show it to all who look on."""
        if row is None:
            return
        row |= row.pop("snapshot").read()
        self.last, self.val_loss = row, row.get("val/loss", self.val_loss)
        if row["step"] == 0 and "grad/norm_by_layer" in row:
            for text in findings(row, self.config.model.vocab_size):
                self.console.say(text)
                self.record.event("init", finding=text)
        for watch in self.watches:
            watch(row)
        self.console.row(row)

    def save(self) -> None:
        self.record.sync()
        folder = self.run_dir.checkpoints
        trainer = self.trainer
        path = checkpoint.save(folder, self.done, trainer.model, trainer.optimizer, trainer.scaling.state())
        self.record.event("checkpoint", step=self.done, path=path.name)

    def summary(self, status: str, seconds: float) -> Summary:
        """The fields of `summary.json`; also closes the record with an event."""
        config, tokens = self.config, self.last["tokens"]
        verdict = self.judge.conclude(config.train.steps)
        rate = round((tokens - self.before["tokens"]) / seconds, 1)
        self.record.event(status, step=verdict.horizon + 1, seconds=round(seconds, 3), tokens_per_second=rate)
        val = self.val_loss
        summary = {
            "run_id": run_id(config),
            "variant": config.variant,
            "lr": config.optim.lr,
            "seed": config.seed,
            "status": status,
            **asdict(verdict),
            **self.tally.facts(),
            "val_loss": val,
            "val_perplexity": None if val is None else math.exp(min(val, 700.0)),
            "steps": verdict.horizon + 1,
            "tokens": tokens,
            "seconds": round(self.run_dir.seconds_spent(), 3),
            "tokens_per_second": rate,
        }
        told: Summary = jsonable(summary)
        return told


class Stop:
    """Turns the first SIGINT or SIGTERM into a wish (`asked`) to stop after the step; a second one stops at once."""

    def __init__(self) -> None:
        self.asked = False

    def __enter__(self) -> "Stop":
        self.before = {which: signal.signal(which, self.ask) for which in (signal.SIGINT, signal.SIGTERM)}
        return self

    def ask(self, which: int, frame: Any) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True

    def __exit__(self, *exception: object) -> None:
        for which, handler in self.before.items():
            signal.signal(which, handler)
