"""The run directory: held by one process, used for one configuration, resumed from its checkpoint."""

import errno
import fcntl
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from stabrun.config import RESULT, Config, UserError, marked, read_config
from stabrun.record.jsonl import Record, read_events, read_json, write_atomic

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EFBIG)  # faults of the disk, not of a name
COMPLETE, STOPPED, INTERRUPTED, FAILED = "complete", "stopped", "interrupted", "failed"


@contextmanager
def claimed(config: Config, directory: Path) -> Iterator[Record]:
    """The run directory, made or found, held by this process alone.

    Raises UserError where another process holds it, it is no folder, or it holds something else.
    """
    with named("run_dir", directory):
        directory.mkdir(parents=True, exist_ok=True)
    with open(directory / ".lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(f"run_dir={directory}: another process is training it now.") from error
        refuse_strangers(config, directory)
        if not (directory / "config.yaml").exists():
            write_atomic(directory / "config.yaml", OmegaConf.to_yaml(OmegaConf.structured(config)))
        yield Record(directory)


def refuse_strangers(config: Config, directory: Path) -> None:
    """UserError where `directory` holds something else than this experiment, or can be no folder."""
    file = directory / "config.yaml"
    with named("run_dir", directory):
        recorded = file.exists()
    if recorded:
        there, here = marked(read_config(file), RESULT), marked(config, RESULT)
        other = [f"{key}={there[key]} (here {here[key]})" for key in here if here[key] != there[key]]
        if other:
            more = f" and {len(other) - 3} more" if len(other) > 3 else ""
            raise UserError(
                f"run_dir={directory}: it holds a run with {', '.join(other[:3])}{more}. Name another run_dir, or none."
            )
    elif directory.is_dir() and any(item.name != ".lock" for item in directory.iterdir()):
        raise UserError(f"run_dir={directory}: the folder is not empty and holds no run.")


@contextmanager
def named(key: str, directory: Path) -> Iterator[None]:
    """Turn the error of a path that can be no folder into a UserError that names its key."""
    try:
        yield
    except OSError as error:
        if error.errno in FULL:
            raise
        why = "it is not a folder" if isinstance(error, (FileExistsError, NotADirectoryError)) else error.strerror
        raise UserError(f"{key}={directory}: {why}.") from error


def finished(directory: Path) -> dict[str, Any] | None:
    """The summary of a run that is over, or None."""
    file = directory / "summary.json"
    if not file.exists():
        return None
    summary = read_json(file)
    return summary if summary.get("status") in (COMPLETE, STOPPED) else None


def refuse_other_data(directory: Path, now: str) -> None:
    """UserError where the data, of hash `now`, are no longer those of the run's first start."""
    file = directory / "environment.json"
    before = read_json(file).get("data_hash") if file.exists() else now
    if before != now:
        raise UserError(
            f"run_dir={directory}: the run began on other data (hash {before}, now {now}). "
            "Put them back, or name another run_dir."
        )


def note_environment(directory: Path, facts: dict[str, Any]) -> None:
    """Keep the environment of the first start."""
    if not (directory / "environment.json").exists():
        write_atomic(directory / "environment.json", json.dumps(facts, indent=1) + "\n")


def seconds_spent(directory: Path) -> float:
    """Time of all starts by the clock of their events; of one that was killed, up to its last event."""
    total, began, last = 0.0, 0.0, 0.0
    for event in read_events(directory / "events.jsonl"):
        if not isinstance(event.get("time"), (int, float)):
            continue
        if event.get("event") == "start":
            total, began = total + last - began, event["time"]
        last = event["time"]
    return max(0.0, total + last - began)
