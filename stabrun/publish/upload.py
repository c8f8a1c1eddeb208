"""`stabrun upload`: the record of a study or a run, replayed into W&B under the ids that its runs have, and that once.

What was sent is noted in `wandb/sent.json` of each folder, by a tracked run at its end and by each upload. W&B changes
no step that it has: of a record that grew only the new rows go, and of one that was cut back and trained anew those
beyond what was sent. What an offline run holds is sent again when W&B is online, for the server has not seen it; steps
that the server has are left out.
"""

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from stabrun.composition import plainly
from stabrun.config import Config, TrackerConfig, UserError, check, run_id
from stabrun.record.jsonl import jsonable, number
from stabrun.record.run_dir import RunDir
from stabrun.record.schema import OVER, Summary
from stabrun.record.study_dir import StudyDir, find
from stabrun.record.synced import OFFLINE, ONLINE, Sent, digest, digests, file_digest, known
from stabrun.study import results
from stabrun.study.plan import Plan, load
from stabrun.study.summary import answer
from stabrun.study.tracking import images, send_study
from stabrun.text import run_name, warn
from stabrun.training.tracker import has_key, note_sent, opened_run, projection

FIGURES = "report/figures"


@dataclass(frozen=True)
class Survey:
    """What a record holds: the step after its last row, its bytes up to there, and its lowest finite loss."""

    steps: int = 0
    size: int = 0
    lowest: float | None = None
    damaged: tuple[str, ...] = ()


@dataclass(frozen=True)
class News:
    """What W&B lacks of a run: rows from step `first` on, its summary where that is new, figures."""

    survey: Survey
    first: int
    summary: Summary
    new_summary: bool
    figures: list[Path]
    cut_back: bool

    @property
    def parts(self) -> list[str]:
        rows = self.survey.steps - self.first
        told = [counted(rows, "row")] if rows > 0 else []
        told += ["its summary"] * self.new_summary
        return told + ([counted(len(self.figures), "figure")] if self.figures else [])


def upload(directory: Path, changes: Sequence[str] = (), dry_run: bool = False) -> int:
    """Send what W&B lacks of a study or a run; `changes` are tracker.KEY=VALUE. Returns the exit status."""
    import wandb

    found = find(directory)
    plan, runs = None, list[RunDir]()
    if isinstance(found, StudyDir):
        plan = load(found.path)
        runs = finished_runs(plan, found)
    else:
        runs = [found]
    mode = destination(dry_run)
    try:
        count = sum(uploaded(run, changes, mode, dry_run) for run in runs)
        if plan is not None:
            count += uploaded_study(plan, directory, changes, mode, dry_run)
            if left := len(plan.cells) - len(runs):
                print(f"{left} of {len(plan.cells)} cells are not finished; the same command sends them later.")
    except wandb.Error as error:
        reason = " ".join(str(error).split())
        warn(f"W&B: {reason}. What went before is sent and noted; the same command goes on from there.")
        return 1
    finally:
        wandb.teardown()  # waits until all of it is on the disk
    print(told_at_the_end(count, directory, mode, dry_run, plan is not None))
    return 0


def told_at_the_end(count: int, directory: Path, mode: str, dry_run: bool, study: bool) -> str:
    if not count:
        return "nothing to send."
    if dry_run:
        return f"{counted(count, 'W&B run')} would be sent; nothing was."
    if mode == ONLINE:
        return f"{counted(count, 'W&B run')} sent."
    folders = [f"{directory}/wandb/offline-run-*"] + [f"{directory}/runs/*/wandb/offline-run-*"] * study
    return (
        f"{counted(count, 'W&B run')} written, offline; with a key at hand they go by: wandb sync {' '.join(folders)}"
    )


def counted(count: int, what: str) -> str:
    return f"{count} {what}" if count == 1 else f"{count} {what}s"


def destination(dry_run: bool) -> str:
    """`online` or `offline`. UserError where nothing could be sent; to look needs no key."""
    mode = os.environ.get("WANDB_MODE") or ONLINE
    if mode not in (ONLINE, OFFLINE):
        raise UserError(f"WANDB_MODE={mode}: upload needs online or offline.")
    if mode == ONLINE and not (dry_run or has_key()):
        raise UserError(
            "upload: W&B has no API key here; `wandb login` or WANDB_API_KEY gives one, and WANDB_MODE=offline writes "
            "offline runs for a later `wandb sync`."
        )
    return mode


def finished_runs(plan: Plan, study: StudyDir) -> list[RunDir]:
    """The finished runs of a study in the order of its plan."""
    return [run for run in map(study.run, plan.cells) if run.summary_file.is_file()]


def changed(tracker: TrackerConfig, changes: Sequence[str]) -> TrackerConfig:
    """The tracker's keys with those that were typed."""
    from omegaconf import OmegaConf

    if foreign := [word for word in changes if not word.startswith("tracker.")]:
        raise UserError(f"{foreign[0]}: only the keys of tracker can be changed here, such as tracker.project=NAME.")
    with plainly():
        own = [word.removeprefix("tracker.") for word in changes]
        merged: Any = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(tracker), OmegaConf.from_dotlist(own)))
    found: TrackerConfig = merged
    return found


def uploaded(recorded: RunDir, changes: Sequence[str], mode: str, dry_run: bool) -> bool:
    """Send what W&B lacks of a run. False where that is nothing."""
    config = recorded.config()
    live = config.tracker.name == "wandb" and recorded.is_locked()
    config = replace(config, tracker=changed(config.tracker, changes))
    check(config)
    name = config.tracker.run_name or run_name(config.variant, config.optim.lr, config.seed)
    if live:
        print(f"{name}: it is being trained, and tracked as it goes; nothing to upload.")
        return False
    before = known(recorded.path, mode, config.tracker)
    found = news(recorded, before)
    for sentence in found.survey.damaged:
        warn(f"{recorded.metrics}: {sentence}")
    if found.cut_back:
        warn(
            f"{recorded.metrics} is not what was sent: it was cut back, or trained anew. W&B keeps the "
            f"{before.steps} steps it has; those from there on are sent."
        )
    if not found.parts:
        return False
    print(f"{name}: {', '.join(found.parts)} → {mode}, {recorded.path.resolve().name}", flush=True)
    if not dry_run:
        send(recorded, config, before, found)
    return True


def news(recorded: RunDir, before: Sent) -> News:
    """What a run's folder holds beyond what W&B has."""
    metrics = recorded.metrics
    kept = file_digest(metrics, before.size) == before.sha256
    same = kept and (metrics.stat().st_size if metrics.is_file() else 0) == before.size
    survey = Survey(before.steps, before.size) if same else surveyed(recorded)
    summary = recorded.summary() or {}
    new_summary = bool(summary) and digest(summary) != before.summary
    figures = [file for file in drawn(recorded.path) if file_digest(file) != before.figures.get(file.name)]
    return News(survey, before.steps, summary, new_summary, figures, not kept)


def drawn(directory: Path) -> list[Path]:
    """The figures of a report; none, and a sentence, where W&B could not take them."""
    files = sorted((directory / FIGURES).glob("*.png"))
    if files and find_spec("PIL") is None:
        warn(f"{directory / FIGURES}: W&B takes figures by the package pillow: pip install 'stabrun[dashboard]'.")
        return []
    return files


def surveyed(recorded: RunDir) -> Survey:
    steps, whole, lowest, damaged = 0, 0, math.inf, []
    for row, size in recorded.readable_rows():
        if isinstance(row, str):
            damaged.append(row)
            continue
        steps, whole = row["step"] + 1, size
        loss = number(row["train/loss"])
        lowest = loss if loss < lowest else lowest  # not so for NaN
    return Survey(steps, whole, lowest if math.isfinite(lowest) else None, tuple(damaged))


def send(recorded: RunDir, config: Config, before: Sent, found: News) -> None:
    """Send `found`, and note it.

    The lowest loss goes by itself, for W&B knows that of the rows alone that it is sent here.
    """
    run = opened_run(config, run_id(config), recorded.path)
    run.define_metric("train/loss", summary="none", step_metric="step")
    survey, first = found.survey, max(found.first, run.step or 0)  # asked once: each question waits for W&B's process
    for row, end in recorded.readable_rows() if survey.steps > found.first else ():
        if end > survey.size:
            break
        if isinstance(row, dict) and row["step"] >= first:
            run.log(projection(row, config.tracker.norms_every), step=row["step"])
    if survey.lowest is not None:
        run.summary.update({"train/loss": {"min": survey.lowest}})
    told = {key: value for key, value in found.summary.items() if value is not None}
    run.summary.update(told | images(found.figures))
    run.finish(exit_code=0 if told.get("status") in OVER else 130)
    note_sent(
        config.tracker,
        recorded.path,
        steps=max(survey.steps, before.steps),
        size=survey.size,
        sha256=file_digest(recorded.metrics, survey.size),
        summary=digest(found.summary),
        figures=before.figures | digests(found.figures),
    )


def uploaded_study(plan: Plan, directory: Path, changes: Sequence[str], mode: str, dry_run: bool) -> bool:
    """Send a study's table, answer and figures. False where W&B has them, or no run is finished."""
    tracker = changed(next(iter(plan.arms.values())).tracker, changes)
    rows = list(results.finished(plan, directory))
    if not rows:
        return False
    told = jsonable(answer(plan, rows))
    table = [results.result(row) for row in rows]
    figures, before = drawn(directory), known(directory, mode, tracker)
    if (before.summary, before.figures) == (digest([table, told]), digests(figures)):
        return False
    parts = [counted(len(table), "row")] + ([counted(len(figures), "figure")] if figures else [])
    print(f"the answer: {', '.join(parts)} → {mode}, {directory.resolve().name}", flush=True)
    if not dry_run:
        send_study(tracker, directory, table, told, figures)
    return True
