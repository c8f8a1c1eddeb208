"""The summary run of a study in W&B."""

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from stabrun.config import TrackerConfig, UserError
from stabrun.record.schema import Result, StudySummary
from stabrun.record.synced import SyncState, digest, file_digests
from stabrun.text import warn
from stabrun.training.tracker import WAIT, open_wandb, wandb_mode, within

Table = list[Result]


def track_study(tracker: TrackerConfig, directory: Path, results: Table, summary: StudySummary) -> None:
    """Send a study's results and summary to a run in its group, unless W&B has them. Failures are only reported."""

    def send() -> None:
        import wandb

        send_study(tracker, directory, results, summary)
        wandb.teardown()  # waits until everything is on disk

    try:
        if not knows(tracker, directory, results, summary) and not within(WAIT, send):
            raise TimeoutError(f"not taken within {WAIT:.0f} s")
    except Exception as error:
        warn(f"W&B has no summary of the study ({type(error).__name__}: {error}); it is in {directory}/study.json.")


def knows(tracker: TrackerConfig, directory: Path, results: Table, summary: StudySummary) -> bool:
    """Whether W&B has a study's results and summary; False if what says so is damaged."""
    try:
        return SyncState.at(directory, wandb_mode(), tracker).summary == digest([results, summary])
    except UserError:
        return False


def send_study(
    tracker: TrackerConfig, directory: Path, results: Table, summary: StudySummary, figures: Iterable[Path] = ()
) -> None:
    """Send the table of results, the leaves of the summary, and figures. Each call is a step of the summary run."""
    # An offline table waits in W&B's data directory for `wandb sync`; by default that is in the user's home directory.
    os.environ.setdefault("WANDB_DATA_DIR", str(directory.resolve() / "wandb"))
    import wandb

    name = directory.resolve().name
    columns: list[Any] = list(results[0]) if results else []
    before = SyncState.load(directory)
    group = tracker.group or name
    run = open_wandb(tracker, name, directory, group=group, job_type="study", name=f"{name}: summary")
    step = max(run.starting_step, before.steps if before else 0)
    table = wandb.Table(columns, [list(row.values()) for row in results], allow_mixed_types=True)
    run.log({"results": table, **images(figures)}, step=step)
    run.summary.update(leaves(summary))
    run.finish()
    SyncState(
        wandb_mode(),
        tracker.entity,
        tracker.project,
        steps=step + 1,
        summary=digest([results, summary]),
        figures=file_digests(figures),
    ).save(directory)


def images(figures: Iterable[Path]) -> dict[str, Any]:
    """Figures as W&B images, `figures/<name>`."""
    import wandb

    return {f"figures/{file.stem}": wandb.Image(str(file)) for file in figures}


def leaves(value: Any, prefix: str = "") -> dict[str, Any]:
    """The leaves of nested objects as `a/b/c` → value, without lists and nulls."""
    found: dict[str, Any] = {}
    for name, item in value.items():
        if isinstance(item, dict):
            found |= leaves(item, f"{prefix}{name}/")
        elif item is not None and not isinstance(item, list):
            found[prefix + name] = item
    return found
