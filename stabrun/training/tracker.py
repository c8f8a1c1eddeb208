"""W&B as a projection of the record: the files are the truth, and a failure of W&B stops no run.

Online, a run is sent while it trains. Offline nobody looks at it before it is over, and nothing is imported or sent
until then: `stabrun.training.offline` has it written.
"""

import atexit
import logging
import os
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass
from netrc import NetrcParseError, netrc
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from stabrun.config import Config, TrackerConfig, run_id
from stabrun.model.counts import parameters
from stabrun.record.jsonl import parse_line
from stabrun.record.metrics import flatten
from stabrun.record.run_dir import RunDir, row_fault
from stabrun.record.schema import Row, Summary
from stabrun.record.synced import OFFLINE, ONLINE, SyncState, digest, file_digest, forget
from stabrun.record.watched import Watched
from stabrun.text import count_text, run_name, warn

os.environ.setdefault("WANDB_SILENT", "true")


WAIT = 60.0  # seconds that the end of a run, or of a study, waits for W&B at most
SHORT_WAIT = 5.0  # the same after an interruption
POLL = 0.5  # seconds between two looks for new rows
DISABLED = "disabled"  # the mode of W&B that sends and writes nothing
TRIES = 5  # times that the server is asked for what it has: it may need a moment to count


class Tracker:
    """Sends the rows of `metrics.jsonl` to W&B under the run's own id, so that a resumed run is the same W&B run.

    In a thread, which reads them from the file: the training never waits for W&B. Rows from before a resume are sent
    again, and a server ignores steps that it has. The first failure is reported, and disables tracking. Offline it only
    notes that the W&B run is to be written again.
    """

    def __init__(self, tracker: TrackerConfig, identity: "Identity", files: RunDir) -> None:
        self.tracker, self.identity, self.files = tracker, identity, files
        self.read, self.steps = 0, 0  # bytes of the record that were read; the step after the last row that was sent
        self.run: Any = None
        self.over, self.lost = threading.Event(), False
        self.ending: tuple[Summary, int] | None = None
        self.thread = threading.Thread(target=self._work, daemon=True)
        if self.tracker.name == "wandb":
            forget(self.files.path)
            if wandb_mode() not in (OFFLINE, DISABLED):
                self.thread.start()

    def _work(self) -> None:
        try:
            self.run = open_run(self.tracker, self.identity, self.files)
            atexit.register(self._at_exit)  # after W&B's own, which it precedes
            self.run.define_metric("train/loss", summary="min", step_metric="step")
            self.steps = self.run.starting_step
            while not self.over.wait(POLL):
                self._log_new()
            self._log_new()
            if self.ending:
                self._finish(*self.ending)
            else:
                self.run.finish(exit_code=1)
        except Exception as error:  # of W&B, its transport or its process
            self._lose(f"W&B logging disabled ({reason(error)}). Training continues")
            if has_ended(service()):
                end_service()

    def _log_new(self) -> None:
        for row in self._new_rows():
            if row["step"] >= self.steps:
                self._log(row)
        if has_ended(service()):  # W&B goes on in silence
            raise ChildProcessError("its process has ended")

    def _log(self, row: Row) -> None:
        log_row(self.run, row, self.tracker)
        self.steps = row["step"] + 1

    def _new_rows(self) -> Iterator[Row]:
        """The rows that were added to the record; all of them if it was cut since."""
        if not self.files.metrics.exists():
            return
        with open(self.files.metrics, "rb") as file:
            file.seek(max(0, self.read - 1))
            if self.read and file.read(1) != b"\n":
                file.seek(0)
                self.read = 0
            for line in file:
                if not line.endswith(b"\n"):
                    return
                self.read += len(line)
                row = parse_line(line)
                if row is not None and row_fault(row) is None:
                    yield row

    def finish(self, summary: Summary, interrupted: bool) -> None:
        """Send the summary and close the W&B run; exit code 130 marks an interrupted run. Waits `WAIT` at most."""
        self.ending = summary, 130 if interrupted else 0
        self._end(SHORT_WAIT if interrupted else WAIT)

    def abandon(self) -> None:
        """Close the W&B run as a failed one. After a rewind another one follows: W&B cannot replace rows."""
        self._end(SHORT_WAIT)

    def _end(self, seconds: float) -> None:
        if not self.thread.is_alive():
            return
        self.over.set()
        self.thread.join(seconds)
        atexit.unregister(self._at_exit)
        if self.thread.is_alive():
            self._lose(f"W&B has not taken the run within {seconds:.0f} s. Its record is complete")
            end_service()

    def _finish(self, summary: Summary, exit_code: int) -> None:
        run, metrics = self.run, self.files.metrics
        run.summary.update({key: value for key, value in summary.items() if value is not None})
        run.finish(exit_code=exit_code)
        self._log_new()
        mode = wandb_mode()
        if mode == ONLINE and (has := steps_at_server(run, self.steps)) < self.steps:
            return self._lose(f"W&B has {has} of {self.steps} rows. The record is complete")
        SyncState(
            mode,
            self.tracker.entity,
            self.tracker.project,
            steps=self.steps,
            size=metrics.stat().st_size,
            sha256=file_digest(metrics),
            summary=digest(summary),
        ).save(self.files.path)

    def _lose(self, text: str) -> None:
        """Report the first failure."""
        if not self.lost:
            self.lost = True
            warn(f"{text}; `stabrun upload {self.files.path}` sends the rest.")

    def _at_exit(self) -> None:
        """Let a program that ends without `finish` not wait for W&B."""
        if self.thread.is_alive():
            self.over.set()
            self.thread.join(SHORT_WAIT)
            if self.thread.is_alive():
                end_service()


def reason(error: Exception) -> str:
    """The kind and the first line of an error."""
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}".rstrip(": ")


def steps_at_server(run: Any, expected: int) -> int:
    """The step after the last row that the server has of a finished run; 0 if it does not say.

    W&B's process drops what a server refuses, as with a key that is no longer valid, and reports nothing.
    """
    import wandb

    steps = 0
    for _ in range(TRIES):
        try:
            steps = wandb.Api(timeout=10).run(f"{run.entity}/{run.project}/{run.id}").lastHistoryStep + 1
        except Exception:  # of W&B or its transport: then it is not known to have anything
            return steps
        if steps >= expected:
            break
        time.sleep(1.0)
    return steps


def within(seconds: float, action: Callable[[], None]) -> bool:
    """Call an action of W&B in a thread, and wait for it at most so long. Whether it ended; raises what it raised."""
    errors = list[Exception]()

    def act() -> None:
        try:
            action()
        except Exception as error:
            errors.append(error)

    thread = threading.Thread(target=act, daemon=True)
    thread.start()
    thread.join(seconds)
    if errors:
        raise errors[0]
    if thread.is_alive():
        end_service()
    return not thread.is_alive()


def service() -> subprocess.Popen[bytes] | None:
    """W&B's process of this one; None if it is not known. There is no public way to it."""
    from wandb.sdk import wandb_setup

    connection = getattr(getattr(wandb_setup, "_singleton", None), "_connection", None)
    found = getattr(getattr(connection, "_proc", None), "_process", None)
    return found if isinstance(found, subprocess.Popen) else None


def has_ended(process: subprocess.Popen[bytes] | None) -> bool:
    return process is not None and process.poll() is not None


def end_service() -> None:
    """Kill W&B's process, unless a run of the caller's own uses it: W&B waits for it when the program ends."""
    import wandb

    process = service()
    if process is not None and wandb.run is None:
        process.kill()
        with suppress(Exception):  # the process has ended: W&B shall know it, and start another one for another run
            wandb.teardown()


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
        return OFFLINE if mode == "dryrun" else mode  # the old name
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
