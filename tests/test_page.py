"""The page of a report: its numbers are those of the study's files, its text is escaped, and it works in a browser."""

import base64
import csv
import json
import os
import re
import shutil
import zlib
from html import unescape
from html.parser import HTMLParser

import pytest
import yaml
from chromium import Browser
from made import a_study
from studies import write_results

from stabrun.record.metrics import METRICS, OUTPUT, Metric
from stabrun.report.report import write_report
from stabrun.study.plan import load

EVIL = "<script>alert(1)</script>"
CHROMIUM = shutil.which("chromium")
browsed = [pytest.mark.chromium, pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed")]


@pytest.fixture(scope="module")
def study(made_study, tmp_path_factory):
    directory = tmp_path_factory.mktemp("page") / "study"
    shutil.copytree(made_study, directory)
    report_page(directory)
    return directory


@pytest.fixture(scope="module")
def evil(tmp_path_factory):
    """A study in which every word that a record may hold is an attack, and a record is incomplete."""
    directory = tmp_path_factory.mktemp("evil") / "study"
    a_study(directory)
    facts = yaml.safe_load((directory / "study.yaml").read_text())
    facts["arms"] = {EVIL if arm == "qk_norm" else arm: config for arm, config in facts["arms"].items()}
    facts["arms"][EVIL]["variant"] = EVIL
    facts["cells"] = [[run, EVIL if arm == "qk_norm" else arm, *rest] for run, arm, *rest in facts["cells"]]
    (directory / "study.yaml").write_text(yaml.safe_dump(facts, sort_keys=False))
    for file in directory.glob("runs/*/*.json"):
        file.write_text(file.read_text().replace('"qk_norm"', json.dumps(EVIL)).replace('"fell"', json.dumps(EVIL)))
        file.write_text(file.read_text().replace('"2.13.0"', json.dumps(EVIL)))
    write_results(load(directory), directory)
    for record in directory.glob("runs/*/metrics.jsonl"):
        record.write_text(record.read_text()[:-30])
    report_page(directory)
    return directory


def report_page(*directories):
    """Write the page, without the files of the figures, which take most of the time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("stabrun.report.report.write_figures", lambda drawn, directory: None)
        write_report(*directories)


class Tables(HTMLParser):
    """Table name → rows of (text, data-value)."""

    def __init__(self, html):
        super().__init__()
        self.found, self.rows, self.cell = {}, None, None
        self.feed(html)

    def handle_starttag(self, tag, attributes):
        facts = dict(attributes)
        if tag == "table":
            self.rows = self.found.setdefault(facts.get("data-table"), [])
        elif tag == "tr":
            self.rows.append([])
        elif tag == "td":
            self.cell = ["", facts.get("data-value")]
            self.rows[-1].append(self.cell)

    def handle_data(self, data):
        if self.cell is not None:
            self.cell[0] += data

    def handle_endtag(self, tag):
        if tag == "td":
            self.cell = None


def html_of(directory):
    return (directory / "report" / "index.html").read_text()


def data_of(directory):
    (text,) = re.findall(r'<script type="text/plain" id="data">(.*?)</script>', html_of(directory), re.S)
    return json.loads(zlib.decompress(base64.b64decode(text)))["studies"][0]


def shown(text):
    """The number that a cell begins with."""
    return float(text.split(" ")[0])


def two_digits(number):
    return float(f"{number:.2g}")


def test_every_number_on_the_page_is_that_of_the_studys_files(study):
    told = json.loads((study / "study.json").read_text())
    with open(study / "results.csv", newline="") as file:
        results = list(csv.DictReader(file))
    cells = Tables(html_of(study)).found
    for row, theirs in zip(cells["runs"][1:], results, strict=True):
        for (text, value), there in zip(row, theirs.values(), strict=True):
            assert value == there or float(value) == float(there)
            if re.fullmatch(r"-?\d+(\.\d+)?(e-?\d+)?", text) and "." in there:
                assert float(text) == pytest.approx(float(there), abs=0.5 if "." not in text else 0.006, rel=0.01)
            else:
                assert text in (there, "-")
    for row, (arm, facts) in zip(cells["variants"][1:], told["variants"].items(), strict=True):
        frontier = facts["frontier"]
        assert row[0][0] == arm
        assert [cell[1] for cell in row[1:4]] == [
            str(sum(place[name] for place in facts["runs"])) for name in ("runs", "diverged", "undecided")
        ]
        intervals = [frontier[level][name] for name in ("lr50", "lr10") for level in ("standard", "lenient", "strict")]
        for (text, value), ends in zip(row[4:10], intervals, strict=True):
            assert value == ("" if ends["median"] is None else str(ends["median"]))
            assert ends["median"] is None or shown(text) == two_digits(ends["median"])
            for end in ("low", "high"):
                number = ends[end]
                assert number is None or two_digits(number) in map(float, re.findall(r"[\d.]+(?:e-?\d+)?", text))
        assert [row[place][1] for place in (14, 15, 17)] == [
            str(facts["best_final_loss"]["value"]), str(facts["best_lr"]), str(facts["lr_sensitivity"]["value"])
        ]  # fmt: skip


def test_the_charts_have_the_numbers_of_the_studys_files(study):
    """The page draws this data; `test_charts` compares the charts themselves to the files."""
    charts = data_of(study)["charts"]
    with open(study / "results.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    for arm, facts in json.loads((study / "study.json").read_text())["variants"].items():
        squares = next(marks for marks in charts["divergence_map"]["panels"][0]["marks"] if marks["arm"] == arm)
        for rate, text, point in zip(squares["x"], squares["text"], facts["runs"], strict=True):
            assert (rate, text) == (point["lr"], f"{point['diverged']}/{point['runs']}")
            own = [row["verdict"] for row in rows if row["arm"] == arm and float(row["lr"]) == rate]
            assert (len(own), own.count("diverged")) == (point["runs"], point["diverged"])
    hovers = [text for marks in charts["loss_by_lr"]["panels"][0]["marks"] for text in marks.get("hover", [])]
    assert sorted(text.rpartition(" ")[2] for text in hovers) == sorted(row["final_loss"] for row in rows)


def test_statistics_to_choose_from_are_those_of_the_table_of_metrics(study, monkeypatch):
    recorded = {key for run in data_of(study)["runs"].values() for key in run["series"]}
    options = dict(re.findall(r'<option value="([^"]*/[^"]*)">([^<]*)</option>', unescape(html_of(study))))
    assert options == {key: metric.label for key, metric in METRICS.items() if recorded & set(metric.keys)}
    assert {"norm/out/{site}", "attn/entropy", "grad/norm"} < set(options)
    monkeypatch.setitem(METRICS, "norm/skew/{site}", Metric("norm/skew/{site}", "skew", "1", OUTPUT, "", "mean", "…"))
    record = next(study.glob("runs/*/metrics.jsonl"))
    text = record.read_text()
    record.write_text(text.replace('"norm/out/', '"norm/skew/'))
    report_page(study)
    record.write_text(text)
    assert '<option value="norm/skew/{site}">skew</option>' in html_of(study)
    monkeypatch.undo()
    report_page(study)


def test_text_of_records_is_escaped_and_a_cut_record_is_noted(evil):
    html = html_of(evil)
    assert EVIL not in html
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in html
    assert EVIL in data_of(evil)["charts"]["divergence_map"]["panels"][0]["y"]["bands"]
    assert "is incomplete; it was left out." in html


def test_a_page_names_no_other_place_and_runs_only_its_own_scripts(study):
    html = html_of(study)
    assert not re.search(r"""(src|href)=["'](?!data:,)""", html.split("<script>")[0])
    assert re.search(r"default-src 'none'; script-src 'sha256-[^']+' 'sha256-[^']+'; style-src", unescape(html))
    assert len(html) < 3_000_000


@pytest.fixture(scope="module")
def chromium(tmp_path_factory):
    browser = Browser(CHROMIUM, tmp_path_factory.mktemp("home"))
    yield browser
    browser.close()


@pytest.fixture
def browser(chromium):
    """Opens a page, of one window size and color scheme, in the browser that all tests share."""

    def start(directory, width=1280, dark=False, before=None):
        chromium.requests, chromium.errors = [], []
        chromium.shape(width, 900, dark)
        chromium.open(directory / "report" / "index.html")
        ready = "document.documentElement.dataset.ready ? done() : setTimeout(wait, 20)"
        chromium.ask(f"new Promise(done => {{ const wait = () => {ready}; wait(); }})")
        return chromium

    return start


def plotted(page, name):
    """The names of a figure's curves."""
    return page.ask(
        f"document.querySelector('[data-plot={name}]').data.filter(t => t.showlegend !== false).map(t => t.name)"
    )


def clean(page, directory):
    """Nothing was complained of, and nothing was asked for but the page itself."""
    file = (directory / "report" / "index.html").resolve().as_uri()
    assert page.errors == [], str(page.errors)
    assert {request for request in page.requests if not request.startswith(("data:", "blob:"))} == {file}


WINDOWS = [
    (1280, False),
    (390, True),
    *(pytest.param(*shape, marks=pytest.mark.slow) for shape in [(1280, True), (390, False)]),
]


@pytest.mark.parametrize(("width", "dark"), WINDOWS)
class TestInChromium:
    pytestmark = browsed

    def test_what_a_reader_clicks(self, study, browser, width, dark):
        page = browser(study, width, dark)
        assert "diverged" in plotted(page, "loss_by_lr")
        assert any(name.startswith("baseline") for name in plotted(page, "loss_by_lr"))
        page.click("[data-variant=baseline]")
        assert not any(name.startswith("baseline") for name in plotted(page, "loss_by_lr"))
        assert page.ask("document.querySelector('[data-table=variants] tr[data-arm=baseline]').hidden")
        page.click("[data-variant=baseline]")

        page.click("[data-panel=tables]")
        column = "[...document.querySelectorAll('[data-table=runs] tbody tr')].map(row => row.cells[19].dataset.value)"
        before = page.ask(column)
        page.click("[data-table=runs] th:nth-child(20) button")
        assert page.ask(column) == sorted(before, key=float) != before
        page.click("[data-table=runs] th:nth-child(20) button")
        assert page.ask(column) == sorted(before, key=float, reverse=True)

        run = page.ask("document.querySelector('[data-inspect]').dataset.inspect")
        page.click("[data-inspect]")
        assert page.ask("['left', 'right'].map(side => document.querySelector(`[data-control=${side}]`).value)").count(
            run
        )
        assert page.ask("document.querySelector('[data-panel=inside]').getAttribute('aria-selected')") == "true"
        assert set(plotted(page, "inside")) == {"layer 0", "layer 1"}
        page.choose("[data-control=layer]", "1")
        assert set(plotted(page, "inside")) == {"layer 1"}
        page.choose("[data-control=site]", "fc2")
        assert "fc2" in page.ask("document.querySelector('[data-plot=inside]').layout.yaxis.title.text")
        run = data_of(study)["runs"][page.ask("document.querySelector('[data-control=left]').value")]
        assert (
            page.ask("document.querySelector('[data-plot=inside]').data[0].y") == run["series"]["norm/out/fc2"]["v"][1]
        )

        page.ask("document.querySelector('[data-panel=inside]').focus()")
        page.press("ArrowRight")
        assert page.ask("document.activeElement.dataset.panel") == "signals"
        page.press("ArrowLeft")
        page.press("ArrowLeft")
        assert page.ask("document.activeElement.dataset.panel") == "curves"
        count = len(plotted(page, "training_curves"))
        page.ask("document.querySelector('details:has([data-run])').open = true")
        page.click("[data-run]")
        assert len(plotted(page, "training_curves")) == count - 1

        buttons = page.ask("[...document.querySelectorAll('.modebar-btn')].map(button => button.dataset.title)")
        assert set(buttons) <= {"Download plot", "Zoom", "Pan", "Zoom in", "Zoom out", "Reset axes"}, "none that sends"
        assert bool(buttons) == (width == 1280)

        paper = "getComputedStyle(document.body).backgroundColor"
        assert (page.ask(paper) == "rgb(21, 24, 28)") == dark
        page.click("button.theme")
        assert (page.ask(paper) == "rgb(21, 24, 28)") != dark
        clean(page, study)

    def test_no_panel_is_wider_than_the_window(self, study, browser, width, dark):
        page = browser(study, width, dark)
        for place in range(6):
            page.click("[role=tab]", place)
            assert page.ask("document.documentElement.scrollWidth - innerWidth") <= 0
            assert page.ask("document.querySelectorAll('[role=tabpanel]:not([hidden])').length") == 1
        clean(page, study)

    def test_on_paper_all_is_light_and_as_wide_as_a_sheet(self, study, browser, width, dark):
        page = browser(study, width, dark)
        look = (
            "[[...document.querySelectorAll('[data-plot]')].map(plot => plot._fullLayout ? plot._fullLayout.width : 0),"
            "getComputedStyle(document.body).backgroundColor]"
        )
        before = page.ask(look)
        page.ask("void window.dispatchEvent(new Event('beforeprint'))")
        assert page.ask(look) == [[960] * len(before[0]), "rgb(255, 255, 255)"]
        page.ask("void window.dispatchEvent(new Event('afterprint'))")
        page.ask("new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))")
        shown = [width for width in before[0] if width]
        assert page.ask(look)[0][: len(shown)] == shown
        assert page.ask(look)[1] == before[1]

    def test_an_attack_is_only_text(self, evil, browser, width, dark):
        page = browser(evil, width, dark)
        for place in range(6):
            page.click("[role=tab]", place)
        assert page.ask("[...document.querySelectorAll('.results li strong')].map(e => e.textContent)") == [
            "baseline",
            EVIL,
        ]
        assert page.ask("[...document.scripts].every(script => script.textContent.length > 20)")
        clean(page, evil)


@pytest.mark.parametrize("kind", ["empty", "one", "lost", "alone"])
class TestMissingRuns:
    pytestmark = browsed

    def test_a_page_states_what_is_missing(self, missing_runs, tmp_path, browser, kind):
        shutil.copytree(missing_runs[kind], tmp_path / "study")
        report_page(tmp_path / "study")
        page = browser(tmp_path / "study")
        assert page.ask("document.querySelector('.state').textContent")
        for place in range(6):
            page.click("[role=tab]", place)
            assert page.ask("document.querySelector('[role=tabpanel]:not([hidden])').textContent.trim().length") > 10
        clean(page, tmp_path / "study")


class TestHiding:
    pytestmark = browsed

    def test_a_hidden_variant_leaves_no_gap_in_the_map(self, study, browser):
        page = browser(study)
        ticks = "document.querySelector('[data-plot=divergence_map]').layout.yaxis"
        assert page.ask(f"[{ticks}.ticktext, {ticks}.tickvals, {ticks}.range]") == [
            ["baseline", "qk_norm"],
            [0, -1],
            [-1.5, 0.5],
        ]
        page.click("[data-variant=baseline]")
        assert page.ask(f"[{ticks}.ticktext, {ticks}.tickvals, {ticks}.range]") == [["qk_norm"], [0], [-0.5, 0.5]]
        heights = page.ask("document.querySelector('[data-plot=divergence_map]').data.flatMap(t => t.y)")
        assert all(height is None or -0.5 < height < 0.5 for height in heights)
        page.click("[data-variant=qk_norm]")
        assert "No data" in page.ask("document.querySelector('[data-plot=divergence_map]').textContent")
        clean(page, study)


def test_a_run_and_two_of_them(study, tmp_path):
    runs = sorted(os.listdir(study / "runs"))[:2]
    for run in runs:
        shutil.copytree(study / "runs" / run, tmp_path / run)
    report_page(tmp_path / runs[0])
    assert "Training curves" in html_of(tmp_path / runs[0])
    report_page(*(tmp_path / run for run in runs))
    assert "Side by side" in (tmp_path / runs[0] / f"report-beside-{runs[1]}" / "index.html").read_text()
