"""W&B as a projection of the record: the file is the truth, and no fault of W&B's stops a run."""

import logging
import os
from collections.abc import Callable, Iterable
from dataclasses import asdict
from netrc import NetrcParseError, netrc
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from stabrun.config import Config, TrackerConfig
from stabrun.record.run_dir import RunDir
from stabrun.record.schema import Row, Summary
from stabrun.record.synced import OFFLINE, ONLINE, Sent, digest, file_digest, forget, note
from stabrun.text import run_name, warn

os.environ.setdefault("WANDB_SILENT", "true")


class Tracker:
    """Sends rows to W&B under the run's own id, so that a resumed run is the same W&B run.

    Rows written before a resume are sent again: an offline run is thereby whole, and a server drops the steps that it
    has. Any exception of W&B's is reported once and ends the tracking, not the run.
    """

    def __init__(self, config: Config, run_id: str, run_dir: RunDir, earlier: Iterable[Row]) -> None:
        self.config: TrackerConfig = config.tracker
        self.run_dir, self.steps = run_dir, 0
        self.there = 0  # rows that W&B has; asked once, for each question waits for W&B's own process
        self.run: Any = None
        if self.config.name == "wandb":
            self._guard(lambda: self._start(config, run_id, run_dir, earlier))

    def _start(self, config: Config, run_id: str, run_dir: RunDir, earlier: Iterable[Row]) -> None:
        forget(run_dir.path)
        self.run = opened_run(config, run_id, run_dir.path)
        self.there = self.run.step or 0
        self.run.define_metric("train/loss", summary="min", step_metric="step")
        for row in earlier:
            self._log(row)

    def row(self, row: Row) -> None:
        if self.run is not None:
            self._guard(lambda: self._log(row))

    def _log(self, row: Row) -> None:
        if row["step"] >= self.there:
            self.run.log(projection(row, self.config.norms_every), step=row["step"])
        self.steps = row["step"] + 1

    def finish(self, summary: Summary, interrupted: bool) -> None:
        """Put the run's summary beside W&B's own and close it; exit code 130 marks an interrupted run."""
        if self.run is not None:
            self._guard(lambda: self._finish(summary, 130 if interrupted else 0))

    def _finish(self, summary: Summary, exit_code: int) -> None:
        self.run.summary.update({key: value for key, value in summary.items() if value is not None})
        self.run.finish(exit_code=exit_code)
        self.run = None
        metrics = self.run_dir.metrics
        size, sha256 = metrics.stat().st_size, file_digest(metrics)
        note_sent(self.config, self.run_dir.path, steps=self.steps, size=size, sha256=sha256, summary=digest(summary))

    def _guard(self, action: Callable[[], None]) -> None:
        try:
            action()
        except Exception as error:
            self.run = None
            reason = str(error).strip().split("\n")[0]
            warn(f"W&B is off from here on ({type(error).__name__}: {reason}); the record goes on.")


def opened_run(config: Config, run_id: str, directory: Path) -> Any:
    """The W&B run of a run: its name, group and configuration, and `step` as the axis of its metrics."""
    run = opened(
        config.tracker,
        run_id,
        directory,
        group=config.tracker.group or config.variant,
        job_type="train",
        name=config.tracker.run_name or run_name(config.variant, config.optim.lr, config.seed),
        config=asdict(config),
    )
    run.define_metric("step")
    run.define_metric("*", step_metric="step")
    return run


def opened(tracker: TrackerConfig, run_id: str, directory: Path, **facts: Any) -> Any:
    """A W&B run under this id, the same one if it is there already; whatever became of earlier ones of this process."""
    import wandb

    logging.getLogger("wandb").setLevel(logging.ERROR)
    return wandb.init(
        id=run_id,
        resume="allow",
        mode=wandb_mode(),
        dir=str(directory),
        project=tracker.project,
        entity=tracker.entity,
        tags=tracker.tags or None,
        reinit="create_new",
        settings=wandb.Settings(
            console="off",
            disable_git=False,
            init_timeout=30,
            x_disable_stats=True,
            x_save_requirements=False,
            silent=True,
        ),
        **facts,
    )


def note_sent(tracker: TrackerConfig, directory: Path, **facts: Any) -> None:
    """Keep what was sent of a run or a study, and where to."""
    if (mode := wandb_mode()) in (ONLINE, OFFLINE):
        note(directory, Sent(mode, tracker.entity, tracker.project, **facts))


def projection(row: Row, norms_every: int) -> dict[str, float]:
    """A row as W&B takes it: scalars always; lists every `norms_every` steps, as `key/layer_03`."""
    flat: dict[str, float] = {}
    for key, value in row.items():
        if not isinstance(value, list):
            flat[key] = value if isinstance(value, int) else float(value)
        elif row["step"] % norms_every == 0:
            single = key.endswith("/head")
            flat |= {key if single else f"{key}/layer_{i:02d}": float(item) for i, item in enumerate(value)}
    return flat


def wandb_mode() -> Any:
    """WANDB_MODE where it is set; else online with an API key at hand, and offline without: never a prompt."""
    if mode := os.environ.get("WANDB_MODE"):
        return mode
    return ONLINE if has_key() else OFFLINE


def has_key() -> bool:
    return bool(os.environ.get("WANDB_API_KEY")) or _in_netrc()


def _in_netrc() -> bool:
    """Whether `wandb login` has left a key for the server in use."""
    host = urlsplit(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname or ""
    try:
        return netrc(os.environ.get("NETRC")).authenticators(host) is not None
    except (OSError, NetrcParseError):
        return False
