"""`stabrun upload`: the records of a study or a run, sent to W&B under the ids of the runs, each part once.

`wandb/sent.json` in each directory says what was sent. W&B changes no step that it has: only later rows are
sent. What an offline run holds is sent again once W&B is online, because the server has not seen it.
"""

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path

from stabrun.config import Config, TrackerConfig, UserError
from stabrun.record.jsonl import jsonable, number
from stabrun.record.run_dir import RunDir, refuse_links
from stabrun.record.schema import OVER, Summary
from stabrun.record.study_dir import StudyDir, find
from stabrun.record.synced import OFFLINE, ONLINE, SyncState, digest, file_digest, file_digests
from stabrun.study.plan import Plan, load
from stabrun.study.tracking import images, send_study
from stabrun.text import warn
from stabrun.training.tracker import Identity, has_key, identity, log_row, open_run, steps_at_server, watched_identity

FIGURES = "report/figures"


@dataclass(frozen=True)
class Destination:
    """How to send: online or offline, with overrides of the recorded tracker keys, or not at all."""

    mode: str
    overrides: Sequence[str]
    dry_run: bool

    def tracker(self, config: Config) -> TrackerConfig:
        return with_tracker(config, self.overrides).tracker


@dataclass(frozen=True)
class Extent:
    """The readable part of a record: the step after its last row, its bytes up to there, its lowest finite loss."""

    steps: int = 0
    size: int = 0
    lowest: float | None = None
    damaged: tuple[str, ...] = ()


@dataclass(frozen=True)
class UploadPlan:
    """What W&B lacks of a run whose state there is `state`."""

    state: SyncState
    extent: Extent
    summary: Summary
    figures: list[Path]
    rewritten: bool  # the record no longer begins with what was sent

    @property
    def parts(self) -> list[str]:
        """What is to be sent, in words; empty if W&B has everything."""
        rows = self.extent.steps - self.state.steps
        summary = bool(self.summary) and digest(self.summary) != self.state.summary
        counts = [(rows, "row"), (int(summary), "summary"), (len(self.figures), "figure")]
        return [counted(count, noun) for count, noun in counts if count > 0]


def upload(directory: Path, changes: Sequence[str] = (), dry_run: bool = False) -> int:
    """Send what W&B lacks of a study or a run. Returns the exit status.

    Args:
        directory: a study or a run; of a study the finished runs are sent.
        changes: overrides of the recorded tracker keys, such as `tracker.project=NAME`.
        dry_run: print what would be sent.
    """
    import wandb

    found = find(directory)
    target = Destination(destination_mode(dry_run), changes, dry_run)
    try:
        count = upload_study(found, target) if isinstance(found, StudyDir) else int(upload_run(found, target))
    except wandb.Error as error:
        reason = " ".join(str(error).split())
        warn(f"W&B: {reason}. Everything before was sent and recorded; the same command continues from there.")
        return 1
    finally:
        wandb.teardown()  # waits until everything is on disk
    print(closing_line(count, found, target))
    return 0


def upload_study(study: StudyDir, target: Destination) -> int:
    """Send the finished runs and the summary of a study. Returns the number of W&B runs sent."""
    plan = load(study.path)
    runs = [run for run in map(study.run, plan.cells) if run.summary_file.is_file()]
    count = sum(upload_run(run, target) for run in runs) + upload_study_summary(plan, study, target)
    if left := len(plan.cells) - len(runs):
        print(f"{left} of {len(plan.cells)} cells are not finished; the same command sends them later.")
    return count


def closing_line(count: int, found: StudyDir | RunDir, target: Destination) -> str:
    if not count:
        return "nothing to send."
    runs = counted(count, "W&B run")
    if target.dry_run:
        return f"{runs} would be sent."
    if target.mode == ONLINE:
        return f"{runs} sent."
    folders = [f"{found.path}/wandb/offline-run-*"]
    if isinstance(found, StudyDir):
        folders.append(f"{found.runs}/*/wandb/offline-run-*")
    return f"{runs} written offline; send them with an API key and: wandb sync {' '.join(folders)}"


def counted(count: int, noun: str) -> str:
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def destination_mode(dry_run: bool) -> str:
    """`online` or `offline`, by WANDB_MODE. Raises UserError if nothing can be sent; a dry run needs no API key."""
    mode = os.environ.get("WANDB_MODE") or ONLINE
    if mode not in (ONLINE, OFFLINE):
        raise UserError(f"WANDB_MODE={mode}: upload requires online or offline.")
    if mode == ONLINE and not (dry_run or has_key()):
        raise UserError(
            "upload: no W&B API key; run `wandb login`, set WANDB_API_KEY, or write offline runs for `wandb sync` with "
            "WANDB_MODE=offline."
        )
    return mode


def with_tracker(config: Config, overrides: Sequence[str]) -> Config:
    """The configuration with other tracker keys. Raises UserError at any other key."""
    if not overrides:
        return config
    from stabrun.composition import override  # Hydra, which no tracked run needs

    for word in overrides:
        if not word.startswith("tracker."):
            raise UserError(f"{word}: only tracker keys can be changed here, such as tracker.project=NAME.")
    return override(config, overrides)


def upload_run(files: RunDir, target: Destination) -> bool:
    """Send what W&B lacks of a run. Returns False if that is nothing."""
    watched = files.watched()
    recorded = Config() if watched else files.config()
    tracker = target.tracker(recorded)
    if watched:
        sent = watched_identity(watched, tracker, files)
    else:
        sent = identity(replace(recorded, tracker=tracker), files)
    name = sent.name
    if not watched and recorded.tracker.name == "wandb" and files.is_locked():
        print(f"{name}: is being trained with W&B tracking; skipped.")
        return False
    plan = upload_plan(files, SyncState.at(files.path, target.mode, tracker))
    for sentence in files.faults():
        warn(f"{files.path}: {sentence}")
    for sentence in plan.extent.damaged:
        warn(f"{files.metrics}: {sentence}")
    if plan.rewritten:
        warn(
            f"{files.metrics}: changed since it was sent; it was truncated, or the run trained again. W&B keeps the "
            f"{plan.state.steps} steps it has, and only later ones are sent."
        )
    if not plan.parts:
        return False
    print(f"{name}: {', '.join(plan.parts)} → {target.mode}, {files.path.resolve().name}", flush=True)
    if not target.dry_run:
        refuse_links("upload", files.path, "*")
        send(files, tracker, sent, plan, target.mode)
    return True


def upload_plan(files: RunDir, state: SyncState) -> UploadPlan:
    size = files.metrics.stat().st_size if files.metrics.is_file() else 0
    rewritten = file_digest(files.metrics, state.size) != state.sha256
    unchanged = not rewritten and size == state.size
    figures = [file for file in figure_files(files.path) if file_digest(file) != state.figures.get(file.name)]
    return UploadPlan(
        state,
        Extent(state.steps, state.size) if unchanged else extent_of(files),
        files.summary() or {},
        figures,
        rewritten,
    )


def figure_files(directory: Path) -> list[Path]:
    """The figures of a report; none, with a warning, if W&B could not read them."""
    figures = sorted((directory / FIGURES).glob("*.png"))
    if figures and find_spec("PIL") is None:
        warn(f"{directory / FIGURES}: not sent; W&B needs pillow to read figures: pip install 'stabrun[dashboard]'.")
        return []
    return figures


def extent_of(files: RunDir) -> Extent:
    steps, size, lowest, damaged = 0, 0, math.inf, []
    for row, end in files.readable_rows():
        if isinstance(row, str):
            damaged.append(row)
            continue
        steps, size = row["step"] + 1, end
        loss = number(row["train/loss"])
        lowest = loss if loss < lowest else lowest  # NaN is never lower
    return Extent(steps, size, lowest if math.isfinite(lowest) else None, tuple(damaged))


def send(files: RunDir, tracker: TrackerConfig, sent: Identity, plan: UploadPlan, mode: str) -> None:
    """Send what the plan lists, and save the new state.

    The lowest loss is sent explicitly: W&B computes it only from the rows of one upload.
    """
    import wandb

    run = open_run(tracker, sent, files)
    run.define_metric("train/loss", summary="none", step_metric="step")
    extent, first = plan.extent, max(plan.state.steps, run.starting_step)
    for row, end in files.readable_rows() if extent.steps > plan.state.steps else ():
        if end > extent.size:
            break
        if isinstance(row, dict) and row["step"] >= first:
            log_row(run, row, tracker)
    if extent.lowest is not None:
        run.summary.update({"train/loss": {"min": extent.lowest}})
    fields = {key: value for key, value in plan.summary.items() if value is not None}
    run.summary.update(fields | images(plan.figures))
    run.finish(exit_code=0 if fields.get("status") in OVER else 130)
    if mode == ONLINE and (has := steps_at_server(run, extent.steps)) < extent.steps:
        raise wandb.Error(f"has {has} of {extent.steps} rows of {sent.name}")
    state = replace(
        plan.state,
        mode=mode,
        steps=max(extent.steps, plan.state.steps),
        size=extent.size,
        sha256=file_digest(files.metrics, extent.size),
        summary=digest(plan.summary),
        figures=plan.state.figures | file_digests(plan.figures),
    )
    state.save(files.path)


def upload_study_summary(plan: Plan, study: StudyDir, target: Destination) -> bool:
    """Send a study's table, summary and figures. Returns False if W&B has them, or no run is finished."""
    from stabrun.study import results  # SciPy, which a run does not need
    from stabrun.study.snapshot import SnapshotReader
    from stabrun.study.summary import study_summary

    rows = SnapshotReader(study.path).read(plan, attempts=False).rows
    if not rows:
        return False
    tracker = target.tracker(next(iter(plan.arms.values())))
    table, summary = [results.result(row) for row in rows], jsonable(study_summary(plan, rows))
    figures, state = figure_files(study.path), SyncState.at(study.path, target.mode, tracker)
    if (state.summary, state.figures) == (digest([table, summary]), file_digests(figures)):
        return False
    counts = [(len(table), "row"), (len(figures), "figure")]
    parts = ", ".join(counted(count, noun) for count, noun in counts if count)
    print(f"summary: {parts} → {target.mode}, {study.path.resolve().name}", flush=True)
    if not target.dry_run:
        send_study(tracker, study.path, table, summary, figures)
    return True
