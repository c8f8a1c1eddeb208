"""What a report is made of: the files of a study or a run as plain data. Nothing is written."""

import csv
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

from stabrun.config import Config, UserError, run_id
from stabrun.record.jsonl import jsonable
from stabrun.record.run_dir import RunDir
from stabrun.record.schema import OVER, ArmSummary, Result, Row, StudySummary, Summary
from stabrun.record.schema import RUNNING as STILL_RUNNING
from stabrun.record.study_dir import StudyDir, find
from stabrun.record.watched import Watched
from stabrun.study.ledger import DONE, FAILED, PLANNED, RUNNING
from stabrun.study.live_table import NO_SUMMARY
from stabrun.study.plan import FRONTIER, Plan
from stabrun.study.results import result
from stabrun.study.snapshot import SnapshotReader
from stabrun.study.summary import study_summary
from stabrun.text import run_name
from stabrun.verdict.judge import Judge

WORDS = {column for column, kind in Result.__annotations__.items() if kind is str}
RUN = "run"  # the strategy of a single run


@dataclass
class StudyData:
    """A study, or a single run as a study of one, whose plan has the strategy RUN.

    `summary` is what `study.json` holds (None for a run), `rows` what `results.csv` holds, and `summaries` the
    `summary.json` of each run. `notes` are sentences about what is missing or could not be read.
    """

    directory: Path
    plan: Plan
    summary: StudySummary | None
    rows: list[Result]
    counts: dict[str, int]
    summaries: dict[str, Summary]
    notes: list[str]
    watched: Watched | None = None  # the configuration in the plan says nothing about such a run

    @property
    def partial(self) -> bool:
        """Whether more runs are to come: planned ones, or those that a search has not planned yet."""
        if self.counts[PLANNED] + self.counts[RUNNING]:
            return True
        return self.plan.strategy == FRONTIER and not all(map(self._finished, self.plan.arms))

    def _finished(self, arm: str) -> bool:
        enough = arm in self.arm_summaries and self.arm_summaries[arm].get("enough")
        return bool(enough) or sum(row["arm"] == arm for row in self.rows) >= self.plan.max_runs

    @property
    def arm_summaries(self) -> dict[str, ArmSummary]:
        """Arm → its part of `study.json`; empty for a single run."""
        return self.summary["variants"] if self.summary else {}

    def run(self, run: str) -> RunDir:
        return RunDir(self.directory) if self.plan.strategy == RUN else StudyDir(self.directory).run(run)

    def run_summary(self, run: str) -> Summary:
        """What the run's `summary.json` holds; empty if it could not be read."""
        return self.summaries.get(run, {})


def read(directory: Path) -> StudyData:
    """The study or run in a directory. Raises UserError if it holds neither."""
    found = find(directory)
    return read_study(found) if isinstance(found, StudyDir) else read_run(found)


def read_study(study: StudyDir) -> StudyData:
    snapshot, notes = SnapshotReader(study.path).read(attempts=False), list[str]()
    for cell in snapshot.cells(DONE):
        if cell.id not in snapshot.summaries:
            notes.append(f"runs/{cell.id}: the run is left out: {NO_SUMMARY}")
    try:
        summary = study.summary()
    except UserError:
        summary = None
    if summary is None:
        if snapshot.summaries:
            notes.append("study.json is missing or damaged; its content was computed again from the runs' summaries.")
        summary = jsonable(study_summary(snapshot.plan, snapshot.rows))
    rows = list(map(result, snapshot.rows))
    return StudyData(study.path, snapshot.plan, summary, rows, snapshot.counts, snapshot.summaries, notes)


def read_run(run: RunDir) -> StudyData:
    """A run. One that is not over is judged on the rows recorded so far."""
    watched, notes = run.watched(), list[str]()
    config = Config() if watched else run.config()
    facts: dict[str, Any] = {
        "run_id": run_id(config), "variant": config.variant, "lr": config.optim.lr, "seed": config.seed
    }  # fmt: skip
    if watched:
        name = run.path.resolve().name
        facts = {"run_id": name, "variant": watched.name, "lr": watched.lr, "seed": watched.seed}
    try:
        summary = run.summary()
        notes += run.faults()
    except UserError:
        summary = None
    if summary is None:
        notes.append("summary.json is missing or damaged: the run is judged on the rows recorded so far.")
        judge = Judge.of_record(run)
        for row in read_rows(run, notes):
            judge.add(row)
        steps = int(judge.steps[-1]) + 1 if judge.steps else 0
        summary = jsonable(facts | asdict(judge.conclude(running=True)) | {"status": STILL_RUNNING, "steps": steps})
    elif watched:
        summary = cast(Summary, summary | facts)
    arm = facts["variant"]
    plan = Plan(run_name(arm, facts["lr"], facts["seed"]), RUN, {arm: config})
    rows = [result({**summary, "arm": arm})]
    over = summary["status"] in OVER
    counts = {PLANNED: 0, RUNNING: int(not over), DONE: int(over), FAILED: 0}
    return StudyData(run.path, plan, None, rows, counts, {summary["run_id"]: summary}, notes, watched)


def read_results(file: Path, notes: list[str]) -> Iterator[Result]:
    """The rows of `results.csv`, with numbers parsed; a damaged row is noted and left out."""
    if not file.is_file():
        return
    with open(file, newline="", errors="replace") as lines:
        reader = csv.reader(lines)
        head = next(reader, [])
        for cells in reader:
            try:
                row = dict(zip(head, cells, strict=True))
                values = {key: text if key in WORDS else parse_number(text) for key, text in row.items()}
                yield cast(Result, values)
            except ValueError:
                notes.append(f"{file.name}: line {reader.line_num} is damaged; it was left out.")


def parse_number(text: str) -> float | int | str | None:
    """A number of `results.csv` as `study.json` holds it: a non-finite one stays a string."""
    if text in ("", "nan", "inf", "-inf"):
        return text or None
    return int(text) if text.removeprefix("-").isdigit() else float(text)


def read_rows(run: RunDir, notes: list[str]) -> Iterator[Row]:
    """The rows of `metrics.jsonl`; lines that are not rows are noted and left out."""
    name = f"{run.path.name}/{run.metrics.name}"
    if not run.metrics.is_file():
        notes.append(f"{name} is missing.")
    for row, _ in run.readable_rows():
        if isinstance(row, str):
            notes.append(f"{name}: {row}")
        else:
            yield row


def environment(study: StudyData) -> dict[str, str]:
    """The environments of all finished runs: key → its value, or all its different values."""
    values: dict[str, dict[str, None]] = {}
    for row in study.rows:
        try:
            facts = study.run(row["run_id"]).environment()
        except UserError:
            continue
        packages = facts.pop("packages", None)
        for key, value in {**facts, **(packages if isinstance(packages, dict) else {})}.items():
            values.setdefault(key, {})[value if isinstance(value, str) else json.dumps(value)] = None
    return {key: ", ".join(found) for key, found in values.items()}
