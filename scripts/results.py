"""The tables and figures of docs/results, made again from the committed records.

    python scripts/results.py                 # write them into the pages and into docs/results/figures
    python scripts/results.py --check         # only tell which pages differ

A page says what it shows. A table is between two comments,

    <!-- table: rybakov_nano/strictness; columns: variant, lr50_standard; sort: lr50_standard -->
    <!-- end -->

and comes from the report of docs/results/rybakov_nano.tar.xz, as `stabrun unpack` and `stabrun report` write it. Names
of columns are those of its CSV. Two records, as in `rybakov_nano_cosine+rybakov_mini/side_by_side`, are compared. A
figure is a link to figures/RECORD/CHART.svg.
"""

import argparse
import re
import sys
import tempfile
from dataclasses import replace
from functools import cache
from pathlib import Path

import by_eye

from stabrun.publish.pack import unpack
from stabrun.report import figures, tables
from stabrun.report.charts import Chart
from stabrun.report.page import Part
from stabrun.report.report import part_of
from stabrun.report.study_data import StudyData, read

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "docs" / "results"
RECORDS = [file.name.removesuffix(".tar.xz") for file in sorted(RESULTS.glob("*.tar.xz"))]
BY_EYE = RESULTS / "by_eye.csv"
PAGES = [ROOT / "README.md", *sorted(RESULTS.glob("*.md"))]
TABLE = re.compile(r"(<!-- table: (\S+)/(\w+)(?:; columns: ([\w, ]+))?(?:; sort: (\w+))? -->\n).*?(<!-- end -->)", re.S)
FIGURE = re.compile(r"\]\((?:docs/results/)?figures/(\w+)/(\w+)\.svg\)")


@cache
def folder() -> "tempfile.TemporaryDirectory[str]":
    """Where records are unpacked until the process ends."""
    return tempfile.TemporaryDirectory()


@cache
def part(record: str) -> Part:
    """The report of a committed record."""
    return part_of(read(unpack(RESULTS / f"{record}.tar.xz", Path(folder().name))))


@cache
def judged() -> tuple[dict[str, StudyData], list[by_eye.Judged]]:
    """The studies of all records, and their runs that were judged by eye."""
    studies = {record: part(record).study for record in RECORDS}
    return studies, by_eye.judged(studies, BY_EYE)


def table(records: str, name: str) -> tables.Table:
    names = records.split("+")
    if len(names) > 1:
        return tables.comparison({record: part(record).study for record in names})
    found = by_eye.by_eye_tables(judged()[1]) if records == BY_EYE.stem else part(records).tables
    return next(table for table in found if table.name == name)


def chart(record: str, name: str) -> Chart:
    if record == BY_EYE.stem:
        return by_eye.disagreements(*judged())
    return next(chart for chart in part(record).charts if chart.name == name)


def chosen(whole: tables.Table, columns: str | None, sort: str | None) -> tables.Table:
    """Some columns of a table, in this order, and its rows by one of them, the highest first."""
    keys = [column.key for column in whole.columns]
    rows = whole.rows
    if sort:
        place = keys.index(sort)
        rows = sorted(rows, key=lambda row: -next((value for value in row[place].values if value), 0.0))
    places = [keys.index(key.strip()) for key in columns.split(",")] if columns else range(len(keys))
    return replace(
        whole, columns=[whole.columns[k] for k in places], rows=[[row[k] for k in places] for row in rows], note=""
    )


def rebuilt(text: str) -> str:
    """The text of a page with its tables made again."""

    def again(match: re.Match[str]) -> str:
        start, records, name, columns, sort, end = match.groups()
        lines = tables.as_markdown(chosen(table(records, name), columns, sort)).splitlines()
        return start + "".join(f"{line}\n" for line in lines if line.startswith("|")) + end

    return TABLE.sub(again, text)


def figure(record: str, name: str) -> bytes:
    """The SVG of a chart; the same record gives the same bytes with the same version of matplotlib."""
    return dict(figures.files([chart(record, name)]))[f"{name}.svg"]


def write_figures(text: str) -> None:
    for record, name in sorted(set(FIGURE.findall(text))):
        file = RESULTS / "figures" / record / f"{name}.svg"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(figure(record, name))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="only tell which pages differ")
    only_check, differing = parser.parse_args().check, 0
    for page in PAGES:
        text = page.read_text()
        new = rebuilt(text)
        if new != text:
            differing += 1
            print(f"{page.relative_to(ROOT)}: {'differs' if only_check else 'written'}")
        if not only_check:
            page.write_text(new)
            write_figures(new)
    return int(only_check and differing > 0)


if __name__ == "__main__":
    sys.exit(main())
