"""`stabrun pack` and `stabrun unpack`: the record of a study in one small file, and the study directory of that file.

The file is a `.tar.xz` of what reports, verdicts and reruns read: the plan, the ledger, the results and, of each
finished run, configuration, environment, events, summary and rows. The same study gives the same bytes.
"""

import io
import lzma
import os
import tarfile
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from stabrun.config import UserError
from stabrun.record.disk import writing
from stabrun.record.jsonl import dumps
from stabrun.record.metrics import METRICS, STEP
from stabrun.record.run_dir import RunDir
from stabrun.record.study_dir import StudyDir
from stabrun.report.breaking import steps_compared
from stabrun.report.selection import sides
from stabrun.report.study_data import read

DIGITS = 4  # of a statistic
LARGEST = 1 << 30  # bytes of an unpacked file: a larger one is not the file of a study


def pack(directory: Path, file: Path, every: int) -> None:
    """Write the record of the study in `directory` to `file`; a complete file replaces an older one.

    Each row keeps its exact losses and what else the step itself gives. Its statistics are kept every `every` steps and
    where a report compares norms, to DIGITS digits; the two runs that a report compares in detail keep all of theirs.
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
                size = 0
                for name, content in members(study, every):
                    size += len(content)
                    if size > LARGEST:
                        raise UserError(f"{directory}: more than {LARGEST >> 30} GiB, which cannot be packed.")
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
    data = read(study.path)
    detailed, compared = {row["run_id"] for row in sides(data.rows)}, steps_compared(data)
    for run in study.recorded_runs():
        name = run.path.name
        content = rows(run, 1 if name in detailed else every, compared.get(name, set()))
        yield run.metrics.relative_to(study.path).as_posix(), content


def rows(run: RunDir, every: int, steps: set[int]) -> bytes:
    """The `metrics.jsonl` of a run, with the statistics of one row in `every` steps, and of those at `steps`."""
    text, due, waiting = list[str](), 0, sorted(steps)
    for row in run.rows():
        step, whole = row["step"], row.keys() > OF_STEP & row.keys()
        if whole and (step >= due or (waiting and step >= waiting[0])):
            due, waiting = (step // every + 1) * every, [other for other in waiting if other > step]
        else:
            row = {key: value for key, value in row.items() if key in OF_STEP}
        text.append(dumps({key: value if key in OF_STEP else rounded(value) for key, value in row.items()}) + "\n")
    return "".join(text).encode()


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
            names = {Path(entry.name).parts[:1] for entry in entries}
            plans = {f"{name[0]}/{StudyDir(parent).plan_file.name}" for name in names if name}
            if len(names) != 1 or names & {(), ("..",)} or sum(entry.size for entry in entries) > LARGEST:
                raise UserError(f"{file}: not a packed study.")
            if not plans <= set(archive.getnames()):
                raise UserError(f"{file}: not a packed study: {StudyDir(parent).plan_file.name} is missing.")
            ((name,),) = names
            if (parent / name).exists():
                raise UserError(f"{parent / name}: exists already; give another directory to unpack into.")
            parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(prefix=f".{name}.", dir=parent) as scratch:
                archive.extractall(scratch, entries, filter="data")
                os.rename(Path(scratch) / name, parent / name)
    except (tarfile.TarError, lzma.LZMAError, OSError, EOFError) as error:
        raise UserError(f"{file}: cannot be unpacked: {getattr(error, 'strerror', None) or error}.") from error
    return parent / name
