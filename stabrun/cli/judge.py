"""`stabrun judge`: the verdict on saved records of a run, a study, or another tool."""

import json
import math
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, Any

import numpy as np

from stabrun.cli.status import with_checkpoint
from stabrun.config import UserError
from stabrun.foreign.follow import POLL, followed, replaced
from stabrun.foreign.read import read_foreign_runs
from stabrun.foreign.runs import ForeignRun
from stabrun.record.jsonl import LONGEST, jsonable, parse_line, read_lines
from stabrun.record.run_dir import RunDir, check_row
from stabrun.record.schema import Row
from stabrun.record.study_dir import StudyDir
from stabrun.study.plan import planned_runs
from stabrun.text import shown
from stabrun.verdict.compare import compare, sameness
from stabrun.verdict.judge import Judge, Verdict
from stabrun.verdict.rule import CONVERGED, DIVERGED, RECOVERED, UNDECIDED
from stabrun.verdict.wording import alarm_lines, details, verdict_line

NOT_SAME = 3  # exit status


@dataclass
class Request:
    """What to judge, and how to show it."""

    path: Path
    as_json: bool = False
    follow: bool = False
    against: Path | None = None
    tolerance: float | None = None
    step: str | None = None
    loss: str | None = None
    split: str | None = None

    @property
    def columns(self) -> tuple[str | None, str | None, str | None]:
        return self.step, self.loss, self.split


@dataclass
class Saved:
    """The rows of a run, read again at each call, and where its record is, if it is one of stabrun."""

    name: str
    rows: Callable[[], Iterable[Row]]
    record: RunDir | None = None
    notes: list[str] = field(default_factory=list)
    foreign: ForeignRun | None = None

    def verdict(self) -> Verdict:
        judge = Judge.of_record(self.record) if self.record else Judge()
        if self.foreign:
            run = self.foreign
            steps, losses, rates, gradients = map(np.asarray, (run.steps, run.losses, run.rates, run.gradients))
            judge.add_columns(steps, losses, rates, gradients, run.validations)
        else:
            for row in self.rows():
                judge.add(row)
        return judge.conclude()


def judge(request: Request) -> int:
    """Print the verdict on each run at a path. Returns the exit status: NOT_SAME if a tolerance is not kept."""
    if request.tolerance is not None and not (request.against and 0 <= request.tolerance < math.inf):
        needs = "must be a finite number of at least zero" if request.against else "--against OTHER is missing"
        raise UserError(f"--tolerance {request.tolerance:g}: {needs}.")
    if request.follow:
        return follow(request)
    if is_folder(request.path):
        return judge_folder(request)
    records = read(request.path, request)
    if len(records) == 1 and next(iter(records[0].rows()), None) is None:
        raise UserError(f"{records[0].name}: metrics.jsonl has no rows yet, or is not a record.")
    verdicts = [show(record, request) for record in records]
    if request.as_json:
        print(json.dumps(verdicts[0] if len(verdicts) == 1 else verdicts, indent=1))
    kept = all(verdict["against"]["same"] for verdict in verdicts) if request.tolerance is not None else True
    return 0 if kept else NOT_SAME


def read(path: Path, request: Request) -> list[Saved]:
    """The runs at `path`: a run, a study, or a foreign file. Raises UserError if it is none of these."""
    if path.is_dir():
        if is_record(path):
            return [of_directory(path)]
        if file := wandb_file(path):
            return of_file(file, request)
        runs = runs_of_study(path)
        if not runs:
            raise UserError(f"{path}: neither a run nor a study directory: {RunDir(path).metrics.name} is missing.")
        return [of_directory(run) for run in runs]
    if not path.is_file():
        raise UserError(f"{path}: no such file or directory.")
    beside = RunDir(path.parent)
    if path == beside.metrics and beside.is_run() and is_record(path.parent):
        return [of_directory(path.parent)]
    return of_file(path, request)


def of_file(path: Path, request: Request) -> list[Saved]:
    return [Saved(str(path), run.rows, None, run.notes, run) for run in read_foreign_runs(path, *request.columns)]


def runs_of_study(path: Path) -> list[Path]:
    """The directories of the runs of a study; none if it is not one."""
    study = StudyDir(path)
    return [run.path for run in (planned_runs(study) if study.is_study() else study.recorded_runs())]


def is_record(directory: Path) -> bool:
    """Whether a directory has a `metrics.jsonl` that may be stabrun's: other tools use this name for other rows."""
    metrics = RunDir(directory).metrics
    if not metrics.is_file():
        return False
    first = next(read_lines(metrics), None)
    foreign = first is not None and first.value is not None and "train/loss" not in first.value
    return not foreign or RunDir(directory).events_file.is_file()


def wandb_file(path: Path) -> Path | None:
    """The record in the directory of a W&B run."""
    files = list(path.glob("run-*.wandb"))
    return files[0] if len(files) == 1 else None


def is_folder(path: Path) -> bool:
    """Whether a path is a directory of files, not of a run or a study."""
    return path.is_dir() and not (is_record(path) or runs_of_study(path) or wandb_file(path))


def judge_folder(request: Request) -> int:
    """Judge each record in a folder, and print a line for each, and their number by verdict."""
    facts: list[dict[str, Any]] = []
    waiting: list[str] = []  # lines about files before the first that can be read: there may be none
    verdicts: Counter[str] = Counter()
    for count, path in enumerate(records_in(request.path), 1):
        try:
            found = [(record, record.verdict()) for record in read(path, request)]
            lines = [f"{record.name}: {verdict_line(asdict(verdict))}" for record, verdict in found]
            for record, verdict in found:
                judged = with_checkpoint(jsonable(asdict(verdict)), record.record)
                facts.append({"path": record.name, **judged, "notes": record.notes})
            verdicts.update(verdict.verdict for _, verdict in found)
        except (UserError, OSError) as error:
            why = str(error) if isinstance(error, UserError) else f"{path}: {error.strerror}."
            lines = [why if why.startswith(str(path)) else f"{path}: {why}"]
            facts.append({"path": str(path), "error": why})
            verdicts["not read"] += 1
        waiting += lines
        if not request.as_json and count > verdicts["not read"]:
            print("\n".join(map(shown, waiting)), flush=True)
            waiting = []
    files = len({fact["path"] for fact in facts})
    if verdicts["not read"] == files:
        raise UserError(f"{request.path}: neither a run nor a study, and {none_of(files)} can be judged.")
    if request.as_json:
        print(json.dumps(facts, indent=1))
    else:
        named = (*(name for name in (CONVERGED, RECOVERED, DIVERGED, UNDECIDED)), "not read")
        print(f"{files} file{'s' * (files != 1)}: " + ", ".join(f"{verdicts[n]} {n}" for n in named if verdicts[n]))
    return 0


def none_of(files: int) -> str:
    return (
        f"none of its {files} files"
        if files > 1
        else "its only file cannot be read, so that nothing"
        if files
        else "no file in it"
    )


def records_in(folder: Path) -> Iterator[Path]:
    """The files in a folder and below it, in order of their names, without hidden ones. A directory of a run, of W&B as
    well, is one record.
    """
    for item in sorted(folder.iterdir()):
        if item.name.startswith("."):
            continue
        if item.is_dir() and not item.is_symlink():
            if is_folder(item):
                yield from records_in(item)
            else:
                yield item
        elif item.is_file():
            yield item


def of_directory(directory: Path) -> Saved:
    run = RunDir(directory)
    return Saved(str(directory), run.rows, run, run.faults())


def show(record: Saved, request: Request) -> dict[str, Any]:
    """The verdict on one run as plain data. Also prints it, unless JSON was requested."""
    verdict = record.verdict()
    facts = {"path": record.name, **with_checkpoint(jsonable(asdict(verdict)), record.record), "notes": record.notes}
    if request.against is not None:
        others = read(request.against, request)
        if len(others) != 1:
            raise UserError(f"--against {request.against}: contains {len(others)} runs; choose one.")
        this, other = list(record.rows()), list(others[0].rows())
        other_verdict = others[0].verdict().verdict
        facts["against"] = {"verdict": other_verdict, **compare(this, other)}
        if request.tolerance is not None:
            one_diverged = (verdict.verdict == DIVERGED) != (other_verdict == DIVERGED)
            facts["against"] |= jsonable(sameness(this, other, request.tolerance, one_diverged))
    if not request.as_json:
        name = "" if request.path == Path(record.name) else f"{record.name}: "
        print(shown(name + verdict_line(facts)))
        for line in details(facts):
            print(shown(f"  {line}"))
    return facts


class Follower:
    """A judge of the rows of a growing run. A verdict costs time in proportion to the rows: one is `due` from time to
    time.
    """

    def __init__(self, run: RunDir) -> None:
        self.judge, self.due_at = Judge.of_record(run), 0

    @property
    def due(self) -> bool:
        return len(self.judge.losses) >= self.due_at or self.judge.over

    def conclude(self) -> Verdict:
        """The verdict so far on a run that goes on."""
        self.due_at = len(self.judge.losses) + max(10, len(self.judge.losses) // 100)
        return self.judge.conclude(running=True)


def follow(request: Request) -> int:
    """Watch a growing run: print each alarm once; end when the run ends or is certain to have diverged."""
    run = RunDir(request.path)
    file = run.metrics if request.path.is_dir() else request.path
    if request.against:
        raise UserError("--follow cannot be combined with --against.")
    if request.path.is_dir() and not (file.is_file() or run.is_run()):
        raise UserError(f"--follow {request.path}: not a run directory.")
    if request.path.is_dir() and any(request.columns):
        raise UserError("--step, --loss and --split name columns of another tool's file, not of a run directory.")
    printed, follower = set[str](), Follower(run)

    def enough() -> bool:
        return over(request.path, follower.judge)

    status = 0
    try:
        for row in rows_of(request, file, enough):
            if row is None:  # the file was truncated or replaced
                printed, follower = set(), Follower(run)
                continue
            follower.judge.add(row)
            if follower.due:
                for what, line in alarm_lines(follower.conclude()):
                    if what not in printed and not request.as_json:
                        print(shown(line), flush=True)
                    printed.add(what)
    except KeyboardInterrupt:
        status = 130
    record = run if request.path.is_dir() else None
    verdict = with_checkpoint(jsonable(asdict(follower.judge.conclude())), record)
    facts = {"path": str(request.path), **verdict, "notes": []}
    print(
        json.dumps(facts, indent=1)
        if request.as_json
        else "\n  ".join(map(shown, [verdict_line(facts), *details(facts)]))
    )
    return status


def over(path: Path, fold: Judge) -> bool:
    """Whether a followed run has ended, or is certain to have diverged."""
    if fold.over or fold.certain is not None:
        return fold.verdict().verdict == DIVERGED
    if fold.planned is not None and fold.losses and fold.steps[-1] + 1 >= fold.planned:
        return True
    return RunDir(path).final_summary() is not None


def rows_of(request: Request, file: Path, enough: Callable[[], bool]) -> Iterator[Row | None]:
    """The rows of a growing record of stabrun or of another tool, and None if it was truncated or replaced."""
    own = file.name == RunDir(file.parent).metrics.name and (not file.is_file() or is_record(file.parent))
    if request.path.is_dir() or (own and not any(request.columns)):
        return grown(file, enough)
    return followed(file, enough, *request.columns)


def grown(file: Path, enough: Callable[[], bool]) -> Iterator[Row | None]:
    """Yield the rows of a growing file as they are completed, and None if it was truncated or replaced.

    Ends when `enough()` is true and all rows have been read.
    """
    handle: IO[bytes] | None = None
    half = b""
    while True:
        if handle is None and file.is_file():
            handle = open(file, "rb")
        piece = handle.readline(LONGEST) if handle else b""
        half += piece
        if len(half) > LONGEST:
            raise UserError(f"{file} is damaged: a line is longer than {LONGEST >> 20} MiB.")
        if half.endswith(b"\n"):
            row, half = parse_line(half), b""
            if row is None:
                raise UserError(f"{file} is damaged: a line is not a JSON object.")
            yield check_row(row, file)
            continue
        if piece:
            continue
        if handle and replaced(handle, file):
            handle.close()
            handle, half = None, b""
            yield None
        elif enough():
            return
        else:
            time.sleep(POLL)
