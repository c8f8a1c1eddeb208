"""One run: from a configuration to a record and a verdict."""

import math
import time
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import cast

from stabrun.config import Config, UserError, check, run_dir, run_id
from stabrun.data.degenerate import Finding
from stabrun.data.shards import Prepared, prepare
from stabrun.model.switches import leak
from stabrun.observe.initial import findings
from stabrun.record import checkpoints
from stabrun.record.jsonl import jsonable
from stabrun.record.nowhere import NoRunDir
from stabrun.record.run_dir import RunDir, RunWriter
from stabrun.record.schema import COMPLETE, FAILED, INTERRUPTED, STOPPED, Row, Summary
from stabrun.text import masked, rate_text, warn
from stabrun.training import checkpoint
from stabrun.training.compilation import graphs
from stabrun.training.console import Console
from stabrun.training.environment import environment
from stabrun.training.extension import beginning
from stabrun.training.launcher import launch
from stabrun.training.memory import refuse_too_large
from stabrun.training.place import Place
from stabrun.training.precision import pick_device
from stabrun.training.ranks import Ranks, joined
from stabrun.training.rewinds import Levels, allowed, points, target
from stabrun.training.schedule import unreached
from stabrun.training.stop import Stop
from stabrun.training.tally import Tally
from stabrun.training.tracker import Tracker, identity
from stabrun.training.trainer import Trainer
from stabrun.training.usage import Usage
from stabrun.verdict.judge import DIVERGED, Judge

Watch = Callable[[Row], None]

REWIND = "rewind"  # how the loop ends if the run goes back to an earlier state
FINDINGS_SHOWN = 3  # findings about batches that the console shows per start


def train(
    config: Config, directory: Path | None = None, watch: Watch | None = None, stop: Stop | None = None
) -> Summary:
    """Train one run to its end, from its checkpoint if there is one. Returns its summary.

    `directory` replaces the configuration's run directory; `watch` is called with each row, or with the newest one from
    time to time if there are several ranks; `stop` lets the caller interrupt the run if no signal reaches this process.
    Raises UserError if the configuration or the run directory does not allow the run, OSError if a rank is lost. A
    divergence raises nothing.
    """
    place = Place.here()
    config = place.of_rank(config)
    check(config)
    run = RunDir(directory or run_dir(config)) if place.first else NoRunDir()
    run.refuse_other_run(config)
    data = prepare(config.data, config.model)
    run.refuse_other_data(data.manifest["hash"])
    if (summary := run.final_summary()) and not place.started:
        print(f"{run.path}: this run is already finished; nothing is trained.")
        newest = next(iter(checkpoints.steps(run.checkpoints).values()), None)
        if why := newest and checkpoint.damage(newest):
            warn(f"{newest}: {why}; delete {run.summary_file}, and the same command writes it again.")
        return summary
    first_part = beginning(config, run, data.manifest["hash"]) if place.first else None
    if place.count < config.train.ranks:
        return launched(config, run, watch, stop)
    with joined(place, pick_device(config.train, place)) as ranks:
        refuse_different_data(ranks, data)
        trainer = Trainer(config, data, ranks)
        with run.lock(config) as record:  # another process may have started or finished it meanwhile
            run.refuse_other_data(data.manifest["hash"])
            summary = ranks.from_first(run.final_summary())
            if first_part and not summary:
                first_part.write(record)
            return summary or Run(trainer, record, watch).start(stop or Stop(patient=place.started))


def launched(config: Config, run: RunDir, watch: Watch | None, stop: Stop | None) -> Summary:
    """Train by `train.ranks` processes of this machine. Returns the summary."""
    device = pick_device(config.train)
    if device.type == "cpu":  # which they share; of GPUs each rank has one, and asks it
        refuse_too_large(config, device, config.train.ranks)

    def follow() -> None:
        if watch and (row := run.last_row()):
            watch(row)

    with stop or Stop() as stop:
        summary: Summary = launch(config.train.ranks, train, (config, run.path), stop, follow)
    return summary


def refuse_different_data(ranks: Ranks, data: Prepared) -> None:
    """Raise UserError if a machine has prepared other tokens than that of the first rank."""
    here, first = data.manifest["hash"], ranks.from_first(data.manifest["hash"])
    if here != first:
        raise UserError(
            f"{data.folder}: rank {ranks.place.number} has other tokens than rank 0 (hash {here}, not {first}). "
            "Give all machines the same text."
        )


class Run:
    """One start of a run: the training loop, and what observes it."""

    def __init__(self, trainer: Trainer, record: RunWriter, watch: Watch | None = None) -> None:
        self.trainer, self.config, self.record = trainer, trainer.config, record
        self.run_dir, self.ranks = record.run, trainer.ranks
        self.environment = environment(
            trainer.device,
            trainer.data.manifest["hash"],
            ranks=trainer.ranks.count,
            compiled=trainer.compiled,
            attention=trainer.attention,
        )
        self.run_dir.keep_environment(self.environment)
        self.run_dir.keep_tokenizer(trainer.data.tokenizer())
        self.batch_findings = 0
        lost = self.restore()
        if lost:
            warn(f"{self.run_dir.path}: {lost} of {self.done + lost} recorded steps have no checkpoint; trained again.")
        self.tracker = Tracker(self.config.tracker, identity(self.config, self.run_dir), self.run_dir)
        self.usage = Usage(self.config, trainer.device)
        self.watch = watch
        self.saved_at = time.monotonic()
        self.resumed_at = {"step": self.done, "tokens": self.tokens}

    def restore(self) -> int:
        """Go on from the newest checkpoint. Returns the number of later rows, which are removed.

        Everything that the loop changes is set here: it depends on the checkpoint and the rows before it only.
        """
        trainer = self.trainer
        self.done, path = checkpoint.latest(self.run_dir.checkpoints, self.pass_over) or (0, None)
        earlier, lost = self.record.cut(self.done)
        state = checkpoint.load(path, trainer.model, trainer.optimizer) if path else {}
        trainer.load(checkpoint.copy_first(self.ranks, trainer.model, trainer.optimizer, state))
        self.judge, self.tally, self.levels = Judge.of(self.config), Tally(), Levels(self.config.train.outlier_loss)
        for row in earlier:
            self.judge.add(row)
            self.tally.add(row)
            self.levels.add(row)
        self.rows, self.tokens = self.done, earlier[-1]["tokens"] if earlier else 0
        self.val_loss = next((row["val/loss"] for row in reversed(earlier) if "val/loss" in row), None)
        self.share_progress()
        return lost

    def pass_over(self, path: Path, why: str) -> None:
        """Report a damaged checkpoint, and rename it."""
        aside = checkpoint.set_aside(path)
        warn(f"{path}: {why}; an older checkpoint is used. The damaged one is kept as {aside.name}.")
        self.record.event("damaged", path=path.name, why=why)

    def share_progress(self) -> None:
        """Give each rank what the first one knows from its record: all take the same decisions afterwards."""
        names = "done", "rows", "tokens", "val_loss", "judge", "tally", "levels"
        vars(self).update(self.ranks.from_first({name: getattr(self, name) for name in names}))

    def start(self, stop: Stop | None = None) -> Summary:
        """Train until the run is over or interrupted. Writes its summary and returns it."""
        self.record.event("start", **self.resumed_at, environment=self.environment)
        self.open_console()
        began = time.monotonic()
        try:
            with stop or Stop() as stop:
                stop.be_at_once(self.trainer.compiled)  # until the first step is: that takes up to minutes
                while (status := self.loop(stop)) == REWIND:
                    self.rewind()
        except Exception as error:
            self.record.event(FAILED, step=self.done, error=masked(f"{type(error).__name__}: {error}"))
            raise
        finally:
            self.console.close()
            self.record.close()
        summary = self.summary(status, time.monotonic() - began)
        self.run_dir.write_summary(summary)
        self.tracker.finish(summary, status == INTERRUPTED)
        shared: Summary = self.ranks.from_first(summary)
        return shared

    def open_console(self) -> None:
        config = self.config
        title = f"{config.variant}  lr {rate_text(config.optim.lr)}  seed {config.seed}  → {self.run_dir.path}"
        self.console = Console(title, self.done, config.train.steps, lambda: self.judge.verdict())
        for sentence in filter(None, (unreached(config), leak(config.model))):
            self.console.say(sentence)

    def loop(self, stop: Stop) -> str:
        """Update until the last step, a divergence or a request to stop. Returns the status.

        The values of a step are read after the next step is launched, so that the device never waits for the reader.
        """
        steps, pending = self.config.train.steps, cast(Row | None, None)  # launched and not yet read
        if self.done == 0 and self.is_point(0):
            self.save()
        while self.done < steps:
            launched = self.launch(self.done)
            stop.be_at_once(False)
            self.done += 1
            self.read(pending)
            if ending := self.ending():
                return ending
            pending, stopping, last = launched, self.ranks.any(stop.asked), self.done == steps
            point = self.is_point(self.done)
            if stopping or last or point or self.checkpoint_is_due():
                self.read(pending)
                pending = None
                if ending := self.ending(thorough=last or point):
                    return ending
                if stopping or point or self.saves:
                    self.save()
            if stopping and not last:
                return INTERRUPTED
        return COMPLETE

    @property
    def saves(self) -> bool:
        return self.config.train.checkpoint_every > 0 or self.config.train.checkpoint_minutes > 0

    def checkpoint_is_due(self) -> bool:
        every, minutes = self.config.train.checkpoint_every, self.config.train.checkpoint_minutes
        late = minutes > 0 and self.ranks.any(time.monotonic() - self.saved_at >= 60 * minutes)
        return late or (every > 0 and self.done % every == 0)

    def is_point(self, step: int) -> bool:
        """Whether the state after `step` updates is one that the run may go back to."""
        return bool(points(self.config, [step]))

    def ending(self, thorough: bool = False) -> str | None:
        """How the loop ends after the rows that were read: STOPPED or REWIND; None if it goes on.

        It stops if no later step can change the verdict, or `train.stop_early` allows it to end. It is rewound instead,
        and after a spike, if that is still allowed; `thorough`: also if the verdict so far is `diverged`, which costs
        time in proportion to the rows.
        """
        over = self.judge.over or (self.config.train.stop_early and self.judge.certain is not None)
        if not allowed(self.config, self.trainer.rewinds):
            return STOPPED if over else None
        diverged = over or (thorough and self.judge.verdict().verdict == DIVERGED)
        return REWIND if diverged or self.levels.spike else None

    def rewind(self) -> None:
        """Go back to an earlier state, and on from there with other batches."""
        verdict, trainer = self.judge.verdict(), self.trainer
        why = f"{verdict.verdict} ({verdict.reason})" if verdict.verdict == DIVERGED else "a spike"
        saved = self.ranks.from_first(points(self.config, checkpoints.steps(self.run_dir.checkpoints)))
        to = target(saved, verdict.last_healthy_step)
        rewinds = trainer.rewinds.back(to, self.rows)
        self.record.event("rewind", number=rewinds.count, step=self.rows - 1, to=to, why=why)
        self.console.say(f"step {self.rows - 1}: {why}; back to the state after {to} steps, on with other batches")
        self.tracker.abandon()
        if self.ranks.first:
            folder = self.run_dir.checkpoints
            self.record.keep_rewound(to, rewinds.count)
            checkpoint.rewind(folder, to, {"rewinds": asdict(rewinds)})
        self.restore()
        self.tracker = Tracker(self.config.tracker, identity(self.config, self.run_dir), self.run_dir)

    def launch(self, step: int) -> Row:
        """Queue one update. Its row holds a snapshot instead of the values that the device is still computing."""
        train, every = self.config.train, self.config.train.val_every
        before = graphs()
        snapshot = self.trainer.step(step)
        row: Row = {
            "step": step,
            "tokens": (step + 1) * train.batch_size * self.config.data.seq_len,
            "train/lr": self.trainer.rate,
            "snapshot": snapshot,
        }
        if train.recovery == "rewind":
            row["recovery/rewinds"] = self.trainer.rewinds.count
        for finding in self.trainer.findings:
            self.report_batch(step, finding)
        if step + 1 == train.steps or (every and (step + 1) % every == 0):
            row["val/loss"] = self.trainer.validate()
        if made := graphs() - before:
            self.record.event("compiled", step=step, graphs=made)
        return row

    def report_batch(self, step: int, finding: Finding) -> None:
        """Write a finding about a batch to the events, and the first few to the console."""
        where = self.trainer.data.train.where(finding.position)
        self.record.event("batch", step=step, finding=finding.sentence, sequence=finding.sequence, where=where)
        self.batch_findings += 1
        if self.batch_findings <= FINDINGS_SHOWN:
            more = "; further findings are in events.jsonl only" if self.batch_findings == FINDINGS_SHOWN else ""
            self.console.say(f"step {step}: {finding.sentence} ({where}){more}")

    def report_outlier(self, row: Row) -> None:
        """Write an update that was left out to the events, and the first few to the console."""
        loss, norm, count = row["train/loss"], row["grad/norm"], (self.judge.outliers or 0) + 1
        self.record.event("skipped", step=row["step"], loss=loss, grad_norm=norm)
        if count <= FINDINGS_SHOWN:
            more = "; further ones are in events.jsonl only" if count == FINDINGS_SHOWN else ""
            self.console.say(
                f"step {row['step']}: update left out as an outlier (loss {loss:.4g}, gradient norm {norm:.4g}){more}"
            )

    def read(self, row: Row | None) -> None:
        """Read the values of a launched row and pass it to everything that observes the run."""
        if row is None:
            return
        row |= row.pop("snapshot").read()
        self.record.write(row)
        self.rows, self.tokens = row["step"] + 1, row["tokens"]
        self.val_loss = row.get("val/loss", self.val_loss)
        if row["step"] == 0 and "grad/norm_by_layer" in row:
            for text in findings(row, self.config.model.vocab_size):
                self.console.say(text)
                self.record.event("init", finding=text)
        if row.get("recovery/skipped"):
            self.report_outlier(row)
        for add in (self.judge.add, self.tally.add, self.levels.add, self.usage.add):
            add(row)
        if self.watch:
            self.watch(row)
        self.console.row(row)

    def save(self) -> None:
        """Save a checkpoint after the record's rows are on disk."""
        self.saved_at = time.monotonic()
        if not self.ranks.first:
            return
        self.record.sync()
        trainer, folder = self.trainer, self.run_dir.checkpoints
        path = checkpoint.save(
            folder,
            self.done,
            trainer.model,
            trainer.optimizer,
            trainer.state(),
            self.config.train.keep_checkpoints,
            partial(points, self.config),
        )
        self.record.event("checkpoint", step=self.done, path=path.name)

    def summary(self, status: str, seconds: float) -> Summary:
        """The content of `summary.json`; also writes the event that ends this start."""
        config, val = self.config, self.val_loss
        verdict = self.judge.conclude()
        rate = round((self.tokens - self.resumed_at["tokens"]) / seconds, 1)
        used = {"tokens_per_second": rate, **self.usage.facts()}
        self.record.event(status, step=self.rows, seconds=round(seconds, 3), **used)
        facts = {
            "run_id": run_id(config),
            "variant": config.variant,
            "lr": config.optim.lr,
            "seed": config.seed,
            "status": status,
            **asdict(verdict),
            "last_healthy_checkpoint": self.run_dir.healthy_checkpoint(verdict.last_healthy_step),
            **self.tally.facts(),
            "val_loss": val,
            "val_perplexity": None if val is None else math.exp(min(val, 700.0)),
            "steps": self.rows,
            "tokens": self.tokens,
            "seconds": round(self.run_dir.seconds_spent(), 3),
            **used,
        }
        summary: Summary = jsonable(facts)
        return summary
