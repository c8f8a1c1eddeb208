"""What each chart shows: panels, axes, marks and reference lines, computed once from the data of a study.

`figures` draws a chart by matplotlib, and the page's script by plotly; neither computes anything.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import cycle
from statistics import median, median_low
from typing import Any

from stabrun.record.jsonl import number
from stabrun.record.metrics import BY_LAYER, BY_SITE, EVERY, METRICS, find, signals
from stabrun.record.schema import Interval, Point, Result
from stabrun.report import style
from stabrun.report.run_curves import Curves, RunCurves, Series, spread
from stabrun.report.selection import is_stable
from stabrun.report.study_data import StudyData
from stabrun.report.tables import lead
from stabrun.study.facts import end_texts, estimate_text, frontier_of, known_end
from stabrun.study.summary import BASELINE
from stabrun.text import rate_text, run_name
from stabrun.verdict.judge import CONVERGED, DIVERGED, STANDARD

COLUMN_WIDTH, PAGE_WIDTH, ONE_PANEL_WIDTH = 3.4, 7.0, 5.0  # inches
INK, FAINT = "ink", "faint"  # colors of text, which depend on the theme
LINEAR, LOG, RATE, COUNT, BANDS = "linear", "log", "rate", "count", "bands"
STRICTNESS = {"lenient": ("triangle-down", 0.6), "standard": ("circle", 1.0), "strict": ("triangle-up", 0.6)}
UNKNOWN_END = 1.3  # factor by which an arrow extends an interval whose end is unknown
SQUARES = 22  # squares of the divergence map that fit side by side, on a phone too
LEGEND_LAYERS = 8
DEPTH_STEPS = 7
MAX_SPIKES = 20
SITE_COLORS = [color for color, _ in style.SHIPPED.values()][1:]


@dataclass(frozen=True)
class Marks:
    """Points of one style, joined by a line if there is a `dash`; `None` is a gap.

    `symbol`, `color` and `text` are for all points or one for each. Colors are hexadecimal, INK, FAINT or a position
    on a scale (`style.on_scale`). `size` and `width` are in points. `arm` and `run` are what a reader of the page hides
    the marks by.
    """

    x: Sequence[float | None] = ()
    y: Sequence[float | None] = ()
    color: str | list[str] = INK
    symbol: str | list[str] = ""
    dash: str = ""
    size: float = 4.0
    width: float = 1.2
    opacity: float = 1.0
    hollow: bool = False
    bar: bool = False
    label: str = ""
    text: list[str] = field(default_factory=list)
    hover: list[str] = field(default_factory=list)
    arm: str = ""
    run: str = ""

    def at(self, points: Iterable[tuple[float, float | None]], **look: Any) -> "Marks":
        """These marks at other points (x, y)."""
        pairs = list(points)
        return replace(self, x=[x for x, _ in pairs], y=[y for _, y in pairs], **look)


@dataclass(frozen=True)
class Axis:
    """`scale`: RATE is logarithmic, COUNT has whole numbers, BANDS has the name of `bands[i]` at -i.

    Axes of a chart with the same `share` have one range.
    """

    label: str = ""
    scale: str = LINEAR
    range: tuple[float, float] | None = None
    bands: Sequence[str] = ()
    share: str = ""


@dataclass(frozen=True)
class Rule:
    """A reference line at a value of the x or the y axis."""

    axis: str
    at: float
    label: str = ""


@dataclass(frozen=True)
class Panel:
    """`legend`: whether the panel has a legend of its own, instead of that of the chart."""

    x: Axis
    y: Axis
    marks: list[Marks]
    title: str = ""
    color: str = INK
    rules: list[Rule] = field(default_factory=list)
    legend: bool = False


@dataclass(frozen=True)
class Chart:
    """Panels in rows of `columns`. `legend` holds entries that no mark in a panel has; sizes are in inches."""

    name: str
    panels: list[Panel]
    columns: int = 1
    row_height: float = 2.6
    width: float = PAGE_WIDTH
    widths: tuple[float, ...] = ()
    legend: list[Marks] = field(default_factory=list)


def study_charts(study: StudyData) -> list[Chart]:
    """The charts of a study with finished runs; one without data is left out."""
    charts = frontiers(study), loss_by_lr(study), divergence_map(study), clipped_share(study), lead_times(study)
    return [chart for chart in charts if chart]


def run_charts(study: StudyData, sides: list[Result], curves: Curves) -> list[Chart]:
    """The charts of single runs: `sides` are those to compare in detail."""
    charts = [training_curves(study, curves), gradient_by_depth(sides, curves), *statistics(sides, curves)]
    return [chart for chart in charts if chart]


def loss_by_lr(study: StudyData) -> Chart | None:
    """Final loss by learning rate; one above the loss at initialization is drawn at that loss."""
    initial = [number(row["init_loss"]) for row in study.rows if row["init_loss"] is not None]
    start = median(initial) if initial else None
    labels = {
        arm: f"{arm}, LR sensitivity {estimate_text(sensitivity)}"
        for arm, summary in study.arm_summaries.items()
        if (sensitivity := summary.get("lr_sensitivity"))
    }
    return by_learning_rate("loss_by_lr", study, "final_loss", Axis("final training loss (nats/token)"), start, labels)


def clipped_share(study: StudyData) -> Chart | None:
    axis = Axis("share of clipped steps", range=(-0.03, 1.03))
    chart = by_learning_rate("clipped_share", study, "clipped_share", axis, None, {})
    return chart and replace(chart, width=COLUMN_WIDTH, row_height=2.0)


def by_learning_rate(
    name: str, study: StudyData, column: str, y: Axis, start: float | None, labels: dict[str, str]
) -> Chart | None:
    """A column of `results.csv` by learning rate: one point per run, and a line through the medians of each arm.

    `start`: the value at initialization, if any; a higher one is drawn there. `labels`: those of some arms.
    """
    rows = [row for row in study.rows if row.get(column) is not None]
    marks, legend = list[Marks](), list[Marks]()
    for arm, own in by_arm(study, rows).items():
        base = Marks(color=style.color(arm), arm=arm)
        dash, symbol = style.dash(arm, list(study.plan.arms)), style.marker(arm)
        values = {row["run_id"]: capped(row.get(column), math.inf if start is None else start) for row in own}
        at_rate = {
            rate: [values[row["run_id"]] for row in own if row["lr"] == rate] for rate in sorted({r["lr"] for r in own})
        }
        marks.append(base.at(((rate, median(found)) for rate, found in at_rate.items()), dash=dash))
        ranges = [(rate, end) for rate, found in at_rate.items() for end in (min(found), max(found), None)]
        marks.append(base.at(ranges, dash="solid", width=0.8, opacity=0.7))
        for diverged in (False, True):
            part = [row for row in own if (row["verdict"] == DIVERGED) == diverged]
            look = replace(DIVERGED_MARK, color=base.color) if diverged else replace(base, symbol=symbol, size=3.5)
            hover = [f"{run_title(row)}\n{column.replace('_', ' ')} {row.get(column)}" for row in part]
            places = ((row["lr"], values[row["run_id"]]) for row in part)
            marks.append(look.at(places, arm=arm, label="", hover=hover))
        legend.append(replace(base, dash=dash, symbol=symbol, label=labels.get(arm, arm)))
    rules = [] if start is None else [Rule("y", start, "loss at initialization")]
    panel = Panel(Axis("learning rate", RATE), y, marks, rules=rules)
    return Chart(name, [panel], legend=[*legend, DIVERGED_MARK]) if rows else None


DIVERGED_MARK = Marks(symbol="x-thin", size=6.0, color=FAINT, label="diverged")


def capped(value: Any, cap: float) -> float:
    """At most `cap`, which a value that is not finite gets too."""
    return min(number(value), cap) if math.isfinite(number(value)) else cap


def divergence_map(study: StudyData) -> Chart | None:
    """A band per arm: share of diverged runs by learning rate, and below it the intervals of lr50 and lr10."""
    rates = [point["lr"] for summary in study.arm_summaries.values() for point in summary["runs"]]
    if not rates:
        return None
    width = (math.log(max(rates) / min(rates)) + 2) / SQUARES
    marks = list[Marks]()
    for band, (arm, summary) in enumerate(study.arm_summaries.items()):
        groups, base = together(summary["runs"], width), Marks(arm=arm, color=style.color(arm))
        squares = list(map(square, groups))
        marks.append(replace(
            base, x=[x for x, _, _, _ in squares], y=[0.15 - band] * len(squares), symbol="square", size=7.8,
            color=[style.share_color(share) for _, share, _, _ in squares], text=[text for _, _, text, _ in squares],
            hover=[f"{arm}, {hover}" for _, _, _, hover in squares],
        ))  # fmt: skip
        for level, (strictness, (symbol, opacity)) in enumerate(STRICTNESS.items()):
            frontier, y = summary["frontier"].get(strictness), -0.08 - 0.13 * level - band
            intervals = {"lr50": frontier["lr50"], "lr10": frontier["lr10"]} if frontier else {}
            for name, ends in intervals.items():
                hollow = name == "lr10"
                look = replace(base, symbol=symbol, hollow=hollow, opacity=opacity * (0.7 if hollow else 1))
                marks += interval(ends, f"{arm}, {name} ({strictness})", y - 0.06 * hollow, look)
    legend = [
        Marks(symbol=symbol, color=FAINT, opacity=opacity, label=f"lr50, {strictness}")
        for strictness, (symbol, opacity) in STRICTNESS.items()
    ]
    legend.append(Marks(symbol="circle", color=FAINT, hollow=True, label="lr10 (hollow)"))
    legend.append(Marks(symbol="square", size=7, color=style.share_color(1.0), label="all runs diverged"))
    legend.append(Marks(symbol="square", size=7, color=FAINT, hollow=True, label="none"))
    panel = Panel(Axis("learning rate", RATE), bands(list(study.arm_summaries)), marks)
    return Chart("divergence_map", [panel], row_height=0.3 + 0.55 * len(study.arm_summaries), legend=legend)


def frontiers(study: StudyData) -> Chart | None:
    """lr50 of each arm with its interval, the highest first, and lr10; None if fewer than two arms have one.

    An arm of which a bound is known only has its place by that.
    """
    found = {arm: frontier_of(summary, STANDARD) for arm, summary in study.arm_summaries.items()}
    known = {arm: end for arm, one in found.items() if one and (end := known_end(one["lr50"]))}
    if len(known) < 2:
        return None
    order = sorted(known, key=lambda arm: -known[arm])
    marks = list[Marks]()
    for band, arm in enumerate(order):
        look = Marks(symbol="circle", color=style.color(arm), arm=arm, size=5.0)
        marks += interval(found[arm]["lr50"], f"{arm}, lr50", -band, look)
        if lr10 := found[arm]["lr10"]["median"]:
            marks.append(look.at([(lr10, -band)], hollow=True, hover=[f"{arm}, lr10: {rate_text(lr10)}"]))
    legend = [Marks(symbol="circle", color=FAINT, label="lr50: half of the seeds diverge")]
    legend.append(Marks(symbol="circle", color=FAINT, hollow=True, label="lr10: a tenth"))
    middle = found[BASELINE]["lr50"]["median"] if BASELINE in known else None
    rules = [Rule("x", middle)] if middle else []
    panel = Panel(Axis("learning rate", RATE), bands(order), marks, rules=rules)
    return Chart("lr50", [panel], row_height=0.3 + 0.2 * len(order), width=ONE_PANEL_WIDTH, legend=legend)


def together(points: list[Point], width: float) -> list[list[Point]]:
    """Groups of neighboring learning rates whose squares, `width` wide on a logarithmic axis, would overlap."""
    groups = list[list[Point]]()
    for point in points:
        if groups and math.log(point["lr"] / groups[-1][0]["lr"]) < width:
            groups[-1].append(point)
        else:
            groups.append([point])
    return groups


def square(group: list[Point]) -> tuple[float, float, str, str]:
    """A square of the divergence map: its learning rate, the share of diverged runs, its text and its hover text."""
    rates = [point["lr"] for point in group]
    runs, diverged, undecided = (sum(column) for column in zip(
        *((point["runs"], point["diverged"], point["undecided"]) for point in group), strict=True
    ))  # fmt: skip
    ends = " to ".join(dict.fromkeys(map(rate_text, (rates[0], rates[-1]))))
    hover = f"learning rate {ends}:\n{diverged} of {runs} diverged, {undecided} undecided"
    return median_low(rates), diverged / runs, f"{diverged}/{runs}", hover


def interval(ends: Interval, label: str, y: float, look: Marks) -> Iterator[Marks]:
    """A median with its interval; an end that is unknown is an arrow."""
    low, middle, high = ends["low"], ends["median"], ends["high"]
    known = [end for end in (low, middle, high) if end is not None]
    if not known:
        return
    left = min(known) / (UNKNOWN_END if low is None else 1)
    right = max(known) * (UNKNOWN_END if high is None else 1)
    symbols = ["triangle-left" if low is None else "line-ns", "triangle-right" if high is None else "line-ns"]
    yield replace(
        look, x=[left, right], y=[y, y], dash="solid", symbol=symbols, hollow=False, width=0.7 if look.hollow else 1.3
    )
    if middle is not None:
        known_middle, below, above = end_texts(ends, rate_text)
        range_text = f"{below or 'below the range'} to {above or 'above the range'}"
        yield replace(look, x=[middle], y=[y], hover=[f"{label}: {known_middle}, 95 % interval {range_text}"])


def lead_times(study: StudyData) -> Chart | None:
    """By signal: lead over the loss in each diverged run, and the share of converged runs with a false alarm."""
    diverged = [row for row in study.rows if row["verdict"] == DIVERGED]
    converged = [study.run_summary(row["run_id"]) for row in study.rows if row["verdict"] == CONVERGED]
    if not diverged:
        return None
    names, marks = list(signals()), list[Marks]()
    leads = [
        (row, band, steps)
        for row in diverged
        for band, name in enumerate(names)
        if (steps := lead(study.run_summary(row["run_id"]), name)) is not None
    ]
    for arm in by_arm(study, diverged):
        own = [entry for entry in leads if entry[0]["arm"] == arm]
        hover = [f"{run_title(row)}\n{names[band].replace('_', ' ')}: {steps} steps" for row, band, steps in own]
        look = Marks(symbol=style.marker(arm), color=style.color(arm), opacity=0.8, label=arm, arm=arm, hover=hover)
        marks.append(look.at((steps, -band) for _, band, steps in own))
    of_band = {band: [steps for _, at, steps in leads if at == band] for band in range(len(names))}
    medians = [(median(steps), -band) for band, steps in of_band.items() if steps]
    marks.append(Marks(symbol="line-ns", size=10, label="median").at(medians))
    counts = [sum(name in summary.get("signals", {}) for summary in converged) for name in names]
    shares = [(count / max(1, len(converged)), -band) for band, count in enumerate(counts)]
    y = bands([name.replace("_", " ") for name in names], share="signals")
    lead_title, alarm_title = f"Lead, {len(diverged)} diverged runs", f"False alarms, {len(converged)} converged runs"
    x = Axis("steps before the loss")
    left = Panel(x, y, marks, title=lead_title, rules=[Rule("x", 0)])
    bars = Marks(color=FAINT, bar=True).at(shares)
    right = Panel(Axis("share of runs", range=(0, 1)), y, [bars], title=alarm_title)
    return Chart("lead_times", [left, right], columns=2, widths=(5, 2))


def training_curves(study: StudyData, curves: Curves) -> Chart | None:
    """A panel per arm: the losses of the selected runs, where they diverged, spiked or were resumed."""
    rows = [row for row in study.rows if row["run_id"] in curves and curves[row["run_id"]].loss]
    losses = [loss for row in rows for _, loss in curves[row["run_id"]].loss if math.isfinite(loss)]
    if not losses:
        return None
    starts = [curves[row["run_id"]].loss[0][1] for row in rows]
    top = max((loss for loss in starts if math.isfinite(loss)), default=max(losses))
    y = Axis("training loss (nats/token)", range=(min(losses) - 0.05 * (top - min(losses)), 1.08 * top), share="loss")
    panels = []
    for arm, own in by_arm(study, rows).items():
        marks = list[Marks]()
        for place, row in enumerate(own, 1):
            marks += training_curve(study, row, curves[row["run_id"]], opacity=0.55 + 0.45 * place / len(own))
        panels.append(Panel(Axis("step"), y, marks, title=arm, color=style.color(arm), legend=True))
    return grid("training_curves", panels, min(3, len(panels)), row_height=2.1, legend=list(EVENTS))


EVENTS = (
    Marks(symbol="triangle-down", size=5, label="diverged or rising from here"),
    Marks(symbol="y-down", size=5, label="spike"),
    Marks(symbol="line-ns", size=8, label="restart"),
    Marks(symbol="x-thin", size=5, label="outlier, left out"),
    Marks(symbol="triangle-left", size=6, label="went back to here"),
)


def training_curve(study: StudyData, row: Result, curves: RunCurves, opacity: float) -> Iterator[Marks]:
    """The loss of a run, dashed if it diverged, and its events."""
    base = Marks(arm=row["arm"], run=row["run_id"])
    scar = f", scar {number(row['scar']):.2f}" if row["scar"] else ""
    name = run_name("", row["lr"], row["seed"]).removeprefix("lr=")
    label = f"{name} {row['verdict']}{scar}".lstrip()
    dash = "dash" if row["verdict"] == DIVERGED else "solid"
    yield base.at(curves.loss, color=style.color(base.arm), label=label, opacity=opacity, width=0.9, dash=dash)
    found = study.run_summary(base.run).get("spikes")
    spikes = found["list"] if found else []
    bad = [] if row["first_bad_step"] is None else [row["first_bad_step"]]
    high, skipped = [step for step, _ in spikes[:MAX_SPIKES]], [*curves.skipped[:MAX_SPIKES]]
    marked: list[list[float]] = [[*bad], high, [*curves.restarts], [*skipped], [*curves.rewinds]]
    for event, steps in zip(EVENTS, marked, strict=True):
        if steps:
            nearest = [min(curves.loss, key=lambda point: abs(point[0] - step))[1] for step in steps]
            hover = [f"{run_title(row)}\n{event.label}, step {step}" for step in steps]
            yield event.at(zip(steps, nearest, strict=True), label="", hover=hover, arm=base.arm, run=base.run)


def gradient_by_depth(sides: list[Result], curves: Curves) -> Chart | None:
    """Gradient norm of each block, a line per step: where it grows or vanishes along the depth."""
    last = max((step for run in curves.values() for step, _ in run.loss), default=0)
    panels = [panel for row in sides if (panel := depth_panel(row, curves[row["run_id"]], last))]
    return grid("gradient_by_depth", panels, len(panels), row_height=1.9) if panels else None


def depth_panel(row: Result, curves: RunCurves, last_step: int) -> Panel | None:
    """A run's part of `gradient_by_depth`; None if it has fewer than two blocks, or no gradient norms."""
    metric = METRICS["grad/norm_by_layer"]
    stacks = {key: series for key, series in curves.series.items() if find(key) is metric}
    series = in_depth(list(stacks.values()))
    if series is None or len(series.values[0]) < 2:
        return None
    names = [key.removeprefix(metric.key)[1:] for key in stacks]
    line, marks = Marks(symbol="circle", dash="solid", size=2.5, width=1.0), list[Marks]()
    for place in spread(len(series.steps), DEPTH_STEPS):
        step = series.steps[place]
        color = style.on_scale(style.TIME, step / max(1, last_step))
        marks.append(line.at(enumerate(series.values[place]), color=color, label=f"step {step}"))
    x = Axis(f"layer of {', then '.join(names)}" if len(names) > 1 else "layer", COUNT)
    return Panel(x, Axis(metric.title, LOG, share=metric.key), marks, title=side_title(row))


def in_depth(stacks: list[Series]) -> Series | None:
    """The layers of several stacks, one stack after the other; None if they were not recorded at the same steps."""
    if not stacks or any(series.steps != stacks[0].steps for series in stacks):
        return None
    joined = Series(stacks[0].most)
    joined.steps = stacks[0].steps
    for parts in zip(*(stack.values for stack in stacks), strict=True):
        joined.values.append([value for part in parts for value in part])
    return joined


def statistics(sides: list[Result], curves: Curves) -> Iterator[Chart]:
    """Every statistic of the table of metrics that the runs have recorded.

    Those by site that are recorded often have a chart each, with a line per layer; the others share a chart by what
    they are computed from, with a line per site, or per layer if they have no sites.
    """
    charts: dict[str, list[list[str]]] = {}  # name → the keys of each row
    recorded = dict.fromkeys(key for side in sides for key in curves[side["run_id"]].series)
    for metric in METRICS.values():
        keys = [key for key in recorded if find(key) is metric]
        if metric.shape == BY_SITE and metric.cadence == EVERY:
            name = metric.key.removesuffix("/{site}").replace("norm/", "norms/").replace("/", "_")
            charts[name] = [[key] for key in keys]
        elif metric.shape in (BY_SITE, BY_LAYER) and keys:
            charts.setdefault(metric.source.lower().replace(" ", "_"), []).append(keys)
    for name, rows in charts.items():
        panels = [statistic_panel(side, curves[side["run_id"]], keys) for keys in rows for side in sides]
        if panels:
            below = [replace(panel, title="") for panel in panels[len(sides) :]]
            yield grid(name, panels[: len(sides)] + below, len(sides), row_height=1.35)


def statistic_panel(row: Result, curves: RunCurves, keys: list[str]) -> Panel:
    """A run's statistic by step: a line per layer of a single key, or per site its largest layer."""
    metric = find(keys[0])
    assert metric is not None
    found = {key.rpartition("/")[2]: curves.series[key] for key in keys if key in curves.series}
    label, marks = metric.title, list[Marks]()
    if len(keys) == 1:
        label += f"\n{keys[0].rpartition('/')[2]}" if metric.shape == BY_SITE else ""
        marks += [line for series in found.values() for line in layer_lines(series)]
    else:
        for (site, series), color, dash in zip(found.items(), cycle(SITE_COLORS), cycle(style.DASHES)):
            largest = zip(series.steps, map(largest_of, series.values), strict=True)
            marks.append(Marks(dash=dash, color=color, width=1.0, label=f"{site}, largest layer").at(largest))
    rules = [] if row["first_bad_step"] is None else [Rule("x", row["first_bad_step"])]
    y = Axis(label, LOG if metric.log else LINEAR, share=keys[0])
    return Panel(Axis("step", share="step"), y, marks, title=side_title(row), rules=rules)


def largest_of(layers: list[float]) -> float:
    """The largest value of those that are numbers."""
    return max((value for value in layers if not math.isnan(value)), default=math.nan)


def layer_lines(series: Series) -> Iterator[Marks]:
    """A line per layer; a legend names at most LEGEND_LAYERS of them."""
    named = spread(len(series.layers), LEGEND_LAYERS)
    for layer, values in enumerate(series.layers):
        color = style.on_scale(style.DEPTH, layer / max(1, len(series.layers) - 1))
        label = f"layer {layer}" if layer in named else ""
        yield Marks(x=series.steps, y=values, dash="solid", color=color, width=1.0, label=label)


def grid(name: str, panels: list[Panel], columns: int, row_height: float, **more: Any) -> Chart:
    return Chart(name, panels, columns, row_height, PAGE_WIDTH if columns > 1 else ONE_PANEL_WIDTH, **more)


def by_arm(study: StudyData, rows: list[Result]) -> dict[str, list[Result]]:
    """Arm → its rows, in the order of the study; arms without any are left out."""
    return {arm: own for arm in study.plan.arms if (own := [row for row in rows if row["arm"] == arm])}


def bands(names: Sequence[str], share: str = "") -> Axis:
    return Axis(scale=BANDS, bands=names, range=(0.5 - len(names), 0.5), share=share)


def run_title(row: Result) -> str:
    return f"{run_name(row['arm'], row['lr'], row['seed'])}, {row['verdict']}"


def side_title(row: Result) -> str:
    return f"{'stable' if is_stable(row) else row['verdict']}: {run_name(row['arm'], row['lr'], row['seed'])}"
