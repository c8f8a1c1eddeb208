"""The page of a report: one file that needs no network, made of a template, the data of the charts, and a script."""

import base64
import hashlib
import json
import math
import zlib
from dataclasses import asdict, dataclass, fields, is_dataclass
from importlib.resources import files
from typing import Any

from stabrun.record.metrics import BY_LAYER, BY_SITE, METRICS, SCALAR, SITES, Metric, find
from stabrun.record.schema import Result
from stabrun.report import commands, sentences, style
from stabrun.report.charts import Chart, depth_panel, run_title, side_title
from stabrun.report.run_curves import Curves, RunCurves, Series
from stabrun.report.selection import sides
from stabrun.report.study_data import RUN, StudyData, environment
from stabrun.report.tables import Table
from stabrun.study.plan import FRONTIER
from stabrun.text import rate_text
from stabrun.verdict.judge import DIVERGED

MAX_NUMBERS = 350_000  # of all curves by layer in a page
MIN_POINTS = 24  # of a curve, however many curves there are
TABS = {
    "rates": "Learning rates", "curves": "Training curves", "inside": "Inside the model", "signals": "Early signals",
    "tables": "Tables", "settings": "Settings",
}  # fmt: skip


@dataclass
class Part:
    """One of the studies or runs that a page shows."""

    study: StudyData
    curves: Curves
    tables: list[Table]
    charts: list[Chart]


def page(parts: list[Part], comparisons: list[Table]) -> str:
    """The HTML of one or two studies or runs, with the tables that compare them."""
    from jinja2 import Environment, PackageLoader
    from plotly.offline import get_plotlyjs

    package, plotly = files("stabrun.report"), get_plotlyjs()
    script = package.joinpath("page.js").read_text(encoding="utf-8")
    data = {
        "studies": [study_json(part) for part in parts],
        "statistics": {
            key: {"title": title, "log": metric.log} for part in parts for key, title, metric in statistics(part.curves)
        },
        "scales": style.SCALES,
        "rates": {rate_text(rate): rate for power in range(-7, 4) for rate in (10.0**power, 3 * 10.0**power)},
    }
    template = Environment(
        loader=PackageLoader("stabrun.report", "."), autoescape=True, trim_blocks=True, lstrip_blocks=True
    ).get_template("page.html")
    return template.render(
        title=" / ".join(part.study.plan.name for part in parts),
        parts=[context(part) for part in parts],
        comparisons=comparisons,
        tabs=TABS,
        # Only these two scripts run, whatever a record contains.
        hashes=" ".join(f"'sha256-{sha256(text)}'" for text in (plotly, script)),
        style=package.joinpath("page.css").read_text(encoding="utf-8"),
        script=script,
        plotly=packed(plotly),
        data=packed(json.dumps(data, separators=(",", ":"), allow_nan=False)),
    )


def sha256(text: str) -> str:
    return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def packed(text: str) -> str:
    """Text as base64 of its deflated bytes, a quarter to a third of the size; the page's script unpacks it."""
    return base64.b64encode(zlib.compress(text.encode(), 9)).decode()


def context(part: Part) -> dict[str, Any]:
    """What the template shows of a study or a run."""
    import yaml

    study = part.study
    rows = [row for row in study.rows if row["run_id"] in part.curves]
    pair = sides(rows)
    return {
        "study": study,
        "subtitle": subtitle(study),
        "state": list(sentences.state(study)),
        "results": list(sentences.results(study)),
        "colors": {arm: style.color(arm) for arm in study.plan.arms},
        "runs": [(row["run_id"], row["arm"], run_title(row)) for row in rows],
        "drawn": set(part.curves),
        "left": pair[0]["run_id"] if pair else None,
        "right": pair[-1]["run_id"] if pair else None,
        "statistics": [(key, label(key)) for key, _, _ in statistics(part.curves)],
        "sites": [(site, site) for site in sites(part.curves)],
        "site": (pair[-1]["first_bad_site"] or "").rpartition("/")[2] if pair else "",
        "charts": {chart.name for chart in part.charts} | COMPOSED_BY_SCRIPT,
        "tables": {table.name: table for table in part.tables},
        "is_study": study.plan.strategy != RUN,
        "commands": "\n".join(commands.commands(study)),
        "configs": {
            arm: yaml.safe_dump(asdict(study.watched or config), sort_keys=False)
            for arm, config in study.plan.arms.items()
        },
        "environment": environment(study),
    }


def statistics(curves: Curves) -> list[tuple[str, str, Metric]]:
    """What the runs have recorded: key, title of its axis, and metric.

    A key with `{site}` stands for those of all sites; the layers of several stacks have a key each.
    """
    recorded = dict.fromkeys(key for run in curves.values() for key in run.series)
    found = [(key, metric) for key in recorded if (metric := find(key))]
    order = sorted(METRICS.values(), key=lambda metric: (BY_SITE, BY_LAYER, SCALAR).index(metric.shape))
    keys = dict.fromkeys(
        (metric.key if metric.shape == BY_SITE else key, metric)
        for wanted in order for key, metric in found if metric is wanted
    )  # fmt: skip
    return [(key, metric.title + stack_text(key, metric), metric) for key, metric in keys]


def label(key: str) -> str:
    """What a statistic is called in a list."""
    metric = find(key)
    return metric.label + stack_text(key, metric) if metric else key


def stack_text(key: str, metric: Metric) -> str:
    """`, encoder` for the layers of one of several stacks."""
    stack = key.removeprefix(metric.key)[1:] if metric.shape == BY_LAYER else ""
    return f", {stack}" if stack else ""


def sites(curves: Curves) -> list[str]:
    """The sites that the runs have recorded, in the order of the forward pass; those of stabrun if there are none."""
    keys = dict.fromkeys(key for run in curves.values() for key in run.series)
    found = dict.fromkeys(
        key.rpartition("/")[2] for key in keys if (metric := find(key)) and metric.shape == BY_SITE
    )  # fmt: skip
    return list(found) or list(SITES)


def subtitle(study: StudyData) -> str:
    """The kind of study, and what it has used so far."""
    summary = study.summary
    if study.watched:
        return f"single run of {study.watched.model or 'a model'}, recorded by stabrun.watch"
    if summary is None:
        return "single run"
    kind = "grid of learning rates"
    if study.plan.strategy == FRONTIER:
        low, high = map(rate_text, summary["lr_range"])
        kind = f"search for lr50 between {low} and {high}"
    return f"{kind}; {summary['runs']:,} finished runs, {summary['tokens']:,} tokens; rule version {summary['rule']}"


def study_json(part: Part) -> dict[str, Any]:
    """What the page's script draws: whole charts, and the curves from which the reader selects some."""
    rows = {row["run_id"]: row for row in part.study.rows if row["run_id"] in part.curves}
    lines = sum(len(series.values[0]) for curves in part.curves.values() for series in curves.series.values())
    points = max(MIN_POINTS, MAX_NUMBERS // max(1, lines))
    last = max((step for curves in part.curves.values() for step, _ in curves.loss), default=0)
    return {
        "charts": {chart.name: as_json(chart) for chart in part.charts if chart.name in PAGE_CHARTS},
        "runs": {run: run_json(row, part.curves[run], points) for run, row in rows.items()},
        "depth": {run: as_json(depth_panel(row, part.curves[run], last)) for run, row in rows.items()},
    }


COMPOSED_BY_SCRIPT = {"inside", "gradient_by_depth"}  # of the two runs that the reader selects
PAGE_CHARTS = "lr50", "loss_by_lr", "divergence_map", "clipped_share", "training_curves", "lead_times"


def run_json(row: Result, curves: RunCurves, points: int) -> dict[str, Any]:
    """A run's curves, each with at most about `points`. `axes`: lists of steps, each shared by many curves."""
    axes, series = list[list[int]](), {}
    for key, found in curves.series.items():
        steps, values = thinned(found, points)
        if steps not in axes:
            axes.append(steps)
        series[key] = {"s": axes.index(steps), "v": as_json([list(layer) for layer in zip(*values, strict=True)], 4)}
    facts = {"title": side_title(row), "first_bad_step": row["first_bad_step"], "diverged": row["verdict"] == DIVERGED}
    return facts | {"axes": axes, "series": series}


def thinned(series: Series, points: int) -> tuple[list[int], list[list[float]]]:
    steps, values = series.steps, series.values
    kept = sorted({*range(0, len(steps), math.ceil(len(steps) / points)), len(steps) - 1})
    return [steps[place] for place in kept], [values[place] for place in kept]


def as_json(value: Any, digits: int = 6) -> Any:
    """Dataclasses without their defaults, numbers with so many digits, and None for what is not finite."""
    if is_dataclass(value):
        items = ((field, getattr(value, field.name)) for field in fields(value))
        return {field.name: as_json(item, digits) for field, item in items if item != field.default and item != []}
    if isinstance(value, (list, tuple)):
        return [as_json(item, digits) for item in value]
    if isinstance(value, float):
        return float(f"{value:.{digits}g}") if math.isfinite(value) else None
    return value
