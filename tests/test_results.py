"""The pages of docs/results and the README: their tables and numbers come from the committed records."""

import re

import pytest
import results

from stabrun.config import conf_dir

LARGEST = 5_000_000  # bytes of a record
NOT_PROSE = re.compile(r"```.*?```|<!--.*?-->|^\|.*?$|`[^`\n]*`|\]\([^)]*\)", re.S | re.M)
NUMBER = re.compile(r"(?<![\w.])\d+(?:[.,]\d+)*(?:e-?\d+)?")
# Numbers of a page that no run gave: of the paper (stabrun/report/paper.py), levels of intervals, sizes of models.
GIVEN = {"2410.16682", "2309.14322", "95", "0.2", "0.9", "12", "830", "1.5", "6e-3", "60e-3", "2"}


def prose_numbers(text):
    return set(NUMBER.findall(NOT_PROSE.sub(" ", text)))


def table_numbers(text):
    rows = "\n".join(line for line in text.splitlines() if line.startswith("|"))
    return set(NUMBER.findall(rows)) | {number.replace(",", "") for number in NUMBER.findall(rows)}


def settings(name):
    """The numbers in the files of an experiment and of the model that it names."""
    experiment = conf_dir() / "experiment" / f"{name}.yaml"
    if not experiment.exists():
        return set()
    text = experiment.read_text()
    model = re.search(r"override /model: (\w+)", text)
    return set(NUMBER.findall(text + (conf_dir() / "model" / f"{model[1] if model else 'nano'}.yaml").read_text()))


@pytest.mark.parametrize("page", results.PAGES, ids=lambda page: f"{page.parent.name}-{page.stem}")
def test_tables_are_those_of_the_records(page):
    text = page.read_text()
    assert results.rebuilt(text) == text
    assert text.count("<!-- table:") == len(results.TABLE.findall(text)) == text.count("<!-- end -->")


@pytest.mark.parametrize("page", sorted(results.RESULTS.glob("*.md")), ids=lambda page: page.stem)
def test_a_number_in_the_text_is_in_a_table_of_the_page_or_a_setting(page):
    text = page.read_text()
    assert prose_numbers(text) <= table_numbers(text) | settings(page.stem) | GIVEN


def test_numbers_are_found_where_they_are():
    text = "On `x=1`, 4.5 of 12 [runs](7.md) at 6e-3.\n```\n8\n```\n| 9 (10–11) | 409,600 |\n<!-- 13 -->\n"
    assert prose_numbers(text) == {"4.5", "12", "6e-3"}
    assert table_numbers(text) == {"9", "10", "11", "409,600", "409600"}


def test_records_are_small():
    files = list(results.RESULTS.glob("*.tar.xz"))
    assert files
    assert max(file.stat().st_size for file in files) < LARGEST


@pytest.mark.parametrize("page", results.PAGES, ids=lambda page: f"{page.parent.name}-{page.stem}")
def test_figures_are_those_of_the_records(page):
    for record, name in results.FIGURE.findall(page.read_text()):
        assert (results.RESULTS / "figures" / record / f"{name}.svg").read_bytes() == results.figure(record, name)
