"""`stabrun dashboard`: a workspace in W&B, and a report of a study, as `wandb-workspaces` writes them.

Panels are made from the table of keys (`stabrun/record/metrics.py`). Runs are grouped by variant and then by learning
rate, so that a line is the mean over seeds, and a point of the LR curve too.
"""

import html
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import wandb_workspaces.reports.v2 as wr
import wandb_workspaces.workspaces as ws

from stabrun.config import TrackerConfig, UserError
from stabrun.publish.upload import changed
from stabrun.record.jsonl import jsonable
from stabrun.record.metrics import BY_LAYER, BY_SITE, METRICS, SCALAR, Metric
from stabrun.record.synced import ONLINE
from stabrun.study import results
from stabrun.study.plan import GRID, load
from stabrun.study.summary import GRID_COLUMNS, SEARCH_COLUMNS, answer
from stabrun.text import warn
from stabrun.training.tracker import has_key

COLUMNS = ("verdict", "reason", "variant", "lr", "seed", "final_loss", "val_loss", "first_bad_step", "first_bad_site")
GROUPING = ("variant", "optim.lr")
REPORTED = ("Loss against learning rate", "Verdicts", "Training", "Gradient", "Attention", "norm/out")
NOBODY = "the-account"  # stands for the account's own entity, where nobody is asked which that is
MOST_RUNS = 100  # drawn in a panel


@dataclass(frozen=True)
class Subject:
    """What is shown: all runs of a project, or those of one study, with its answer as Markdown."""

    name: str
    tracker: TrackerConfig
    told: str | None = None

    @property
    def filters(self) -> str:
        """Of the study's group. `=` is spelled otherwise, for the package doubles it even within quotes."""
        group = repr(self.tracker.group).replace("=", r"\x3d")
        return "" if self.told is None else f"Metric('Group') == {group}"


def dashboard(study: Path | None = None, changes: Sequence[str] = (), dry_run: bool = False) -> int:
    """Save a workspace and a report in W&B, or print them; `changes` are tracker.KEY=VALUE. Returns the exit status."""
    if not dry_run and (os.environ.get("WANDB_MODE") or ONLINE, has_key()) != (ONLINE, True):
        raise UserError(
            "dashboard: it needs W&B online: WANDB_MODE unset, and a key by `wandb login` or WANDB_API_KEY; "
            "--dry-run prints what would be saved."
        )
    shown = subject(study, changes)
    if dry_run:
        views = {"workspace": workspace(shown, NOBODY), "report": report(shown, NOBODY)}
        print(json.dumps(spec(views), indent=1, ensure_ascii=False))
        return 0
    try:
        save(shown)
    except Exception as error:  # W&B's own, those of its transport, and those of GraphQL
        warn(f"W&B ({type(error).__name__}): {' '.join(str(error).split())}")
        return 1
    return 0


def save(shown: Subject) -> None:
    import wandb

    entity = shown.tracker.entity or wandb.Api().default_entity or NOBODY
    for view in (workspace(shown, entity), report(shown, entity)):
        if view is not None:
            print(view.save().url)


def subject(study: Path | None, changes: Sequence[str]) -> Subject:
    """The study of this directory, or the project alone."""
    if study is None:
        tracker = changed(TrackerConfig(), changes)
        return Subject(tracker.project, tracker)
    plan = load(study)
    facts = jsonable(answer(plan, list(results.finished(plan, study))))
    return Subject(study.resolve().name, changed(next(iter(plan.arms.values())).tracker, changes), markdown(facts))


def markdown(facts: dict[str, Any]) -> str:
    """The answer of a study as a Markdown table."""
    columns = GRID_COLUMNS if facts["strategy"] == GRID else SEARCH_COLUMNS
    table = [["variant", *columns], ["---"] * (len(columns) + 1)]
    table += [[arm, *(say(told) for say in columns.values())] for arm, told in facts["variants"].items()]
    lines = ["| " + " | ".join(html.escape(cell).replace("|", "\\|") for cell in row) + " |" for row in table]
    return "\n".join([f"{facts['runs']} of {facts['cells']} runs, rule {facts['rule']}.", "", *lines])


def workspace(shown: Subject, entity: str) -> Any:
    sections = [
        ws.Section(name, panels=panels, is_open=index < 2) for index, (name, panels) in enumerate(sections_of())
    ]
    return ws.Workspace(
        entity=shown.tracker.entity or entity,
        project=shown.tracker.project,
        name=plain(shown.name),
        sections=sections,
        settings=ws.WorkspaceSettings(max_runs=MOST_RUNS),
        runset_settings=ws.RunsetSettings(
            filters=shown.filters,
            groupby=[ws.Config(key) for key in GROUPING],
            pinned_columns=[f"summary:{name}" for name in COLUMNS],
        ),
    )


def report(shown: Subject, entity: str) -> Any:
    """A report of a study; None of a project."""
    if shown.told is None:
        return None
    blocks: list[Any] = [wr.H1("The answer"), wr.MarkdownBlock(shown.told)]
    for name, panels in sections_of():
        if name not in REPORTED:
            continue
        # Without entity and project the runs are those of the report's own project.
        runs = wr.Runset(name="runs", filters=shown.filters, groupby=[f"config.{key}" for key in GROUPING])
        blocks += [wr.H1(name), wr.PanelGrid(runsets=[runs], panels=panels)]
    return wr.Report(
        entity=shown.tracker.entity or entity,
        project=shown.tracker.project,
        title=f"{plain(shown.name)[:100]}: where it diverges",
        description="Made by `stabrun dashboard`; the numbers are those of study.json.",
        blocks=blocks,
        width="fluid",
    )


def sections_of() -> Iterator[tuple[str, list[Any]]]:
    """Name → panels of each section; the norms have one each, with a panel a site."""
    yield "Loss against learning rate", [against_rate(name) for name in ("final_loss", "val_loss", "best_loss")]
    yield "Verdicts", [wr.WeavePanelSummaryTable(table_name="results"), wr.RunComparer(diff_only="split")]
    by_layer = [metric for metric in METRICS.values() if metric.shape == BY_LAYER]
    shown = [metric for metric in METRICS.values() if metric.shape == SCALAR and metric.key not in ("step", "tokens")]
    for name, prefixes in (
        ("Training", ("train/", "val/", "scale/")),
        ("Gradient", ("grad/",)),
        ("Attention", ("attn/",)),
        ("Residual stream", ("residual/",)),
    ):
        yield (
            name,
            [line(metric) for metric in shown if metric.key.startswith(prefixes)]
            + [lines(metric, metric.key) for metric in by_layer if metric.key.startswith(prefixes)],
        )
    for metric in METRICS.values():
        if metric.shape == BY_SITE:
            yield metric.key.removesuffix("/{site}"), [lines(metric, key) for key in metric.keys]


def against_rate(name: str) -> Any:
    """The LR curve: a summary's value over the configured rate, and the lowest so far as a line."""
    return wr.ScatterPlot(
        title=f"{name} by learning rate",
        x=wr.Config("optim.lr"),
        y=wr.SummaryMetric(name),
        log_x=True,
        running_ymin=True,
    )


def line(metric: Metric) -> Any:
    return wr.LinePlot(title=metric.key, x="Step", y=[metric.key], title_y=metric.unit, max_runs_to_show=MOST_RUNS)


def lines(metric: Metric, key: str) -> Any:
    """A line a layer, as the tracker sends them; the head has one layer, and no number."""
    regex = f"^{key}$" if key.endswith("/head") else f"^{key}/layer_[0-9]+$"
    return wr.LinePlot(title=key, x="Step", metric_regex=regex, title_y=metric.unit, max_runs_to_show=MOST_RUNS)


def plain(name: str) -> str:
    """A name without what W&B refuses in one: pictures and what cannot be printed."""
    return "".join(letter for letter in name if letter.isprintable() and letter < "\u2190")


def spec(views: dict[str, Any]) -> dict[str, Any]:
    """Views as plain data, the same each time: random ids become numbers."""
    numbers: dict[str, str] = {}

    def settled(node: Any, key: str = "") -> Any:
        if isinstance(node, dict):
            return {name: settled(value, name) for name, value in node.items()}
        if isinstance(node, list):
            return [settled(value) for value in node]
        return numbers.setdefault(node, f"id-{len(numbers)}") if key in ("__id__", "id") and node else node

    # The package writes views by this private method alone; hence its pinned version.
    dumped = {
        name: view._to_model().model_dump(mode="json", by_alias=True, exclude_none=True)
        for name, view in views.items()
        if view
    }
    plainest: dict[str, Any] = settled(dumped)
    return plainest
