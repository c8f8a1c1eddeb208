"""Draws charts by matplotlib, as SVG, PDF and PNG for a paper."""

import io
import math
from collections.abc import Iterator
from itertools import groupby
from textwrap import wrap
from typing import Any

from stabrun.report import style
from stabrun.report.charts import BANDS, COUNT, FAINT, INK, LOG, RATE, Axis, Chart, Marks, Panel
from stabrun.text import rate_text

SETTINGS: dict[Any, Any] = {
    "font.size": 8, "axes.titlesize": 8, "axes.labelsize": 8, "legend.fontsize": 7, "xtick.labelsize": 7,
    "ytick.labelsize": 7, "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.alpha": 0.25,
    "grid.linewidth": 0.5, "legend.frameon": False, "axes.axisbelow": True, "text.parse_math": False,
    "svg.hashsalt": "stabrun", "pdf.fonttype": 42,
}  # fmt: skip
# Without dates and versions: the same data give the same bytes.
METADATA: dict[str, dict[str, Any]] = {"svg": {"Date": None}, "pdf": {"CreationDate": None}, "png": {"Software": None}}
TEXT_COLORS = {INK: "#000000", FAINT: "#666666"}
MARGIN = 0.8  # inches of a figure besides its rows of panels
CHARACTERS = 16  # of a label per inch
LEGEND_LINES, LEGEND_LINE = 4, 0.16  # lines of the legend within the margin; inches of each further one

Figure = Any
Axes = Any


def files(charts: list[Chart]) -> Iterator[tuple[str, bytes]]:
    """Name and content of the files of each chart. The same charts give the same bytes."""
    import matplotlib

    for chart in charts:
        with matplotlib.rc_context(SETTINGS):
            figure = draw(chart)
            figure.get_layout_engine().execute(figure)  # once, instead of once per format
            figure.set_layout_engine(None)
            for kind in METADATA:
                file = io.BytesIO()
                figure.savefig(file, format=kind, dpi=200, metadata=METADATA[kind])
                yield f"{chart.name}.{kind}", file.getvalue()


def draw(chart: Chart) -> Figure:
    from matplotlib.figure import Figure

    rows = math.ceil(len(chart.panels) / chart.columns)
    labels = legend_labels(chart)
    lines = math.ceil(len(labels) / legend_columns(chart, labels)) if labels else 0
    height = MARGIN + LEGEND_LINE * max(0, lines - LEGEND_LINES) + chart.row_height * rows
    figure = Figure(figsize=(chart.width, height), layout="constrained")
    grid = figure.subplots(rows, chart.columns, squeeze=False, width_ratios=chart.widths or None)
    first: dict[tuple[str, str], Axes] = {}
    for axes, panel in zip(grid.flat, chart.panels, strict=False):
        for name, axis in (("x", panel.x), ("y", panel.y)):
            if axis.share and first.setdefault((name, axis.share), axes) is not axes:
                getattr(axes, f"share{name}")(first[name, axis.share])
        draw_panel(axes, panel, int(chart.row_height * CHARACTERS))
    for place, (axes, panel) in enumerate(zip(grid.flat, chart.panels, strict=False)):
        format_axis(axes.xaxis, panel.x)
        format_axis(axes.yaxis, panel.y)
        left = chart.panels[place - 1] if place % chart.columns else None
        if left and left.y.share == panel.y.share != "":
            axes.set_ylabel("")
            axes.tick_params(labelleft=False)
        below = chart.panels[place + chart.columns] if place + chart.columns < len(chart.panels) else None
        if below and below.x.share == panel.x.share != "":
            axes.set_xlabel("")
            axes.tick_params(labelbottom=False)
    for axes in list(grid.flat)[len(chart.panels) :]:
        axes.set_visible(False)
    add_legend(figure, chart)
    return figure


def draw_panel(axes: Axes, panel: Panel, width: int) -> None:
    """Draw a panel; `width` is that of the label of its y axis, in characters."""
    axes.set_title(panel.title, color=color_of(panel.color), fontweight="normal" if panel.color == INK else "bold")
    for name, axis in (("x", panel.x), ("y", panel.y)):
        label = "\n".join(line for part in axis.label.split("\n") for line in wrap(part, width))
        axes.set(**{f"{name}label": label, f"{name}scale": "log" if axis.scale in (LOG, RATE) else "linear"})
        if axis.range:
            axes.set(**{f"{name}lim": axis.range})
    for marks in panel.marks:
        draw_marks(axes, marks)
    for rule in panel.rules:
        (axes.axhline if rule.axis == "y" else axes.axvline)(rule.at, color=color_of(FAINT), lw=0.8, ls=":")
        if rule.label:
            axes.annotate(
                rule.label, (1, rule.at), (0, 2), xycoords=("axes fraction", "data"), textcoords="offset points",
                ha="right", fontsize=6.5, color=color_of(FAINT),
            )  # fmt: skip
    if panel.legend:
        axes.legend(
            loc="upper right", handlelength=1.2, borderaxespad=0.1, labelspacing=0.2, fontsize=6, frameon=True,
            edgecolor="none",
        )  # fmt: skip


def draw_marks(axes: Axes, marks: Marks) -> None:
    """Draw marks; those with a symbol or color for each point are drawn in groups of the same look."""
    x, y = ([math.nan if value is None else value for value in values] for values in (marks.x, marks.y))
    if marks.bar:
        axes.barh(y, x, color=color_of(marks.color), height=0.6)
        return
    look: dict[str, Any] = {"lw": marks.width, "alpha": marks.opacity, "zorder": 3}
    if marks.dash and (isinstance(marks.symbol, list) or not marks.symbol):
        label = "" if marks.symbol else marks.label
        axes.plot(x, y, style.DASHES[marks.dash], color=color_of(marks.color), label=label, **look)
        if not marks.symbol:
            return
        look["ls"] = ""
    else:
        look["ls"] = style.DASHES.get(marks.dash, "")
    each = [[word] * max(1, len(x)) if isinstance(word, str) else word for word in (marks.symbol, marks.color)]
    for (symbol, color), group in groupby(range(len(each[0])), key=lambda place: (each[0][place], each[1][place])):
        places = [place for place in group if place < len(x)]
        edge = "#444444" if symbol == "square" and marks.text else color_of(color)
        axes.plot(
            [x[place] for place in places], [y[place] for place in places], marker=style.MATPLOTLIB_MARKERS[symbol],
            color=color_of(color), ms=marks.size, mec=edge, mfc="white" if marks.hollow else color_of(color),
            mew=1.4 if symbol in LINES else 0.5 + 0.3 * marks.hollow, label=marks.label, **look,
        )  # fmt: skip
    for at, height, text in zip(x, y, marks.text, strict=False):
        axes.annotate(text, (at, height), ha="center", va="center", fontsize=4.5, zorder=4)


LINES = "x-thin", "y-down", "line-ns"  # symbols without an area


def color_of(color: Any) -> str:
    """A color of `Marks` as matplotlib knows it, on white."""
    from matplotlib.colors import LinearSegmentedColormap, to_hex

    scale, _, position = color.partition(" ")
    if scale in style.SCALES:
        return to_hex(LinearSegmentedColormap.from_list(scale, style.SCALES[scale]["light"])(float(position)))
    return TEXT_COLORS.get(color, color)


def format_axis(ticks: Any, axis: Axis) -> None:
    """Ticks by the scale: logarithmic axes get a few labels however little they span."""
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

    if axis.scale == BANDS:
        ticks.set_ticks([-place for place in range(len(axis.bands))], axis.bands)
        ticks.grid(visible=False)
    elif axis.scale == COUNT:
        ticks.set_major_locator(MaxNLocator(integer=True, nbins=8))
    elif axis.scale in (LOG, RATE):
        low, high = ticks.get_view_interval()
        parts = (1.0, 3.0) if axis.scale == RATE else (1.0, 2.0, 5.0) if high / low < 30 else (1.0,)
        ticks.set_major_locator(LogLocator(subs=parts, numticks=20 if axis.scale == RATE else 8))
        ticks.set_major_formatter(
            FuncFormatter(lambda value, _: rate_text(value) if axis.scale == RATE else f"{value:g}")
        )
        ticks.set_minor_locator(NullLocator())


def add_legend(figure: Figure, chart: Chart) -> None:
    """The legend of the chart below it: entries of its own, and each label of the panels once."""
    entries: dict[str, Any] = {}
    for axes, panel in zip(figure.axes, chart.panels, strict=False):
        if not panel.legend:
            handles, labels = axes.get_legend_handles_labels()
            entries = dict(zip(labels, handles, strict=True)) | entries
    axes = figure.axes[0]
    for marks in chart.legend:
        before = len(axes.lines)
        draw_marks(axes, marks)
        entries[marks.label] = axes.lines[before]
    if entries:
        columns = legend_columns(chart, list(entries))
        figure.legend(list(entries.values()), list(entries), loc="outside lower center", ncols=columns)


def legend_labels(chart: Chart) -> list[str]:
    """The labels of the legend below the chart."""
    marks = [*(mark for panel in chart.panels if not panel.legend for mark in panel.marks), *chart.legend]
    return list(dict.fromkeys(mark.label for mark in marks if mark.label))


def legend_columns(chart: Chart, labels: list[str]) -> int:
    return min(max(int(chart.width * CHARACTERS / (max(map(len, labels)) + 7)), 1), 8)
