"""W&B as a projection of the record: the files are the truth, and a failure of W&B stops no run."""

import logging
import os
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from netrc import NetrcParseError, netrc
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from stabrun.config import Config, TrackerConfig, run_id
from stabrun.model.counts import parameters
from stabrun.record.metrics import flatten
from stabrun.record.run_dir import RunDir
from stabrun.record.schema import Row, Summary
from stabrun.record.synced import OFFLINE, ONLINE, SyncState, digest, file_digest, forget
from stabrun.record.watched import Watched
from stabrun.text import count_text, run_name, warn

os.environ.setdefault("WANDB_SILENT", "true")


class Tracker:
    """Sends rows to W&B under the run's own id, so that a resumed run is the same W&B run.

    Rows from before a resume are sent again: the offline run is then complete, and a server ignores steps that it has.
    An exception raised by W&B is reported once and disables tracking.
    """

    def __init__(self, tracker: TrackerConfig, identity: "Identity", files: RunDir, earlier: Iterable[Row]) -> None:
        self.tracker, self.identity = tracker, identity
        self.files, self.steps = files, 0
        self.steps_at_server = 0  # asked once: each request waits for the W&B process
        self.run: Any = None
        if self.tracker.name == "wandb":
            self._guard(lambda: self._start(earlier))

    def _start(self, earlier: Iterable[Row]) -> None:
        forget(self.files.path)
        self.run = open_run(self.tracker, self.identity, self.files)
        self.steps_at_server = self.run.step or 0
        self.run.define_metric("train/loss", summary="min", step_metric="step")
        for row in earlier:
            self._log(row)

    def rewind(self, identity: "Identity", earlier: Iterable[Row]) -> None:
        """Go on in a W&B run of its own: W&B cannot replace the rows of one."""
        self.identity = identity
        if self.run is not None:
            self._guard(lambda: self.run.finish(exit_code=1))
        if self.run is not None:
            self._guard(lambda: self._start(earlier))

    def row(self, row: Row) -> None:
        if self.run is not None:
            self._guard(lambda: self._log(row))

    def _log(self, row: Row) -> None:
        if row["step"] >= self.steps_at_server:
            log_row(self.run, row, self.tracker)
        self.steps = row["step"] + 1

    def finish(self, summary: Summary, interrupted: bool) -> None:
        """Send the summary and close the W&B run; exit code 130 marks an interrupted run."""
        if self.run is not None:
            self._guard(lambda: self._finish(summary, 130 if interrupted else 0))

    def _finish(self, summary: Summary, exit_code: int) -> None:
        self.run.summary.update({key: value for key, value in summary.items() if value is not None})
        self.run.finish(exit_code=exit_code)
        self.run = None
        metrics = self.files.metrics
        SyncState(
            wandb_mode(),
            self.tracker.entity,
            self.tracker.project,
            steps=self.steps,
            size=metrics.stat().st_size,
            sha256=file_digest(metrics),
            summary=digest(summary),
        ).save(self.files.path)

    def _guard(self, action: Callable[[], None]) -> None:
        try:
            action()
        except Exception as error:
            self.run = None
            reason = str(error).strip().split("\n")[0]
            warn(f"W&B logging disabled ({type(error).__name__}: {reason}). Training continues.")


@dataclass(frozen=True)
class Identity:
    """What a run is at W&B: its id and name, and what it is grouped, tagged and described by."""

    id: str
    name: str
    group: str | None
    tags: tuple[str, ...]
    config: dict[str, Any]


def identity(config: Config, files: RunDir) -> Identity:
    """A run of stabrun. Its description also has the parameter count, and the commit and data hash of its first start;
    its tags are the variant and the size.
    """
    environment, count = files.environment(), parameters(config.model, config.data.seq_len)["total"]
    return Identity(
        wandb_id(config, files),
        config.tracker.run_name or run_name(config.variant, config.optim.lr, config.seed),
        config.tracker.group or config.variant,
        (config.variant[:64], count_text(count)),
        asdict(config)
        | {"parameters": count, "commit": environment.get("commit"), "data_hash": environment.get("data_hash")},
    )


def watched_identity(watched: Watched, tracker: TrackerConfig, files: RunDir) -> Identity:
    """A watched run. Its id is a hash of its first start, so that it stays if the directory is moved or renamed."""
    first = next(iter(files.events()), None)
    return Identity(
        digest(first or [watched.name, str(files.path.resolve())])[:12],
        tracker.run_name or run_name(watched.name, watched.lr, watched.seed),
        tracker.group,
        (watched.model[:64],) if watched.model else (),
        asdict(watched),
    )


def open_run(tracker: TrackerConfig, identity: Identity, files: RunDir) -> Any:
    """The W&B run of a run, with `step` as the axis of its metrics."""
    run = open_wandb(
        tracker,
        identity.id,
        files.path,
        tags=identity.tags,
        group=identity.group,
        job_type="train",
        name=identity.name,
        config=identity.config,
    )
    run.define_metric("step")
    run.define_metric("*", step_metric="step")
    return run


def wandb_id(config: Config, files: RunDir) -> str:
    """The `run_id`. A rerun without changes has the id of its run, and becomes a W&B run of its own, as does what
    follows a rewind.
    """
    rerun = f"{run_id(config)}-rerun"
    rewinds = len(files.rewinds())
    return (rerun if files.path.name == rerun else run_id(config)) + f"-rewind{rewinds}" * (rewinds > 0)


def open_wandb(tracker: TrackerConfig, identity: str, directory: Path, tags: tuple[str, ...] = (), **facts: Any) -> Any:
    """The W&B run with this id, resumed if it exists, in a new session of this process."""
    import wandb

    logging.getLogger("wandb").setLevel(logging.ERROR)
    return wandb.init(
        id=identity,
        resume="allow",
        mode=wandb_mode(),
        dir=str(directory),
        project=tracker.project,
        entity=tracker.entity,
        tags=list(dict.fromkeys([*tracker.tags, *tags])) or None,
        reinit="create_new",
        settings=wandb.Settings(
            console="off", init_timeout=30, x_disable_stats=True, x_save_requirements=False, silent=True
        ),
        **facts,
    )


def log_row(run: Any, row: Row, tracker: TrackerConfig) -> None:
    """Send a row: scalars always, lists over layers every `tracker.norms_every` steps, as `key/layer_03`."""
    run.log(flatten(row, lists=row["step"] % tracker.norms_every == 0), step=row["step"])


def wandb_mode() -> Any:
    """WANDB_MODE if it is set; otherwise online with an API key and offline without. Never prompts."""
    if mode := os.environ.get("WANDB_MODE"):
        return mode
    return ONLINE if has_key() else OFFLINE


def has_key() -> bool:
    """Whether there is an API key, in WANDB_API_KEY or from `wandb login`, for the server in use."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    host = urlsplit(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname or ""
    try:
        return netrc(os.environ.get("NETRC")).authenticators(host) is not None
    except (OSError, NetrcParseError):
        return False
