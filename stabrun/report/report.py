"""`stabrun report`: a study, a run, or two of them side by side, as tables, figures and one page."""

import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

from stabrun.config import UserError
from stabrun.report import figures, sentences, tables
from stabrun.report.page import Part, page
from stabrun.report.paper import beside_paper
from stabrun.report.run_curves import Trace, trace
from stabrun.report.selection import chosen, pair
from stabrun.report.source import RUN, Source, opened

MOST_NOTES = 5  # in the terminal


def write_report(directory: Path, other: Path | None = None) -> None:
    """Write the report of a study or a run, or of two of them side by side, and print its main results."""
    refuse_without_packages()
    sources = [opened(path) for path in (directory, other) if path is not None]
    place = directory / ("report" if other is None else f"report-beside-{other.resolve().name}")
    with whole(place) as folder:
        write(sources, folder)
    for source in sources:
        tell(source, len(sources) > 1)
    print(f"report: {place / 'index.html'}")


def refuse_without_packages() -> None:
    """UserError where the extra is not installed: neither package is needed for anything else."""
    if any(find_spec(name) is None for name in ("matplotlib", "plotly")):
        raise UserError("report: it needs matplotlib and plotly: pip install 'stabrun[report]'.")


def tell(source: Source, named: bool) -> None:
    if named:
        print(f"{source.name} ({source.directory})")
    for line in sentences.state(source):
        print(line)
    for arm, line in sentences.answers(source):
        print(f"{arm}: {line}")
    for note in source.notes[:MOST_NOTES]:
        print(f"note: {note}")
    if len(source.notes) > MOST_NOTES:
        print(f"note: {len(source.notes) - MOST_NOTES} more; they stand on the page.")


def write(sources: list[Source], folder: Path) -> None:
    """All files of a report; those of the second of two go into folders of their own."""
    parts: list[Part] = []
    for place, source in enumerate(sources):
        traces = {row["run_id"]: trace(source, row["run_id"]) for row in chosen(source.rows)}
        parts.append((source, traces, tables_of(source, traces)))
        own = folder if len(sources) == 1 else folder / "ab"[place]
        write_tables(parts[-1][2], own / "tables")
        write_figures(figures.figures(source, traces), own / "figures")
    compared = compare(sources) if len(sources) > 1 else []
    write_tables(compared, folder / "tables")
    (folder / "index.html").write_text(page(parts, compared))


def write_tables(written: list[tables.Table], folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in tables.files(written):
        (folder / name).write_text(text)


def write_figures(drawn: Iterable[tuple[str, figures.Figure]], folder: Path) -> None:
    folder.mkdir(parents=True)
    for name, figure in drawn:
        for kind in figures.METADATA:
            (folder / f"{name}.{kind}").write_bytes(figures.written(figure, kind))


def tables_of(source: Source, traces: dict[str, Trace]) -> list[tables.Table]:
    """The tables that a source has; a single run has no variants to compare."""
    sides = [row for row in pair(source.rows) if row]
    found = [tables.leads(source), tables.ratios(sides, traces), tables.runs(source)]
    if source.strategy != RUN:
        found = [tables.variants(source), beside_paper(source), *found]
    return [table for table in found if table is not None]


def compare(sources: list[Source]) -> list[tables.Table]:
    """The table that sets two sources side by side: by variant two studies, by fact two runs."""
    return [tables.by_study({f"{'AB'[place]}: {source.name}": source for place, source in enumerate(sources)})]


@contextmanager
def whole(place: Path) -> Iterator[Path]:
    """A new folder that takes this place when all is in it; where something fails, what was there stays."""
    scratch = Path(tempfile.mkdtemp(prefix=f".{place.name}.", dir=place.parent))
    old = scratch.with_name(f"{scratch.name}.old")
    try:
        scratch.chmod(0o755)
        yield scratch
        if place.exists():
            os.rename(place, old)
        os.rename(scratch, place)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)
