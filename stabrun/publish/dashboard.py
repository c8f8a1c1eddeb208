"""`stabrun dashboard`: a W&B workspace, and a report of a study, built with `wandb-workspaces`.

Panels derive from the table of metrics (`stabrun/record/metrics.py`). Runs are grouped by variant, then by learning
rate: a curve is the mean over seeds, and so is a point of the LR curve.
"""

import html
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import wandb_workspaces.reports.v2 as wr
import wandb_workspaces.workspaces as ws

from stabrun.config import Config, TrackerConfig, UserError
from stabrun.publish.upload import with_tracker
from stabrun.record.jsonl import jsonable
from stabrun.record.metrics import BY_SITE, METRICS, SCALAR, Metric
from stabrun.record.schema import StudySummary
from stabrun.record.synced import ONLINE
from stabrun.study.facts import short_table
from stabrun.study.snapshot import SnapshotReader
from stabrun.study.summary import study_summary
from stabrun.text import warn
from stabrun.training.tracker import has_key

COLUMNS = ("verdict", "reason", "variant", "lr", "seed", "final_loss", "val_loss", "first_bad_step", "first_bad_site")
GROUPING = ("variant", "optim.lr")
AXES = ("step", "tokens")  # metrics without a panel
SECTIONS = {
    "train": "Training",
    "val": "Training",
    "scale": "Training",
    "grad": "Gradient",
    "attn": "Attention",
    "residual": "Residual stream",
}  # first part of a key → title; a metric by site has a section of its own
REPORTED = ("Loss by learning rate", "Verdicts", "Training", "Gradient", "Attention", METRICS["norm/out/{site}"].label)
PLACEHOLDER = "your-entity"  # in place of the account's own entity, which a dry run does not ask for
MAX_RUNS = 100  # per panel


@dataclass(frozen=True)
class Subject:
    """What is shown: all runs of a project, or those of one study with its summary in Markdown."""

    name: str
    tracker: TrackerConfig
    summary: str | None = None

    @property
    def filters(self) -> str:
        """Selects the study's group. `=` is escaped: the package doubles it even inside quotes."""
        group = repr(self.tracker.group).replace("=", r"\x3d")
        return "" if self.summary is None else f"Metric('Group') == {group}"


def dashboard(study: Path | None = None, changes: Sequence[str] = (), dry_run: bool = False) -> int:
    """Save a workspace and a report in W&B, or print their specification. Returns the exit status.

    Args:
        study: a study directory; the whole project by default, without a report.
        changes: overrides of tracker keys, such as `tracker.project=NAME`.
        dry_run: print JSON; needs no network.
    """
    if not dry_run and (os.environ.get("WANDB_MODE") or ONLINE, has_key()) != (ONLINE, True):
        raise UserError(
            "dashboard: requires W&B online: unset WANDB_MODE, and run `wandb login` or set WANDB_API_KEY. "
            "--dry-run prints what would be saved."
        )
    shown = subject(study, changes)
    if dry_run:
        views = {"workspace": workspace(shown, PLACEHOLDER), "report": report(shown, PLACEHOLDER)}
        print(json.dumps(specification(views), indent=1, ensure_ascii=False))
        return 0
    try:
        save(shown)
    except Exception as error:  # of W&B, its transport or GraphQL
        warn(f"W&B ({type(error).__name__}): {' '.join(str(error).split())}")
        return 1
    return 0


def save(shown: Subject) -> None:
    import wandb

    entity = shown.tracker.entity or wandb.Api().default_entity or PLACEHOLDER
    for view in (workspace(shown, entity), report(shown, entity)):
        if view is not None:
            print(view.save().url)


def subject(study: Path | None, changes: Sequence[str]) -> Subject:
    if study is None:
        tracker = with_tracker(Config(), changes).tracker
        return Subject(tracker.project, tracker)
    snapshot = SnapshotReader(study).read(attempts=False)
    summary = jsonable(study_summary(snapshot.plan, snapshot.rows))
    tracker = with_tracker(next(iter(snapshot.plan.arms.values())), changes).tracker
    return Subject(study.resolve().name, tracker, markdown(summary))


def markdown(summary: StudySummary) -> str:
    """The summary of a study as a Markdown table."""
    head, *rows = short_table(summary)
    table = [head, ["---"] * len(head), *rows]
    lines = ["| " + " | ".join(html.escape(cell).replace("|", "\\|") for cell in row) + " |" for row in table]
    return "\n".join([f"{summary['runs']} of {summary['cells']} runs, rule {summary['rule']}.", "", *lines])


def workspace(shown: Subject, entity: str) -> ws.Workspace:
    return ws.Workspace(
        entity=shown.tracker.entity or entity,
        project=shown.tracker.project,
        name=plain(shown.name),
        sections=[
            ws.Section(name, panels=panels, is_open=index < 2)
            for index, (name, panels) in enumerate(all_sections().items())
        ],
        settings=ws.WorkspaceSettings(max_runs=MAX_RUNS),
        runset_settings=ws.RunsetSettings(
            filters=shown.filters,
            groupby=[ws.Config(key) for key in GROUPING],
            pinned_columns=[f"summary:{name}" for name in COLUMNS],
        ),
    )


def report(shown: Subject, entity: str) -> wr.Report | None:
    """A report of a study; None for a project."""
    if shown.summary is None:
        return None
    blocks: list[Any] = [wr.H1("Summary"), wr.MarkdownBlock(shown.summary)]
    sections = all_sections()
    for name in REPORTED:
        # Without entity and project, the runs are those of the report's own project.
        runs = wr.Runset(name="runs", filters=shown.filters, groupby=[f"config.{key}" for key in GROUPING])
        blocks += [wr.H1(name), wr.PanelGrid(runsets=[runs], panels=sections[name])]
    return wr.Report(
        entity=shown.tracker.entity or entity,
        project=shown.tracker.project,
        title=f"{plain(shown.name)[:100]}: training stability",
        description="Created by `stabrun dashboard`; the numbers are those of study.json.",
        blocks=blocks,
        width="fluid",
    )


def all_sections() -> dict[str, list[Any]]:
    """Title → panels: LR curves, results, and a panel for each metric, or for each site of it."""
    sections: dict[str, list[Any]] = {
        "Loss by learning rate": [lr_curve(name) for name in ("final_loss", "val_loss", "best_loss")],
        "Verdicts": [wr.WeavePanelSummaryTable(table_name="results"), wr.RunComparer(diff_only="split")],
    }
    for metric in sorted(METRICS.values(), key=lambda metric: metric.shape == BY_SITE):
        prefix = metric.key.split("/")[0]
        name = metric.label if metric.shape == BY_SITE else SECTIONS.get(prefix, prefix)
        if metric.key not in AXES:
            sections.setdefault(name, []).extend(line_plot(metric, key) for key in metric.keys)
    return sections


def lr_curve(name: str) -> wr.ScatterPlot:
    """A field of the summary by learning rate, and its running minimum."""
    return wr.ScatterPlot(
        title=f"{name} by learning rate",
        x=wr.Config("optim.lr"),
        y=wr.SummaryMetric(name),
        log_x=True,
        running_ymin=True,
    )


def line_plot(metric: Metric, key: str) -> wr.LinePlot:
    """One curve, or one per layer under the names that the tracker sends; the head has no layer in its name."""
    regex = f"^{key}$" if key.endswith("/head") else f"^{key}/layer_[0-9]+$"
    values: dict[str, Any] = {"y": [key]} if metric.shape == SCALAR else {"metric_regex": regex}
    return wr.LinePlot(title=key, x="Step", title_y=metric.title, log_y=metric.log, max_runs_to_show=MAX_RUNS, **values)


def plain(name: str) -> str:
    """A name without the characters that W&B rejects: symbols such as emoji, and unprintable ones."""
    return "".join(letter for letter in name if letter.isprintable() and letter < "\u2190")


def specification(views: dict[str, Any]) -> dict[str, Any]:
    """Views as plain data, the same on each call: random ids become numbers."""
    numbers: dict[str, str] = {}

    def settled(node: Any, key: str = "") -> Any:
        if isinstance(node, dict):
            return {name: settled(value, name) for name, value in node.items()}
        if isinstance(node, list):
            return [settled(value) for value in node]
        return numbers.setdefault(node, f"id-{len(numbers)}") if key in ("__id__", "id") and node else node

    # Private: `wandb-workspaces` has no public way to serialize a view without saving it. Hence its pinned version.
    dumped = {
        name: view._to_model().model_dump(mode="json", by_alias=True, exclude_none=True)
        for name, view in views.items()
        if view
    }
    result: dict[str, Any] = settled(dumped)
    return result
