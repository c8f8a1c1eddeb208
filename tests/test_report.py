"""`stabrun report` beside `study.json` and `results.csv`, and what is said where something is missing."""

import csv
import json
import math
import os
import shutil
import subprocess
import sys

import pytest
from helpers import TINY, run, stabrun
from made import a_study

from stabrun.config import RESULT, UserError, marked
from stabrun.record.jsonl import number
from stabrun.record.run_dir import RunDir
from stabrun.report import sentences, style, tables
from stabrun.report.commands import overrides
from stabrun.report.figures import figures
from stabrun.report.paper import beside_paper
from stabrun.report.report import write_report
from stabrun.report.run_curves import LAYERED, POINTS, trace, traced
from stabrun.report.selection import chosen, pair
from stabrun.report.source import opened, read_results, read_rows
from stabrun.study.question import planned

FIGURES = {
    "loss_by_lr", "divergence_map", "clipped_share", "lead_times", "training_curves", "norms_out", "norms_in",
    "norms_weight", "gradient_by_depth", "adam", "attention",
}  # fmt: skip


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
    from stabrun.text import rate_text

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


def drawn(directory):
    """The names of the figures that a study has."""
    source = opened(directory)
    traces = {row["run_id"]: trace(source, row["run_id"]) for row in chosen(source.rows)}
    return {name for name, _ in figures(source, traces)}


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
    names = {name: drawn(tmp_path / name) for name in ("empty", "one", "lost", "alone", "failed")}
    assert names["empty"] == names["failed"] == set()
    assert names["lost"] == names["alone"] == FIGURES
    assert names["one"] == FIGURES - {"lead_times"}, "no run diverged"
    done = stabrun("report", "failed", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")


def test_a_damaged_line_is_noted_and_left_out(study, tmp_path):
    folder = next((study / "runs").iterdir())
    lines = (folder / "metrics.jsonl").read_text().splitlines(keepends=True)
    file = tmp_path / "run" / "metrics.jsonl"
    file.parent.mkdir()
    file.write_text("".join([*lines[:5], lines[5][:40] + "\n", *lines[6:9], lines[9][:50]]))
    notes = []
    assert [row["step"] for row in read_rows(RunDir(file.parent), notes)] == [0, 1, 2, 3, 4, 6, 7, 8]
    assert notes == [
        "run/metrics.jsonl: line 6 is not a row of a record; it was left out.",
        "run/metrics.jsonl: line 10 is incomplete; it was left out.",
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


def test_the_command_and_its_mistakes(study, tmp_path, monkeypatch, capsys):
    shutil.copytree(study, tmp_path / "study")
    first = stabrun("report", "study", cwd=tmp_path)
    assert first.returncode == 0, first.stderr
    assert "qk_norm: half of the seeds diverge" in first.stdout
    tables_there, figures_there = (os.listdir(tmp_path / "study" / "report" / name) for name in ("tables", "figures"))
    assert {f"variants.{kind}" for kind in ("csv", "md", "tex")} | {"runs.csv", "leads.csv"} < set(tables_there)
    names = {name.partition(".")[0] for name in figures_there}
    assert names == FIGURES
    assert sorted(figures_there) == sorted(f"{name}.{kind}" for name in names for kind in ("svg", "pdf", "png"))
    bytes_of = {name: (tmp_path / "study" / "report" / "figures" / name).read_bytes() for name in figures_there}
    (tmp_path / "study" / "report" / "left over").touch()
    monkeypatch.chdir(tmp_path)
    assert run(capsys, "report", "study")[:2] == (0, first.stdout)
    for name, there in bytes_of.items():
        assert (tmp_path / "study" / "report" / "figures" / name).read_bytes() == there, "the same data, the same bytes"
    assert "left over" not in os.listdir(tmp_path / "study" / "report"), "a report is replaced whole"
    assert not [name for name in os.listdir(tmp_path / "study") if name.startswith(".report")]
    for words in ([], ["a", "b", "c"], ["--json"]):
        assert run(capsys, "report", *words)[0] == 2
    with pytest.raises(UserError, match="neither a study nor a run"):
        opened(tmp_path)


def test_a_run_that_is_not_over(study, tmp_path):
    stable, _ = pair(opened(study).rows)
    shutil.copytree(study / "runs" / stable["run_id"], tmp_path / "run")
    whole = opened(tmp_path / "run")
    assert list(sentences.state(whole)) == []
    assert "converged (fell)" in dict(sentences.answers(whole))["baseline"]
    (tmp_path / "run" / "summary.json").unlink()
    assert "The run is not over (120 steps so far)" in state_of(tmp_path / "run")


def test_curves_are_bounded_and_keep_their_ends_and_extremes():
    rows = [
        {"step": step, "train/loss": 1.0 + (step == 1234) * 50, "norm/out/qkv": [step, 2.0]} for step in range(5001)
    ]
    found = traced(rows)
    assert len(found.loss) <= POINTS + 2
    assert (1234, 51.0) in found.loss
    curve = found.curves["norm/out/qkv"]
    assert LAYERED / 2 <= len(curve.steps) <= LAYERED + 1
    assert (curve.steps[0], curve.steps[-1]) == (0, 5000)
    assert curve.layers[0] == [float(step) for step in curve.steps]


def test_the_ratio_of_two_runs_norms(study):
    source = opened(study)
    sides = [row for row in pair(source.rows) if row]
    traces = {row["run_id"]: trace(source, row["run_id"]) for row in sides}
    table = tables.ratios(sides, traces)
    records = [list(RunDir(study / "runs" / row["run_id"]).rows()) for row in sides]
    last = int(table.columns[-1].key.removeprefix("step_"))
    by_hand = [record[last]["norm/out/qkv"][1] for record in records]
    assert [cell.values[0] for cell in table.rows[1]][:3] == ["out", "qkv", 1]
    assert table.rows[1][-1].values[0] == by_hand[1] / by_hand[0] > 2


def test_without_the_extra_there_is_a_sentence(study, monkeypatch):
    monkeypatch.setattr("stabrun.report.report.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install 'stabrun\[report\]'"):
        write_report(study)


def test_a_report_imports_no_torch(study, tmp_path):
    shutil.copytree(study, tmp_path / "study")
    code = "import sys; from pathlib import Path; from stabrun.report import report; "
    code += "report.write_figures = lambda *_: None; "
    code += "report.write_report(Path('study')); assert 'torch' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_command_told_asks_the_same_question(study):
    source = opened(study)
    plan, _, _ = planned(overrides(source))
    assert set(plan.cells) == set(source.plan.cells)


def test_the_command_told_of_a_search_with_a_further_axis(tmp_path):
    words = (
        "study.strategy=frontier",
        "study.lr_range=[0.01,1]",
        "model.n_layer=1,2",
        "study.variants=[baseline,qk_norm]",
    )
    plan, _, _ = planned([*TINY, *words])
    for folder in ("runs", "ledger"):
        (tmp_path / folder).mkdir()
    plan.save(tmp_path)
    again, _, _ = planned(overrides(opened(tmp_path)))
    assert [marked(arm, RESULT) for arm in again.arms.values()] == [marked(arm, RESULT) for arm in plan.arms.values()]
    assert (again.strategy, again.lr_range) == (plan.strategy, plan.lr_range)


def test_two_studies_side_by_side(study, tmp_path):
    shutil.copytree(study, tmp_path / "one")
    a_study(tmp_path / "two", "model.n_layer=1", skip=3)
    write_report(tmp_path / "one", tmp_path / "two")
    place = tmp_path / "one" / "report-beside-two"
    row = next(csv.DictReader((place / "tables" / "side_by_side.csv").read_text().splitlines()))
    told = [json.loads((tmp_path / name / "study.json").read_text())["variants"]["baseline"] for name in ("one", "two")]
    assert [row["lr50_a"], row["lr50_b"]] == [str(one["frontier"]["standard"]["lr50"]["median"]) for one in told]
    assert (place / "b" / "figures" / "loss_by_lr.svg").is_file()
    assert not (tmp_path / "one" / "report").exists()
