"""A study directory: the names of its files, and how those are read and written that no other module owns."""

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

from stabrun.config import UserError
from stabrun.record.jsonl import read_checked, write_checked
from stabrun.record.run_dir import RunDir
from stabrun.record.schema import StudySummary
from stabrun.record.types import wrong_field


class StudyDir:
    """The files of one study. `stabrun.study` has the formats of the plan, the ledger and `results.csv`."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.plan_file = path / "study.yaml"
        self.summary_file = path / "study.json"
        self.results_file = path / "results.csv"
        self.ledger = path / "ledger"
        self.runs = path / "runs"
        self.attempts = path / "attempts"
        self.worker_log = path / "worker.log"
        self.lock_file = path / ".lock"

    def is_study(self) -> bool:
        return self.plan_file.is_file()

    def run(self, run_id: str) -> RunDir:
        """The directory of a finished run."""
        return RunDir(self.runs / run_id)

    def attempt(self, run_id: str, number: int) -> RunDir:
        """Where an attempt at a run trains; it becomes the run's directory when it is finished."""
        return RunDir(self.attempts / f"{run_id}.{number:04d}")

    def recorded_runs(self) -> list[RunDir]:
        """The finished runs that have a record, by name."""
        runs = [RunDir(path) for path in sorted(self.runs.glob("*"))]
        return [run for run in runs if run.metrics.is_file()]

    def summary(self) -> StudySummary | None:
        """What `study.json` holds; None if there is none, or if another version wrote less of it.

        Raises UserError if it is damaged.
        """
        facts = read_checked(self.summary_file) if self.summary_file.is_file() else {}
        return cast(StudySummary, facts) if wrong_field(facts, StudySummary) is None else None

    def write_summary(self, summary: StudySummary) -> None:
        write_checked(self.summary_file, cast(dict[str, Any], summary))

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Wait for the right to change the plan. The ledger needs no lock."""
        with open(self.lock_file, "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield

    def refuse_other_content(self) -> None:
        """Raise UserError if the directory holds something, and not a study."""
        if self.path.is_dir() and any(item != self.lock_file for item in self.path.iterdir()):
            raise UserError(f"study_dir={self.path}: not empty, and not a study directory.")


def find(path: Path) -> StudyDir | RunDir:
    """The study or the run in a directory. Raises UserError if it holds neither."""
    study, run = StudyDir(path), RunDir(path)
    if study.is_study():
        return study
    if run.is_run():
        return run
    needs = ", ".join((study.plan_file.name, run.config_file.name))
    missing = f"{needs} and {run.watched_file.name} are missing" if path.is_dir() else "no such directory"
    raise UserError(f"{path}: neither a study nor a run: {missing}.")
