"""What a report is made of: the files of a study or a run as plain data. They are read; nothing is written."""

import csv
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from stabrun.config import Config, UserError, run_id
from stabrun.record.jsonl import jsonable
from stabrun.record.run_dir import RunDir
from stabrun.record.schema import OVER, Row
from stabrun.record.schema import RUNNING as STILL
from stabrun.record.study_dir import StudyDir, find
from stabrun.study.ledger import DONE, FAILED, PLANNED, RUNNING
from stabrun.study.plan import FRONTIER, Plan, load
from stabrun.study.results import COLUMNS, result
from stabrun.study.snapshot import SnapshotReader
from stabrun.study.summary import study_summary
from stabrun.text import run_name
from stabrun.verdict.judge import Judge

WORDS = "run_id", "arm", "variant", "status", "verdict", "reason", "lenient", "standard", "strict", "first_bad_site"
NUMBERS = tuple(column for column in COLUMNS if column not in WORDS)
RUN = "run"


@dataclass
class Source:
    """A study, or a run as a study of one.

    `told` is what `study.json` holds, `rows` what `results.csv` does, and `summaries` has each run's `summary.json`.
    `notes` are sentences about what could not be read, or is not there yet.
    """

    directory: Path
    name: str
    strategy: str
    told: Any
    arms: dict[str, Config]
    rows: list[Row]
    counts: dict[str, int]
    plan: Plan | None = None
    summaries: dict[str, Any] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    @property
    def partial(self) -> bool:
        """Whether more runs are to come: planned ones, or, in a search, such as are not planned yet."""
        if self.counts[PLANNED] + self.counts[RUNNING]:
            return True
        return self.plan is not None and self.plan.strategy == FRONTIER and not all(map(self._finished, self.arms))

    def _finished(self, arm: str) -> bool:
        assert self.plan is not None
        told = self.told["variants"].get(arm, {})
        return bool(told.get("enough")) or sum(row["arm"] == arm for row in self.rows) >= self.plan.max_runs

    @property
    def variants(self) -> Row:
        """Arm → what `study.json` says of it; empty for a single run."""
        variants: Row = self.told.get("variants", {})
        return variants

    def run(self, run_id: str) -> RunDir:
        return RunDir(self.directory) if self.strategy == RUN else StudyDir(self.directory).run(run_id)

    def summary(self, run: str) -> Row:
        summary: Row = self.summaries.get(run, {})
        return summary


def opened(directory: Path) -> Source:
    """The study or run in a directory. UserError where it holds neither."""
    found = find(directory)
    return a_study(found) if isinstance(found, StudyDir) else a_run(found)


def a_study(study: StudyDir) -> Source:
    directory = study.path
    plan, notes = load(directory), list[str]()
    look = SnapshotReader(directory).read(plan)
    for run, entry in look.entries.items():
        if entry.status == DONE and run not in look.summaries:
            notes.append(f"runs/{run}/summary.json holds no summary; the run's signals and spikes are left out.")
    try:
        told = study.summary()
    except UserError:
        told = None
    if told is None:
        if look.summaries:
            notes.append("study.json is missing or damaged; what it would hold was worked out anew from the summaries.")
        told = jsonable(study_summary(plan, look.rows))
    rows = list(read_results(study.results_file, notes))
    return Source(
        directory,
        plan.name,
        plan.strategy,
        told,
        plan.arms,
        rows,
        look.counts,
        plan,
        look.summaries,
        look.failed,
        notes,
    )


def a_run(run: RunDir) -> Source:
    """A run, judged on what is recorded so far where it is not over."""
    config, notes = run.config(), list[str]()
    try:
        summary = run.summary()
    except UserError:
        summary = None
    if summary is None:
        notes.append("summary.json is not there, so that the run is not over; it is judged on what is recorded so far.")
        judge = Judge()
        for row in read_rows(run, notes):
            judge.add(row)
        steps = judge.steps[-1] + 1 if judge.steps else 0
        facts = {"run_id": run_id(config), "variant": config.variant, "lr": config.optim.lr, "seed": config.seed}
        summary = jsonable(facts | asdict(judge.conclude()) | {"status": STILL, "steps": steps})
    name = run_name(config.variant, config.optim.lr, config.seed)
    rows = [result({**summary, "arm": config.variant})]
    over = summary["status"] in OVER
    counts = {PLANNED: 0, RUNNING: int(not over), DONE: int(over), FAILED: 0}
    summaries = {summary["run_id"]: summary}
    return Source(run.path, name, RUN, {}, {config.variant: config}, rows, counts, None, summaries, notes=notes)


def read_results(file: Path, notes: list[str]) -> Iterator[Row]:
    """The rows of `results.csv`, its numbers as numbers; a damaged row is noted and left out."""
    if not file.is_file():
        return
    with open(file, newline="", errors="replace") as lines:
        reader = csv.reader(lines)
        head = next(reader, [])
        for cells in reader:
            row = dict(zip(head, cells, strict=False))
            try:
                if len(cells) != len(head):
                    raise ValueError
                yield {key: text if key in WORDS else typed(text) for key, text in row.items()}
            except ValueError:
                notes.append(f"{file.name}: line {reader.line_num} is damaged; it was left out.")


def typed(text: str) -> float | int | str | None:
    """A cell of `results.csv` as `study.json` would have it: what is not finite stays a word."""
    if text in ("", "nan", "inf", "-inf"):
        return text or None
    return int(text) if text.removeprefix("-").isdigit() else float(text)


def read_rows(run: RunDir, notes: list[str]) -> Iterator[Row]:
    """The rows of `metrics.jsonl`; lines that are not rows are noted and left out."""
    place = f"{run.path.name}/{run.metrics.name}"
    if not run.metrics.is_file():
        notes.append(f"{place} is missing.")
    for row, _ in run.readable_rows():
        if isinstance(row, str):
            notes.append(f"{place}: {row}")
        else:
            yield row


def environment(source: Source) -> Row:
    """What the runs ran on: key → the value, or the several values, of all finished runs' `environment.json`."""
    seen: dict[str, list[str]] = {}
    for row in source.rows:
        try:
            facts = source.run(row["run_id"]).environment()
        except UserError:
            continue
        packages = facts.pop("packages", None)
        for key, value in {**facts, **(packages if isinstance(packages, dict) else {})}.items():
            text = value if isinstance(value, str) else json.dumps(value)
            if text not in seen.setdefault(key, []):
                seen[key].append(text)
    return {key: ", ".join(values) for key, values in seen.items()}
