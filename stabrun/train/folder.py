"""The run directory: held by one process, used for one configuration, resumed from its checkpoint."""

import fcntl
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from stabrun.config import RESULT, Config, MistakeError, check, marked
from stabrun.observe.record import Record, read_rows, write_whole
from stabrun.train import checkpoint

LOST = object()
COMPLETE, STOPPED, INTERRUPTED, FAILED = "complete", "stopped", "interrupted", "failed"


@contextmanager
def claimed(config: Config, directory: Path) -> Iterator[Record]:
    """The run directory, made or found, held by this process alone.

    Raises MistakeError where another process holds it, it is no folder, or it holds something else.
    """
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        raise MistakeError(f"run_dir={directory}: it is not a folder.") from error
    with open(directory / ".lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise MistakeError(f"run_dir={directory}: another process is training it now.") from error
        refuse_strangers(config, directory)
        if not (directory / "config.yaml").exists():
            write_whole(directory / "config.yaml", OmegaConf.to_yaml(OmegaConf.structured(config)))
        yield Record(directory)


def refuse_strangers(config: Config, directory: Path) -> None:
    """MistakeError where `directory` holds something else than this experiment."""
    file = directory / "config.yaml"
    if file.exists():
        there, here = marked(read_config(file), RESULT), marked(config, RESULT)
        other = [f"{key}={there[key]} (here {here[key]})" for key in here if here[key] != there[key]]
        if other:
            more = f" and {len(other) - 3} more" if len(other) > 3 else ""
            raise MistakeError(
                f"run_dir={directory}: it holds a run with {', '.join(other[:3])}{more}. Name another run_dir, or none."
            )
    elif directory.is_dir() and any(item.name != ".lock" for item in directory.iterdir()):
        raise MistakeError(f"run_dir={directory}: the folder is not empty and holds no run.")


def read_config(file: Path) -> Config:
    """A recorded `config.yaml`, checked against the schema. MistakeError where it is none, or not whole."""
    try:
        recorded = OmegaConf.load(file)
        config: Any = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(Config), recorded))
        lost = [path for path in marked(config, RESULT) if OmegaConf.select(recorded, path, default=LOST) is LOST]
    except (OmegaConfBaseException, yaml.YAMLError, UnicodeDecodeError, TypeError, ValueError) as error:
        raise MistakeError(f"{file}: it is no configuration of a run.") from error
    if lost:
        raise MistakeError(f"{file}: it is not whole, for {lost[0]} is missing.")
    check(config)
    return config


def finished(directory: Path) -> dict[str, Any] | None:
    """The summary of a run that is over, or None."""
    file = directory / "summary.json"
    if not file.exists():
        return None
    summary = json.loads(file.read_text())
    return summary if summary["status"] in (COMPLETE, STOPPED) else None


def note_environment(directory: Path, facts: dict[str, Any]) -> None:
    """Keep the environment of the first start. MistakeError where the data are no longer those of that start."""
    file = directory / "environment.json"
    if not file.exists():
        write_whole(file, json.dumps(facts, indent=1) + "\n")
        return
    before, now = json.loads(file.read_text())["data_hash"], facts["data_hash"]
    if before != now:
        raise MistakeError(
            f"run_dir={directory}: the run began on other data (hash {before}, now {now}). "
            "Put them back, or name another run_dir."
        )


def resume_point(record: Record) -> tuple[int, Path | None, list[dict[str, Any]]]:
    """The updates done, their checkpoint, and the rows of the record, cut back to it."""
    found = checkpoint.latest(record.directory / "checkpoints")
    step, path = found if found else (0, None)
    return step, path, record.cut(step)


def seconds_before(directory: Path) -> float:
    """Training time of earlier starts, as far as they ended in order."""
    return sum(event.get("seconds", 0.0) for event in read_rows(directory / "events.jsonl"))
