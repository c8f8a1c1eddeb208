"""What a report is made of: the files of a study or a run as plain data. They are read; nothing is written."""

import csv
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from stabrun.config import Config, UserError, read_config, run_id
from stabrun.record.jsonl import check_row, jsonable, parse_line, read_events, read_json
from stabrun.study.ledger import DONE, FAILED, PLANNED, RUNNING
from stabrun.study.plan import FILE, FRONTIER, Plan, load
from stabrun.study.results import COLUMNS, result
from stabrun.study.snapshot import SnapshotReader
from stabrun.study.summary import answer
from stabrun.text import run_name
from stabrun.verdict.judge import Judge

WORDS = "run_id", "arm", "variant", "status", "verdict", "reason", "lenient", "standard", "strict", "first_bad_site"
NUMBERS = tuple(column for column in COLUMNS if column not in WORDS)
RUN = "run"

Row = dict[str, Any]


@dataclass
class Source:
    """A study, or a run as a study of one.

    `told` is what `study.json` holds, `rows` what `results.csv` does, and `summaries` has each run's `summary.json`.
    `notes` are sentences about what could not be read, or is not there yet.
    """

    directory: Path
    name: str
    strategy: str
    told: Row
    arms: dict[str, Config]
    rows: list[Row]
    counts: dict[str, int]
    plan: Plan | None = None
    summaries: dict[str, Row] = field(default_factory=dict)
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

    def folder(self, run: str) -> Path:
        return self.directory if self.strategy == RUN else self.directory / "runs" / run

    def summary(self, run: str) -> Row:
        return self.summaries.get(run, {})


def opened(directory: Path) -> Source:
    """The study or run in a directory. UserError where it holds neither."""
    if (directory / FILE).is_file():
        return a_study(directory)
    if (directory / "config.yaml").is_file():
        return a_run(directory)
    missing = f"it holds no {FILE} and no config.yaml" if directory.is_dir() else "there is no such folder"
    raise UserError(f"{directory}: it is neither a study nor a run, for {missing}.")


def a_study(directory: Path) -> Source:
    plan, notes = load(directory), list[str]()
    look = SnapshotReader(directory).look(plan)
    finished = [{**facts, "arm": plan.cells[run].arm} for run, facts in look.summaries.items()]
    for run, entry in look.entries.items():
        if entry.status == DONE and run not in look.summaries:
            notes.append(f"runs/{run}/summary.json holds no summary; the run's signals and spikes are left out.")
    try:
        told = read_json(directory / "study.json")
    except (OSError, UserError):
        if finished:
            notes.append("study.json is missing or damaged; what it would hold was worked out anew from the summaries.")
        told = jsonable(answer(plan, finished))
    rows = list(read_results(directory / "results.csv", notes))
    counts = {status: look.count(status) for status in (PLANNED, RUNNING, DONE, FAILED)}
    return Source(
        directory, plan.name, plan.strategy, told, plan.arms, rows, counts, plan, look.summaries, look.failed, notes
    )


def a_run(directory: Path) -> Source:
    """A run, judged on what is recorded so far where it is not over."""
    config, notes = read_config(directory / "config.yaml"), list[str]()
    try:
        summary = read_json(directory / "summary.json")
    except (OSError, UserError):
        notes.append("summary.json is not there, so that the run is not over; it is judged on what is recorded so far.")
        judge = Judge()
        for row in read_rows(directory / "metrics.jsonl", notes):
            judge.add(row)
        steps = judge.steps[-1] + 1 if judge.steps else 0
        facts = {"run_id": run_id(config), "variant": config.variant, "lr": config.optim.lr, "seed": config.seed}
        summary = jsonable(facts | asdict(judge.conclude()) | {"status": "running", "steps": steps})
    name = run_name(config.variant, config.optim.lr, config.seed)
    rows = [result({**summary, "arm": config.variant})]
    over = summary["status"] in ("complete", "stopped")
    counts = {PLANNED: 0, RUNNING: int(not over), DONE: int(over), FAILED: 0}
    run = summary["run_id"]
    return Source(directory, name, RUN, {}, {config.variant: config}, rows, counts, None, {run: summary}, notes=notes)


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


def read_rows(file: Path, notes: list[str]) -> Iterator[Row]:
    """The rows of `metrics.jsonl`; a line that is none, or was cut, is noted and left out."""
    if not file.is_file():
        notes.append(f"{file.parent.name}/{file.name} is not there.")
        return
    with open(file, "rb") as lines:
        for number, line in enumerate(lines, 1):
            row = parse_line(line)
            try:
                if row is None:
                    raise UserError("")
                yield check_row(row, file)
            except UserError:
                what = "is no row of a record" if line.endswith(b"\n") else "was cut off, or is still being written"
                notes.append(f"{file.parent.name}/{file.name}: line {number} {what}; it was left out.")


def restarts(directory: Path) -> list[int]:
    """The steps at which a run was started again."""
    starts = [event.get("step") for event in read_events(directory / "events.jsonl") if event.get("event") == "start"]
    return [step for step in starts if isinstance(step, int) and step > 0]


def environment(source: Source) -> Row:
    """What the runs ran on: key → the value, or the several values, of all finished runs' `environment.json`."""
    seen: dict[str, list[str]] = {}
    for row in source.rows:
        try:
            facts = read_json(source.folder(row["run_id"]) / "environment.json")
        except (OSError, UserError):
            continue
        packages = facts.pop("packages", None)
        for key, value in {**facts, **(packages if isinstance(packages, dict) else {})}.items():
            text = value if isinstance(value, str) else json.dumps(value)
            if text not in seen.setdefault(key, []):
                seen[key].append(text)
    return {key: ", ".join(values) for key, values in seen.items()}
