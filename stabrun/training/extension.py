"""`train.extends`: a longer run that begins from the checkpoint of a shorter one.

Only if the shorter run's learning rates are those of the longer one, step by step, so that the longer run is, to the
bit, the one that would have been trained from the start.
"""

import shutil
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from stabrun.config import RESULT, Config, UserError, differences, marked, run_id
from stabrun.record import checkpoints
from stabrun.record.jsonl import dumps, sealed, write_atomic
from stabrun.record.run_dir import RunDir, RunWriter
from stabrun.record.schema import Row
from stabrun.training.checkpoint import INCOMPLETE, damage
from stabrun.training.schedule import learning_rate


@dataclass(frozen=True)
class Beginning:
    """What a longer run takes over: rows and a checkpoint of the run `run_id` in `source`."""

    source: Path
    run_id: str
    checkpoint: Path
    rows: list[Row]

    def write(self, record: RunWriter) -> None:
        """Begin the record of the longer run with it, unless another process has trained that run meanwhile."""
        target, incomplete = record.run, record.run.checkpoints / INCOMPLETE
        if checkpoints.steps(target.checkpoints):
            return
        write_atomic(target.metrics, "".join(sealed(dumps(row)) + "\n" for row in self.rows))
        shutil.rmtree(target.checkpoints, ignore_errors=True)
        shutil.copytree(self.checkpoint, incomplete)
        incomplete.rename(target.checkpoints / self.checkpoint.name)
        record.event("extended", run=self.run_id, path=str(self.source), step=len(self.rows))


def beginning(config: Config, target: RunDir, data_hash: str) -> Beginning | None:
    """What this run takes over from the run `train.extends`; None if it has a checkpoint of its own.

    Raises UserError if that run is another experiment, is being trained, or has no checkpoint that can be used.
    """
    if config.train.extends is None or checkpoints.steps(target.checkpoints):
        return None
    source = RunDir(Path(config.train.extends))
    shorter = shorter_config(config, source)
    source.refuse_other_data(data_hash)
    step, path = newest_shared(config, shorter, source)
    rows = list(islice(source.rows(), step))
    if [row["step"] for row in rows] != list(range(step)):
        raise UserError(f"train.extends={source.path}: metrics.jsonl does not contain the {step} steps of {path.name}.")
    every = config.train.val_every
    if step == shorter.train.steps and not (every and step % every == 0):
        rows[-1].pop("val/loss", None)  # this validation was the one after its last step
    return Beginning(source.path, run_id(shorter), path, rows)


def shorter_config(config: Config, source: RunDir) -> Config:
    """The configuration of the run that is extended. UserError if more than its length differs."""
    if not source.is_run():
        raise UserError(f"train.extends={source.path}: not a run directory.")
    if source.is_locked():
        raise UserError(f"train.extends={source.path}: another process is training it now.")
    shorter = source.config(to_train=True)
    ours, theirs = marked(config, RESULT), marked(shorter, RESULT)
    if others := differences(({**theirs, "train.steps": ours["train.steps"]}, ours)):
        raise UserError(f"train.extends={source.path}: only train.steps may differ; that run has {others}.")
    if config.train.steps <= shorter.train.steps:
        raise UserError(
            f"train.steps={config.train.steps}: must be above {shorter.train.steps}, the steps of the run in "
            f"train.extends={source.path}."
        )
    return shorter


def newest_shared(config: Config, shorter: Config, source: RunDir) -> tuple[int, Path]:
    """The newest whole checkpoint up to which both runs have the same learning rates: its updates and path."""
    found = checkpoints.steps(source.checkpoints)
    most = next(
        (step for step in range(max(found, default=0)) if learning_rate(config, step) != learning_rate(shorter, step)),
        max(found, default=0),
    )
    for step, path in found.items():
        if step <= most and damage(path) is None:
            return step, path
    kept = ", ".join(str(step) for step in sorted(found)) or "none"
    raise UserError(
        f"train.extends={source.path}: schedule.kind={config.schedule.kind} has the same learning rates in both runs "
        f"up to step {most} only, and that run has checkpoints after these steps: {kept}."
    )
