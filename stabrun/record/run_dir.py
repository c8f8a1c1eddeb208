"""A run directory: the names of its files, how they are read and written, and the state of the run."""

import fcntl
import json
import math
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, cast

from stabrun.config import RESULT, Config, UserError, config_yaml, differences, marked, read_config
from stabrun.record import checkpoints
from stabrun.record.disk import REMEDIES, writing
from stabrun.record.jsonl import (
    append_line,
    check_text,
    checked_text,
    dumps,
    is_number,
    read_checked,
    read_last,
    read_lines,
    sealed,
    write_atomic,
    write_checked,
)
from stabrun.record.metrics import is_value
from stabrun.record.schema import (
    COMPLETE,
    EMPTY,
    FAILED,
    FORMAT,
    INTERRUPTED,
    OVER,
    RUNNING,
    STOPPED,
    CheckpointFacts,
    Event,
    Row,
    Summary,
)
from stabrun.record.types import wrong_field
from stabrun.record.watched import Watched

ENDS = COMPLETE, STOPPED, INTERRUPTED  # events whose step is the number of rows, as is that of a start
GOES_BACK = "damaged", "rewind"  # events after which there may be fewer rows than before
WRITTEN_AGAIN = "Delete it: the command that trains the run writes it again."


class RunDir:
    """The files of one run. Reading creates no file; only the process that holds the lock writes."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config_file = path / "config.yaml"
        self.watched_file = path / "watch.json"
        self.environment_file = path / "environment.json"
        self.tokenizer_file = path / "tokenizer.json"
        self.metrics = path / "metrics.jsonl"
        self.events_file = path / "events.jsonl"
        self.summary_file = path / "summary.json"
        self.ramp_file = path / "ramp.json"
        self.checkpoints = path / "checkpoints"
        self.lock_file = path / ".lock"

    def rows(self) -> Iterator[Row]:
        """The rows of `metrics.jsonl`; a last line that is still being written is left out.

        Raises UserError at a damaged line, at a row without step or training loss, or if later rows were lost.
        """
        end, done, least = 0, 0, self.least_steps()
        for line in read_lines(self.metrics):
            if line.value is not None:
                done = check_row(line.value, self.metrics)["step"] + 1
                yield line.value
            elif line.terminated:
                raise UserError(f"{self.metrics} is damaged: the line at byte {end} is not as it was written.")
            end = line.end
        if done < least:
            raise UserError(f"{self.metrics} is damaged: {too_few(done, least)}.")

    def readable_rows(self) -> Iterator[tuple[Row | str, int]]:
        """Each row of `metrics.jsonl`, or a sentence about a line that holds none, and the byte after it.

        At last a sentence if later rows were lost.
        """
        end, done, least = 0, 0, self.least_steps()
        for count, line in enumerate(read_lines(self.metrics), 1):
            if not line.terminated:
                yield f"line {count} is incomplete; it was left out.", line.end
            elif line.value is None or row_fault(line.value):
                yield f"line {count} is not a row of a record; it was left out.", line.end
            else:
                yield line.value, line.end
                done = line.value["step"] + 1
            end = line.end
        if done < least:
            yield f"{too_few(done, least)}.", end

    def least_steps(self) -> int:
        """Updates that the record has had, and still has unless it is damaged: of the summary, or else of the events.

        A run that goes back to an older checkpoint may have fewer.
        """
        try:
            if summary := self.final_summary():
                return int(summary.get("steps") or 0)
        except UserError:
            pass  # the events tell, too
        least = 0
        for event in self.events():
            kind, step = event.get("event"), event.get("step")
            if kind in GOES_BACK:
                least = 0
            elif kind in ENDS or (kind in ("start", "checkpoint") and not self.watched_file.is_file()):
                least = step if type(step) is int else 0
        return least

    def last_row(self) -> Row | None:
        """The last complete row; None if there is none. Raises UserError if it is damaged."""
        return check_row(row, self.metrics) if (row := read_last(self.metrics)) else None

    def steps_done(self) -> int:
        """Updates recorded so far; 0 if none can be read."""
        try:
            return int((self.last_row() or {})["step"]) + 1
        except (OSError, UserError, KeyError):
            return 0

    def events(self) -> list[Event]:
        """The events of `events.jsonl`; lines that a kill cut short are skipped."""
        return [cast(Event, line.value) for line in read_lines(self.events_file) if line.value is not None]

    def faults(self) -> list[str]:
        """Sentences about what cannot be read of the events and the summary, and what is missing at their end."""
        name, events = self.events_file.name, self.events()
        lines = [count for count, line in enumerate(read_lines(self.events_file), 1) if line.value is None]
        found = [f"{name}: line {count} is damaged or incomplete; it was left out." for count in lines]
        try:
            summary = self.final_summary()
        except UserError as error:
            return [*found, str(error)]
        if summary and events and not lines and events[-1].get("event") not in OVER:
            found.append(f"{name}: its end is missing: it does not tell that the run is {summary['status']}.")
        return found

    def starts(self) -> list[int]:
        """The step of each start of the run."""
        steps = [event.get("step") for event in self.events() if event.get("event") == "start"]
        return [step for step in steps if isinstance(step, int)]

    def restarts(self) -> list[int]:
        """The steps at which the run was resumed. The first start of a watched run may be at any step."""
        return [step for step in self.starts()[self.watched_file.is_file() :] if step > 0]

    def steps_per_second(self) -> float | None:
        """Speed of the last start; None if unknown.

        From the modification times of the lock, opened at the start, and of the record: one clock for both. Unknown
        between the lock and the event of the start, which says from which step it goes on.
        """
        try:
            starts = self.starts()
            files = self.lock_file, self.events_file, self.metrics
            began, told, now = (file.stat().st_mtime for file in files)
        except OSError:
            return None
        if told < began:
            return None
        steps = self.steps_done() - starts[-1] if starts else 0
        return steps / (now - began) if steps > 0 and now > began else None

    def seconds_spent(self) -> float:
        """Wall-clock time of all starts; a killed start counts up to its last event."""
        total, began, last = 0.0, 0.0, 0.0
        for event in self.events():
            if not isinstance(event.get("time"), (int, float)):
                continue
            if event.get("event") == "start":
                total, began = total + last - began, event["time"]
            last = event["time"]
        return max(0.0, total + last - began)

    def error(self) -> str | None:
        """The error that ended the last start, if one did."""
        last = (self.events() or [{}])[-1]
        return str(last.get("error")) if last.get("event") == FAILED else None

    def summary(self) -> Summary | None:
        """What `summary.json` holds; None if there is none. UserError if it is damaged.

        Fields that another version did not write are added empty.
        """
        if not self.summary_file.is_file():
            return None
        facts = read_checked(self.summary_file, WRITTEN_AGAIN)
        known = {name: value for name, value in facts.items() if value is not None}
        if wrong := wrong_field(known, Summary):
            what = f"{wrong} is {str(known[wrong])[:40]!r}"
            raise UserError(f"{self.summary_file} is damaged: {what}. {WRITTEN_AGAIN}")
        return cast(Summary, EMPTY | known)

    def write_summary(self, summary: Summary) -> None:
        write_checked(self.summary_file, cast(dict[str, Any], summary))

    def final_summary(self) -> Summary | None:
        """The summary of a run that is over; None for any other."""
        summary = self.summary()
        return summary if summary and summary.get("status") in OVER else None

    def state(self) -> str:
        """`running`, `complete`, `stopped`, `interrupted` or `failed`."""
        if summary := self.final_summary():
            return str(summary["status"])
        return RUNNING if self.is_locked() else INTERRUPTED if self.error() is None else FAILED

    def config(self, to_train: bool = False) -> Config:
        """The recorded configuration.

        Raises UserError if it is damaged or, `to_train`, of a newer version, or if the run is a watched one.
        """
        if self.watched_file.is_file() and not self.config_file.is_file():
            raise UserError(
                f"{self.path}: a run that stabrun.watch recorded has no configuration: its model and data are not "
                "stabrun's own. Only runs of `stabrun train` can be trained again, evaluated or sampled from."
            )
        if to_train:
            refuse_newer(self.environment_file, self.environment().get("format", FORMAT))
        check_text(self.config_file, "Restore it, or train again in another run_dir.")
        return read_config(self.config_file, to_train)

    def watched(self) -> Watched | None:
        """What `watch.json` holds; None if this is not a watched run. UserError if it is damaged."""
        own = self.config_file.is_file() or not self.watched_file.is_file()
        return None if own else Watched.read(self.watched_file)

    def write_watched(self, watched: Watched) -> None:
        """Write `watch.json`. UserError if the one of an earlier start is of a newer version."""
        if before := self.watched():
            refuse_newer(self.watched_file, before.format)
        watched.write(self.watched_file)

    def is_run(self) -> bool:
        """Whether the directory holds a run: the configuration of one of stabrun, or what a watched one has."""
        return self.config_file.is_file() or self.watched_file.is_file()

    def checkpoint_step(self) -> int | None:
        """The updates that the newest complete checkpoint holds; of a watched run, that of its events."""
        if self.watched_file.is_file():
            newest = self.checkpoint_before(math.inf)
            return newest and newest[0]
        return next(iter(checkpoints.steps(self.checkpoints)), None)

    def checkpoint_before(self, step: float) -> tuple[int, Path] | None:
        """The newest checkpoint that holds no update after `step`: its updates and path. None if there is none.

        From the events; of their paths, which are relative to `checkpoints/` or to the working directory, those that
        exist. A path inside the run directory begins as `self.path` does.
        """
        found: tuple[int, Path] | None = None
        here = self.path.absolute()
        for event in self.events():
            updates, name = event.get("step"), event.get("path")
            if event.get("event") != "checkpoint" or not isinstance(updates, int) or not isinstance(name, str):
                continue
            if not name or updates > step + 1 or (found and updates < found[0]):
                continue
            path = next((path for path in (self.checkpoints / name, Path(name)) if path.exists()), None)
            if path and path.is_absolute() and path.is_relative_to(here):
                path = self.path / path.relative_to(here)
            found = (updates, path) if path else found
        return found

    def healthy_checkpoint(self, step: float | None) -> CheckpointFacts | None:
        """The checkpoint before the last healthy step of a verdict, as `summary.json` names it."""
        found = None if step is None else self.checkpoint_before(step)
        if found is None:
            return None
        updates, path = found
        inside = path.relative_to(self.path) if path.is_relative_to(self.path) else path
        return {"step": updates, "path": str(inside)}

    def environment(self) -> dict[str, Any]:
        """What `environment.json` holds; empty if there is none. UserError if it is damaged."""
        return read_checked(self.environment_file, WRITTEN_AGAIN) if self.environment_file.exists() else {}

    def keep_environment(self, facts: dict[str, Any]) -> None:
        """Write the environment of the first start; later ones do not change it."""
        if not self.environment_file.exists():
            write_checked(self.environment_file, {"format": FORMAT, **facts})

    def keep_tokenizer(self, definition: str) -> None:
        """Write the tokenizer at the first start, so that the directory alone suffices to encode and decode text."""
        if not self.tokenizer_file.exists():
            write_atomic(self.tokenizer_file, definition)

    def refuse_other_data(self, now: str) -> None:
        """Raise UserError if the run began on data of another hash than `now`."""
        before = self.environment().get("data_hash") if self.environment_file.exists() else now
        if before != now:
            raise UserError(
                f"run_dir={self.path}: the run was started on other data (hash {before}, now {now}). "
                "Restore the data, or choose another run_dir."
            )

    def refuse_other_run(self, config: Config) -> None:
        """Raise UserError if the directory holds anything but this experiment, or cannot be a directory."""
        with naming("run_dir", self.path):
            recorded = self.config_file.exists()
        if recorded:
            before, now = marked(self.config(to_train=True), RESULT), marked(config, RESULT)
            longer = {**before, "train.steps": now["train.steps"]} == now
            how = f", and train.extends={self.path} to go on from this run" if longer else ""
            if differing := differences((before, now)):
                raise UserError(f"run_dir={self.path}: contains a run with {differing}. Choose another run_dir{how}.")
        elif self.path.is_dir() and any(item != self.lock_file for item in self.path.iterdir()):
            raise UserError(f"run_dir={self.path}: not empty, and not a run directory.")

    def rewound_file(self, number: int) -> Path:
        """The rows that the rewind of this number, from 1, removed from `metrics.jsonl`."""
        return self.path / f"rewound_{number}.jsonl"

    def rewinds(self) -> list[int]:
        """The step that each rewind went back to. A rewind that a kill interrupted may have two events."""
        found = {event.get("number"): event.get("to") for event in self.events() if event.get("event") == "rewind"}
        return [step for number, step in found.items() if isinstance(number, int) and isinstance(step, int)]

    def is_locked(self) -> bool:
        """Whether a process is training the run. Tried by a shared lock, released at once."""
        try:
            with open(self.lock_file, "rb") as lock:
                fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except FileNotFoundError:
            return False
        except BlockingIOError:
            return True
        return False

    @contextmanager
    def hold(self, key: str = "run_dir", busy: str = "another process is training it now") -> Iterator["RunWriter"]:
        """Hold the directory, created if necessary, for this process only, and yield its writer.

        Raises UserError, which names `key`, if it cannot be written to, or is held (`busy`).
        """
        with naming(key, self.path):
            self.path.mkdir(parents=True, exist_ok=True)
            refuse_links(key, self.path, "*", f"{self.checkpoints.name}/*")
            lock = open(self.lock_file, "w")  # its errors are of the directory; those of the caller are not
        with lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise UserError(f"{key}={self.path}: {busy}.") from error
            try:
                yield RunWriter(self)
            finally:  # closing it would not, while a process that was forked in between has it open, too
                fcntl.flock(lock, fcntl.LOCK_UN)

    @contextmanager
    def lock(self, config: Config) -> Iterator["RunWriter"]:
        """Hold the directory as that of a run of this configuration.

        Raises UserError as `hold` and `refuse_other_run` do.
        """
        with self.hold() as writer:
            self.refuse_other_run(config)
            if not self.config_file.exists():
                write_atomic(self.config_file, checked_text(config_yaml(config)))
            yield writer


class RunWriter:
    """Writes `metrics.jsonl` and `events.jsonl` of the run whose lock this process holds."""

    def __init__(self, run: RunDir) -> None:
        self.run = run
        self.file: IO[str] | None = None

    def cut(self, step: int) -> tuple[list[Row], int]:
        """Truncate the metrics to the rows 0 … `step` − 1. Returns those, and the number of rows removed.

        Raises UserError, before anything is removed, if the file does not hold the rows.
        """
        rows, end, lines = self._first_rows(lambda count, _: count < step)
        if [row.get("step") for row in rows if is_number(row.get("train/loss"))] != list(range(step)):
            raise UserError(
                f"{self.run.metrics} does not contain the {step} steps of its checkpoint in order; "
                f"restore it, or remove {self.run.path} to train again from the start."
            )
        self._truncate(end)
        return rows, lines - len(rows)

    def keep_rewound(self, step: int, number: int) -> None:
        """Copy the rows from `step` on to `rewound_N.jsonl`, before they are cut."""
        self.sync()
        _, end, _ = self._first_rows(lambda count, _: count < step)
        with open(self.run.metrics, "rb") as rows:
            rows.seek(end)
            write_atomic(self.run.rewound_file(number), rows.read())

    def cut_from(self, step: int) -> list[Row]:
        """Truncate the metrics to the rows before `step`, however many there are, and return those.

        Raises UserError, before anything is removed, if one of them is damaged.
        """
        rows, end, _ = self._first_rows(lambda _, row: row_fault(row) is None and row["step"] < step)
        for row in self.run.rows():  # raises at damage, such as a line that ended the first rows early
            if row["step"] >= step:
                break
        self._truncate(end)
        return rows

    def _first_rows(self, keeps: Callable[[int, Row], bool]) -> tuple[list[Row], int, int]:
        """The rows up to the first that `keeps`, given their number before and a row, does not, or the first damage.

        Also the byte after them, and the number of all rows before the damage.
        """
        rows, end, count, whole = list[Row](), 0, 0, True
        for line in read_lines(self.run.metrics):
            if line.value is None:
                break
            count, whole = count + 1, whole and keeps(len(rows), line.value)
            if whole:
                rows.append(line.value)
                end = line.end
        return rows, end, count

    def _truncate(self, end: int) -> None:
        if self.run.metrics.exists():
            os.truncate(self.run.metrics, end)

    def write(self, row: Row) -> None:
        if self.file is None:
            self.file = open(self.run.metrics, "a", buffering=1, encoding="utf-8")
        with writing(self.run.metrics):
            self.file.write(sealed(dumps(row)) + "\n")

    def sync(self) -> None:
        """Wait until the rows are on disk: a checkpoint must never be ahead of its record."""
        if self.file is not None:
            with writing(self.run.metrics):
                self.file.flush()
                os.fsync(self.file.fileno())

    def event(self, kind: str, **facts: Any) -> None:
        """Append to `events.jsonl`: what happened, when (Unix seconds), and `facts`."""
        append_line(self.run.events_file, {"event": kind, "time": round(time.time(), 3), **facts})

    def close(self) -> None:
        if self.file is not None:
            with writing(self.run.metrics):
                self.file.close()
            self.file = None


def row_fault(row: dict[str, Any]) -> str | None:
    """What keeps an object from being a row of `metrics.jsonl`, or None."""
    if type(row.get("step")) is not int or abs(row["step"]) >= 2**53 or not is_number(row.get("train/loss")):
        return f"step or train/loss is missing in the row {json.dumps(row)[:60]}"
    for key, value in row.items():
        if type(value) is not float and not is_value(key, value):
            return f"{key} is not a number at step {row['step']}"
    return None


def too_few(done: int, least: int) -> str:
    return f"it ends after {done} steps, and {least} were recorded"


def check_row(row: dict[str, Any], path: Path) -> Row:
    """The row. Raises UserError, naming the file, if it has no step or training loss."""
    if fault := row_fault(row):
        raise UserError(f"{path}: {fault}.")
    return row


def refuse_newer(file: Path, written: Any) -> None:
    """Raise UserError if the format of a record is not one that this version writes."""
    if written != FORMAT:
        raise UserError(f"{file}: format {written} was written by a newer version of stabrun; use that version.")


def refuse_links(key: str, directory: Path, *patterns: str) -> None:
    """Raise UserError if a path in a directory is a link out of it: nothing is written elsewhere.

    The directory itself may be a link.
    """
    here = os.path.realpath(directory)
    for item in sorted(path for pattern in patterns for path in directory.glob(pattern)):
        if item.is_symlink() and not Path(os.path.realpath(item)).is_relative_to(here):
            raise UserError(
                f"{key}={directory}: {item.relative_to(directory)} is a link to a place outside, where nothing is "
                "written. Remove the link; the directory as a whole may be a link."
            )


@contextmanager
def naming(key: str, directory: Path) -> Iterator[None]:
    """Turn the error of a path that cannot be a directory into a UserError that names its key."""
    try:
        yield
    except OSError as error:
        if error.errno in REMEDIES:
            raise
        why = "not a directory" if isinstance(error, (FileExistsError, NotADirectoryError)) else error.strerror
        raise UserError(f"{key}={directory}: {why}.") from error
