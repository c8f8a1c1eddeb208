"""Offline W&B runs, written from the record by a process of its own: this one never imports W&B.

It is `stabrun upload`, so that an offline run holds the same as one that is uploaded.
"""

import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from stabrun import interpreter
from stabrun.config import TrackerConfig
from stabrun.record.run_dir import RunDir
from stabrun.record.schema import INTERRUPTED, Summary
from stabrun.record.synced import OFFLINE, holds_all
from stabrun.text import masked, warn
from stabrun.training.place import Place
from stabrun.training.tracker import SHORT_WAIT, WAIT, wandb_mode

ROW = 0.01  # seconds that a row may take: about five times what it does


def is_offline(tracker: TrackerConfig) -> bool:
    """Whether W&B runs are to be written on this machine's disk."""
    return tracker.name == "wandb" and wandb_mode() == OFFLINE


def write_run(tracker: TrackerConfig, run: RunDir, summary: Summary, changes: Sequence[str] = ()) -> None:
    """Write the W&B run of a run that is over or interrupted, unless that is not asked for or was done.

    By the first rank only. `changes`: overrides of the recorded tracker keys. The run directory must not be locked.
    """
    if Place.here().first and is_offline(tracker) and not holds_all(run, OFFLINE):
        interrupted = summary["status"] == INTERRUPTED
        write(run.path, SHORT_WAIT if interrupted else WAIT + ROW * summary["steps"], changes)


def write(directory: Path, seconds: float, changes: Sequence[str] = ()) -> None:
    """Write the W&B runs of a run or a study, for so long at most. A failure is only reported."""
    command = [sys.executable, "-m", "stabrun", "upload", str(directory.absolute()), *changes]
    environment = os.environ | interpreter.environment() | {"WANDB_MODE": OFFLINE}
    try:
        process = subprocess.Popen(
            command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, start_new_session=True
        )
    except OSError as error:
        return report(directory, f"no process could be started: {error.strerror}")
    try:
        _, said = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        report(directory, f"not done within {seconds:.0f} s")
    else:
        if process.returncode:
            lines = said.decode(errors="replace").split("\n")
            last = next((line.strip() for line in reversed(lines) if line.strip()), f"status {process.returncode}")
            report(directory, masked(last.removeprefix("stabrun: ")))
    finally:
        if process.poll() is None:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def report(directory: Path, why: str) -> None:
    """Say that the W&B runs of a run or a study are not written, and what to do."""
    warn(f"W&B offline runs are incomplete ({why}); `stabrun upload {directory}` writes the rest.")
