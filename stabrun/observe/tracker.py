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
from stabrun.observe.console import warn
from stabrun.observe.sent import OFFLINE, ONLINE, Sent, digest, digests, file_digest, forget, known, note, recall
from stabrun.observe.text import run_name

os.environ.setdefault("WANDB_SILENT", "true")


class Tracker:
    """Sends rows to W&B under the run's own id, so that a resumed run is the same W&B run.

    Rows written before a resume are sent again: an offline run is thereby whole, and a server drops the steps that it
    has. Any exception of W&B's is reported once and ends the tracking, not the run.
    """

    def __init__(self, config: Config, run_id: str, directory: Path, earlier: Iterable[dict[str, Any]]) -> None:
        self.config: TrackerConfig = config.tracker
        self.directory, self.steps = directory, 0
        self.there = 0  # rows that W&B has; asked once, for each question waits for W&B's own process
        self.run: Any = None
        if self.config.name == "wandb":
            self._guard(lambda: self._start(config, run_id, directory, earlier))

    def _start(self, config: Config, run_id: str, directory: Path, earlier: Iterable[dict[str, Any]]) -> None:
        forget(directory)
        self.run = opened_run(config, run_id, directory)
        self.there = self.run.step or 0
        self.run.define_metric("train/loss", summary="min", step_metric="step")
        for row in earlier:
            self._log(row)

    def row(self, row: dict[str, Any]) -> None:
        if self.run is not None:
            self._guard(lambda: self._log(row))

    def _log(self, row: dict[str, Any]) -> None:
        if row["step"] >= self.there:
            self.run.log(projection(row, self.config.norms_every), step=row["step"])
        self.steps = row["step"] + 1

    def finish(self, summary: dict[str, Any], interrupted: bool) -> None:
        """Put the run's summary beside W&B's own and close it; exit code 130 marks an interrupted run."""
        if self.run is not None:
            self._guard(lambda: self._finish(summary, 130 if interrupted else 0))

    def _finish(self, summary: dict[str, Any], exit_code: int) -> None:
        self.run.summary.update({key: value for key, value in summary.items() if value is not None})
        self.run.finish(exit_code=exit_code)
        self.run = None
        metrics = self.directory / "metrics.jsonl"
        size, sha256 = metrics.stat().st_size, file_digest(metrics)
        note_sent(self.config, self.directory, steps=self.steps, size=size, sha256=sha256, summary=digest(summary))

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
        mode=_mode(),
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


def track_study(tracker: TrackerConfig, directory: Path, results: list[dict[str, Any]], answer: dict[str, Any]) -> None:
    """Put a study's results, as a table, and its answer into a summary run in its group, where they are new."""
    try:
        import wandb

        if known(directory, _mode(), tracker).summary == digest([results, answer]):
            return
        send_study(tracker, directory, results, answer)
        wandb.teardown()  # waits until all of it is on the disk
    except Exception as error:
        warn(f"W&B has no summary of the study ({type(error).__name__}: {error}); {directory}/study.json has.")


def send_study(
    tracker: TrackerConfig,
    directory: Path,
    results: list[dict[str, Any]],
    answer: dict[str, Any],
    figures: Iterable[Path] = (),
) -> None:
    """The summary run of a study, under the name of its folder; each sending of it is a step."""
    # An offline table waits in W&B's data folder for its upload: it belongs to the study, and not to the user's home.
    os.environ.setdefault("WANDB_DATA_DIR", str(directory.resolve() / "wandb"))
    import wandb

    name = directory.resolve().name
    columns: list[Any] = list(results[0]) if results else []
    group = tracker.group or name
    before = recall(directory)
    run = opened(tracker, name, directory, group=group, job_type="study", name=f"{name}: the answer")
    step = max(run.step or 0, before.steps if before else 0)
    table = wandb.Table(columns, [list(row.values()) for row in results], allow_mixed_types=True)
    run.log({"results": table, **images(figures)}, step=step)
    run.summary.update(flat(answer))
    run.finish()
    sent = digest([results, answer])
    note_sent(tracker, directory, steps=step + 1, summary=sent, figures=digests(figures))


def images(figures: Iterable[Path]) -> dict[str, Any]:
    """Figures as W&B shows them, `figures/<name>`."""
    import wandb

    return {f"figures/{file.stem}": wandb.Image(str(file)) for file in figures}


def note_sent(tracker: TrackerConfig, directory: Path, **facts: Any) -> None:
    """Keep what was sent of a run or a study, and where to."""
    if (mode := _mode()) in (ONLINE, OFFLINE):
        note(directory, Sent(mode, tracker.entity, tracker.project, **facts))


def flat(value: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """The leaves of nested objects, `a/b/c` → value, without lists and what is not known."""
    found: dict[str, Any] = {}
    for name, item in value.items():
        if isinstance(item, dict):
            found |= flat(item, f"{prefix}{name}/")
        elif item is not None and not isinstance(item, list):
            found[prefix + name] = item
    return found


def projection(row: dict[str, Any], norms_every: int) -> dict[str, float]:
    """A row as W&B takes it: scalars always; lists every `norms_every` steps, as `key/layer_03`."""
    flat: dict[str, float] = {}
    for key, value in row.items():
        if not isinstance(value, list):
            flat[key] = value if isinstance(value, int) else float(value)
        elif row["step"] % norms_every == 0:
            single = key.endswith("/head")
            flat |= {key if single else f"{key}/layer_{i:02d}": float(item) for i, item in enumerate(value)}
    return flat


def _mode() -> Any:
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
