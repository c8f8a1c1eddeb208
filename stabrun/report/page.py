"""One page, whole in itself: sentences and tables as HTML, the figures' data as JSON, and the code that draws them."""

import json
import math
from dataclasses import asdict
from html import escape
from importlib.resources import files
from typing import Any

from stabrun.record.jsonl import jsonable, number
from stabrun.record.metrics import SITES, signals
from stabrun.report import commands, sentences, style
from stabrun.report.figures import Traces, arm_label
from stabrun.report.run_curves import Curve, Trace
from stabrun.report.selection import pair
from stabrun.report.source import RUN, Row, Source, environment
from stabrun.report.tables import Table, lead_of
from stabrun.study.plan import FRONTIER
from stabrun.text import rate_text, run_name
from stabrun.verdict.judge import CONVERGED, DIVERGED

NUMBERS = 350_000  # numbers of curves by layer in a page: some 2.5 MB
FEWEST = 24  # points of a curve, however many there are
# Nothing is loaded from anywhere, whatever a record's text may say.
POLICY = "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data: blob:"
PANELS = {
    "rates": "Learning rates", "curves": "Training curves", "inside": "Inside the model", "signals": "Early signals",
    "tables": "Tables", "settings": "Settings",
}  # fmt: skip

Part = tuple[Source, Traces, list[Table]]


def page(parts: list[Part], compared: list[Table]) -> str:
    """The page of one study or run, or of several with the tables that compare them."""
    from plotly.offline import get_plotlyjs

    title = " beside ".join(source.name for source, _, _ in parts)
    data = {"studies": [facts(source, traces) for source, traces, _ in parts]}
    own = files("stabrun.report")
    style_sheet, script = (own.joinpath(name).read_text() for name in ("page.css", "page.js"))
    body = "".join(section(place, part, len(parts)) for place, part in enumerate(parts))
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{POLICY}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<link rel="icon" href="data:,">
<title>{escape(title)} · stabrun</title>
<style>{style_sheet}</style>
</head>
<body>
<header><h1>{escape(title)}</h1><button class="theme" type="button">dark or light</button></header>
<main>
{comparison(parts, compared)}{body}</main>
<noscript><p>The figures are drawn by JavaScript; they lie in the folder figures as files too.</p></noscript>
<script>{get_plotlyjs()}</script>
<script type="application/json" id="data">{embedded(data)}</script>
<script>{script}</script>
</body>
</html>
"""


def embedded(data: Any) -> str:
    """JSON that no text in it can end early."""
    return json.dumps(jsonable(data), separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")


def comparison(parts: list[Part], compared: list[Table]) -> str:
    if len(parts) < 2:
        return ""
    buttons = "".join(
        f'<button type="button" data-show="{place}" aria-pressed="{str(not place).lower()}">{escape(source.name)}: '
        f"{escape(str(source.directory))}</button> "
        for place, (source, _, _) in enumerate(parts)
    )
    html = "".join(map(table_html, compared))
    return f'<section class="compare"><h2>Side by side</h2>{html}<p>{buttons}</p></section>\n'


def section(place: int, part: Part, count: int) -> str:
    """A study's part of the page: the answer first."""
    source, traces, tables = part
    panels = panels_of(source, traces, {table.name: table for table in tables})
    tabs = "".join(
        f'<button type="button" role="tab" id="tab-{place}-{name}" data-panel="{name}" '
        f'aria-controls="panel-{place}-{name}">{PANELS[name]}</button>'
        for name in panels
    )
    bodies = "".join(
        f'<div role="tabpanel" id="panel-{place}-{name}" data-panel="{name}" tabindex="0" '
        f'aria-labelledby="tab-{place}-{name}">{html}</div>\n'
        for name, html in panels.items()
    )
    hidden = " hidden" if place else ""
    head = f"<h2>{escape(source.name)}</h2>" if count > 1 else ""
    return (
        f'<section class="study"{hidden}>{head}{answer(source)}{variant_boxes(source)}'
        f'<div role="tablist" aria-label="Parts of the report">{tabs}</div>\n{bodies}</section>\n'
    )


def answer(source: Source) -> str:
    states = "".join(f'<p class="state">{escape(line)}</p>' for line in sentences.state(source))
    lines = "".join(
        f'<li data-arm="{escape(arm)}" style="--c: {style.colour(arm)}">'
        f"<strong>{escape(arm)}</strong>: {escape(line)}</li>"
        for arm, line in sentences.answers(source)
    )
    notes = "".join(f"<li>{escape(note)}</li>" for note in source.notes)
    lost = f"<details><summary>What could not be read: {len(source.notes)}</summary><ul>{notes}</ul></details>"
    head = f'<p class="faint">{escape(subtitle(source))}</p>'
    return f'{head}{states}<ul class="answers">{lines}</ul>{lost if notes else ""}'


def subtitle(source: Source) -> str:
    """What kind of study it is, and what it took so far."""
    if source.strategy == RUN:
        return "one run"
    told, kind = source.told, "a grid of learning rates"
    if source.strategy == FRONTIER:
        low, high = (rate_text(rate) for rate in told["lr_range"])
        kind = f"a search for lr50 between {low} and {high}"
    return f"{kind}; {told['runs']:,} finished runs, {told['tokens']:,} tokens; judged by rule {told['rule']}"


def variant_boxes(source: Source) -> str:
    if len(source.arms) < 2:
        return ""
    boxes = "".join(
        f'<label><input type="checkbox" checked data-variant="{escape(arm)}">'
        f'<span class="swatch" style="--c: {style.colour(arm)}"></span>{escape(arm)}</label>'
        for arm in source.arms
    )
    return f"<fieldset><legend>Variants shown</legend>{boxes}</fieldset>"


def panels_of(source: Source, traces: Traces, tables: dict[str, Table]) -> dict[str, str]:
    """Panel → HTML; a panel that would be empty says what is missing."""
    traced = [row for row in source.rows if row["run_id"] in traces]
    none = '<p class="note">No run is finished yet: there is nothing to draw.</p>'
    panels = {}
    if source.strategy != RUN:
        drawn = (
            plot("loss_by_lr", "Loss against learning rate",
                 "A point a run, a line through the medians over seeds. A loss above that at initialisation is drawn "
                 "there.")
            + plot("divergence_map", "Where runs diverge",
                   "Squares: runs that diverged, of all at this rate. Below them lr50 (filled) and lr10 (hollow) with "
                   "their 95 % intervals, at three strictnesses of the rule: lenient ▼, standard ●, strict ▲. "
                   "An arrow leads out of the range.")
            + plot("clipped_share", "Share of clipped steps",
                   "A point a run: the share of its steps whose gradient was clipped.")
        )  # fmt: skip
        panels["rates"] = drawn if source.rows else none
    marks = "▼ counted as diverged, or as risen, from here; Y: a spike; | a restart."
    panels["curves"] = run_boxes(traced) + plot("training_curves", "Training curves", marks) if traced else none
    panels["inside"] = (
        controls(source, traced)
        + plot("inside", "By step and layer", "The dotted line is the step at which the loss counts as lost.")
        + plot("gradient_by_depth", "Gradient norm by depth", "A line a step.")
        + table_html(tables.get("norm_ratios"))
        if traced
        else none
    )
    signals = ""
    if source.strategy != RUN:
        signals = plot(
            "lead_times", "Lead over the loss",
            "A point a diverged run. False alarms: the share of the converged runs in which the signal broke away too.",
        )  # fmt: skip
    panels["signals"] = (signals if source.rows else none) + table_html(tables.get("leads"))
    panels["tables"] = "".join(table_html(tables.get(name), traces) for name in ("variants", "paper", "runs"))
    panels["settings"] = settings(source)
    return panels


def plot(name: str, title: str, caption: str) -> str:
    return (
        f'<figure><h3>{title}</h3><div class="plot" data-plot="{name}" role="img" aria-label="{title}"></div>'
        f"<figcaption>{caption}</figcaption></figure>"
    )


def run_boxes(rows: list[Row]) -> str:
    boxes = "".join(
        f'<label data-arm="{escape(row["arm"])}"><input type="checkbox" checked data-run="{escape(row["run_id"])}">'
        f'<span class="swatch" style="--c: {style.colour(row["arm"])}"></span>{escape(title(row))}</label>'
        for row in rows
    )
    return f"<details><summary>Runs shown</summary><fieldset><legend>Runs shown</legend>{boxes}</fieldset></details>"


def title(row: Row) -> str:
    return f"{run_name(row['arm'], row['lr'], row['seed'])}, {row['verdict']}"


def controls(source: Source, rows: list[Row]) -> str:
    """What to look at inside of which two runs."""
    stable, lost = pair(rows)
    left = stable or lost or rows[0]
    right = lost or left

    def runs(chosen: Row) -> str:
        return "".join(
            f'<option value="{escape(row["run_id"])}"{" selected" * (row is chosen)}>{escape(title(row))}</option>'
            for row in rows
        )

    sites = "".join(f"<option>{site}</option>" for site in SITES)
    boxes = {
        "statistic": "",
        "site": sites,
        "layer": '<option value="all">all</option>',
        "left": runs(left),
        "right": runs(right),
    }
    labels = {"statistic": "statistic", "site": "site", "layer": "layer", "left": "run", "right": "beside it"}
    html = "".join(
        f'<label>{labels[name]}<select data-control="{name}">{options}</select></label>'
        for name, options in boxes.items()
    )
    return f'<div class="controls">{html}</div>'


def table_html(table: Table | None, traces: Traces | None = None) -> str:
    """A table that sorts; a run that has curves is a button which shows them."""
    if table is None or not table.rows:
        return ""
    head = "".join(
        f'<th scope="col"><button type="button">{escape(column.label)}</button></th>' for column in table.columns
    )
    by_arm = {"variants": 0, "paper": 0, "runs": 1}.get(table.name)
    rows = ""
    for cells in table.rows:
        arm = "" if by_arm is None else f' data-arm="{escape(cells[by_arm].text)}"'
        run = cells[0].text if table.name == "runs" else None
        rows += f"<tr{arm}" + (f' data-id="{escape(run)}">' if run else ">")
        for place, cell in enumerate(cells):
            inner = cell_html(cell.text, None if place else run, traces)
            rows += f'<td data-value="{escape(value_text(cell.values[0]))}">{inner}</td>'
        rows += "</tr>\n"
    note = f'<p class="note">{escape(table.note)}</p>' if table.note else ""
    tall = " tall" if len(table.rows) > 20 else ""
    return (
        f'<div data-of="{table.name}"><h3>{escape(table.title)}</h3>{note}'
        f'<div class="scroll{tall}" tabindex="0" role="region" '
        f'aria-label="{escape(table.title)}"><table data-table="{table.name}"><thead><tr>{head}</tr></thead>'
        f"<tbody>{rows}</tbody></table></div></div>"
    )


def value_text(value: Any) -> str:
    return "" if value is None else str(value)


def cell_html(text: str, run: str | None, traces: Traces | None) -> str:
    if run is not None and traces and run in traces:
        return f'<button type="button" data-choose="{escape(run)}">{escape(text)}</button>'
    return escape(text)


def settings(source: Source) -> str:
    """The commands, the configuration of each arm, and what the runs ran on."""
    import yaml

    lines = "\n".join(commands.commands(source))
    configs = ""
    for arm, config in source.arms.items():
        text = yaml.safe_dump(asdict(config), sort_keys=False)
        configs += f"<details><summary>{escape(arm)}</summary><pre>{escape(text)}</pre></details>"
    facts = "".join(
        f"<tr><td>{escape(key)}</td><td>{escape(value)}</td></tr>" for key, value in environment(source).items()
    )
    ran = f'<div class="scroll"><table class="facts"><tbody>{facts}</tbody></table></div>' if facts else (
        '<p class="note">No finished run tells of its environment.</p>')  # fmt: skip
    return (
        f"<h3>Commands</h3><pre>{escape(lines)}</pre><h3>Configuration</h3>{configs}"
        f'<h3>Environment</h3>{ran}<p class="note">Read from {escape(str(source.directory))}.</p>'
    )


def facts(source: Source, traces: Traces) -> Row:
    """What the page's code draws from. `told` is study.json, `rows` results.csv."""
    arms = list(source.arms)
    held = [row for row in source.rows if row["verdict"] == CONVERGED]
    leads = [
        {"signal": signal.replace("_", " "), "arm": row["arm"], "run": row["run_id"], "lead": lead}
        for row in source.rows
        if row["verdict"] == DIVERGED
        for signal in signals()
        if (lead := lead_of(source.summary(row["run_id"]), signal)) is not None
    ]
    shares = [
        {"name": signal.replace("_", " "), "share": share(source, held, signal) if held else None}
        for signal in signals()
    ]
    lines = sum(len(curve.values[0]) for found in traces.values() for curve in found.curves.values() if curve.values)
    points = max(FEWEST, NUMBERS // max(1, lines))
    return {
        "told": source.told,
        "rows": source.rows,
        "looks": {arm: style.look(arm, arms) for arm in arms},
        "labels": {arm: arm_label(source, arm) for arm in arms},
        "leads": leads,
        "signals": shares,
        "traces": {run: traced(found, source.summary(run), points) for run, found in traces.items()},
    }


def share(source: Source, rows: list[Row], signal: str) -> float:
    return sum(signal in source.summary(row["run_id"]).get("signals", {}) for row in rows) / len(rows)


def traced(found: Trace, summary: Row, points: int) -> Row:
    """A run's curves as JSON: `axes` are lists of steps, which many curves share."""
    axes: list[list[int]] = []
    curves = {}
    for key, curve in found.curves.items():
        steps, values = thinned(curve, points)
        if steps not in axes:
            axes.append(steps)
        curves[key] = {"s": axes.index(steps), "v": [list(map(short, layer)) for layer in zip(*values, strict=True)]}
    spikes = [step for step, _ in (summary.get("spikes") or {}).get("list", [])]
    loss = [[step for step, _ in found.loss], [short(value) for _, value in found.loss]]
    return {"loss": loss, "axes": axes, "curves": curves, "spikes": spikes, "restarts": found.restarts}


def thinned(curve: Curve, points: int) -> tuple[list[int], list[list[float]]]:
    steps, values = curve.steps, curve.values
    stride = math.ceil(len(steps) / points)
    kept = sorted({*range(0, len(steps), stride), len(steps) - 1}) if steps else []
    return [steps[place] for place in kept], [values[place] for place in kept]


def short(value: float) -> float | None:
    """Four digits, which no eye can tell from all; None for what is not finite."""
    return float(f"{number(value):.4g}") if math.isfinite(value) else None
