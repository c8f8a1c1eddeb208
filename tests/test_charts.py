"""What the charts show compared to the files of the study."""

import csv
import json
import math
from statistics import median

import pytest
from made import CHARTS

from stabrun.record.metrics import BY_SITE, EVERY, METRICS, OUTPUT, Metric
from stabrun.record.run_dir import RunDir
from stabrun.report import charts, figures, style
from stabrun.report.report import part_of
from stabrun.report.study_data import read


@pytest.fixture(scope="module")
def part(made_study):
    return part_of(read(made_study))


@pytest.fixture(scope="module")
def results(made_study):
    with open(made_study / "results.csv", newline="") as file:
        return list(csv.DictReader(file))


def chart(part, name):
    return next(chart for chart in part.charts if chart.name == name)


def test_loss_by_lr_has_a_point_per_run_and_a_line_through_the_medians(part, results):
    (panel,) = chart(part, "loss_by_lr").panels
    start = median(float(row["init_loss"]) for row in results)
    assert panel.rules[0].at == start
    for arm in ("baseline", "qk_norm"):
        own = [marks for marks in panel.marks if marks.arm == arm]
        for diverged in (True, False):
            points = [point for marks in own if marks.hover and (marks.symbol == "x-thin") == diverged
                      for point in zip(marks.x, marks.y, strict=True)]  # fmt: skip
            rows = [row for row in results if row["arm"] == arm and (row["verdict"] == "diverged") == diverged]
            assert sorted(points) == sorted((float(row["lr"]), min(start, float(row["final_loss"]))) for row in rows)
        line = own[0]
        for rate, loss in zip(line.x, line.y, strict=True):
            seeds = [float(row["final_loss"]) for row in results if row["arm"] == arm and float(row["lr"]) == rate]
            assert loss == pytest.approx(min(start, median(seeds)))


def test_a_loss_above_the_initial_one_is_drawn_there(made_study):
    study = read(made_study)
    study.rows[0] |= {"final_loss": "nan"}
    study.rows[1] |= {"final_loss": 1e9}
    (panel,) = charts.loss_by_lr(study).panels
    heights = [y for marks in panel.marks for y in marks.y if y is not None]
    assert max(heights) == panel.rules[0].at


def test_the_divergence_map_has_the_counts_and_intervals_of_study_json(part, made_study, results):
    summaries = json.loads((made_study / "study.json").read_text())["variants"]
    (panel,) = chart(part, "divergence_map").panels
    assert list(panel.y.bands) == list(summaries)
    for arm, summary in summaries.items():
        squares, *intervals = (marks for marks in panel.marks if marks.arm == arm)
        for rate, text in zip(squares.x, squares.text, strict=True):
            verdicts = [row["verdict"] for row in results if row["arm"] == arm and float(row["lr"]) == rate]
            assert text == f"{verdicts.count('diverged')}/{len(verdicts)}"
        medians = [marks.x[0] for marks in intervals if marks.hover]
        frontiers = [summary["frontier"][level] for level in ("lenient", "standard", "strict")]
        assert medians == [frontier[name]["median"] for frontier in frontiers for name in ("lr50", "lr10")]


def test_lr50_of_each_arm_is_that_of_study_json_the_highest_first(part, made_study):
    summaries = json.loads((made_study / "study.json").read_text())["variants"]
    (panel,) = chart(part, "lr50").panels
    ends = {arm: summary["frontier"]["standard"] for arm, summary in summaries.items()}
    assert list(panel.y.bands) == sorted(ends, key=lambda arm: -ends[arm]["lr50"]["median"]) == ["qk_norm", "baseline"]
    for place, arm in enumerate(panel.y.bands):
        drawn = [(x, y) for marks in panel.marks if marks.arm == arm for x, y in zip(marks.x, marks.y, strict=True)]
        assert {y for _, y in drawn} == {-place}
        assert {ends[arm]["lr50"][end] for end in ("low", "median", "high")} < {x for x, _ in drawn}
        assert ends[arm]["lr10"]["median"] in {x for x, _ in drawn}
    assert panel.rules[0].at == ends["baseline"]["lr50"]["median"]


@pytest.mark.parametrize(
    ("ends", "drawn", "symbols"),
    [
        ((0.2, 0.1, 0.4), [0.1, 0.4], ["line-ns", "line-ns"]),
        ((0.2, None, 0.4), [0.2 / 1.3, 0.4], ["triangle-left", "line-ns"]),
        ((None, 0.3, None), [0.3, 0.3 * 1.3], ["line-ns", "triangle-right"]),
    ],
)
def test_an_unknown_end_of_an_interval_is_an_arrow(ends, drawn, symbols):
    facts = dict(zip(("median", "low", "high"), ends, strict=True))
    line, *middle = charts.interval(facts, "qk_norm, lr50", 0.0, charts.Marks())
    assert (line.x, line.symbol) == (drawn, symbols)
    assert [marks.x for marks in middle] == [[end] for end in ends[:1] if end]


def test_squares_that_would_overlap_are_one():
    points = [
        {"lr": lr, "runs": runs, "diverged": diverged, "undecided": 1}
        for lr, runs, diverged in ((0.1, 2, 0), (0.101, 3, 1), (0.11, 1, 1), (1.0, 4, 4))
    ]
    groups = charts.together(points, 0.05)
    assert [[point["lr"] for point in group] for group in groups] == [[0.1, 0.101], [0.11], [1.0]]
    rate, share, text, hover = charts.square(groups[0])
    assert rate == 0.1
    assert (share, text) == (pytest.approx(0.2), "1/5")
    assert hover == "learning rate 0.1 to 0.101:\n1 of 5 diverged, 2 undecided"
    assert charts.square(groups[2])[3] == "learning rate 1:\n4 of 4 diverged, 1 undecided"


def test_leads_are_those_of_the_summaries(part, made_study, results):
    left, right = chart(part, "lead_times").panels
    diverged = [row for row in results if row["verdict"] == "diverged"]
    expected = [
        (signal["lead"], name.replace("_", " "))
        for row in diverged
        for name, signal in RunDir(made_study / "runs" / row["run_id"]).summary()["signals"].items()
    ]
    drawn = [(x, left.y.bands[-y]) for marks in left.marks if marks.arm for x, y in zip(marks.x, marks.y, strict=True)]
    assert sorted(drawn) == sorted(expected)
    assert all(0 <= share <= 1 for share in right.marks[0].x)


def test_training_curves_mark_where_a_run_diverged(part, results):
    panels = chart(part, "training_curves").panels
    assert [panel.title for panel in panels] == ["baseline", "qk_norm"]
    for row in results:
        own = [marks for panel in panels for marks in panel.marks if marks.run == row["run_id"]]
        if own:
            assert own[0].dash == ("dash" if row["verdict"] == "diverged" else "solid")
            steps = [marks.x[0] for marks in own if marks.symbol == "triangle-down"]
            assert steps == [float(step) for step in [row["first_bad_step"]] if step]


def test_a_line_per_layer_has_the_recorded_values(part, made_study):
    panel = chart(part, "norms_out").panels[0]
    run = read(made_study).rows[0]
    recorded = list(RunDir(made_study / "runs" / run["run_id"]).rows())
    assert panel.title == "stable: baseline lr=1e-2 s0"
    assert [marks.label for marks in panel.marks] == ["layer 0", "layer 1"]
    for layer, marks in enumerate(panel.marks):
        assert marks.y == [recorded[step]["norm/out/qkv"][layer] for step in marks.x]


def test_a_statistic_of_the_table_has_a_chart(made_study, monkeypatch):
    study = read(made_study)
    metric = Metric("largest/out/{site}", "largest output", "1", OUTPUT, EVERY, "mean", "…")
    monkeypatch.setitem(METRICS, metric.key, metric)
    monkeypatch.setattr(
        "stabrun.report.run_curves.read_rows",
        lambda run, notes: [row | {"largest/out/qkv": row["norm/out/qkv"]} for row in run.rows()],
    )
    part = part_of(study)
    assert metric.shape == BY_SITE
    assert chart(part, "largest_out").panels[0].y.label == "largest output\nqkv"
    assert chart(part, "norms_out").panels[0].y.label == "output norm\nqkv"


def test_charts_of_incomplete_studies(part, missing_runs, made_study):
    names = {kind: {chart.name for chart in part_of(read(path)).charts} for kind, path in missing_runs.items()}
    assert {chart.name for chart in part.charts} == CHARTS
    assert names["empty"] == set()
    assert names["lost"] == names["alone"] == CHARTS
    assert names["one"] == CHARTS - {"lr50", "lead_times"}, "one arm has runs, and none diverged"


def test_a_legend_names_few_of_many_layers():
    series = charts.Series(10)
    for step in (0, 1):
        series.add(step, [float(layer) for layer in range(48)])
    labels = [marks.label for marks in charts.layer_lines(series) if marks.label]
    assert len(labels) == 8
    assert (labels[0], labels[-1]) == ("layer 0", "layer 47")


def test_figures_draw_every_mark_of_a_chart(part):
    for name in ("loss_by_lr", "training_curves", "norms_out"):
        described = chart(part, name)
        figure = figures.draw(described)
        for axes, panel in zip(figure.axes, described.panels, strict=False):
            drawn = {tuple(line.get_xdata()) for line in axes.lines}
            for marks in panel.marks:
                if marks.dash and None not in marks.x:
                    assert tuple(marks.x) in drawn


def test_color_on_a_scale_runs_from_its_first_to_its_last():
    for name, themes in style.SCALES.items():
        ends = figures.color_of(style.on_scale(name, 0.0)), figures.color_of(style.on_scale(name, 1.0))
        assert ends == (themes["light"][0], themes["light"][-1])
    assert math.isclose(len(style.SCALES["depth"]["light"]), len(style.SCALES["depth"]["dark"]))
