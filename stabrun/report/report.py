"""`stabrun report`: a study, a run, or two of them side by side, as tables, figures and one page."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

from stabrun.config import UserError
from stabrun.record.disk import writing
from stabrun.report import breaking, charts, figures, sentences, tables
from stabrun.report.page import Part, page
from stabrun.report.paper import paper_comparison
from stabrun.report.run_curves import read_curves
from stabrun.report.scaling import scaling
from stabrun.report.selection import selected, sides
from stabrun.report.strictness import strictness
from stabrun.report.study_data import RUN, StudyData, read
from stabrun.text import shown

PACKAGES = "jinja2", "matplotlib", "plotly"
MAX_NOTES = 5  # printed; the page has all


def write_report(directory: Path, other: Path | None = None) -> None:
    """Write the report of a study or a run, compared to another one if named, and print the results and its path.

    Raises UserError if a directory holds neither, or the packages of the extra `report` are missing.
    """
    if missing := [name for name in PACKAGES if find_spec(name) is None]:
        raise UserError(f"report: not installed: {', '.join(missing)}. Install them: pip install 'stabrun[report]'.")
    studies = [read(path) for path in (directory, other) if path]
    target = directory / (f"report-beside-{other.resolve().name}" if other else "report")
    with replacing(target) as scratch:
        write_files(studies, scratch)
    for study in studies:
        print_results(study, len(studies) > 1)
    page = target / "index.html"
    print(f"report: {page}\nopen it in a browser: {page.resolve().as_uri()}")


def print_results(study: StudyData, named: bool) -> None:
    if named:
        print(shown(f"{study.plan.name} ({study.directory})"))
    for line in sentences.state(study):
        print(line)
    for arm, line in sentences.results(study):
        print(shown(f"{arm}: {line}"))
    for note in study.notes[:MAX_NOTES]:
        print(shown(f"note: {note}"))
    if len(study.notes) > MAX_NOTES:
        print(f"note: {len(study.notes) - MAX_NOTES} more, listed in the report.")


def write_files(studies: list[StudyData], directory: Path) -> None:
    """All files of a report; two studies have a directory each, `a` and `b`."""
    parts = [part_of(study) for study in studies]
    for letter, part in zip("ab", parts, strict=False):
        own = directory if len(parts) == 1 else directory / letter
        write_tables(part.tables, own / "tables")
        write_figures(part.charts, own / "figures")
    titles = {f"{letter.upper()}: {study.plan.name}": study for letter, study in zip("ab", studies, strict=False)}
    comparisons = [tables.comparison(titles)] if len(studies) > 1 else []
    write_tables(comparisons, directory / "tables")
    (directory / "index.html").write_text(page(parts, comparisons), encoding="utf-8")


def part_of(study: StudyData) -> Part:
    """The curves, tables and charts of a study or a run."""
    curves = {row["run_id"]: read_curves(study, row["run_id"]) for row in selected(study.rows)}
    pair = [row for row in sides(study.rows) if row["run_id"] in curves]
    is_study = study.plan.strategy != RUN
    found = list[tables.Table | None]()
    if is_study:
        found = [tables.totals(study), tables.variants(study), tables.outcomes(study), strictness(study)]
        found += [paper_comparison(study)]
        found += scaling(study)
        found += [breaking.first_sites(study), breaking.growth(study)]
    found += [tables.leads(study), tables.norm_ratios(pair, curves), tables.runs(study)]
    drawn = charts.study_charts(study) if is_study else []
    drawn += charts.run_charts(study, pair, curves)
    return Part(study, curves, [table for table in found if table], drawn)


def write_tables(written: list[tables.Table], directory: Path) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    for name, text in tables.files(written):
        (directory / name).write_text(text, encoding="utf-8")


def write_figures(drawn: list[charts.Chart], directory: Path) -> None:
    directory.mkdir(parents=True)
    for name, content in figures.files(drawn):
        (directory / name).write_bytes(content)


@contextmanager
def replacing(target: Path) -> Iterator[Path]:
    """A new directory that replaces `target` when the block ends; if it fails, `target` stays."""
    scratch = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    old = scratch.with_name(f"{scratch.name}.old")
    try:
        scratch.chmod(0o755)
        with writing(target):
            yield scratch
        if target.exists():
            os.rename(target, old)
        os.rename(scratch, target)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)
