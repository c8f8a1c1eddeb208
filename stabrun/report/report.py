"""`stabrun report`: a study, a run, or two of them side by side, as tables, figures and one page."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from stabrun.config import MistakeError
from stabrun.report import sentences, tables
from stabrun.report.paper import beside_paper
from stabrun.report.source import RUN, Source, opened

USAGE = "report: name a study or a run, or two of them to stand side by side: stabrun report DIR [OTHER]."


def report(words: list[str]) -> int:
    """Write the report of the one or two directories that `words` name, say the answer and where it lies."""
    if not 1 <= len(words) <= 2 or any(word.startswith("-") for word in words):
        raise MistakeError(USAGE)
    source = opened(Path(words[0]))
    place = source.directory / "report"
    with whole(place) as folder:
        write(source, folder)
    for line in sentences.state(source):
        print(line)
    for arm, line in sentences.answers(source):
        print(f"{arm}: {line}")
    for note in source.notes:
        print(f"note: {note}")
    print(f"report: {place / 'tables'}")
    return 0


def write(source: Source, folder: Path) -> None:
    (folder / "tables").mkdir()
    for name, text in tables.files(tables_of(source)):
        (folder / "tables" / name).write_text(text)


def tables_of(source: Source) -> list[tables.Table]:
    """The tables that a source has; a single run has no variants to compare."""
    if source.strategy == RUN:
        return [tables.runs(source), tables.leads(source)]
    paper = beside_paper(source)
    return [tables.variants(source), *([paper] if paper else []), tables.leads(source), tables.runs(source)]


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
