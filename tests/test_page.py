"""The report's page: its numbers beside the study's files, its text escaped, and what it does in a real browser."""

import csv
import json
import os
import re
import shutil
from html.parser import HTMLParser

import pytest
import yaml
from chromium import Browser
from made import a_study
from studies import write_results

from stabrun.report.report import write_report
from stabrun.study.plan import load

EVIL = "<script>alert(1)</script>"
CHROMIUM = shutil.which("chromium")
browsed = [pytest.mark.chromium, pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed")]


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    directory = tmp_path_factory.mktemp("made") / "study"
    a_study(directory)
    reported(directory)
    return directory


@pytest.fixture(scope="module")
def evil(tmp_path_factory):
    """A study in which every word that a record may hold is an attack, and a record was cut off."""
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
    reported(directory)
    return directory


def reported(*directories):
    """The page, without the files of the figures, which take most of the time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("stabrun.report.report.write_figures", lambda drawn, folder: None)
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
    (text,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', html_of(directory), re.S)
    return json.loads(text)["studies"][0]


def shown(text):
    """The number that a cell begins with."""
    return float(text.split(" ")[0])


def two_digits(number):
    return float(f"{number:.2g}")


def test_every_number_on_the_page_is_that_of_the_studys_files(study):
    told = json.loads((study / "study.json").read_text())
    with open(study / "results.csv", newline="") as file:
        results = list(csv.DictReader(file))
    data, cells = data_of(study), Tables(html_of(study)).found
    assert data["told"] == told
    for mine, theirs in zip(data["rows"], results, strict=True):
        for key, text in theirs.items():
            assert str("" if mine[key] is None else mine[key]) == text or mine[key] == float(text), key
    for row, theirs in zip(cells["runs"][1:], results, strict=True):
        for (text, value), there in zip(row, theirs.values(), strict=True):
            assert value == there or float(value) == float(there)
            if re.fullmatch(r"-?\d+(\.\d+)?(e-?\d+)?", text) and "." in there:
                assert float(text) == pytest.approx(float(there), abs=0.5 if "." not in text else 0.006, rel=0.01)
            else:
                assert text in (there, "–")
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
        assert [row[place][1] for place in (14, 15, 18)] == [
            str(facts["best_final_loss"]["value"]), str(facts["best_lr"]), str(facts["lr_sensitivity"]["value"])
        ]  # fmt: skip


def test_the_map_counts_what_the_study_counts(study):
    told = data_of(study)["told"]["variants"]
    with open(study / "results.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    for arm, facts in told.items():
        for place in facts["runs"]:
            own = [row for row in rows if row["arm"] == arm and float(row["lr"]) == place["lr"]]
            assert len(own) == place["runs"]
            assert sum(row["verdict"] == "diverged" for row in own) == place["diverged"]


def test_text_of_records_is_escaped_and_a_cut_record_is_noted(evil):
    html = html_of(evil)
    assert EVIL not in html
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in html
    assert EVIL in data_of(evil)["looks"]
    assert "is incomplete; it was left out." in html


def test_a_page_names_no_other_place(study):
    html = html_of(study)
    without_plotly = re.sub(r"<script>/\*.*?</script>", "", html, flags=re.S)
    assert not re.search(r"""(src|href)=["'](?!data:,)""", without_plotly.split("<script>")[0])
    assert "default-src 'none'" in html


@pytest.fixture
def browser(tmp_path):
    opened = []

    def start(**options):
        opened.append(Browser(CHROMIUM, tmp_path / f"home{len(opened)}", **options))
        return opened[-1]

    yield start
    for one in opened:
        one.close()


def plotted(page, name):
    """The names of a figure's curves."""
    return page.ask(
        f"document.querySelector('[data-plot={name}]').data.filter(t => t.showlegend !== false).map(t => t.name)"
    )


def clean(page, directory):
    """Nothing was complained of, and nothing was asked for but the page itself."""
    file = (directory / "report" / "index.html").resolve().as_uri()
    assert page.errors == []
    assert {request for request in page.requests if not request.startswith(("data:", "blob:"))} == {file}


@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("width", [1280, 390])
class TestInChromium:
    pytestmark = browsed

    def test_what_a_reader_clicks(self, study, browser, width, dark):
        page = browser(width=width, dark=dark)
        page.open(study / "report" / "index.html")
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

        run = page.ask("document.querySelector('[data-choose]').dataset.choose")
        page.click("[data-choose]")
        assert page.ask("['left', 'right'].map(side => document.querySelector(`[data-control=${side}]`).value)").count(
            run
        )
        assert page.ask("document.querySelector('[data-panel=inside]').getAttribute('aria-selected')") == "true"
        assert set(plotted(page, "inside")) == {"layer 0", "layer 1"}
        page.choose("[data-control=layer]", "1")
        assert set(plotted(page, "inside")) == {"layer 1"}
        page.choose("[data-control=site]", "fc2")
        assert "fc2" in page.ask("document.querySelector('[data-plot=inside]').layout.yaxis.title.text")
        trace = data_of(study)["traces"][page.ask("document.querySelector('[data-control=left]').value")]
        curve = page.ask("document.querySelector('[data-plot=inside]').data[0].y")
        assert curve == trace["curves"]["norm/out/fc2"]["v"][1]

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
        page = browser(width=width, dark=dark)
        page.open(study / "report" / "index.html")
        for place in range(6):
            page.click("[role=tab]", place)
            assert page.ask("document.documentElement.scrollWidth - innerWidth") <= 0
            assert page.ask("document.querySelectorAll('[role=tabpanel]:not([hidden])').length") == 1
        clean(page, study)

    def test_on_paper_all_is_light_and_as_wide_as_a_sheet(self, study, browser, width, dark):
        page = browser(width=width, dark=dark)
        page.open(study / "report" / "index.html")
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
        page = browser(width=width, dark=dark)
        page.ask("window.alert = () => console.error('it ran')")
        page.open(evil / "report" / "index.html")
        for place in range(6):
            page.click("[role=tab]", place)
        assert page.ask("[...document.querySelectorAll('.answers li strong')].map(e => e.textContent)") == [
            "baseline",
            EVIL,
        ]
        assert page.ask("[...document.scripts].every(script => script.textContent.length > 20)")
        clean(page, evil)


@pytest.mark.parametrize("kind", ["empty", "one", "lost", "alone"])
class TestWhatIsMissing:
    pytestmark = browsed

    def test_a_page_says_it_and_complains_of_nothing(self, tmp_path, browser, kind):
        options = {"empty": {"skip": 12}, "one": {"skip": 11}, "lost": {"edges": {"baseline": 0.0, "qk_norm": 0.0}}}
        a_study(tmp_path / "study", **options.get(kind, {"seeds": 1}))
        reported(tmp_path / "study")
        page = browser()
        page.open(tmp_path / "study" / "report" / "index.html")
        assert page.ask("document.querySelector('.state').textContent")
        for place in range(6):
            page.click("[role=tab]", place)
            assert page.ask("document.querySelector('[role=tabpanel]:not([hidden])').textContent.trim().length") > 10
        clean(page, tmp_path / "study")


def test_a_run_and_two_of_them(study, tmp_path):
    runs = sorted(os.listdir(study / "runs"))[:2]
    for run in runs:
        shutil.copytree(study / "runs" / run, tmp_path / run)
    reported(tmp_path / runs[0])
    assert "Training curves" in html_of(tmp_path / runs[0])
    reported(*(tmp_path / run for run in runs))
    assert "Side by side" in (tmp_path / runs[0] / f"report-beside-{runs[1]}" / "index.html").read_text()
