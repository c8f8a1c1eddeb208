"""The summary run of a study in W&B."""

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from stabrun.config import TrackerConfig
from stabrun.record.synced import digest, digests, known, recall
from stabrun.text import warn
from stabrun.training.tracker import note_sent, opened, wandb_mode


def track_study(tracker: TrackerConfig, directory: Path, results: list[dict[str, Any]], answer: dict[str, Any]) -> None:
    """Put a study's results, as a table, and its answer into a summary run in its group, where they are new."""
    try:
        import wandb

        if known(directory, wandb_mode(), tracker).summary == digest([results, answer]):
            return
        send_study(tracker, directory, results, answer)
        wandb.teardown()  # waits until all of it is on the disk
    except Exception as error:
        warn(f"W&B has no summary of the study ({type(error).__name__}: {error}); {directory}/study.json has.")


def send_study(
    tracker: TrackerConfig,
    directory: Path,
    results: list[dict[str, Any]],
    answer: dict[str, Any],
    figures: Iterable[Path] = (),
) -> None:
    """The summary run of a study, under the name of its folder; each sending of it is a step."""
    # An offline table waits in W&B's data folder for its upload: it belongs to the study, and not to the user's home.
    os.environ.setdefault("WANDB_DATA_DIR", str(directory.resolve() / "wandb"))
    import wandb

    name = directory.resolve().name
    columns: list[Any] = list(results[0]) if results else []
    group = tracker.group or name
    before = recall(directory)
    run = opened(tracker, name, directory, group=group, job_type="study", name=f"{name}: the answer")
    step = max(run.step or 0, before.steps if before else 0)
    table = wandb.Table(columns, [list(row.values()) for row in results], allow_mixed_types=True)
    run.log({"results": table, **images(figures)}, step=step)
    run.summary.update(flat(answer))
    run.finish()
    sent = digest([results, answer])
    note_sent(tracker, directory, steps=step + 1, summary=sent, figures=digests(figures))


def images(figures: Iterable[Path]) -> dict[str, Any]:
    """Figures as W&B shows them, `figures/<name>`."""
    import wandb

    return {f"figures/{file.stem}": wandb.Image(str(file)) for file in figures}


def flat(value: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """The leaves of nested objects, `a/b/c` → value, without lists and what is not known."""
    found: dict[str, Any] = {}
    for name, item in value.items():
        if isinstance(item, dict):
            found |= flat(item, f"{prefix}{name}/")
        elif item is not None and not isinstance(item, list):
            found[prefix + name] = item
    return found
