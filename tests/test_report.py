"""`stabrun report` beside `study.json` and `results.csv`, and what is said where something is missing."""

import csv
import json
import math
import os
import shutil

import pytest
from conftest import stabrun
from made import a_study

from stabrun.config import MistakeError
from stabrun.observe.record import number
from stabrun.report import sentences, style, tables
from stabrun.report.choose import chosen, pair
from stabrun.report.paper import beside_paper
from stabrun.report.source import opened, read_results, read_rows


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    directory = tmp_path_factory.mktemp("made") / "study"
    a_study(directory)
    return directory


def test_the_variants_table_is_study_json(study):
    told = json.loads((study / "study.json").read_text())["variants"]
    rows = list(csv.DictReader(tables.as_csv(tables.variants(opened(study))).splitlines()))
    assert [row["variant"] for row in rows] == list(told)
    for row in rows:
        arm = told[row["variant"]]
        assert int(row["diverged"]) == sum(place["diverged"] for place in arm["runs"]) > 0
        for name, place in (("lr50", "standard"), ("lr50_strict", "strict"), ("lr50_lenient", "lenient")):
            ends = arm["frontier"][place]["lr50"]
            assert [row[name], row[f"{name}_low"], row[f"{name}_high"]] == [
                "" if ends[end] is None else str(ends[end]) for end in ("median", "low", "high")
            ]
        for name in ("lr_sensitivity", "best_final_loss"):
            assert float(row[f"{name}_low"]) == arm[name]["low"]
        assert float(row["best_perplexity"]) == pytest.approx(math.exp(arm["best_final_loss"]["value"]))
    assert float(rows[1]["gain"]) == told["qk_norm"]["gain"]["value"]


def test_the_runs_table_is_results_csv(study):
    with open(study / "results.csv", newline="") as file:
        there = list(csv.DictReader(file))
    here = list(csv.DictReader(tables.as_csv(tables.runs(opened(study))).splitlines()))
    assert len(here) == 12
    for mine, theirs in zip(here, there, strict=True):
        assert list(mine) == list(theirs)
        for key, value in theirs.items():
            assert mine[key] == value or float(mine[key]) == float(value), key


def test_a_sentence_a_variant(study):
    told = json.loads((study / "study.json").read_text())["variants"]["qk_norm"]["frontier"]["standard"]
    arms = dict(sentences.answers(opened(study)))
    from stabrun.observe.text import rate_text

    median, low, high = (rate_text(told["lr50"][end]) for end in ("median", "low", "high"))
    start = f"half of the seeds diverge at a learning rate of {median} (95 % interval {low} to {high})"
    times = [sentences.times(told["over"]["baseline"][end]) for end in ("median", "low", "high")]
    assert arms["qk_norm"].startswith(f"{start}, {times[0]} times the baseline's ({times[1]} to {times[2]});")
    assert "seen stable up to 0.1, the lowest rate that diverged is 1;" in arms["qk_norm"]
    assert list(sentences.state(opened(study))) == []


@pytest.mark.parametrize(
    ("ends", "said"),
    [
        ((0.15, 0.1, 0.2), "at a learning rate of 0.15 (95 % interval 0.1 to 0.2)"),
        ((0.15, None, 0.2), "(95 % interval from below the range searched to 0.2)"),
        ((0.15, 0.1, None), "(95 % interval from 0.1 to beyond the range searched)"),
        ((None, 3.0, None), "above 3: only this bound is known"),
        ((None, None, 0.003), "below 3e-3: only this bound is known"),
        ((None, None, None), "is not known"),
    ],
)
def test_bounds_in_words(ends, said):
    assert said in sentences.half(dict(zip(("median", "low", "high"), ends, strict=True)), False)


@pytest.mark.parametrize(
    ("ends", "said"),
    [
        ((9.6, 3.04, 22.4), ", 9.6 times the baseline's (3.0 to 22)"),
        ((9.6, 3.0, None), ", 9.6 times the baseline's (at least 3.0)"),
        ((None, 3.0, None), ", more than 3.0 times the baseline's"),
        ((None, None, None), ""),
    ],
)
def test_ratios_in_words(ends, said):
    assert sentences.over(dict(zip(("median", "low", "high"), ends, strict=True))) == said


def state_of(directory):
    return " ".join(sentences.state(opened(directory)))


def test_what_is_missing_is_said(tmp_path):
    lost = {"baseline": 0.0, "qk_norm": 0.0}
    a_study(tmp_path / "empty", skip=12)
    a_study(tmp_path / "one", skip=11)
    a_study(tmp_path / "lost", edges=lost)
    a_study(tmp_path / "alone", seeds=1)
    assert "partial: 0 of 12" in state_of(tmp_path / "empty")
    assert "No run is finished yet" in state_of(tmp_path / "empty")
    assert dict(sentences.answers(opened(tmp_path / "empty")))["baseline"] == "no run has ended yet."
    assert "partial: 1 of 12 planned runs are finished (11 planned)" in state_of(tmp_path / "one")
    assert "One run is finished" in state_of(tmp_path / "one")
    assert "Every finished run diverged" in state_of(tmp_path / "lost")
    assert "There is one seed: no loss has an interval" in state_of(tmp_path / "alone")
    assert "(one seed: no interval)" in dict(sentences.answers(opened(tmp_path / "alone")))["qk_norm"]
    plan = a_study(tmp_path / "failed", skip=12)
    for cell in plan.cells:
        for attempt in (1, 2):
            for kind in ("claim", "failed"):
                (tmp_path / "failed" / "ledger" / f"{cell}.{attempt}.{kind}").write_text('{"reason": "boom"}')
    assert "each one that was tried failed" in state_of(tmp_path / "failed")
    for name in ("empty", "one", "lost", "alone", "failed"):
        done = stabrun("report", name, cwd=tmp_path)
        assert (done.returncode, done.stderr) == (0, ""), name


def test_a_damaged_line_is_noted_and_left_out(study, tmp_path):
    folder = next((study / "runs").iterdir())
    lines = (folder / "metrics.jsonl").read_text().splitlines(keepends=True)
    file = tmp_path / "run" / "metrics.jsonl"
    file.parent.mkdir()
    file.write_text("".join([*lines[:5], lines[5][:40] + "\n", *lines[6:9], lines[9][:50]]))
    notes = []
    assert [row["step"] for row in read_rows(file, notes)] == [0, 1, 2, 3, 4, 6, 7, 8]
    assert notes == [
        "run/metrics.jsonl: line 6 is no row of a record; it was left out.",
        "run/metrics.jsonl: line 10 was cut off, or is still being written; it was left out.",
    ]
    text = (study / "results.csv").read_text()
    (tmp_path / "results.csv").write_text(text[:-20])
    notes = []
    assert len(list(read_results(tmp_path / "results.csv", notes))) == 11
    assert notes == ["results.csv: line 13 is damaged; it was left out."]


def test_runs_are_chosen_for_what_they_show(study):
    rows = opened(study).rows
    picked = [(row["arm"], row["lr"], row["verdict"]) for row in chosen(rows)]
    assert ("baseline", 0.1, "diverged") in picked
    assert ("baseline", 0.01, "converged") in picked
    assert ("qk_norm", 1.0, "diverged") in picked
    assert ("qk_norm", 0.1, "converged") in picked
    stable, lost = pair(rows)
    assert (stable["arm"], stable["lr"], lost["lr"]) == ("baseline", 0.01, 0.1)
    assert pair([]) == (None, None)
    assert pair([row for row in rows if row["verdict"] == "diverged"])[0] is None
    assert number(min(chosen(rows), key=lambda row: number(row["final_loss"]))["final_loss"]) == min(
        number(row["final_loss"]) for row in rows
    )


def test_a_variant_looks_the_same_everywhere():
    shipped = list(style.COLOURS)
    assert len(set(style.COLOURS.values())) == len({style.marker(name) for name in shipped}) == len(shipped)
    assert style.colour("qk_norm n_layer=4") == style.colour("qk_norm")
    assert style.colour("mine") == style.colour("mine") not in style.COLOURS.values()
    arms = ["qk_norm n_layer=2", "qk_norm n_layer=4", "baseline n_layer=2"]
    assert [style.dash(arm, arms) for arm in arms] == ["-", "--", "-"]


def test_the_papers_figures_stand_beside_ours_with_what_differs(study):
    table = beside_paper(opened(study))
    row = dict(zip((column.key for column in table.columns), table.rows[1], strict=True))
    assert row["paper_last_stable"].values == (0.04,)
    assert row["paper_perplexity"].text == "10.84"
    assert "830M parameters" in table.note
    assert "2,097,152 tokens a step, here 64" in table.note


def test_text_is_escaped_in_markdown_and_latex():
    cell = tables.plain("<script>alert(1)</script>|a_b\\")
    table = tables.Table("t", "T", [tables.Column("a", "a")], [[cell]])
    assert r"&lt;script&gt;alert(1)&lt;/script&gt;\|a\_b\\" in tables.as_markdown(table)
    assert r"\textless{}script\textgreater{}alert(1)\textless{}/script\textgreater{}|a\_b" in tables.as_latex(table)


def test_the_command_and_its_mistakes(study, tmp_path):
    shutil.copytree(study, tmp_path / "study")
    first = stabrun("report", "study", cwd=tmp_path)
    assert first.returncode == 0, first.stderr
    assert "qk_norm: half of the seeds diverge" in first.stdout
    written = sorted(os.listdir(tmp_path / "study" / "report" / "tables"))
    assert "variants.tex" in written
    assert "runs.csv" in written
    (tmp_path / "study" / "report" / "left over").touch()
    assert stabrun("report", "study", cwd=tmp_path).stdout == first.stdout
    assert "left over" not in os.listdir(tmp_path / "study" / "report"), "a report is replaced whole"
    assert not [name for name in os.listdir(tmp_path / "study") if name.startswith(".report")]
    for words in ([], ["a", "b", "c"], ["--json"]):
        assert stabrun("report", *words, cwd=tmp_path).returncode == 2
    with pytest.raises(MistakeError, match="neither a study nor a run"):
        opened(tmp_path)


def test_a_run_that_is_not_over(study, tmp_path):
    shutil.copytree(next((study / "runs").iterdir()), tmp_path / "run")
    whole = opened(tmp_path / "run")
    assert list(sentences.state(whole)) == []
    assert "converged (fell)" in dict(sentences.answers(whole))["baseline"]
    (tmp_path / "run" / "summary.json").unlink()
    assert "The run is not over (120 steps so far)" in state_of(tmp_path / "run")
