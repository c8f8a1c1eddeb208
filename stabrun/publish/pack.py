"""`stabrun pack` and `stabrun unpack`: the record of a study in one small file, and the study directory of that file.

The file is a `.tar.xz` of what reports, verdicts and reruns read: the plan, the ledger, the results and, of each
finished run, configuration, environment, events, summary and rows. The same study gives the same bytes.
"""

import io
import os
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from stabrun.config import UserError
from stabrun.record.disk import writing
from stabrun.record.jsonl import dumps
from stabrun.record.metrics import METRICS, STEP
from stabrun.record.run_dir import RunDir
from stabrun.record.schema import Row
from stabrun.record.study_dir import StudyDir
from stabrun.report.selection import sides
from stabrun.report.study_data import read

DIGITS = 4  # of a statistic
LARGEST = 1 << 30  # bytes of an unpacked file: a larger one is not the file of a study


def pack(directory: Path, file: Path, every: int) -> None:
    """Write the record of the study in `directory` to `file`; a complete file replaces an older one.

    Each row keeps its exact losses and what else the step itself gives. Its statistics are kept every `every` steps and
    at the first bad step, to DIGITS digits; the two runs that a report compares in detail keep all of theirs.
    Checkpoints, W&B files and runs that are not finished are left out.

    Raises UserError if there is no study, or if a record in it is damaged.
    """
    study = StudyDir(directory)
    if not study.is_study():
        raise UserError(f"{directory}: not a study: {study.plan_file.name} is missing.")
    part = file.with_name(f"{file.name}.part")
    with writing(file):
        try:
            with tarfile.open(part, "w:xz", format=tarfile.PAX_FORMAT, preset=9) as archive:
                for name, content in members(study, every):
                    entry = tarfile.TarInfo(f"{directory.resolve().name}/{name}")
                    entry.size = len(content)
                    archive.addfile(entry, io.BytesIO(content))
            os.replace(part, file)
        finally:
            part.unlink(missing_ok=True)


def members(study: StudyDir, every: int) -> Iterator[tuple[str, bytes]]:
    """Name and content of each file of a packed study."""
    whole = [study.plan_file, study.summary_file, study.results_file, *sorted(study.ledger.glob("*"))]
    for run in study.recorded_runs():
        whole += [run.config_file, run.environment_file, run.tokenizer_file, run.events_file, run.summary_file]
    for path in filter(Path.is_file, whole):
        yield path.relative_to(study.path).as_posix(), path.read_bytes()
    results = read(study.path).rows
    detailed = {row["run_id"] for row in sides(results)}
    bad_steps = {row["run_id"]: row["first_bad_step"] for row in results}
    for run in study.recorded_runs():
        name = run.path.name
        content = rows(run, 1 if name in detailed else every, bad_steps.get(name))
        yield run.metrics.relative_to(study.path).as_posix(), content


def rows(run: RunDir, every: int, bad_step: int | None) -> bytes:
    """The `metrics.jsonl` of a run, with the statistics of every `every` steps and of `bad_step`."""
    kept = (thinned(row, whole=row["step"] % every == 0 or row["step"] == bad_step) for row in run.rows())
    return "".join(f"{dumps(row)}\n" for row in kept).encode()


def thinned(row: Row, whole: bool) -> Row:
    """What a packed study keeps of a row; `whole`: with its statistics."""
    statistics = row if whole else {}
    return {key: rounded(value) for key, value in statistics.items()} | {key: row[key] for key in row if key in OF_STEP}


OF_STEP = {metric.key for metric in METRICS.values() if metric.source == STEP}


def rounded(value: Any) -> Any:
    """A number, or a list of numbers, to DIGITS digits; what is not finite stays."""
    if isinstance(value, list):
        return [rounded(item) for item in value]
    return float(f"{value:.{DIGITS}g}") if isinstance(value, float) else value


def unpack(file: Path, parent: Path) -> Path:
    """Write the study of a packed `file` to a new directory below `parent`, and return it.

    Raises UserError if the file holds no study, or if the directory exists.
    """
    try:
        with tarfile.open(file, "r:xz") as archive:
            entries = archive.getmembers()
            names = {Path(entry.name).parts[0] for entry in entries if entry.name}
            if len(names) != 1 or ".." in names or sum(entry.size for entry in entries) > LARGEST:
                raise UserError(f"{file}: not a packed study.")
            target = parent / names.pop()
            if target.exists():
                raise UserError(f"{target}: exists already; give another directory to unpack into.")
            plan = StudyDir(target).plan_file
            if plan.relative_to(parent).as_posix() not in archive.getnames():
                raise UserError(f"{file}: not a packed study: {plan.name} is missing.")
            archive.extractall(parent, entries, filter="data")
    except (tarfile.TarError, OSError, EOFError) as error:
        raise UserError(f"{file}: cannot be unpacked: {error}.") from error
    return target
