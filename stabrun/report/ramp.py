"""The figure of a learning-rate ramp: the loss and, below it, the output norms that grew most, by learning rate."""

import math
from collections.abc import Iterator, Sequence

from stabrun.record.metrics import by_site
from stabrun.record.schema import Row
from stabrun.report.charts import FAINT, LOG, ONE_PANEL_WIDTH, RATE, SITE_COLORS, Axis, Chart, Marks, Panel
from stabrun.text import rate_text
from stabrun.verdict.growth import OUTPUT, Growth
from stabrun.verdict.ramp import Ramp

SITES = 5  # in the lower panel
ABOVE = 1.15  # times the first loss is the top of the upper panel: a diverged loss may be a hundred times as high
BEYOND = 100.0  # times the largest growth at the edge is the top of the lower panel
LEAST = 0.1  # at least the bottom of the lower panel
RANGE = "#D08A00"  # a color that no site has


def ramp_chart(ramp: Ramp, rows: Sequence[Row], lr_range: Sequence[float] | None, title: str) -> Chart:
    """The chart of a ramp with at least one finite loss. `lr_range`: the one suggested for a search, if any."""
    ends = float(ramp.rates[0]), float(ramp.rates[-1])
    x = Axis("learning rate", RATE, range=ends, share="rate")
    panels = [loss_panel(ramp, lr_range, x, title)]
    if lines := growth_lines(ramp, rows):
        seen = [value for line in lines for value in line.y if value]
        top = BEYOND * max(growth_at_edge(ramp, line) for line in lines)
        span = max(LEAST, 0.5 * min(seen)), min(top, 2 * max(seen))
        marks = [*lines, *edge_line(ramp, span, label="")]
        y = Axis("output norm,\ntimes that of the first step", LOG, range=span)
        panels.append(Panel(x, y, marks, title="The output norms that grew most up to the edge"))
    return Chart("ramp", panels, row_height=2.3, width=ONE_PANEL_WIDTH)


def loss_panel(ramp: Ramp, lr_range: Sequence[float] | None, x: Axis, title: str) -> Panel:
    low, high = min(float(ramp.levels.min()), float(ramp.losses[0])), ABOVE * float(ramp.losses[0])
    span = low - 0.12 * (high - low), high
    step = Marks(color=FAINT, dash="solid", width=0.6, opacity=0.6, label="loss of each step")
    level = Marks(dash="solid", width=1.6, label=f"median of {ramp.window} steps")
    marks = [
        step.at(zip(ramp.rates, ramp.finite, strict=False)),
        level.at(zip(ramp.level_rates, ramp.levels, strict=True)),
    ]
    if ramp.lowest:
        rate, _ = ramp.lowest
        marks.append(Marks(symbol="circle", size=5, label=f"lowest, at {rate_text(rate)}").at([ramp.lowest]))
    marks += edge_line(ramp, span, label="edge, at")
    if lr_range:
        ends = "–".join(map(rate_text, lr_range))
        look = Marks(color=RANGE, dash="solid", width=4, label=f"range for a search, {ends}")
        marks.append(look.at((rate, span[0]) for rate in lr_range))
    return Panel(x, Axis("training loss (nats/token)", range=span), marks, title=title)


def edge_line(ramp: Ramp, span: tuple[float, float], label: str) -> Iterator[Marks]:
    """A vertical line at the edge, if there is one."""
    if rate := ramp.edge.rate:
        text = f"{label} {rate_text(rate)}" if label else ""
        yield Marks([rate, rate], span, dash="dash", label=text)


def growth_lines(ramp: Ramp, rows: Sequence[Row]) -> list[Marks]:
    """A line for each of the sites whose output norm grew most from the first row to the edge, or to the last row."""
    growth, last = Growth(), len(ramp.finite) - 1 if ramp.edge.row is None else ramp.edge.row
    for row in rows[: last + 1]:
        growth.add(row)
    most = growth.most(SITES)
    norms = [(rate, by_site(row, OUTPUT)) for rate, row in zip(ramp.rates, rows, strict=True)]
    return [
        Marks(color=color, dash="solid", label=site.site).at(
            (rate, value if math.isfinite(value := norm[site.site] / site.first) else None)
            for rate, norm in norms
            if site.site in norm
        )
        for site, color in zip(most, SITE_COLORS, strict=False)
    ]


def growth_at_edge(ramp: Ramp, line: Marks) -> float:
    """The last value of a line up to the edge, or of all if there is none."""
    end = ramp.edge.rate or math.inf
    return [y for x, y in zip(line.x, line.y, strict=True) if x is not None and x <= end and y is not None][-1]
